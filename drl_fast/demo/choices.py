"""Which frame each word chose and which word each frame chose, for one caption and its clip."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import open_clip
import torch
from rich.table import Table
from torch import Tensor

from .. import WTI
from ..model.drl import DRL
from ..numerics import unit

SEEN = "pixels moved, first and second"


@dataclass(frozen=True)
class Choices:
    """One caption and one clip under WTI."""

    words: list[str]
    """The caption's tokens, with start and end."""
    word_weights: Tensor
    """(words,)"""
    frame_weights: Tensor
    """(frames,)"""
    frame_of_word: list[int]
    """-1: none."""
    word_of_frame: list[int]
    """-1: none."""
    cosine: Tensor
    """(words, frames)"""


@torch.no_grad()
def choose(model: DRL, caption: str, frames: Tensor, tokenizer: open_clip.SimpleTokenizer) -> Choices:
    """Find the choices of a model with WTI, for a clip's frames (n, 3, H, W) uint8."""
    model.eval()
    assert isinstance(model.interaction, WTI)
    ids = tokenizer([caption])
    text, mask = model.encode_text(ids)
    length = int(mask.sum())
    text, video = text[:, :length], model.encode_video(frames[None])
    words = ["(start)", *(tokenizer.decode([number]).strip() for number in ids[0, 1 : length - 1].tolist()), "(end)"]
    _, matches = model.similarity(text, video, return_matches=True)
    text_weight, video_weight = model.interaction.weights(text, video)
    assert video_weight is not None
    assert matches.text_index is not None
    return Choices(
        words,
        text_weight[0],
        video_weight[0],
        matches.video_index[0, 0].tolist(),
        matches.text_index[0, 0].tolist(),
        unit(text[0]) @ unit(video[0]).T,
    )


def tables(found: Choices, seen: Sequence[str]) -> tuple[Table, Table]:
    """Make a table with a row per word and one with a row per frame, with weights, choices and their cosines.

    Args:
        seen: what each frame shows, in words.
    """
    by_word = Table("word", title="Which frame each word chose", title_justify="left")
    for name in ("weight", "frame", "cosine"):
        by_word.add_column(name, justify="right")
    by_word.add_column(SEEN)
    for i, j in enumerate(found.frame_of_word):
        choice = ("none", "", "") if j < 0 else (f"{j}", f"{found.cosine[i, j]:.2f}", seen[j])
        by_word.add_row(found.words[i], f"{found.word_weights[i]:.2f}", *choice)

    by_frame = Table("frame", SEEN, title="Which word each frame chose", title_justify="left")
    by_frame.add_column("weight", justify="right")
    by_frame.add_column("word")
    by_frame.add_column("cosine", justify="right")
    for j, i in enumerate(found.word_of_frame):
        word = ("none", "") if i < 0 else (found.words[i], f"{found.cosine[i, j]:.2f}")
        by_frame.add_row(f"{j}", seen[j], f"{found.frame_weights[j]:.2f}", *word)
    return by_word, by_frame
