"""The channel decorrelation losses against eager code and against the matrix products they contain.

    python benchmarks/bench_cdcr.py [--quick | --full]

Forward and backward of ``cross_correlation_loss`` on N = B Nt rows ("rows") and of ``cdcr_loss`` on B pairs ("pairs"),
in the full form (``alpha_off > 0``) and the diagonal one (``alpha_off = 0``, as published). The bare products are those
of the full form: (D, N) x (N, D) forward, twice (N, D) x (D, D) backward; for ``cdcr_loss`` these for words and for
frames. ``--full`` needs 5 GB for the public code's form at 48 pairs. Writes ``<out>/<machine>/cdcr.json`` and its
pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import eager
from comparison import Comparison, Contestant, Plan, gradient_step, loss_step, main
from drl_fast import functional
from harness import Call
from problems import Problem, Shape, batches

FULL_FORM = {"alpha_on": 1.0, "alpha_off": 0.06}  # the public code's defaults
DIAGONAL = {"alpha_on": 0.11, "alpha_off": 0.0}  # as published for WTI


# --- cross_correlation_loss: N rows -----------------------------------------------------------------------------------
def partners(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows x, their partners y = x + noise, and weights."""
    x = problem.text.detach().flatten(0, 1)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
    weight = problem.text_weight.detach().flatten()
    return x.requires_grad_(), (x + noise).detach().requires_grad_(), weight.requires_grad_()


def our_rows(alphas: dict[str, float]) -> Callable[[Problem], Call]:
    def make(problem: Problem) -> Call:
        rows, divisor = partners(problem), problem.shape.batch
        return gradient_step(lambda: functional.cross_correlation_loss(*rows, divisor=divisor, **alphas), rows)

    return make


def eager_rows(correlate: eager.Correlate, alphas: dict[str, float]) -> Callable[[Problem], Call]:
    def make(problem: Problem) -> Call:
        rows, divisor = partners(problem), problem.shape.batch
        return gradient_step(lambda: eager.decorrelation(correlate(*rows, divisor), **alphas), rows)

    return make


# --- cdcr_loss: B pairs -----------------------------------------------------------------------------------------------
def our_pairs(alphas: dict[str, float]) -> Callable[[Problem], Call]:
    return loss_step(lambda problem: functional.cdcr_loss(*problem.inputs(), **alphas))


def eager_pairs(correlate: eager.Correlate, alphas: dict[str, float]) -> Callable[[Problem], Call]:
    return loss_step(lambda p: eager.decorrelation(eager.pair_correlation(p.inputs(), correlate), **alphas))


# --- who is measured --------------------------------------------------------------------------------------------------
def products(*rows: Tensor) -> Call:
    """Multiply as the full form does: each matrix with its partners forward, then with D x D for two gradients."""
    square = torch.randn(rows[0].shape[1], rows[0].shape[1]).to(rows[0])
    return lambda: [torch.mm(left, right) for x in rows for left, right in ((x.T, x), (x, square), (x, square))]


def outer_bytes(shape: Shape) -> float:
    """Three N x D x D tensors of words in a training step; those of frames are smaller and come after."""
    return 3 * 4.0 * shape.batch * shape.nt * shape.dim**2


def contestants(
    yardstick: Callable[[Problem], Call], ours: Callable[..., Any], plain: Callable[..., Any]
) -> tuple[Contestant, ...]:
    product = "the formula with one matrix product, in eager PyTorch (benchmarks/eager.py)"
    channel = "the diagonal alone, element by element, in eager PyTorch"
    public = "as the public code computes it, full form; matches as in the eager forms"
    return (
        Contestant("products", "bare products", yardstick, "torch.mm of the full form's products, three a side"),
        Contestant("full", "drl-fast, full", ours(FULL_FORM), "alpha_off > 0"),
        Contestant("diagonal", "drl-fast, diagonal", ours(DIAGONAL), "alpha_off = 0, as published"),
        Contestant("eager_full", "eager product, full", plain(eager.by_product, FULL_FORM), product),
        Contestant("eager_diagonal", "eager, diagonal", plain(eager.by_channel, DIAGONAL), channel),
        Contestant("outer", "N x D x D form", plain(eager.by_outer, FULL_FORM), public, outer_bytes, once=True),
    )


COMPARISON = Comparison(
    "cdcr",
    {
        "rows": contestants(lambda problem: products(problem.rows()[0]), our_rows, eager_rows),
        "pairs": contestants(lambda problem: products(*problem.rows()), our_pairs, eager_pairs),
    },
    yardstick="products",
    step="pairs",
)


def _plan(minutes: float, pairs: tuple[int, ...], outer: tuple[int, ...], **rest: Any) -> Plan:
    """Time the public code's form at the batches ``outer`` alone, each with all others beside it."""
    shapes = batches(Shape(0), *pairs)
    slow = batches(Shape(0), *outer)
    known = ("full", "diagonal", "eager_full", "eager_diagonal")
    timed = (*shapes, Shape(128, lengths="real"), *(shape for shape in slow if shape not in shapes))
    times = {"rows": (Shape(48),), "pairs": timed}
    return Plan(minutes, times, {**dict.fromkeys(known, shapes), "outer": slow}, only={"outer": slow}, **rest)


PLANS = {
    "quick": _plan(1, (48,), (8,), seconds=0.5, rounds=5),
    "default": _plan(2, (48, 128), (8,), rounds=5),
    "full": _plan(2, (48, 128, 256, 512), (8, 16, 48), seconds=3.0, rounds=15),
}

if __name__ == "__main__":
    main(COMPARISON, PLANS, __doc__, forms=[FULL_FORM, DIAGONAL])
