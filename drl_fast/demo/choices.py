"""Which frame each word chose and which word each frame chose, for one caption and its clip."""

from __future__ import annotations

from collections.abc import Sequence

import open_clip
import torch
from rich.table import Table
from torch import Tensor

from .. import WTI
from ..model.drl import DRL
from ..numerics import unit

SEEN = "pixels moved, first and second"


@torch.no_grad()
def choice_tables(
    model: DRL, caption: str, frames: Tensor, tokenizer: open_clip.SimpleTokenizer, seen: Sequence[str]
) -> tuple[Table, Table]:
    """Make a table with a row per word and one with a row per frame, with weights, choices and their cosines.

    Args:
        model: one with WTI.
        frames: (n, 3, H, W) uint8, the clip's.
        seen: what each frame shows, in words.
    """
    model.eval()
    wti = model.interaction
    assert isinstance(wti, WTI)
    ids = tokenizer([caption])
    text, mask = model.encode_text(ids)
    length = int(mask.sum())
    text, video = text[:, :length], model.encode_video(frames[None])
    words = ["(start)", *(tokenizer.decode([number]).strip() for number in ids[0, 1 : length - 1].tolist()), "(end)"]
    _, matches = wti(text, video, return_matches=True)
    text_weight, video_weight = wti.weights(text, video)
    assert video_weight is not None
    cosine = unit(text[0]) @ unit(video[0]).T

    by_word = Table("word", title="Which frame each word chose", title_justify="left")
    for name in ("weight", "frame", "cosine"):
        by_word.add_column(name, justify="right")
    by_word.add_column(SEEN)
    for i, j in enumerate(matches.video_index[0, 0].tolist()):
        choice = ("none", "", "") if j < 0 else (f"{j}", f"{cosine[i, j]:.2f}", seen[j])
        by_word.add_row(words[i], f"{text_weight[0, i]:.2f}", *choice)

    by_frame = Table("frame", SEEN, title="Which word each frame chose", title_justify="left")
    by_frame.add_column("weight", justify="right")
    by_frame.add_column("word")
    by_frame.add_column("cosine", justify="right")
    for j, i in enumerate(matches.text_index[0, 0].tolist()):
        word = ("none", "") if i < 0 else (words[i], f"{cosine[i, j]:.2f}")
        by_frame.add_row(f"{j}", seen[j], f"{video_weight[0, j]:.2f}", *word)
    return by_word, by_frame
