"""What several commands print: the machine, metrics, progress."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from . import __version__
from .data.split import Split
from .metrics import DIRECTIONS
from .ops import dispatch
from .validation import printable

if TYPE_CHECKING:
    from .data.feature_store import FeatureStore
    from .data.loading import Tokenizer, Unreadable
    from .model.drl import DRL

SERVED_BY = {"cpp": "the C++ extension", "chunked": "chunked PyTorch"}
STAGES = {
    "videos": "decode and encode videos",
    "texts": "encode captions",
    "tokens": "read tokens",
    "scores": "score",
}
UNREADABLE_SHOWN = 10
# Seconds between lines of progress where the output is no terminal.
LINE_EVERY = 15.0


def served_by() -> str:
    """Name what computes the interaction on this machine's CPU."""
    name = dispatch.implementation("cpu")
    return SERVED_BY.get(name, name)


def print_machine(console: Console) -> None:
    """Print cores, versions and what computes the interaction."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print_line(
        console,
        f"drl-fast {__version__}, interaction by {served_by()}; torch {torch.__version__} on "
        f"{torch.get_num_threads()} threads, {cores} cores, {platform.machine()}; "
        f"open_clip {version('open_clip_torch')}, PyAV {version('av')}",
    )


def print_line(console: Console, text: str, style: str = "") -> None:
    """Print text without markup, colours for numbers or line breaks; names and captions cannot command the terminal."""
    console.print(printable(text), style=style, markup=False, highlight=False, soft_wrap=True)


def print_split(console: Console, split: Split) -> None:
    """Print a split's size, and what its annotations list but the folders do not hold."""
    captions, videos = len(split.captions), len(split.videos)
    print_line(console, f"{split.dataset}, {split.part}: {captions} captions of {videos} videos")
    for sentence in split.left_out():
        print_line(console, f"left out: {sentence}", "yellow")


def print_cut(console: Console, captions: Sequence[str], model: DRL, tokenizer: Tokenizer, max_words: int) -> None:
    """Print how many captions are longer than ``max_words`` tokens or the CLIP's context, if any are."""
    if console.quiet:
        return
    from .data.loading import count_cut  # loads PyAV, which the extra `cli` lacks

    words = model.words(max_words)
    cut = count_cut(tokenizer, captions, words)
    if cut:
        most = model.words(sys.maxsize)
        more = f"max_words up to {most} keeps more" if words < most else "this CLIP reads no more"
        print_line(
            console,
            f"{cut} of {len(captions)} captions are longer than {words} tokens and are cut there; {more}",
            "yellow",
        )


def print_features(console: Console, store: FeatureStore) -> None:
    """Print what encoded a store's tokens."""
    about, names = store.about, []
    for side in (about.text, about.video):
        by = "imported" if side.encoder is None else f"by {side.encoder['clip']}"
        names.append(f"{by}, width {side.width}")
    print_line(console, f"tokens from {store.folder} ({about.dtype}): captions {names[0]}; frames {names[1]}")


def print_unreadable(console: Console, video: Unreadable) -> None:
    """Print that a video cannot be read, and why."""
    print_line(console, f"unreadable, left out: {video.name}: {video.reason}", "yellow")


def print_all_unreadable(console: Console, videos: Sequence[Unreadable]) -> None:
    """Print the first unreadable videos, and how many more there are."""
    for video in videos[:UNREADABLE_SHOWN]:
        print_unreadable(console, video)
    if len(videos) > UNREADABLE_SHOWN:
        print_line(console, f"... and {len(videos) - UNREADABLE_SHOWN} more unreadable videos")


def progress(console: Console, clock: Callable[[], float] = time.monotonic) -> Progress:
    """Make progress bars with counts, time and an optional note; where the output is no terminal, print plain lines."""
    if not console.is_terminal:
        return _ProgressLines(console, clock)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


class _ProgressLines(Progress):
    """Progress that a file shows: a line every 15 s, and one at the end of each task."""

    def __init__(self, console: Console, clock: Callable[[], float]) -> None:
        super().__init__(console=console, disable=True, get_time=clock)
        self._next = clock() + LINE_EVERY
        self._ended: set[TaskID] = set()

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        self._print(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._print(task_id)

    def _print(self, task_id: TaskID) -> None:
        task, now = self._tasks[task_id], self.get_time()
        ends = task.finished and task_id not in self._ended
        if not ends and now < self._next:
            return
        if ends:
            self._ended.add(task_id)
        self._next = now + LINE_EVERY
        line = f"{task.description}: {task.completed:,.0f} of {task.total or 0:,.0f}, {task.elapsed or 0:.0f} s"
        if task.time_remaining:
            line += f", {task.time_remaining:.0f} s left"
        note = task.fields.get("note")
        print_line(self.console, line + (f", {note}" if note else ""))


def metrics_table(
    title: str,
    rows: Mapping[str, Mapping[str, float]],
    intervals: Mapping[str, Sequence[float]] | None = None,
    candidates: int | None = None,
) -> Table:
    """Make a table of recalls in percent and ranks, a row per search direction or per name.

    Args:
        rows: metrics by direction (``"t2v"`` or ``"v2t"``) or by any other name.
        intervals: R@1's, by the same names.
        candidates: add the metrics of a random order of so many.
    """
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for name in ("R@1", "R@5", "R@10", "median rank", "mean rank"):
        table.add_column(name, justify="right", no_wrap=name.startswith("R@"))
    for name, values in {**rows, **({} if candidates is None else {"chance": chance(candidates)})}.items():
        first, *others = (f"{values[key]:.1f}" for key in ("R1", "R5", "R10", "MdR", "MnR"))
        if intervals and name in intervals:
            low, high = intervals[name]
            first += f" [{low:.0f}, {high:.0f}]"
        table.add_row(DIRECTIONS.get(name, name), first, *others)
    return table


def chance(candidates: int) -> dict[str, float]:
    """Expected metrics of a random order of ``candidates`` with one right answer."""
    recall = {f"R{k}": 100 * min(k, candidates) / candidates for k in (1, 5, 10)}
    return {**recall, "MdR": (candidates + 1) / 2, "MnR": (candidates + 1) / 2}
