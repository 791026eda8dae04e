"""The interaction's benchmark: all contestants compute the same result, and its arithmetic is right."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import bench_wti
import comparison
import eager
import harness
from drl_fast import reference
from problems import CAPTION_LENGTHS, Shape, caption_lengths, make_problem


@pytest.mark.parametrize(
    ("constant", "square", "linear", "budget", "want"),
    [(0, 1e-4, 0.05, 500, 2000), (0, 4e-3, 0.0, 500, 353), (30, 0.0, 0.05, 500, 9400)],
)
def test_largest_batch_fits_and_the_next_does_not(
    constant: float, square: float, linear: float, budget: int, want: int
) -> None:
    asked = []

    def memory(batch: int) -> dict[str, Any]:
        asked.append(batch)
        return {"status": "ok", "mb": constant + square * batch**2 + linear * batch}

    known = {b: memory(b)["mb"] for b in (256, 512)}
    asked.clear()
    found = comparison.largest_batch(memory, budget, known)
    assert len(asked) <= 5, "two points predict a smooth curve"
    assert found["fits"]["mb"] <= budget < found["fails"]["mb"]
    assert 0.96 * want <= found["fits"]["batch"] <= want
    # Measurements correct a prediction from wrong points.
    skewed = {b: mb * (1.2 if b == 512 else 1) for b, mb in known.items()}
    found = comparison.largest_batch(memory, budget, skewed)
    assert found["fits"]["mb"] <= budget < found["fails"]["mb"]


def test_peak_memory_is_that_of_the_call() -> None:
    held = torch.ones(8 << 20)
    used, _ = harness.peak_bytes(lambda: torch.ones(16 << 20) + 1, "cpu")
    assert 120e6 < used < 150e6, "two tensors of 67 MB"
    assert held.sum() > 0


def test_a_worker_that_dies_is_reported() -> None:
    found = harness.measure_apart("problems:no_such_factory")
    assert found["status"].startswith("failed: AttributeError")


def test_contestants_compute_the_same_thing() -> None:
    problem = make_problem(Shape(5, 32, 6, 16, "real"))
    want = reference.token_interaction(*problem.inputs())
    torch.testing.assert_close(eager.token_interaction(*problem.inputs()), want, atol=1e-5, rtol=1e-5)
    ours = bench_wti.training_step(bench_wti.ours(problem), problem)()
    theirs = bench_wti.training_step(bench_wti.eager_form(problem), problem)()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_max_sims_compute_the_same_thing() -> None:
    problem = make_problem(Shape(5, 32, 6, 64, "real"))
    want = eager.maxsim(*problem.unit, problem.text_mask)
    for contestant in bench_wti.COMPARISON.modes["maxsim"]:
        if contestant.name == "mm" or contestant.refusal(problem.shape, "cpu"):
            continue
        # NumKong's first pass is approximate and may choose another token with nearly the same similarity.
        tolerance = 0.5 if contestant.name == "numkong" else 1e-4
        torch.testing.assert_close(contestant.make(problem)(), want, atol=tolerance, rtol=0)


def test_real_lengths_follow_the_histogram() -> None:
    assert sum(CAPTION_LENGTHS.values()) == 1000
    lengths = caption_lengths(20_000, 32, torch.Generator().manual_seed(0)).float()
    mean = sum(length * count for length, count in CAPTION_LENGTHS.items()) / 1000
    assert mean == pytest.approx(11.63, abs=0.01)
    assert float(lengths.mean()) == pytest.approx(mean, rel=0.02)
