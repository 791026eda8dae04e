"""The losses' benchmarks: all contestants compute the same result."""

from __future__ import annotations

import pytest
import torch

import bench_cdcr
import bench_contrastive
import eager
from drl_fast import reference
from problems import Shape, make_problem

TINY = Shape(6, 5, 3, 16)


@pytest.mark.parametrize("lengths", ["full", "real"])
def test_cdcr_contestants_compute_the_same_thing(lengths: str) -> None:
    problem = make_problem(Shape(6, 32, 5, 16, lengths))
    for full, alphas in ((True, bench_cdcr.FULL_FORM), (False, bench_cdcr.DIAGONAL)):
        loss = reference.cdcr_loss(*problem.inputs(), **alphas)
        want = (loss.detach(), *torch.autograd.grad(loss, problem.leaves()))
        for contestant in bench_cdcr.COMPARISON.modes["pairs"][1:]:
            if (contestant.name in ("full", "eager_full", "outer")) != full:
                continue
            for ours, theirs in zip(contestant.make(problem)(), want, strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3, msg=lambda m, n=contestant.name: n + m)


def test_row_contestants_compute_the_same_thing() -> None:
    made = {c.name: c.make(make_problem(TINY)) for c in bench_cdcr.COMPARISON.modes["rows"][1:]}
    for pair in (("full", "eager_full"), ("full", "outer"), ("diagonal", "eager_diagonal")):
        for one, other in zip(*(made[name]() for name in pair), strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_contrastive_contestants_compute_the_same_thing() -> None:
    problem = make_problem(TINY)
    scaled = reference.token_interaction(*problem.inputs()) * bench_contrastive.SCALE
    assert isinstance(scaled, torch.Tensor)
    loss = reference.info_nce(scaled, 1.0)
    want = (loss.detach(), *torch.autograd.grad(loss, problem.leaves()))
    for contestant in bench_contrastive.CONTESTANTS[1:]:
        for ours, theirs in zip(contestant.make(problem)(), want, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


def test_the_outer_form_is_skipped_if_it_cannot_fit() -> None:
    outer = bench_cdcr.COMPARISON.modes["pairs"][-1]
    assert outer.needs(Shape(48)) == pytest.approx(4.8e9, rel=0.02)
    refused = outer.refusal(Shape(1 << 20), "cpu")
    assert refused is not None
    assert refused.startswith("skipped: needs about")


def test_diagonal_of_the_product_is_the_channels_form() -> None:
    x, y, w = torch.randn(20, 4), torch.randn(20, 4), torch.rand(20)
    torch.testing.assert_close(eager.by_channel(x, y, w, 7), eager.by_product(x, y, w, 7).diagonal())
    torch.testing.assert_close(eager.by_outer(x, y, w, 7), eager.by_product(x, y, w, 7))
