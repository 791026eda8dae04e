"""Retrieval metrics: the public code's recorded numbers, ties, several captions per video, bad input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from drl_fast.metrics import dual_softmax_metrics, query_bank_metrics, recall_interval, retrieval_metrics

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
        # The public code computes percentages in float32.
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
    """A stable descending sort: a model with equal scores gets chance, not 100 %."""
    got = retrieval_metrics(torch.zeros(10, 10))
    for direction in ("t2v", "v2t"):
        assert got[direction]["R1"] == 10
        assert got[direction]["MnR"] == 5.5
        assert got[direction]["MdR"] == 5.5


def test_ties_counted_as_the_public_code_does() -> None:
    """The first text ties with one other video and counts ranks 1 and 2; the second and third have rank 1."""
    sim = torch.tensor([[0.5, 0.5, 0.1], [0.2, 0.9, 0.1], [0.3, 0.2, 0.8]])
    assert retrieval_metrics(sim)["t2v"]["R1"] == 100
    public = retrieval_metrics(sim, ties="public")
    assert public["t2v"]["R1"] == 75
    assert public["t2v"]["MnR"] == 5 / 4
    assert public["v2t"]["R1"] == 100
    flat = retrieval_metrics(torch.zeros(4, 4), ties="public")["v2t"]
    assert (flat["R1"], flat["MnR"]) == (25, 2.5)


def test_public_ties_against_the_public_formula() -> None:
    """The public ``compute_metrics`` in numpy, on scores that tie often."""
    sim = np.random.default_rng(0).integers(0, 4, (30, 30)).astype(np.float32)
    for key, scores in (("t2v", sim), ("v2t", sim.T)):
        places = np.where(np.sort(-scores, axis=1) == -np.diag(scores)[:, None])[1]
        got = retrieval_metrics(torch.from_numpy(sim), ties="public")[key]
        assert got["R1"] == pytest.approx(100 * np.mean(places == 0))
        assert got["R5"] == pytest.approx(100 * np.mean(places < 5))
        assert got["MnR"] == pytest.approx(places.mean() + 1)
        assert got["MdR"] == np.median(places) + 1


def test_public_ties_with_several_captions_per_video() -> None:
    """Then the public code gives every text one rank in text-to-video retrieval."""
    owner = torch.tensor([0, 0, 1])
    got = retrieval_metrics(torch.zeros(3, 2), owner, ties="public")
    assert got["t2v"] == retrieval_metrics(torch.zeros(3, 2), owner)["t2v"]
    assert got["v2t"]["R1"] == 50


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
def test_similarities_of_another_dtype(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=rf"sim must be floating point, got {dtype}.*sim\.float\(\)"):
        retrieval_metrics(torch.eye(3).to(dtype))


def test_owner_of_any_integer_type() -> None:
    want = retrieval_metrics(torch.eye(3), torch.arange(3))
    for dtype in (torch.uint8, torch.uint16, torch.int16):
        assert retrieval_metrics(torch.eye(3), torch.arange(3).to(dtype)) == want


# Confidence intervals --------------------------------------------------------------------------------------------


def hits(right: int, count: int) -> torch.Tensor:
    """Make (count, count) similarities whose diagonal wins the first ``right`` rows."""
    sim = torch.eye(count)
    sim[right:] = 1 - sim[right:]
    return sim


def test_interval_of_all_or_no_hits() -> None:
    assert recall_interval(torch.eye(30)) == (100, 100)
    assert recall_interval(1 - torch.eye(30)) == (0, 0)
    assert recall_interval(torch.ones(1, 1)) == (100, 100)


@pytest.mark.parametrize(("right", "count"), [(50, 100), (80, 100), (300, 400)])
def test_interval_is_the_binomial_one(right: int, count: int) -> None:
    """Resampled recalls are binomial: mean p, variance p (1 - p) / N, and nearly normal at these sizes."""
    low, high = recall_interval(hits(right, count))
    share = right / count
    half = 100 * 1.96 * (share * (1 - share) / count) ** 0.5
    assert low == pytest.approx(100 * share - half, abs=1.5)
    assert high == pytest.approx(100 * share + half, abs=1.5)


def test_level_and_seed() -> None:
    sim = hits(60, 100)
    assert recall_interval(sim) == recall_interval(sim)
    inner, outer = recall_interval(sim, level=0.5), recall_interval(sim, level=0.99)
    assert outer[0] < inner[0] < 60 < inner[1] < outer[1]
    assert recall_interval(sim, resamples=50, seed=1) != recall_interval(sim, resamples=50, seed=2)


def test_ties_as_in_the_metrics() -> None:
    """A model with equal scores is right once, for the first column."""
    sim = torch.zeros(20, 20)
    low, high = recall_interval(sim)
    assert low <= retrieval_metrics(sim)["t2v"]["R1"] <= high
    assert high < 20


def test_interval_of_several_captions() -> None:
    """Videos are drawn with all their captions: if 1 caption of 10 is wrong in each, every draw has the same recall."""
    owner = torch.arange(20).repeat_interleave(10)
    sim = torch.eye(20)[owner]
    sim[::10] = 1 - sim[::10]
    assert recall_interval(sim, owner) == (90, 90)
    assert recall_interval(sim, owner, k=20) == (100, 100)
    low, high = recall_interval(sim, owner, direction="v2t")
    assert low <= retrieval_metrics(sim, owner)["v2t"]["R1"] <= high


# Post-processing -------------------------------------------------------------------------------------------------


def test_dual_softmax_by_hand() -> None:
    """Dual softmax lowers the scores of a video that matches every text."""
    sim = torch.tensor([[0.60, 0.50, 0.10], [0.62, 0.61, 0.10], [0.59, 0.10, 0.58]])
    assert retrieval_metrics(sim)["t2v"]["R1"] == pytest.approx(100 / 3)
    weights = torch.exp(100 * sim) / torch.exp(100 * sim).sum(0)
    by_hand = retrieval_metrics(sim * weights)["t2v"]
    found = dual_softmax_metrics(sim)
    assert found["t2v"] == by_hand
    assert found["v2t"] == dual_softmax_metrics(sim.T)["t2v"]
    assert found["t2v"]["R1"] > 60


def test_dual_softmax_of_negative_scores_keeps_their_order() -> None:
    """A small share of a negative score is a larger number: without a shift the worst candidate would come first."""
    sim = torch.tensor([[-0.20, -0.60, -0.70], [-0.65, -0.25, -0.80], [-0.70, -0.60, -0.30]])
    assert retrieval_metrics(sim)["t2v"]["R1"] == 100
    found = dual_softmax_metrics(sim)
    assert (found["t2v"]["R1"], found["v2t"]["R1"]) == (100, 100)
    shifted = sim + 0.8
    assert found == dual_softmax_metrics(shifted)


def test_query_bank_by_hand() -> None:
    sim = torch.tensor([[0.50, 0.49, 0.10], [0.80, 0.10, 0.00], [0.10, 0.20, 0.21]])
    owner = torch.tensor([1, 0, 2])
    # The bank's texts all choose video 0, so its scores are divided by the sum of exponentials over the bank.
    bank = torch.tensor([[0.60, 0.10, 0.00], [0.70, 0.20, 0.10]])
    normalised = torch.exp(20 * sim) / torch.exp(20 * bank).sum(0)
    expected = normalised.clone()
    expected[2] = sim[2]  # no text of the bank chooses its best video
    want = retrieval_metrics(expected, owner)["t2v"]
    found = query_bank_metrics(sim, bank, torch.rand(3, 4), owner)
    assert found["t2v"] == want
    assert want["R1"] > retrieval_metrics(sim, owner)["t2v"]["R1"]
    other = query_bank_metrics(sim.T, torch.rand(5, 3), bank.T, torch.tensor([1, 0, 2]))
    assert other["v2t"]["MnR"] == pytest.approx(retrieval_metrics(expected, owner)["t2v"]["MnR"])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: recall_interval(s[:2]), ValueError, "square without owner"),
        (lambda s: recall_interval(s, level=1.5), ValueError, r"level must be in \(0, 1\), got"),
        (lambda s: recall_interval(s, direction="both"), ValueError, "direction must be one of"),
        (lambda s: recall_interval(s, k=0), ValueError, "k must be a positive integer"),
        (lambda s: dual_softmax_metrics(s, temperature=0), ValueError, "temperature must be positive"),
        (lambda s: dual_softmax_metrics(s, temperature="1"), TypeError, "temperature must be a number, got str"),
        (lambda s: query_bank_metrics(s, s[:, :2], s), ValueError, "text_bank must be .* B = 3"),
        (lambda s: query_bank_metrics(s, s, s[:2]), ValueError, "video_bank must be .* A = 3"),
        (lambda s: query_bank_metrics(s, s, s, beta=-1), ValueError, "beta must be positive"),
    ],
)
def test_bad_options(call: Callable[[torch.Tensor], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.rand(3, 3))


@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
def test_softmax_metrics_refuse_infinities(value: float) -> None:
    """One of them would make every score NaN; plain retrieval takes them, as masked pairs."""
    sim = torch.eye(4)
    sim[0, 1] = value
    retrieval_metrics(sim)
    with pytest.raises(ValueError, match="sim must be finite, got NaN or infinity"):
        dual_softmax_metrics(sim)
    with pytest.raises(ValueError, match="text_bank must be finite"):
        query_bank_metrics(torch.eye(4), sim, torch.eye(4))
