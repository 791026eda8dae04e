"""The run that ``drl-fast train`` starts, and what it shows of it."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.markup import escape

from ..console import DIRECTIONS, chance, metrics_row, metrics_table, print_machine, progress
from ..data import moving_shapes
from ..data.datasets import load_split
from ..data.loading import Unreadable
from ..data.split import Split
from ..engine.config import RunConfig, build_model, read_config
from ..engine.evaluate import Evaluation
from ..engine.processes import Processes, processes
from ..engine.train import BEST, LAST, UNREADABLE, Data, Run
from ..metrics import recall_interval
from ._data import print_left_out, print_unreadable, with_folders

# Of a dry run, which shows that a configuration runs and not how fast.
DRY_STEPS, DRY_BATCH = 2, 8
DRY_HINT = ", or see it run on generated clips with --dry-run"
# Seconds after which another Ctrl-C is one.
SECOND_THOUGHT = 1.0


@dataclass(frozen=True)
class TrainRun:
    """What ``drl-fast train`` was asked for; see its options."""

    config: Path
    out: Path | None = None
    videos: Path | None = None
    annotations: Path | None = None
    overrides: tuple[str, ...] = ()
    resume: bool = False
    strict: bool = False


def run_train(asked: TrainRun, console: Console, *, dry: bool = False) -> bool:
    """Train on all processes; the first prints. Says whether it came to the end or was told to stop before.

    Raises:
        ValueError: a configuration, data, weights or a checkpoint that cannot be used.
        OSError: a disk that is full, a folder that cannot be written.
        RuntimeError: a decoding process that was killed.
    """
    config = read_config(asked.config, asked.overrides)
    with processes() as here, contextlib.ExitStack() as stack:
        console.quiet = not here.first
        folder = asked.out or Path("runs") / asked.config.stem
        if dry:
            scratch = stack.enter_context(_shared_folder(here))
            config, folder = _dry(config, scratch, here), scratch / "run"
            asked = dataclasses.replace(asked, videos=scratch, annotations=scratch)
        # Whole paths: the run's configuration is read again, perhaps from elsewhere.
        named = [path and path.resolve() for path in (asked.videos, asked.annotations)]
        config, videos, annotations = with_folders(config, named[0], named[1], DRY_HINT)
        splits = {
            part: load_split(config.dataset, part, videos=videos, annotations=annotations, strict=asked.strict)
            for part in ("train", "val")
        }
        _introduce(config, splits, here, console)
        torch.manual_seed(config.seed)
        model, tokenizer = build_model(config)
        data = Data(splits["train"], splits["val"], tokenizer, asked.strict)
        stop = stack.enter_context(_asked_to_stop(console))
        watcher = _Watcher(console)
        run = Run(config, model, data, folder, here, watcher, stop)
        run.open_folder(asked.resume)
        with watcher.bars:
            finished = run.train()
        _conclude(run, watcher, finished, dry, console)
    return finished


def _introduce(config: RunConfig, splits: dict[str, Split], here: Processes, console: Console) -> None:
    """What is trained on what and where, before it takes long."""
    print_machine(console)
    for split in splits.values():
        console.print(
            f"{config.dataset}, {split.part}: {len(split.captions)} captions of {len(split.videos)} videos",
            highlight=False,
            soft_wrap=True,
        )
        print_left_out(console, split)
    if splits["train"].captions == splits["val"].captions:
        console.print(
            "[bold yellow]val holds the training captions: its scores say nothing of other videos; a column "
            "split (train, val, test) tells them apart[/bold yellow]",
            highlight=False,
            soft_wrap=True,
        )
    weights = "random weights" if config.pretrained is None else f"weights {config.pretrained}"
    console.print(
        f"{escape(config.clip)}, {escape(weights)}, interaction {config.interaction}, temporal module "
        f"{config.temporal}, cdcr {config.cdcr}; {config.precision} on {here.device}"
        + (f", {here.size} processes ({config.parallel})" if here.size > 1 else ""),
        highlight=False,
        soft_wrap=True,
    )


@contextlib.contextmanager
def _asked_to_stop(console: Console) -> Iterator[Any]:
    """A question that Ctrl-C, or a scheduler's SIGTERM, answers with yes; a second Ctrl-C ends at once."""
    asked: list[float] = []

    def note(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if asked:
            # torchrun passes on what the terminal has sent to its processes already: one Ctrl-C, two signals.
            if number == signal.SIGINT and now - asked[0] > SECOND_THOUGHT:
                raise KeyboardInterrupt
            return
        asked.append(now)
        console.print("stopping after this step, with a checkpoint; once more to stop at once", highlight=False)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Watcher:
    """Bars, a line an evaluation, and the names of what cannot be read."""

    def __init__(self, console: Console) -> None:
        self.console, self.bars = console, progress(console)
        self.best: tuple[int, Evaluation] | None = None
        self._task: Any = None
        self._stages: dict[str, Any] = {}

    def started(self, step: int, steps: int, epochs: int) -> None:
        self._task = self.bars.add_task(f"train, {epochs} epochs", total=steps, completed=step, note="")
        if step:
            self.console.print(f"going on after step {step} of {steps}", highlight=False)

    def stepped(self, values: dict[str, float]) -> None:
        speed = values["pairs"] / values["seconds"]
        note = f"epoch {values['epoch']:.0f}, loss {values['total']:.3f}, {speed:.1f} pairs/s"
        self.bars.update(self._task, completed=values["step"], note=note)

    def evaluating(self, stage: str, done: int, total: int) -> None:
        if stage not in self._stages:
            self._stages[stage] = self.bars.add_task(f"evaluate, {stage}", total=total, note="")
        self.bars.update(self._stages[stage], completed=done)

    def evaluated(self, epoch: int, found: Evaluation, best: bool) -> None:
        for task in self._stages.values():
            self.bars.remove_task(task)
        self._stages.clear()
        if best:
            self.best = epoch, found
        recalls = ", ".join(f"{DIRECTIONS[key]} R@1 {found.metrics[key]['R1']:.1f}" for key in DIRECTIONS)
        self.console.print(f"epoch {epoch}: {recalls}" + ", the best so far" * best, highlight=False)

    def unreadable(self, video: Unreadable) -> None:
        # Every process names its own, on stderr, where the first one's bars are not.
        print_unreadable(Console(stderr=True), video)

    def warned(self, text: str) -> None:
        self.console.print(f"[bold yellow]warning:[/bold yellow] {text}", highlight=False, soft_wrap=True)


def _conclude(run: Run, watcher: _Watcher, finished: bool, dry: bool, console: Console) -> None:
    """What the run came to, and how to go on."""
    if not finished:
        console.print(
            f"stopped after step {run.progress.step} of {len(run.batches)}; the same command with --resume goes on "
            f"from {escape(str(run.folder / LAST))}",
            highlight=False,
            soft_wrap=True,
        )
        return
    unreadable = run.unreadable()
    if unreadable:
        console.print(
            f"{len(unreadable)} videos could not be read and were left out; {escape(str(run.folder / UNREADABLE))} has "
            "their names and why",
            highlight=False,
            soft_wrap=True,
        )
    leader = run.progress.best()
    if leader is None:
        return
    metrics = run.progress.evaluations[leader[0]]
    val = run.data.val
    table = metrics_table(f"\n{val.dataset}, {val.part}: after epoch {leader[0]}, the best by text-to-video R@1")
    fresh = watcher.best[1] if watcher.best is not None and watcher.best[0] == leader[0] else None
    for key, direction in DIRECTIONS.items():
        interval = None if fresh is None else recall_interval(fresh.sim, fresh.owner, direction=key)
        metrics_row(table, direction, metrics[key], interval)
    if fresh is not None:
        metrics_row(table, "chance", chance(fresh.sim.shape[1]))
    console.print(table)
    if dry:
        console.print("A dry run: generated clips and random weights, two steps. The scores mean nothing.")
        return
    console.print(
        f"drl-fast eval --checkpoint {escape(str(run.folder))} scores it on the test part; the model is in "
        f"{escape(str(run.folder / BEST))}",
        highlight=False,
        soft_wrap=True,
    )


def _dry(config: RunConfig, folder: Path, here: Processes) -> RunConfig:
    """The configuration on generated clips, so few that a CPU takes two steps of any model."""
    batch = min(config.batch, DRY_BATCH)
    if here.first:
        count = DRY_STEPS * batch
        clips = moving_shapes.make_clips(count + -count % moving_shapes.ARRANGEMENTS, seed=config.seed)[:count]
        moving_shapes.write_folder(clips, folder)
    here.any(False)  # the others wait for the clips
    sampling = config.sampling(1)
    return dataclasses.replace(
        config,
        dataset="folder",
        pretrained=None,
        epochs=1,
        batch=batch,
        max_words=config.words,
        max_frames=sampling.max_frames,
        workers=min(config.workers, 2),
    )


@contextlib.contextmanager
def _shared_folder(here: Processes) -> Iterator[Path]:
    """A temporary folder that all processes of this machine know."""
    with contextlib.ExitStack() as stack:
        name = [stack.enter_context(tempfile.TemporaryDirectory(prefix="drl_fast_dry_"))] if here.first else [""]
        if here.group is not None:
            dist.broadcast_object_list(name, src=0, group=here.group)
        yield Path(name[0])
        here.any(False)  # removed when all have come to the end
