"""The demo on generated clips: write, decode, train every interaction, compare, and measure the interaction's cost."""

from __future__ import annotations

import contextlib
import json
import os
import platform
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

from ..atomic_write import write_atomically
from ..data import moving_shapes
from ..data.moving_shapes import ARRANGEMENTS, MOST, Clip
from ..data.video import Sampling, read_video
from ..engine.in_memory import Pairs, Schedule
from ..metrics import ranks
from ..model.drl import DRL
from ..model.small import LAYERS
from ._choices import choices, frame_table, word_table
from ._comparison import CDCR, ROWS, Row, as_json, compare, findings, table, tokenizer
from ._measure import CHANNELS, FRAMES, REPEATS, WORDS, measure_apart
from ._plots import draw
from ._tables import print_machine, progress, served_by

SAMPLING = Sampling(rate=4, max_frames=8, size=moving_shapes.SIZE)
MEASURED_BATCH = 256
INTERVALS = (
    "Brackets: 95 % bootstrap interval of R@1 over the held-out clips, each four of them with the same words drawn as "
    "one (how another draw of clips would differ, not another training: each row is one training from one seed)."
)

NUMBERS = "comparison.json"


@dataclass(frozen=True)
class ShapesRun:
    """What ``drl-fast demo`` was asked for; see its options."""

    clips: int
    held_out: int
    steps: int
    seed: int
    out: Path
    keep: Path | None = None

    def __post_init__(self) -> None:
        for name, value, least in (("clips", self.clips, 1), ("held-out", self.held_out, 2)):
            if value % ARRANGEMENTS or value < least * ARRANGEMENTS:
                nearest = max(value // ARRANGEMENTS, least) * ARRANGEMENTS
                raise ValueError(
                    f"{name} must be a multiple of {ARRANGEMENTS}, the arrangements of one caption's words, and at "
                    f"least {least * ARRANGEMENTS}, got {value}; take {nearest}"
                )
        if self.clips + self.held_out > MOST:
            raise ValueError(
                f"clips and held-out together must be at most {MOST}, the different captions there are, got "
                f"{self.clips} + {self.held_out}; make fewer"
            )


def run_shapes(run: ShapesRun, console: Console) -> list[Row]:
    """Run the demo, print what it finds, write its plots, and return what each interaction came to."""
    start = time.perf_counter()
    print_machine(console)
    _must_be_writable(run.out)
    clips = moving_shapes.make_clips(run.clips + run.held_out, run.seed)
    frames, mask = _written_and_decoded(clips, run, console)
    everything = Pairs(frames, mask, tokenizer()([clip.caption for clip in clips]))
    test = everything[run.clips :]
    schedule = Schedule(run.steps, seed=run.seed, together=ARRANGEMENTS)
    rows, model = _train(everything[: run.clips], test, schedule, console)
    console.print(table(rows))
    console.print(INTERVALS)
    console.print("\n".join(findings(rows)), "\n", highlight=False)
    for path in draw(rows, min(schedule.batch, run.clips), run.out):
        console.print(f"plot: {escape(str(path))}", highlight=False, soft_wrap=True)
    _print_choices(model, clips[run.clips], test[:1], rows[-1], console)
    console.print(_costs(console))
    console.print(
        f"Each in a process of its own; time: median of {REPEATS}; memory: what one call adds to its inputs, gradients "
        "included."
    )
    seconds = time.perf_counter() - start
    _keep_numbers(run, rows, seconds)
    console.print(f"numbers: {escape(str(run.out / NUMBERS))}", highlight=False, soft_wrap=True)
    console.print(f"The demo took {seconds:.0f} s.", highlight=False)
    return rows


def _keep_numbers(run: ShapesRun, rows: list[Row], seconds: float) -> None:
    """Write what was compared, and on what, as JSON."""
    asked = {"clips": run.clips, "steps": run.steps, "seed": run.seed}
    machine = {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    found = {**asked, **machine, "torch": torch.__version__, "seconds": round(seconds, 1), **as_json(rows)}
    write_atomically(run.out / NUMBERS, lambda name: Path(name).write_text(json.dumps(found, indent=1) + "\n"))


def _must_be_writable(folder: Path) -> None:
    """Make the folder of the plots now: minutes later would be late to say that they cannot be written."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out must be a folder, got the file {folder}; name another")
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"out must be a folder that can be written to, got {folder}; name another")


def _written_and_decoded(clips: list[Clip], run: ShapesRun, console: Console) -> tuple[Tensor, Tensor]:
    """Frames (N, Nv, 3, H, W) uint8 and mask (N, Nv) bool, by way of H.264 files."""
    with _clip_folder(run.keep) as folder, progress(console) as bars:
        task = bars.add_task("write clips", total=len(clips), note="")
        splits = ["train"] * run.clips + ["test"] * run.held_out
        paths = moving_shapes.write_folder(clips, folder, splits, lambda: bars.advance(task))
        frames, mask = _decode(paths, bars)
        encoded = sum(path.stat().st_size for path in paths)
    console.print(
        f"{len(clips)} H.264 clips of {moving_shapes.SIZE} x {moving_shapes.SIZE} pixels ({encoded / 2**20:.1f} MiB), "
        f"{int(mask.sum())} frames decoded ({SAMPLING.rate:g} per second of video)"
        + (f"; kept in {escape(str(run.keep))}" if run.keep else "")
    )
    console.print(
        f"{run.held_out} clips are held out, with their captions. Captions come in fours of the same words, told apart "
        f"by who moves where and who moves first: {clips[0].caption!r} or {clips[1].caption!r}.",
        highlight=False,
    )
    return frames, mask


def _train(training: Pairs, test: Pairs, schedule: Schedule, console: Console) -> tuple[list[Row], DRL]:
    """All rows, and the last one's model."""
    console.print(
        f"CLIP towers of {LAYERS} + {LAYERS} layers, random weights: all they know they learn here. First the towers "
        f"learn as CLIP's do, by DP, in {schedule.steps} steps; then {len(ROWS)} models start from them, each with an "
        f"interaction of its own, and train for {schedule.steps} steps of {min(schedule.batch, len(training))} pairs: "
        "one recipe, tuned for no row. No temporal module: a frame shows which shape has left and which has not, so "
        "order is seen without one.",
        highlight=False,
    )
    with progress(console) as bars:
        return compare(training, test, schedule, bars)


def _print_choices(model: DRL, clip: Clip, pair: Pairs, row: Row, console: Console) -> None:
    rank = int(ranks(row.sim[:1], torch.zeros(1, dtype=torch.int64)))
    console.print(
        f'\nThe first held-out clip, "{clip.caption}" (by {CDCR} its caption finds it at rank {rank}). Weight: how '
        "much of its side's score a token decides.",
        highlight=False,
    )
    found = choices(model, pair, tokenizer())
    for make in (word_table, frame_table):
        console.print(make(found, lambda frame: _where(clip, frame)))
    console.print()


@contextlib.contextmanager
def _clip_folder(keep: Path | None) -> Iterator[Path]:
    """Where clips are written: ``keep``, which is made anew and goes again when something fails, or one for now."""
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="drl_fast_demo_") as name:
            yield Path(name)
        return
    # Never over someone's own captions.csv.
    if keep.is_file() or (keep.is_dir() and any(keep.iterdir())):
        raise ValueError(f"keep must be a new or an empty folder, got {keep}; name another or empty it")
    new = not keep.exists()
    keep.mkdir(parents=True, exist_ok=True)
    try:
        yield keep
    except BaseException:
        # Some of the clips without their captions serve nobody, and would stand in a second run's way.
        for path in keep.iterdir():
            path.unlink()
        if new:
            keep.rmdir()
        raise


def _decode(paths: list[Path], bars: Progress) -> tuple[Tensor, Tensor]:
    """(N, Nv, 3, H, W) uint8 and (N, Nv) bool."""
    task = bars.add_task("decode clips", total=len(paths), note="")
    decoded = []
    for path in paths:
        decoded.append(read_video(path, SAMPLING))
        bars.advance(task)
    return torch.stack([frames for frames, _ in decoded]), torch.stack([mask for _, mask in decoded])


def _where(clip: Clip, frame: int) -> str:
    """How far each shape is from its place in a sampled frame."""
    ways = clip.travelled(frame * round(moving_shapes.FPS / SAMPLING.rate))
    movers = (clip.first, clip.second)
    return ", ".join(f"{way:.0f} {mover.direction}" for mover, way in zip(movers, ways, strict=True))


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
