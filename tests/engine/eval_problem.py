"""A split of small videos with several captions each, and models that score it quickly."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from torch import Tensor

from drl_fast.data.split import Split
from drl_fast.data.video import Sampling, read_video
from drl_fast.model.drl import DRL
from tests.clips import write_video

SIZE, WORDS, VIDEOS = 32, 12, 10
SAMPLING = Sampling(rate=8, max_frames=4, size=SIZE)


def make_split(folder: Path) -> Split:
    """Write videos of one to five frames with one to three captions each; a video's captions are not adjacent."""
    generator = np.random.default_rng(0)
    names = [f"clip[{number}].mp4" for number in range(VIDEOS)]
    for number, name in enumerate(names):
        write_video(folder / name, list(generator.integers(0, 255, (1 + number % 5, SIZE, SIZE, 3), dtype=np.uint8)))
    owner = [video for turn in range(3) for video in range(VIDEOS) if video % 3 >= turn]
    captions = [f"caption {number} " + "of words " * (number % 7) for number in range(len(owner))]
    return Split(
        dataset="folder",
        part="test",
        captions=tuple(captions),
        owner=tuple(owner),
        videos=tuple(folder / name for name in names),
        names=tuple(names),
        missing=(),
    )


def make_model(**options: Any) -> DRL:
    """Build a model with one narrow layer per tower and the same random weights in every call."""
    torch.manual_seed(0)
    clip = open_clip.CLIP(
        embed_dim=24,
        vision_cfg=open_clip.CLIPVisionCfg(layers=1, width=32, head_width=16, patch_size=16, image_size=SIZE),
        text_cfg=open_clip.CLIPTextCfg(layers=1, width=32, heads=2, context_length=16),
    )
    return DRL(clip, **options)


def tokenizer() -> open_clip.SimpleTokenizer:
    return open_clip.SimpleTokenizer(context_length=16)


@torch.no_grad()
def plain(model: DRL, split: Split) -> Tensor:
    """Encode and score everything at once in float64, with all frames in memory."""
    model = copy.deepcopy(model).double().eval()
    frames, mask = (torch.stack(x) for x in zip(*(read_video(video, SAMPLING) for video in split.videos), strict=True))
    text, text_mask = model.encode_text(tokenizer()(list(split.captions), context_length=WORDS))
    return model.similarity(text, model.encode_video(frames, mask), text_mask, mask)
