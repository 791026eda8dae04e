"""The channel decorrelation losses against the matrix products they contain and against what people use today.

    python benchmarks/bench_cdcr.py            # under two minutes on two cores
    python benchmarks/bench_cdcr.py --full     # more pairs, and the public code's form where memory allows

Forward and backward of ``cross_correlation_loss`` on N = B Nt rows and of ``cdcr_loss`` on B pairs, in the full form
(``alpha_off > 0``) and the diagonal one (``alpha_off = 0``, as published). The yardstick is the bare products of the
full form: (D, N) x (N, D) forward, twice (N, D) x (D, D) backward; for ``cdcr_loss`` these for words and for frames.
Writes ``<out>/<machine>/cdcr.json``, ``cdcr_time.png`` and ``cdcr_memory.png``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import Progress
from torch import Tensor

if str(Path(__file__).resolve().parents[1]) not in sys.path:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import contestants as who
from benchmarks import eager, harness, loss_tables, plots, tables
from benchmarks.contestants import Contestant
from benchmarks.harness import Call
from benchmarks.problem import Problem, Shape, make_problem
from benchmarks.session import OUT, THREADS, Device, Out, Threads, conduct, memory_apart, take_part, tracked
from drl_fast import functional

YARDSTICK = "products"
FULL_FORM = {"alpha_on": 1.0, "alpha_off": 0.06}  # the public code's defaults
DIAGONAL = {"alpha_on": 0.11, "alpha_off": 0.0}  # as published for WTI


@dataclass(frozen=True)
class Plan:
    """What one run measures."""

    rows: tuple[Shape, ...]  # of cross_correlation_loss
    pairs: tuple[Shape, ...]  # of cdcr_loss
    outer: tuple[Shape, ...]  # where the N x D x D form takes part in time, once: it takes seconds
    memory: dict[str, tuple[Shape, ...]]
    seconds: float
    rounds: int


def _plan(batches: tuple[int, ...], outer: tuple[int, ...], **rest: Any) -> Plan:
    shapes = tuple(map(Shape, batches))
    known = ("full", "diagonal", "eager_full", "eager_diagonal")
    memory = {**dict.fromkeys(known, shapes), "outer": tuple(map(Shape, outer))}
    return Plan((Shape(48),), (*shapes, Shape(128, lengths="real")), (*map(Shape, outer),), memory, **rest)


QUICK = _plan((48, 128), (8,), seconds=1.0, rounds=5)
FULL = _plan((48, 128, 256, 512), (8, 16, 48), seconds=3.0, rounds=15)


# --- cross_correlation_loss: N rows -----------------------------------------------------------------------------------
def partners(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Rows x, their partners y = x + noise, and weights."""
    generator = torch.Generator().manual_seed(1)
    x = problem.text.detach().flatten(0, 1)
    noise = torch.randn(x.shape, generator=generator).to(x)
    weight = problem.text_weight.detach().flatten()
    return x.requires_grad_(), (x + noise).detach().requires_grad_(), weight.requires_grad_()


def _ours_rows(alphas: dict[str, float]) -> Callable[[Problem], Call]:
    def make(problem: Problem) -> Call:
        x, y, weight = partners(problem)
        batch = problem.shape.batch
        loss = functional.cross_correlation_loss
        return who.loss_step(lambda: loss(x, y, weight, divisor=batch, **alphas), (x, y, weight))

    return make


def _eager_rows(correlate: eager.Correlate, alphas: dict[str, float]) -> Callable[[Problem], Call]:
    def make(problem: Problem) -> Call:
        x, y, weight = partners(problem)
        batch = problem.shape.batch
        return who.loss_step(lambda: eager.decorrelation(correlate(x, y, weight, batch), **alphas), (x, y, weight))

    return make


def _products(*rows: Tensor) -> Call:
    """The three products of each matrix of rows: with its partners forward, with D x D for two gradients."""
    square = torch.randn(rows[0].shape[1], rows[0].shape[1]).to(rows[0])

    def call() -> list[Tensor]:
        done = []
        for x in rows:
            done += [torch.mm(x.T, x), torch.mm(x, square), torch.mm(x, square)]
        return done

    return call


# --- cdcr_loss: B pairs -----------------------------------------------------------------------------------------------
def _ours_pairs(alphas: dict[str, float]) -> Callable[[Problem], Call]:
    def make(problem: Problem) -> Call:
        return who.loss_step(lambda: functional.cdcr_loss(*problem.inputs(), **alphas), problem.leaves())

    return make


def _eager_pairs(correlate: eager.Correlate, alphas: dict[str, float]) -> Callable[[Problem], Call]:
    def make(problem: Problem) -> Call:
        def forward() -> Tensor:
            return eager.decorrelation(eager.pair_correlation(*problem.inputs(), correlate), **alphas)

        return who.loss_step(forward, problem.leaves())

    return make


def _outer_bytes(shape: Shape, train: bool) -> float:
    """Three N x D x D tensors of words in a training step; those of frames are smaller and come after."""
    return 3 * 4.0 * shape.batch * shape.nt * shape.dim**2


