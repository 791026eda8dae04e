"""Encoding in batches, and the bootstrap interval against what is known in closed form."""

from __future__ import annotations

import pytest
import torch

from drl_fast.engine.evaluate import encode_texts, encode_videos, recall_interval
from drl_fast.metrics import retrieval_metrics
from drl_fast.model.two_tower import small_model

pytestmark = pytest.mark.usefixtures("one_thread")


def hits(right: int, count: int) -> torch.Tensor:
    """(count, count) similarities of which the first ``right`` rows are won by the diagonal."""
    sim = torch.eye(count)
    sim[right:] = 1 - sim[right:]
    return sim


def test_batches_change_nothing_and_keep_the_order() -> None:
    model, tokenizer = small_model(32, 8, seed=0)
    ids = tokenizer(["dog " * i for i in range(7)])
    frames, mask = torch.randint(0, 256, (7, 3, 3, 32, 32), dtype=torch.uint8), torch.rand(7, 3) < 0.7
    model.train()
    (one, one_mask), (many, many_mask) = encode_texts(model, ids, batch=99), encode_texts(model, ids, batch=2)
    assert not model.training
    assert not one.requires_grad
    torch.testing.assert_close(many, one, rtol=1e-5, atol=1e-5)
    assert torch.equal(many_mask, one_mask)
    videos = encode_videos(model, frames, mask, batch=2)
    assert not videos.requires_grad
    torch.testing.assert_close(videos, encode_videos(model, frames, mask, batch=99), rtol=1e-5, atol=1e-5)
    assert videos.shape == (7, 3, 128)


def test_interval_that_has_no_choice() -> None:
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
    """A model that scores everything alike is right once, for the first column."""
    sim = torch.zeros(20, 20)
    low, high = recall_interval(sim)
    assert low <= retrieval_metrics(sim)["t2v"]["R1"] <= high
    assert high < 20


@pytest.mark.parametrize("shape", [(3, 4), (0, 0), (3,)])
def test_bad_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"sim must be a non-empty square matrix, got shape \("):
        recall_interval(torch.zeros(shape))
