"""Retrieval metrics: the public code's recorded numbers, the tie rule, several captions a video, bad input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from drl_fast.metrics import retrieval_metrics

GOLDEN = np.load(Path(__file__).parent / "golden" / "metrics.npz")
NAMES = {"R1": "R1", "R5": "R5", "R10": "R10", "MdR": "MedianR", "MnR": "MeanR"}


def test_square_golden() -> None:
    got = retrieval_metrics(torch.from_numpy(GOLDEN["square_sim"]))["t2v"]
    for ours, theirs in NAMES.items():
        assert got[ours] == pytest.approx(float(GOLDEN[f"square_{theirs}"]))


@pytest.mark.parametrize("direction", ["t2v", "v2t"])
def test_several_captions_golden(direction: str) -> None:
    owner = torch.from_numpy(GOLDEN["multi_owner"])
    got = retrieval_metrics(torch.from_numpy(GOLDEN["multi_sim"]), owner)[direction]
    for ours, theirs in NAMES.items():
        # The public code keeps percentages in float32.
        assert got[ours] == pytest.approx(float(GOLDEN[f"multi_{direction}_{theirs}"]), rel=1e-6)


def test_perfect_and_reversed() -> None:
    perfect = retrieval_metrics(torch.eye(20))
    assert perfect["t2v"] == perfect["v2t"] == {"R1": 100, "R5": 100, "R10": 100, "MdR": 1, "MnR": 1}
    worst = retrieval_metrics(-torch.eye(20))
    assert worst["t2v"] == {"R1": 0, "R5": 0, "R10": 0, "MdR": 20, "MnR": 20}


def test_ranks_by_hand() -> None:
    sim = torch.tensor([[0.1, 0.9, 0.3], [0.2, 0.8, 0.1], [0.7, 0.6, 0.5]])
    got = retrieval_metrics(sim)
    # t2v ranks 3, 1, 3; v2t ranks 3, 2, 1
    assert got["t2v"]["MnR"] == pytest.approx(7 / 3)
    assert got["t2v"]["MdR"] == 3
    assert got["v2t"]["MnR"] == 2
    assert got["v2t"]["R1"] == pytest.approx(100 / 3)


def test_ties_go_to_the_earlier_column() -> None:
    """A stable descending sort: a model that scores everything alike gets chance, not 100 %."""
    got = retrieval_metrics(torch.zeros(10, 10))
    for direction in ("t2v", "v2t"):
        assert got[direction]["R1"] == 10
        assert got[direction]["MnR"] == 5.5
        assert got[direction]["MdR"] == 5.5


def test_owner_that_is_the_diagonal_changes_nothing() -> None:
    sim = torch.randn(12, 12)
    assert retrieval_metrics(sim, torch.arange(12)) == retrieval_metrics(sim)


def test_order_of_captions_does_not_matter() -> None:
    sim, owner = torch.randn(20, 6), torch.arange(20) % 6
    order = torch.randperm(20)
    assert retrieval_metrics(sim[order], owner[order]) == retrieval_metrics(sim, owner)


def test_one_pair_and_infinities() -> None:
    assert retrieval_metrics(torch.zeros(1, 1))["t2v"]["R1"] == 100
    got = retrieval_metrics(torch.tensor([[torch.inf, 0.0], [0.0, -torch.inf]]))
    assert got["t2v"]["MnR"] == 1.5


def test_gradient_and_integer_input() -> None:
    sim = torch.eye(3)
    assert retrieval_metrics(sim.clone().requires_grad_()) == retrieval_metrics(sim)
    assert retrieval_metrics(sim.bfloat16()) == retrieval_metrics(sim)


@pytest.mark.parametrize(
    ("sim", "owner", "error", "message"),
    [
        (torch.zeros(3, 4), None, ValueError, "sim must be square.*3 texts x 4 videos.*owner"),
        (torch.zeros(3), None, ValueError, r"sim must be a non-empty \(A, B\) matrix.*\(3,\)"),
        (torch.zeros(0, 0), None, ValueError, "non-empty"),
        (torch.full((2, 2), torch.nan), None, ValueError, "sim must not hold NaN"),
        ([[1.0]], None, TypeError, "sim must be a torch.Tensor.*list"),
        (torch.zeros(3, 2), [0, 1, 1], TypeError, "owner must be a torch.Tensor"),
        (torch.zeros(3, 2), torch.tensor([0.0, 1, 1]), TypeError, "owner must be integer.*float32"),
        (torch.zeros(3, 2), torch.tensor([0, 1]), ValueError, r"owner must be \(A,\) = \(3,\).*\(2,\)"),
        (torch.zeros(3, 2), torch.tensor([0, 1, 2]), ValueError, r"owner must lie in 0\.\.1.*0\.\.2"),
        (torch.zeros(3, 2), torch.tensor([0, -1, 1]), ValueError, r"owner must lie in 0\.\.1.*-1"),
        (torch.zeros(3, 2), torch.tensor([0, 0, 0]), ValueError, "owner must name every video.*video 1"),
    ],
)
def test_bad_input(sim: object, owner: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        retrieval_metrics(sim, owner)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.cfloat], ids=str)
def test_similarities_of_another_kind(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=rf"sim must be floating point, got {dtype}.*sim\.float\(\)"):
        retrieval_metrics(torch.eye(3).to(dtype))


def test_owner_of_any_integer_type() -> None:
    want = retrieval_metrics(torch.eye(3), torch.arange(3))
    for dtype in (torch.uint8, torch.uint16, torch.int16):
        assert retrieval_metrics(torch.eye(3), torch.arange(3).to(dtype)) == want