_ABOUT = (
    ("full", "drl-fast, full", "alpha_off > 0"),
    ("diagonal", "drl-fast, diagonal", "alpha_off = 0, as published"),
    (
        "eager_full",
        "eager product, full",
        "the formula with one matrix product, in eager PyTorch (benchmarks/eager.py)",
    ),
    ("eager_diagonal", "eager, diagonal", "the diagonal alone, element by element, in eager PyTorch"),
    ("outer", "N x D x D form", "as the public code computes it, full form; matches as in the eager forms"),
)


def _contestants(
    yardstick: Callable[[Problem], Call], ours: Callable[..., Any], plain: Callable[..., Any]
) -> tuple[Contestant, ...]:
    makers = {
        "full": ours(FULL_FORM),
        "diagonal": ours(DIAGONAL),
        "eager_full": plain(eager.by_product, FULL_FORM),
        "eager_diagonal": plain(eager.by_channel, DIAGONAL),
        "outer": plain(eager.by_outer, FULL_FORM),
    }
    return (
        Contestant(YARDSTICK, "bare products", yardstick, "torch.mm of the full form's products, three a side"),
        *(
            Contestant(name, label, makers[name], note, needs=_outer_bytes if name == "outer" else who.nothing)
            for name, label, note in _ABOUT
        ),
    )


MODES = {
    "rows": _contestants(lambda p: _products(p.text.detach().flatten(0, 1)), _ours_rows, _eager_rows),
    "pairs": _contestants(
        lambda p: _products(p.text.detach().flatten(0, 1), p.video.detach().flatten(0, 1)), _ours_pairs, _eager_pairs
    ),
}


# --- measuring --------------------------------------------------------------------------------------------------------
def measure_time(shape: Shape, mode: str, plan: Plan, device: str) -> dict[str, Any]:
    """All contestants side by side; the slow form once, after them, without a warm-up."""
    problem = make_problem(shape, device, train=True)
    *quick, slow = MODES[mode]
    calls, absent = take_part(quick, lambda c: c.make(problem), lambda c: c.refusal(shape, device, "train"))
    results = harness.summarize(harness.interleave(calls, device, plan.seconds, plan.rounds), YARDSTICK)
    reason = "it takes seconds" if shape not in plan.outer else slow.refusal(shape, device, "train")
    if reason is None:
        once = harness.seconds(slow.make(problem), 1, device)
        base = results[YARDSTICK]["ms"]["median"] / 1e3
        results |= {k: v for k, v in harness.summarize({"": [base], slow.name: [once]}, "").items() if k}
    else:
        absent[slow.name] = reason
    return {"shape": shape.as_dict(), "mode": mode, "results": results, "absent": absent}


def memory_step(contestant: str, shape: dict[str, Any], device: str, threads: int) -> tuple[Call, Call, str]:
    """Factory for a worker: a training step of ``cdcr_loss``. Inputs count as inputs, gradients as results."""
    torch.set_num_threads(threads)
    chosen, full = next(c for c in MODES["pairs"] if c.name == contestant), Shape(**shape)
    tiny = make_problem(replace(full, batch=2), device, train=True)
    return chosen.make(tiny), chosen.make(make_problem(full, device, train=True)), device


def run(plan: Plan, device: str, threads: int, progress: Progress) -> dict[str, Any]:
    """Measure everything a plan names."""
    result = harness.record("cdcr", device, threads, {"full": plan is FULL, "forms": [FULL_FORM, DIAGONAL]})
    by_name = {c.name: c for c in MODES["pairs"]}
    result["contestants"] = {name: c.describe() for name, c in by_name.items()}
    jobs = [(shape, mode) for mode, shapes in (("rows", plan.rows), ("pairs", plan.pairs)) for shape in shapes]
    # Where it is slow, it is measured for the pairs as well.
    jobs += [(shape, "pairs") for shape in plan.outer if shape not in plan.pairs]
    result["time"] = [
        measure_time(shape, mode, plan, device)
        for shape, mode in tracked(progress, "time", jobs, lambda job: f"{job[0].label()} {job[1]}")
    ]
    sizes = [(name, shape) for name, shapes in plan.memory.items() for shape in shapes]
    result["memory"] = [
        memory_apart("benchmarks.bench_cdcr:memory_step", by_name[name], shape, device, threads)
        for name, shape in tracked(progress, "memory", sizes, lambda job: f"{job[0]} at {job[1].batch}")
    ]
    return result


def main(
    full: Annotated[bool, typer.Option(help="More pairs, and the N x D x D form at 48 pairs (5 GB).")] = False,
    device: Device = "cpu",
    threads: Threads = THREADS,
    out: Out = OUT,
) -> None:
    """Measure the channel decorrelation losses beside what they replace."""
    torch.set_num_threads(threads)
    plan = FULL if full else QUICK
    shown = loss_tables.CDCR.values()
    conduct("cdcr", lambda bars: run(plan, device, threads, bars), shown, (tables.machine_line,), plots.draw_cdcr, out)


if __name__ == "__main__":
    typer.run(main)
