"""The contrastive loss straight from tokens, against the interaction followed by InfoNCE, and against eager code.

    python benchmarks/bench_contrastive.py            # under two minutes on two cores
    python benchmarks/bench_contrastive.py --full     # the whole grid

Time of a training step where all fit, peak memory beyond the inputs, and the largest batch in a
budget. Writes ``<out>/<machine>/contrastive.json``,
``contrastive_time.png`` and ``contrastive_memory.png``.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import Progress

if str(Path(__file__).resolve().parents[1]) not in sys.path:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import contestants as who
from benchmarks import eager, harness, loss_tables, plots, tables
from benchmarks.contestants import Contestant
from benchmarks.harness import Call
from benchmarks.problem import Problem, Shape, make_problem
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
from drl_fast import functional

SCALE = 100.0  # CLIP's upper limit of the factor
SMALL = Shape(0, 16, 8, 128)
WIDE = Shape(0)


def at(family: Shape, *batches: int) -> tuple[Shape, ...]:
    return tuple(replace(family, batch=batch) for batch in batches)


@dataclass(frozen=True)
class Plan:
    """What one run measures."""

    times: tuple[Shape, ...]
    memory: dict[str, tuple[Shape, ...]]
    budgets: tuple[tuple[Shape, int], ...]  # (family of shapes, megabytes)
    seconds: float
    rounds: int


QUICK = Plan(
    (*at(SMALL, 256, 512), *at(WIDE, 128, 256)),
    {
        "fused": (*at(SMALL, 1024, 4096), *at(WIDE, 512)),
        "two_steps": (*at(SMALL, 1024, 4096), *at(WIDE, 512)),
        "eager": (*at(SMALL, 256, 512), *at(WIDE, 512)),
    },
    ((SMALL, 100),),
    1.0,
    3,
)
FULL = Plan(
    (*at(SMALL, 256, 512, 1024), *at(WIDE, 64, 128, 256, 512), Shape(256, lengths="real")),
    {
        "fused": (*at(SMALL, 512, 1024, 2048, 4096), *at(WIDE, 256, 512, 1024)),
        "two_steps": (*at(SMALL, 512, 1024, 2048, 4096), *at(WIDE, 256, 512, 1024)),
        "eager": (*at(SMALL, 256, 512, 1024), *at(WIDE, 256, 512)),
    },
    ((SMALL, 100),),
    2.0,
    5,
)


def _fused(problem: Problem) -> Call:
    return lambda: functional.token_contrastive_loss(*problem.inputs(), logit_scale=SCALE)


def _two_steps(problem: Problem) -> Call:
    return lambda: functional.info_nce(functional.token_interaction(*problem.inputs()), SCALE)


def _eager(problem: Problem) -> Call:
    return lambda: eager.contrastive_loss(eager.token_interaction(*problem.inputs()), SCALE)


CONTESTANTS = (
    Contestant(who.YARDSTICK, "torch.mm", who.dense_product, "one dense product of all padded tokens, nothing else"),
    Contestant("fused", "drl-fast", _fused, "drl_fast.functional.token_contrastive_loss"),
    Contestant("two_steps", "drl-fast, two steps", _two_steps, "info_nce(token_interaction(...)), which keeps matches"),
    Contestant(
        "eager",
        "eager PyTorch",
        _eager,
        "interaction and loss in eager code (benchmarks/eager.py)",
        needs=who.similarities(3, 3),
    ),
)
BY_NAME = {c.name: c for c in CONTESTANTS}


def training_call(contestant: Contestant, problem: Problem) -> Call:
    """The loss and the gradients of features and weights; the yardstick is its product alone."""
    forward = contestant.make(problem)
    return forward if contestant.name == who.YARDSTICK else who.loss_step(forward, problem.leaves())


def measure_time(shape: Shape, plan: Plan, device: str) -> dict[str, Any]:
    problem = make_problem(shape, device, train=True)
    calls, absent = take_part(
        CONTESTANTS, lambda c: training_call(c, problem), lambda c: c.refusal(shape, device, "train")
    )
    times = harness.interleave(calls, device, plan.seconds, plan.rounds)
    results = harness.summarize(times, who.YARDSTICK)
    # The limits are on these ratios, so they too are taken within a round.
    against = {
        name: harness.spread([ours / theirs for ours, theirs in zip(times["fused"], times[name], strict=True)])
        for name in ("eager", "two_steps")
        if name in times and "fused" in times
    }
    return {"shape": shape.as_dict(), "mode": "train", "results": results, "against": against, "absent": absent}


def memory_step(contestant: str, shape: dict[str, Any], device: str, threads: int) -> tuple[Call, Call, str]:
    """Factory for a worker: a training step. Inputs count as inputs, gradients as results."""
    torch.set_num_threads(threads)
    full = Shape(**shape)
    tiny = make_problem(replace(full, batch=4), device, train=True)
    chosen = BY_NAME[contestant]
    return training_call(chosen, tiny), training_call(chosen, make_problem(full, device, train=True)), device


def run(plan: Plan, device: str, threads: int, progress: Progress) -> dict[str, Any]:
    """Measure everything a plan names."""
    result = harness.record("contrastive", device, threads, {"full": plan is FULL, "logit_scale": SCALE})
    result["contestants"] = {c.name: c.describe() for c in CONTESTANTS}
    result["time"] = [
        measure_time(shape, plan, device) for shape in tracked(progress, "time", plan.times, lambda job: job.label())
    ]

    def memory(name: str, shape: Shape) -> dict[str, Any]:
        return memory_apart("benchmarks.bench_contrastive:memory_step", BY_NAME[name], shape, device, threads)

    sizes = [(name, shape) for name, shapes in plan.memory.items() for shape in shapes]
    result["memory"] = [
        memory(name, shape)
        for name, shape in tracked(progress, "memory", sizes, lambda job: f"{job[0]} at {job[1].label()}")
    ]
    result["budget"] = largest_batches(progress, memory, result["memory"], plan.memory, plan.budgets)
    return result


def main(
    full: Annotated[bool, typer.Option(help="The whole grid.")] = False,
    device: Device = "cpu",
    threads: Threads = THREADS,
    out: Out = OUT,
) -> None:
    """Measure the contrastive loss beside what it replaces."""
    torch.set_num_threads(threads)
    plan = FULL if full else QUICK
    conduct(
        "contrastive",
        lambda bars: run(plan, device, threads, bars),
        loss_tables.CONTRASTIVE.values(),
        (tables.machine_line,),
        plots.draw_contrastive,
        out,
    )


if __name__ == "__main__":
    typer.run(main)
