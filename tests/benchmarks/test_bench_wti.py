"""The benchmark from end to end in small, and the arithmetic that figures rest on."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks import bench_wti, contestants, eager, harness, plots, session, tables
from benchmarks.problem import CAPTION_LENGTHS, Shape, caption_lengths, make_problem
from drl_fast import reference

SMALL = bench_wti.Plan((Shape(2), Shape(3, 32, 2, 8, "real")), (), {"drl_fast": (2, 4), "eager": (2, 4)}, (), 0.01, 2)


def test_a_small_run_prints_saves_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_wti, "ONE_WAY", (Shape(3, 4, 2, 8),))
    with Progress(console=Console(file=io.StringIO())) as progress:
        result = bench_wti.run(SMALL, "cpu", torch.get_num_threads(), progress)
    harness.save(result, tmp_path / "wti.json")
    result = harness.load(tmp_path / "wti.json")
    for record in result["time"]:
        assert {"mm", "drl_fast", "eager"} <= set(record["results"])
        assert all(times["ms"]["median"] > 0 for times in record["results"].values())
    assert [row["status"] for row in result["memory"]] == ["ok"] * 4
    shown = Console(file=io.StringIO(), width=120)
    for name, table in tables.ALL.items():
        if name != "budget":
            shown.print(tables.rich_table(table(result)))
    assert "real lengths" in shown.file.getvalue()  # type: ignore[attr-defined]
    for picture in plots.draw(result, tmp_path):
        assert picture.read_bytes().startswith(b"\x89PNG")


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
    found = session.largest_batch(memory, "x", budget, known)
    assert len(asked) <= 5, "two points predict a smooth curve"
    assert found["fits"]["mb"] <= budget < found["fails"]["mb"]
    assert 0.96 * want <= found["fits"]["batch"] <= want
    # The prediction from wrong points is corrected by what is then measured.
    skewed = {b: mb * (1.2 if b == 512 else 1) for b, mb in known.items()}
    found = session.largest_batch(memory, "x", budget, skewed)
    assert found["fits"]["mb"] <= budget < found["fails"]["mb"]


def test_ratios_are_taken_within_a_round() -> None:
    found = harness.summarize({"mm": [1.0, 10.0, 1.0], "x": [2.0, 20.0, 2.0]}, "mm")["x"]
    assert found["ratio"] == {"median": 2.0, "q1": 2.0, "q3": 2.0, "min": 2.0, "rounds": 3}


def test_peak_memory_is_that_of_the_call_alone() -> None:
    held = torch.ones(8 << 20)
    used, _ = harness.peak_bytes(lambda: torch.ones(16 << 20) + 1, "cpu")
    assert 120e6 < used < 150e6, "two tensors of 67 MB"
    assert held.sum() > 0


def test_a_worker_that_dies_is_reported() -> None:
    found = harness.measure_apart("memory", "benchmarks.contestants:no_such_factory")
    assert found["status"].startswith("failed: AttributeError")


def test_contestants_compute_the_same_thing() -> None:
    problem = make_problem(Shape(5, 32, 6, 16, "real"), train=True)
    want = reference.token_interaction(*problem.inputs())
    torch.testing.assert_close(eager.token_interaction(*problem.inputs()), want, atol=1e-5, rtol=1e-5)
    ours = contestants.training_step(contestants._ours(problem), problem)()
    theirs = contestants.training_step(contestants._eager(problem), problem)()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_max_sims_compute_the_same_thing() -> None:
    problem = make_problem(Shape(5, 32, 6, 64, "real"))
    want = eager.maxsim(*problem.unit(), problem.text_mask)
    for contestant in contestants.MAXSIMS:
        if contestant.name in ("mm", "mm_out") or contestant.refusal(problem.shape, "cpu", "maxsim"):
            continue
        # NumKong's first pass is approximate: it may pick another token of nearly the same similarity.
        tolerance = 0.5 if contestant.name == "numkong" else 1e-4
        torch.testing.assert_close(contestant.make(problem)(), want, atol=tolerance, rtol=0)


def test_real_lengths_are_the_histogram() -> None:
    assert sum(CAPTION_LENGTHS.values()) == 1000
    lengths = caption_lengths(20_000, 32, torch.Generator().manual_seed(0)).float()
    mean = sum(length * count for length, count in CAPTION_LENGTHS.items()) / 1000
    assert mean == pytest.approx(11.63, abs=0.01)
    assert float(lengths.mean()) == pytest.approx(mean, rel=0.02)
