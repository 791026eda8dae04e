"""The demo on generated clips: write, decode, train, search, and measure the interaction."""

from __future__ import annotations

import contextlib
import csv
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from ..data import moving_shapes
from ..data.moving_shapes import Clip
from ..data.video import Sampling, read_video
from ..engine.evaluate import encode_texts, encode_videos
from ..engine.in_memory import Pairs, Schedule, train
from ..metrics import ranks, recall_interval, retrieval_metrics
from ..model.drl import DRL
from ..model.small import small_model
from ._choices import choices, frame_table, word_table
from ._measure import CHANNELS, FRAMES, REPEATS, WORDS, measure_apart
from ._tables import DIRECTIONS, chance, metrics_row, metrics_table, print_machine, progress, served_by

SAMPLING = Sampling(rate=4, max_frames=8, size=moving_shapes.SIZE)
CONTEXT = 16
MEASURED_BATCH = 256


@dataclass(frozen=True)
class ShapesRun:
    """What ``drl-fast demo`` was asked for; see its options."""

    clips: int
    held_out: int
    steps: int
    seed: int
    keep: Path | None = None


def run_shapes(run: ShapesRun, console: Console) -> dict[str, dict[str, float]]:
    """Run the demo, print what it finds, and return the held-out clips' metrics after training."""
    start = time.perf_counter()
    print_machine(console)
    clips = moving_shapes.make_clips(run.clips + run.held_out, run.seed)
    with _clip_folder(run.keep) as folder, progress(console) as bars:
        paths = _write(clips, folder, bars)
        frames, mask = _decode(paths, bars)
        encoded = sum(path.stat().st_size for path in paths)
    console.print(
        f"{len(clips)} H.264 clips of {moving_shapes.SIZE} x {moving_shapes.SIZE} pixels ({encoded / 2**20:.1f} MiB), "
        f"{int(mask.sum())} frames decoded ({SAMPLING.rate:g} per second of video); {run.held_out} clips held out, "
        "whose captions are in no training clip" + (f"; kept in {escape(str(run.keep))}" if run.keep else "")
    )
    model, tokenizer = small_model(moving_shapes.SIZE, CONTEXT, run.seed)
    everything = Pairs(frames, mask, tokenizer([clip.caption for clip in clips]))
    training, test = everything[: run.clips], everything[run.clips :]
    console.print(
        f"Model: 4 + 4 transformer layers, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, random "
        "weights: all it knows it learns here. Trained end to end through drl_fast.WTI and drl_fast.info_nce."
    )
    before = _score(model, test)
    schedule = Schedule(run.steps, seed=run.seed)
    with progress(console) as bars:
        task = bars.add_task("train", total=run.steps, note="")
        train(model, training, schedule, lambda _, loss: bars.update(task, advance=1, note=f"loss {loss:.3f}"))
    after = _score(model, test)
    metrics = retrieval_metrics(after)
    console.print(_metrics(before, after))
    console.print(
        "Brackets: 95 % bootstrap interval over the held-out clips (how another draw of clips would differ, "
        "not another training).\n"
    )
    shown = clips[run.clips]
    rank = int(ranks(after[:1], torch.zeros(1, dtype=torch.int64)))
    console.print(f'The first held-out clip, "{shown.caption}" (its caption finds it at rank {rank}).', highlight=False)
    console.print("Weight: how much of its side's score a token decides.")
    found = choices(model, test[:1], tokenizer)
    for table in (word_table, frame_table):
        console.print(table(found, lambda frame: _where(shown, frame)))
    console.print()
    console.print(_costs(console))
    console.print(
        f"Each in a process of its own; time: median of {REPEATS}; memory: what one call adds to its inputs, gradients "
        "included."
    )
    console.print(f"The demo took {time.perf_counter() - start:.0f} s.", highlight=False)
    return metrics


@contextlib.contextmanager
def _clip_folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        # Never over someone's own captions.csv.
        if keep.is_file() or (keep.is_dir() and any(keep.iterdir())):
            raise ValueError(f"keep must be a new or an empty folder, got {keep}; name another or empty it")
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix="drl_fast_demo_") as name:
        yield Path(name)


def _write(clips: list[Clip], folder: Path, bars: Progress) -> list[Path]:
    """Encode the clips and, last, the captions file that makes the folder one for ``--videos``."""
    paths = [folder / f"clip{number:05}.mp4" for number in range(len(clips))]
    task = bars.add_task("write clips", total=len(clips), note="")
    for clip, path in zip(clips, paths, strict=True):
        moving_shapes.write_clip(clip, path)
        bars.advance(task)
    aside = folder / "captions.csv.part"
    with aside.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["video", "caption"])
        rows.writerows([path.name, clip.caption] for clip, path in zip(clips, paths, strict=True))
    aside.replace(folder / "captions.csv")
    return paths


def _decode(paths: list[Path], bars: Progress) -> tuple[Tensor, Tensor]:
    """(N, Nv, 3, H, W) uint8 and (N, Nv) bool."""
    task = bars.add_task("decode clips", total=len(paths), note="")
    decoded = []
    for path in paths:
        decoded.append(read_video(path, SAMPLING))
        bars.advance(task)
    return torch.stack([frames for frames, _ in decoded]), torch.stack([mask for _, mask in decoded])


@torch.no_grad()
def _score(model: DRL, pairs: Pairs) -> Tensor:
    """Similarities (texts, videos)."""
    text, text_mask = encode_texts(model, pairs.ids)
    return model.similarity(text, encode_videos(model, pairs.frames, pairs.mask), text_mask, pairs.mask)


def _metrics(before: Tensor, after: Tensor) -> Table:
    table = metrics_table(f"\nSearch among {len(after)} held-out clips, before and after training; recalls in percent")
    for key, direction in DIRECTIONS.items():
        for name, sim in (("before", before), ("after", after)):
            interval = recall_interval(sim, direction=key)
            metrics_row(table, f"{direction}, {name}", retrieval_metrics(sim)[key], interval)
    metrics_row(table, "chance", chance(len(after)))
    return table


def _where(clip: Clip, frame: int) -> str:
    """Where the mover is in a sampled frame."""
    x, y = clip.centre(frame * round(moving_shapes.FPS / SAMPLING.rate))
    pixels = abs(x - moving_shapes.SIZE / 2) + abs(y - moving_shapes.SIZE / 2)
    side = {"up": "above", "down": "below"}.get(clip.direction, f"{clip.direction} of")
    return f"{pixels:.0f} px {side} the middle" if round(pixels) else "in the middle"


def _costs(console: Console) -> Table:
    """Time and memory beside the dense form, each measured in a process of its own."""
    title = (
        f"One forward and backward of the interaction, {MEASURED_BATCH} texts x {MEASURED_BATCH} videos "
        f"({WORDS} words x {FRAMES} frames x {CHANNELS} channels, float32)"
    )
    table = Table(title=title, title_justify="left")
    for name in ("", "time", "peak memory"):
        table.add_column(name, justify="right" if name else "left")
    with console.status("measuring the interaction beside its dense form, some ten seconds"):
        for name, form in ((f"drl_fast, {served_by()}", "fused"), ("dense PyTorch, eager", "dense")):
            try:
                cost = measure_apart(form, MEASURED_BATCH)
            except RuntimeError as error:  # a machine without that much memory
                table.add_row(name, "not measured", escape(str(error)))
                continue
            memory = "not told by this system" if cost["bytes"] is None else f"{cost['bytes'] / 2**20:.0f} MiB"
            table.add_row(name, f"{cost['seconds']:.3f} s", memory)
    return table
