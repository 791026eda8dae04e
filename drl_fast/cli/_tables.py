"""What several commands print: the machine, metrics, progress."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from .. import __version__
from ..ops import dispatch

SERVED_BY = {"cpp": "the C++ extension", "chunked": "chunked PyTorch"}
DIRECTIONS = {"t2v": "text to video", "v2t": "video to text"}


def served_by() -> str:
    """What computes the interaction on this machine's CPU, in words."""
    name = dispatch.implementation("cpu")
    return SERVED_BY.get(name, name)


def print_machine(console: Console) -> None:
    """Cores, versions and what computes the interaction."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    console.print(
        f"drl-fast {__version__}, interaction by {served_by()}; torch {torch.__version__} on "
        f"{torch.get_num_threads()} threads, {cores} cores, {platform.machine()}; "
        f"open_clip {version('open_clip_torch')}, PyAV {version('av')}",
        highlight=False,
    )


def progress(console: Console) -> Progress:
    """A progress bar with counts, time and an optional note."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


def metrics_table(title: str) -> Table:
    """An empty table for :func:`metrics_row`."""
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for name in ("R@1", "R@5", "R@10", "median rank", "mean rank"):
        table.add_column(name, justify="right", no_wrap=name.startswith("R@"))
    return table


def metrics_row(table: Table, name: str, values: dict[str, float], interval: tuple[float, float] | None = None) -> None:
    """One direction's recalls in percent and ranks; ``interval`` is R@1's."""
    first = f"{values['R1']:.1f}" + (f" [{interval[0]:.0f}, {interval[1]:.0f}]" if interval else "")
    table.add_row(name, first, *(f"{values[key]:.1f}" for key in ("R5", "R10", "MdR", "MnR")))


def chance(candidates: int) -> dict[str, float]:
    """Expected metrics of a random order of ``candidates`` with one right answer."""
    recall = {f"R{k}": 100 * min(k, candidates) / candidates for k in (1, 5, 10)}
    return {**recall, "MdR": (candidates + 1) / 2, "MnR": (candidates + 1) / 2}
