"""Which frame each word chose and which word each frame chose, for one caption and its clip."""

from __future__ import annotations

from dataclasses import dataclass

import open_clip
import torch
from rich.table import Table
from torch import Tensor

from .. import WTI
from ..functional.dot_product import unit
from ..model.drl import DRL

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
def choices(model: DRL, caption: str, frames: Tensor, tokenizer: open_clip.SimpleTokenizer) -> Choices:
    """Ask a model with a WTI for the choices between a caption and its clip's frames (n, 3, H, W)."""
    model.eval()
    wti = model.interaction
    assert isinstance(wti, WTI)
    ids = tokenizer([caption])
    text, text_mask = model.encode_text(ids)
    words = int(text_mask.sum())
    text, video = text[:, :words], model.encode_video(frames[None])
    _, matches = wti(text, video, return_matches=True)
    text_weight, video_weight = wti.weights(text, video)
    assert video_weight is not None
    inner = [tokenizer.decode([number]).strip() for number in ids[0, 1 : words - 1].tolist()]
    return Choices(
        ["(start)", *inner, "(end)"],
        text_weight[0].tolist(),
        matches.video_index[0, 0].tolist(),
        video_weight[0].tolist(),
        matches.text_index[0, 0].tolist(),
        (unit(text[0]) @ unit(video[0]).T).tolist(),
    )


def word_table(found: Choices, seen: list[str]) -> Table:
    """Make a table with a row per word; ``seen`` says what each frame shows."""
    table = Table("word", title="Which frame each word chose", title_justify="left")
    for name in ("weight", "frame", "cosine"):
        table.add_column(name, justify="right")
    table.add_column(SEEN)
    for i, (word, weight, j) in enumerate(zip(found.words, found.word_weight, found.frame_of_word, strict=True)):
        choice = (NONE, "", "") if j < 0 else (f"{j}", f"{found.cosine[i][j]:.2f}", seen[j])
        table.add_row(word, f"{weight:.2f}", *choice)
    return table


def frame_table(found: Choices, seen: list[str]) -> Table:
    """Make a table with a row per frame."""
    table = Table("frame", SEEN, title="Which word each frame chose", title_justify="left")
    table.add_column("weight", justify="right")
    table.add_column("word")
    table.add_column("cosine", justify="right")
    for j, (weight, i) in enumerate(zip(found.frame_weight, found.word_of_frame, strict=True)):
        choice = (NONE, "") if i < 0 else (found.words[i], f"{found.cosine[i][j]:.2f}")
        table.add_row(f"{j}", seen[j], f"{weight:.2f}", *choice)
    return table
