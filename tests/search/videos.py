"""Videos of coloured seconds, and toy models, for the tests of search."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from drl_fast.model.config import Inputs
from drl_fast.model.drl import DRL
from tests.clips import solid, write_video
from tests.engine import runs  # registers the toy CLIP

CLIP = "toy"
assert runs.tower
# Two frames a second in windows of four: 2 s each, a new one every second.
INPUTS = Inputs(max_words=12, rate=2, max_frames=4)
FPS = 4


def make_video(path: Path, seconds: float, seed: int = 0) -> Path:
    """Write a video that changes its colour twice a second, at random."""
    colours = np.random.default_rng(seed).integers(0, 255, (round(seconds * 2), 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_video(path, [solid(colour) for colour in colours for _ in range(FPS // 2)], rate=FPS)


def make_folder(folder: Path) -> Path:
    """Write three videos with 1, 2 and 5 windows of ``INPUTS``."""
    make_video(folder / "short.mp4", 1.5, 1)
    make_video(folder / "a b" / "日本.mp4", 3, 2)
    make_video(folder / "long.mp4", 6, 3)
    return folder


WINDOWS = {"short.mp4": 1, "a b/日本.mp4": 2, "long.mp4": 5}


def save_model(folder: Path, seed: int = 0, **options: object) -> Path:
    """Save a toy model with random weights."""
    torch.manual_seed(seed)
    model = DRL(CLIP, **{"interaction": "wti", "temporal": "seqTransf", **options})  # type: ignore[arg-type]
    model.inputs = INPUTS
    model.save_pretrained(folder)
    return folder


def keep_times(path: Path, other: Path) -> None:
    """Give a file the times of another."""
    status = other.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
