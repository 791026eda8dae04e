"""Small training runs: a tiny CLIP, clips of one colour each, and a watcher that records its calls."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip

from drl_fast.data.datasets import load_split
from drl_fast.data.loading import Unreadable
from drl_fast.engine.config import RunConfig, build_model
from drl_fast.engine.data import Data
from drl_fast.engine.evaluate import Evaluation
from drl_fast.engine.processes import Processes
from drl_fast.engine.train import Run

from .. import clips

open_clip.add_model_config(Path(__file__).with_name("toy.json"))
CAPTIONS = "a {} picture", "it is all {}"


def tower() -> open_clip.CLIP:
    """Build a narrow CLIP for 32 x 32 pictures and 60 token ids, with four text layers to initialise others from."""
    vision = open_clip.CLIPVisionCfg(layers=1, width=32, head_width=16, patch_size=16, image_size=32)
    text = open_clip.CLIPTextCfg(layers=4, width=32, heads=2, context_length=16, vocab_size=60)
    return open_clip.CLIP(32, vision, text)


def make_folder(folder: Path, count: int = 12) -> Path:
    """Write ``count`` clips, alternately with one and two captions."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["video,caption"]
    for i in range(count):
        colour = [(37 * i + 80 * channel) % 256 for channel in range(3)]
        clips.write_video(folder / f"clip{i}.mp4", [clips.solid(colour)] * (3 + i % 3), rate=2)
        lines += [f"clip{i}.mp4,{text.format(f'number {i}')}" for text in CAPTIONS[: 1 + i % 2]]
    (folder / "captions.csv").write_text("\n".join(lines) + "\n")
    return folder


def configured(folder: Path, **options: Any) -> RunConfig:
    """Return a configuration of two epochs of four steps, in float32 and without decoding processes."""
    usual: dict[str, Any] = {
        "dataset": "folder",
        "videos": str(folder),
        "annotations": str(folder),
        "clip": "toy",
        "pretrained": None,
        "temporal": None,
        "cdcr": 3,
        "epochs": 2,
        "batch": 4,
        "lr": 1e-2,
        "clip_lr": 1e-3,
        "precision": "fp32",
        "max_words": 12,
        "max_frames": 3,
        "workers": 0,
        "checkpoint_every": 3,
    }
    return RunConfig(**{**usual, **options})


class Notes:
    """A watcher that records its calls."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.epochs: list[tuple[int, bool]] = []
        self.names: list[str] = []
        self.warnings: list[str] = []

    def started(self, step: int, steps: int, epochs: int) -> None:
        pass

    def stepped(self, values: dict[str, float]) -> None:
        self.steps.append(values)

    def evaluating(self, stage: str, done: int, total: int) -> None:
        pass

    def evaluated(self, epoch: int, found: Evaluation, best: bool) -> None:
        self.epochs.append((epoch, best))

    def unreadable(self, video: Unreadable) -> None:
        self.names.append(video.name)

    def warned(self, text: str) -> None:
        self.warnings.append(text)

    def losses(self) -> dict[int, float]:
        return {int(values["step"]): values["total"] for values in self.steps}


def opened(
    config: RunConfig,
    out: Path,
    *,
    resume: bool = False,
    stop: Callable[[], bool] = lambda: False,
    strict: bool = False,
    processes: Processes | None = None,
) -> tuple[Run, Notes]:
    """Return a run that is ready to train, and its watcher."""
    assert config.videos is not None
    assert config.annotations is not None
    parts = [
        load_split(config.dataset, part, videos=config.videos, annotations=config.annotations)
        for part in ("train", "val")
    ]
    model, tokenizer = build_model(config)
    notes = Notes()
    run = Run(config, model, Data(*parts, tokenizer, strict), out, processes or Processes(), notes, stop)
    run.open_folder(resume)
    return run, notes


def after(steps: int) -> Callable[[], bool]:
    """Return a ``stop`` that is true from its ``steps``-th call on."""
    asked = iter(range(1, 1_000_000))
    return lambda: next(asked) >= steps
