"""Which frame each word chose and which word each frame chose, for one caption and its clip."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import open_clip
import torch
from rich.table import Table
from torch import Tensor, nn

from .. import WTI
from ..engine.in_memory import Pairs
from ..model.drl import DRL
from ..numerics import unit

NONE = "none"
SEEN = "pixels moved, first and second"


@dataclass(frozen=True)
class Choices:
    """One pair's tokens, their weights and choices; real tokens only."""

    words: list[str]
    word_weight: list[float]
    frame_of_word: list[int]
    """-1 where no frame was chosen."""
    frame_weight: list[float]
    word_of_frame: list[int]
    cosine: list[list[float]]
    """Words by frames."""


@torch.no_grad()
def choices(model: DRL, pair: Pairs, tokenizer: open_clip.SimpleTokenizer) -> Choices:
    """Ask a model with a WTI for the choices within the only pair of ``pair``."""
    model.eval()
    wti = model.interaction
    assert isinstance(wti, WTI)
    text, text_mask = model.encode_text(pair.ids)
    video = model.encode_video(pair.frames, pair.mask)
    _, matches = wti(text, video, text_mask, pair.mask, return_matches=True)
    words, frames = int(text_mask.sum()), int(pair.mask.sum())
    return Choices(
        _words(pair.ids[0, 1 : words - 1], tokenizer),
        _weights(wti.text_weight_fc, text[0, :words]),
        matches.video_index[0, 0, :words].tolist(),
        _weights(wti.video_weight_fc, video[0, :frames]),
        matches.text_index[0, 0, :frames].tolist(),
        (unit(text[0, :words]) @ unit(video[0, :frames]).T).tolist(),
    )


def word_table(found: Choices, seen: Callable[[int], str]) -> Table:
    """A row a word; ``seen`` says what a frame shows."""
    table = Table("word", title="Which frame each word chose", title_justify="left")
    for name in ("weight", "frame", "cosine"):
        table.add_column(name, justify="right")
    table.add_column(SEEN)
    for i, (word, weight, j) in enumerate(zip(found.words, found.word_weight, found.frame_of_word, strict=True)):
        choice = (NONE, "", "") if j < 0 else (f"{j}", f"{found.cosine[i][j]:.2f}", seen(j))
        table.add_row(word, f"{weight:.2f}", *choice)
    return table


def frame_table(found: Choices, seen: Callable[[int], str]) -> Table:
    """A row a frame."""
    table = Table("frame", SEEN, title="Which word each frame chose", title_justify="left")
    table.add_column("weight", justify="right")
    table.add_column("word")
    table.add_column("cosine", justify="right")
    for j, (weight, i) in enumerate(zip(found.frame_weight, found.word_of_frame, strict=True)):
        choice = (NONE, "") if i < 0 else (found.words[i], f"{found.cosine[i][j]:.2f}")
        table.add_row(f"{j}", seen(j), f"{weight:.2f}", *choice)
    return table


def _weights(head: nn.Module, tokens: Tensor) -> list[float]:
    """WTI's weights of one row's real tokens, summing to 1."""
    return head(tokens).squeeze(-1).softmax(dim=-1).tolist()


def _words(inner: Tensor, tokenizer: open_clip.SimpleTokenizer) -> list[str]:
    return ["(start)", *(tokenizer.decode([number]).strip() for number in inner.tolist()), "(end)"]
