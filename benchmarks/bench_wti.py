"""The token interaction against what people use today: time, peak memory, and the largest batch in a budget.

    python benchmarks/bench_wti.py            # under two minutes on two cores
    python benchmarks/bench_wti.py --full     # the whole grid

Prints tables and writes ``<out>/<machine>/wti.json``, ``wti_time.png`` and ``wti_memory.png``. How time and memory are
taken is said in benchmarks/harness.py, who takes part in benchmarks/contestants.py.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if str(Path(__file__).resolve().parents[1]) not in sys.path:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import contestants as who
from benchmarks import harness, plots, tables
from benchmarks.problem import Shape, make_problem

QUICK_TIMES = (
    Shape(8, dim=64), Shape(8), Shape(64), Shape(128), Shape(256), Shape(64, 64, 64),
    Shape(256, lengths="real"),
)  # fmt: skip
FULL_TIMES = (
    *QUICK_TIMES[:2], Shape(8, 64, 64, 64), Shape(32), Shape(64), Shape(128), Shape(256), Shape(512),
    Shape(64, 64, 64), Shape(128, 64, 64), Shape(128, 77, 20), Shape(128, dim=768), Shape(128, dtype="bfloat16"),
    Shape(128, lengths="real"), Shape(256, lengths="real"), Shape(512, lengths="real"),
)  # fmt: skip
ONE_WAY = (Shape(128), Shape(128, lengths="real"))


@dataclass(frozen=True)
class Plan:
    """What one run measures."""

    times: tuple[Shape, ...]
    compiled: tuple[Shape, ...]  # shapes at which torch.compile takes part: compiling takes longer than measuring
    memory: dict[str, tuple[int, ...]]  # batches by contestant
    budgets: tuple[int, ...]  # megabytes
    seconds: float  # of timing for one shape and mode
    rounds: int  # at least


QUICK = Plan(QUICK_TIMES, (Shape(128),), {"drl_fast": (256, 512, 1024), "eager": (256, 512)}, (500,), 1.0, 3)
FULL = Plan(
    FULL_TIMES, (Shape(128), Shape(256), Shape(64, 64, 64), Shape(256, lengths="real")),
    {
        "drl_fast": (128, 256, 512, 1024, 2048, 4096),
        "eager": (128, 256, 512, 1024),
        "compile": (128, 256, 512, 1024),
    },
    (500, 2000), 2.0, 7,
)  # fmt: skip


class Bars:
    """One progress bar over the steps of a section."""

    def __init__(self, progress: Progress, title: str, steps: int) -> None:
        self.progress = progress
        self.task = progress.add_task(title, total=steps, note="")

    def at(self, note: str) -> None:
        self.progress.update(self.task, note=note)

    def done(self) -> None:
        self.progress.update(self.task, advance=1, note="")


def measure_time(shape: Shape, mode: str, plan: Plan, device: str) -> dict[str, Any]:
    """All contestants of one mode at one shape, side by side."""
    problem = make_problem(shape, device, train=True)
    calls: dict[str, harness.Call] = {}
    absent: dict[str, str] = {}
    for contestant in who.MODES[mode]:
        reason = contestant.refusal(shape, device, mode)
        if contestant.name == "compile" and shape not in plan.compiled:
            reason = "compiling takes longer than measuring"
        if reason is not None:
            absent[contestant.name] = reason
            continue
        try:
            call = who.make_call(contestant, problem, mode)
            call()
        except Exception as error:  # a peer that breaks must not end the run, nor go unmentioned
            absent[contestant.name] = f"failed: {type(error).__name__}: {error}".splitlines()[0][:200]
        else:
            calls[contestant.name] = call
    times = harness.interleave(calls, device, plan.seconds, plan.rounds)
    return {
        "shape": shape.as_dict(),
        "mode": mode,
        "results": harness.summarize(times, who.YARDSTICK),
        "absent": absent,
    }


def measure_memory(contestant: str, shape: Shape, device: str, threads: int) -> dict[str, Any]:
    """Peak of one training step beyond its inputs, in a process of its own."""
    by_name = {c.name: c for c in who.INTERACTIONS}
    refused = by_name[contestant].refusal(shape, device, "train")
    found = {"status": refused} if refused else harness.measure_apart(
        "memory", "benchmarks.contestants:memory_step",
        contestant=contestant, shape=asdict(shape), device=device, threads=threads,
    )  # fmt: skip
    return {"contestant": contestant, "shape": shape.as_dict(), **found}


def largest_batch(contestant: str, budget: int, known: dict[int, float], device: str, threads: int) -> dict[str, Any]:
    """The largest batch, to about two percent, whose training step adds at most ``budget`` MB to its inputs.

    Memory is a quadratic in the batch; two measured points predict where it meets the budget. From there on in strides
    that double until one batch fits and another does not, then halving what is between.
    """
    (b1, m1), (b2, m2) = sorted(known.items())[-2:]
    square = max((m2 / b2 - m1 / b1) / (b2 - b1), 1e-9)  # noise alone could make it negative
    linear = max(m1 / b1 - square * b1, 0.0)
    guess = (-linear + math.sqrt(linear * linear + 4 * square * budget)) / (2 * square)
    step = 8 * max(1, round(guess / 400))
    batch, stride = step * max(1, int(guess / step)), step
    fits: dict[str, Any] | None = None
    fails: dict[str, Any] | None = None
    while not (fits and fails and fails["batch"] - fits["batch"] <= step) and not (fails and fails["batch"] == step):
        found = {"batch": batch, **measure_memory(contestant, Shape(batch), device, threads)}
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


def run(plan: Plan, device: str, threads: int, progress: Progress) -> dict[str, Any]:
    """Measure everything a plan names."""
    result = harness.record("wti", device, threads, {"full": plan is FULL})
    names = {c.name: c for mode in who.MODES.values() for c in mode}
    result["contestants"] = {name: c.describe() for name, c in names.items()}

    jobs = [(shape, mode) for shape in plan.times for mode in ("forward", "train")]
    jobs += [(shape, "maxsim") for shape in ONE_WAY]
    bars = Bars(progress, "time", len(jobs))
    result["time"] = []
    for shape, mode in jobs:
        bars.at(f"{shape.label()} {mode}")
        result["time"].append(measure_time(shape, mode, plan, device))
        bars.done()

    sizes = [(name, batch) for name, batches in plan.memory.items() for batch in batches]
    bars = Bars(progress, "memory", len(sizes))
    result["memory"] = []
    for name, batch in sizes:
        bars.at(f"{name} at {batch}")
        result["memory"].append(measure_memory(name, Shape(batch), device, threads))
        bars.done()

    bars = Bars(progress, "largest batch", len(plan.budgets) * len(plan.memory))
    result["budget"] = []
    for budget in plan.budgets:
        for name in plan.memory:
            bars.at(f"{name} in {budget} MB")
            known = {
                row["shape"]["batch"]: row["mb"]
                for row in result["memory"]
                if row["contestant"] == name and row["status"] == "ok"
            }
            if len(known) >= 2:
                result["budget"].append(largest_batch(name, budget, known, device, threads))
            bars.done()
    if device == "cpu":
        result["yardstick"] = measure_yardstick(Shape(256), threads)
    return result


def measure_yardstick(shape: Shape, threads: int) -> dict[str, Any]:
    """How good a yardstick torch.mm is: the same product by numpy's BLAS."""
    times = {
        by: harness.measure_apart("time", "benchmarks.contestants:product", by=by, shape=asdict(shape), threads=threads)
        for by in ("mm", "numpy")
    }
    return {"shape": shape.as_dict(), "products": times, "blas": who.other_blas()}


def main(
    full: Annotated[bool, typer.Option(help="The whole grid (about a quarter of an hour on two cores).")] = False,
    device: Annotated[str, typer.Option(help="cpu, or cuda where there is one.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = torch.get_num_threads(),
    out: Annotated[Path, typer.Option(help="Results go to OUT/<machine>/.")] = Path("bench_out"),
) -> None:
    """Measure the token interaction beside what it replaces."""
    console = Console()
    torch.set_num_threads(threads)
    plan = FULL if full else QUICK
    begin = time.perf_counter()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        result = run(plan, device, threads, progress)
    result["seconds"] = time.perf_counter() - begin
    folder = out / result["machine"]["slug"]
    harness.save(result, folder / "wti.json")
    result = harness.load(folder / "wti.json")
    console.print(tables.machine_line(result), highlight=False)
    if "yardstick" in result:
        console.print(tables.yardstick_line(result), highlight=False)
    for table in tables.ALL.values():
        console.print(tables.rich_table(table(result)))
    for picture in plots.draw(result, folder):
        console.print(f"wrote {picture}", highlight=False)
    console.print(f"wrote {folder / 'wti.json'} after {result['seconds']:.0f} s", highlight=False)


if __name__ == "__main__":
    typer.run(main)
