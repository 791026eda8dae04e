"""The token interaction against what people use today: time, peak memory, and the largest batch in a budget.

    python benchmarks/bench_wti.py            # under two minutes on two cores
    python benchmarks/bench_wti.py --full     # the whole grid

Prints tables and writes ``<out>/<machine>/wti.json``, ``wti_time.png`` and ``wti_memory.png``. How time and memory are
taken is said in benchmarks/harness.py, who takes part in benchmarks/contestants.py.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import Progress

if str(Path(__file__).resolve().parents[1]) not in sys.path:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import contestants as who
from benchmarks import harness, plots, tables
from benchmarks.contestants import Contestant
from benchmarks.problem import Shape, make_problem
from benchmarks.session import (
    OUT,
    THREADS,
    Device,
    Out,
    Threads,
    conduct,
    largest_batches,
    memory_apart,
    take_part,
    tracked,
)

QUICK_TIMES = (
    Shape(8, dim=64),
    Shape(8),
    Shape(64),
    Shape(128),
    Shape(256),
    Shape(64, 64, 64),
    Shape(256, lengths="real"),
)
FULL_TIMES = (
    *QUICK_TIMES[:2],
    Shape(8, 64, 64, 64),
    Shape(32),
    Shape(64),
    Shape(128),
    Shape(256),
    Shape(512),
    Shape(64, 64, 64),
    Shape(128, 64, 64),
    Shape(128, 77, 20),
    Shape(128, dim=768),
    Shape(128, dtype="bfloat16"),
    Shape(128, lengths="real"),
    Shape(256, lengths="real"),
    Shape(512, lengths="real"),
)
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
    FULL_TIMES,
    (Shape(128), Shape(256), Shape(64, 64, 64), Shape(256, lengths="real")),
    {
        "drl_fast": (128, 256, 512, 1024, 2048, 4096),
        "eager": (128, 256, 512, 1024),
        "compile": (128, 256, 512, 1024),
    },
    (500, 2000),
    2.0,
    7,
)


def measure_time(shape: Shape, mode: str, plan: Plan, device: str) -> dict[str, Any]:
    """All contestants of one mode at one shape, side by side."""
    problem = make_problem(shape, device, train=True)

    def refusal(contestant: Contestant) -> str | None:
        if contestant.name == "compile" and shape not in plan.compiled:
            return "compiling takes longer than measuring"
        return contestant.refusal(shape, device, mode)

    calls, absent = take_part(who.MODES[mode], lambda c: who.make_call(c, problem, mode), refusal)
    times = harness.interleave(calls, device, plan.seconds, plan.rounds)
    return {
        "shape": shape.as_dict(),
        "mode": mode,
        "results": harness.summarize(times, who.YARDSTICK),
        "absent": absent,
    }


def run(plan: Plan, device: str, threads: int, progress: Progress) -> dict[str, Any]:
    """Measure everything a plan names."""
    result = harness.record("wti", device, threads, {"full": plan is FULL})
    names = {c.name: c for mode in who.MODES.values() for c in mode}
    result["contestants"] = {name: c.describe() for name, c in names.items()}

    jobs = [(shape, mode) for shape in plan.times for mode in ("forward", "train")]
    jobs += [(shape, "maxsim") for shape in ONE_WAY]
    result["time"] = [
        measure_time(shape, mode, plan, device)
        for shape, mode in tracked(progress, "time", jobs, lambda job: f"{job[0].label()} {job[1]}")
    ]

    def memory(name: str, shape: Shape) -> dict[str, Any]:
        return memory_apart("benchmarks.contestants:memory_step", who.BY_NAME[name], shape, device, threads)

    sizes = [(name, batch) for name, batches in plan.memory.items() for batch in batches]
    result["memory"] = [
        memory(name, Shape(batch)) for name, batch in tracked(progress, "memory", sizes, "{0[0]} at {0[1]}".format)
    ]
    budgets = [(Shape(0), budget) for budget in plan.budgets]
    result["budget"] = largest_batches(progress, memory, result["memory"], plan.memory, budgets)
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
    device: Device = "cpu",
    threads: Threads = THREADS,
    out: Out = OUT,
) -> None:
    """Measure the token interaction beside what it replaces."""
    torch.set_num_threads(threads)
    plan = FULL if full else QUICK
    lines = (tables.machine_line, tables.yardstick_line) if device == "cpu" else (tables.machine_line,)
    conduct("wti", lambda bars: run(plan, device, threads, bars), tables.ALL.values(), lines, plots.draw, out)


if __name__ == "__main__":
    typer.run(main)
