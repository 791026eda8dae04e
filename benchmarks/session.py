"""What the benchmarks' runs share: who takes part, progress, the largest batch in a budget, saving and showing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import harness, tables
from benchmarks.contestants import Contestant
from benchmarks.harness import Call
from benchmarks.problem import Shape

# The options that every benchmark has.
Device = Annotated[str, typer.Option(help="cpu, or cuda where there is one.")]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads.")]
Out = Annotated[Path, typer.Option(help="Results go to OUT/<machine>/.")]
THREADS, OUT = torch.get_num_threads(), Path("bench_out")

Job = TypeVar("Job")


def tracked(progress: Progress, title: str, jobs: Sequence[Job], label: Callable[[Job], str]) -> Iterator[Job]:
    """The jobs of a section, one after the other, behind one progress bar."""
    task = progress.add_task(title, total=len(jobs), note="")
    for job in jobs:
        progress.update(task, note=label(job))
        yield job
        progress.update(task, advance=1, note="")


def take_part(
    contestants: Iterable[Contestant],
    make: Callable[[Contestant], Call],
    refusal: Callable[[Contestant], str | None],
    warm_up: int = 1,
) -> tuple[dict[str, Call], dict[str, str]]:
    """The warmed-up calls of those who can, and why the others do not."""
    calls: dict[str, Call] = {}
    absent: dict[str, str] = {}
    for contestant in contestants:
        reason = refusal(contestant)
        if reason is not None:
            absent[contestant.name] = reason
            continue
        try:
            call = make(contestant)
            for _ in range(warm_up):
                call()
        except Exception as error:  # a peer that breaks must not end the run, nor go unmentioned
            absent[contestant.name] = f"failed: {type(error).__name__}: {error}".splitlines()[0][:200]
        else:
            calls[contestant.name] = call
    return calls, absent


def memory_apart(
    factory: str, contestant: Contestant, shape: Shape, device: str, threads: int, **more: Any
) -> dict[str, Any]:
    """Peak of one training step beyond its inputs, in a process of its own. ``factory`` as in harness.worker."""
    refused = contestant.refusal(shape, device, "train")
    found = (
        {"status": refused}
        if refused
        else harness.measure_apart(
            "memory", factory, contestant=contestant.name, shape=shape.as_dict(), device=device, threads=threads, **more
        )
    )
    return {"contestant": contestant.name, "shape": shape.as_dict(), **found}


def known_memory(rows: list[dict[str, Any]], contestant: str, like: Shape) -> dict[int, float]:
    """{batch: MB} that was measured of one contestant at shapes that differ from ``like`` in their batch alone."""
    return {
        row["shape"]["batch"]: row["mb"]
        for row in rows
        if row["contestant"] == contestant
        and row["status"] == "ok"
        and {**row["shape"], "batch": like.batch} == like.as_dict()
    }


def largest_batch(
    measure: Callable[[int], dict[str, Any]], contestant: str, budget: int, known: dict[int, float]
) -> dict[str, Any]:
    """The largest batch, to about two percent, whose training step adds at most ``budget`` MB to its inputs.

    Two measured points predict where memory meets the budget. From there on in strides that double until one batch fits
    and another does not, then halving what is between. ``measure(batch)`` gives ``status`` and ``mb``.
    """
    guess = _predict(budget, known)
    step = 8 * max(1, round(guess / 400))
    batch, stride = step * max(1, int(guess / step)), step
    fits: dict[str, Any] | None = None
    fails: dict[str, Any] | None = None
    while not (fits and fails and fails["batch"] - fits["batch"] <= step) and not (fails and fails["batch"] == step):
        found = {"batch": batch, **measure(batch)}
        if found["status"] == "ok" and found["mb"] <= budget:
            fits = found
        else:
            fails = found
        if fits and fails:
            batch = (fits["batch"] + fails["batch"]) // (2 * step) * step
        else:
            batch = max(batch + (stride if fits else -stride), step)
            stride *= 2
    keys = ("batch", "status", "mb")
    return {
        "contestant": contestant,
        "budget_mb": budget,
        "fits": fits and {k: fits[k] for k in keys},
        "fails": fails and {k: fails.get(k) for k in keys},
    }


def largest_batches(
    progress: Progress,
    measure: Callable[[str, Shape], dict[str, Any]],
    rows: list[dict[str, Any]],
    names: Iterable[str],
    budgets: Iterable[tuple[Shape, int]],
) -> list[dict[str, Any]]:
    """:func:`largest_batch` of every contestant of which two points are known, for each (family of shapes, MB)."""

    def of(name: str, family: Shape, budget: int) -> list[dict[str, Any]]:
        known = known_memory(rows, name, family)
        if len(known) < 2:
            return []
        return [largest_batch(lambda batch: measure(name, replace(family, batch=batch)), name, budget, known)]

    jobs = [(name, family, budget) for family, budget in budgets for name in names]
    label = "{0[0]} in {0[2]} MB".format
    return [found for job in tracked(progress, "largest batch", jobs, label) for found in of(*job)]


def _predict(budget: float, known: dict[int, float]) -> float:
    """The batch at which memory meets the budget: a quadratic without constant, or a line where growth is no faster."""
    (b1, m1), (b2, m2) = sorted(known.items())[-2:]
    square = (m2 / b2 - m1 / b1) / (b2 - b1)
    linear = m1 / b1 - square * b1
    if square > 0 and linear >= 0:
        return (-linear + math.sqrt(linear * linear + 4 * square * budget)) / (2 * square)
    if square > 0:
        return b2 * math.sqrt(budget / m2)
    # Noise alone could make it fall.
    slope = max((m2 - m1) / (b2 - b1), m2 / b2 / 10)
    return max(b2 + (budget - m2) / slope, 1.0)


def conduct(
    name: str,
    run: Callable[[Progress], dict[str, Any]],
    shown: Iterable[Callable[[dict[str, Any]], tables.Table]],
    lines: Iterable[Callable[[dict[str, Any]], str]],
    draw: Callable[[dict[str, Any], Path], list[Path]],
    out: Path,
) -> None:
    """Run, write ``<out>/<machine>/<name>.json``, print its lines and tables, draw its pictures."""
    console = Console()
    begin = time.perf_counter()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        result = run(progress)
    result["seconds"] = time.perf_counter() - begin
    folder = out / result["machine"]["slug"]
    harness.save(result, folder / f"{name}.json")
    result = harness.load(folder / f"{name}.json")
    for line in lines:
        console.print(line(result), highlight=False)
    for table in shown:
        console.print(tables.rich_table(table(result)))
    for picture in draw(result, folder):
        console.print(f"wrote {picture}", highlight=False)
    console.print(f"wrote {folder / f'{name}.json'} after {result['seconds']:.0f} s", highlight=False)
