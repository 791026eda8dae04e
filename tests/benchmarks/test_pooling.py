"""The benchmark of the other similarities: each equals its eager form, and its table pairs them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import bench_pooling
import comparison
import harness
import result_tables
from comparison import Plan
from problems import Shape, make_problem

MADE = {contestant.name: contestant.make for contestant in bench_pooling.COMPARISON.modes["train"]}


@pytest.mark.parametrize("lengths", ["full", "real"])
@pytest.mark.parametrize("name", bench_pooling.SIMILARITIES)
def test_eager_forms_compute_the_same_thing(name: str, lengths: str) -> None:
    problem = make_problem(Shape(5, 32, 6, 16, lengths, "float64"))
    results, wanted = MADE[name](problem)(), list(MADE[f"eager_{name}"](problem)())
    if len(wanted) == 5:
        # Eager code gives a masked word's weight a gradient; the softmax that made the weight stops it.
        wanted[3] = wanted[3] * problem.text_mask
    for ours, theirs in zip(results, wanted, strict=True):
        assert theirs.any()
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


def test_a_run_pairs_every_similarity_with_its_eager_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = Shape(64, 16, 8, 16)  # large enough for its memory to be measured
    plan = Plan(1, {"train": (tiny,)}, {"max": (tiny,), "eager_max": (tiny,)}, seconds=0.01, rounds=2)
    monkeypatch.setattr(sys, "argv", ["bench_pooling.py", "--quick", "--threads", "1", "--out", str(tmp_path)])
    comparison.main(bench_pooling.COMPARISON, {"quick": plan}, bench_pooling.__doc__)
    (saved,) = tmp_path.glob("*/*")
    assert saved.name == "pooling_quick.json"
    result = harness.load(saved)
    (row,) = result["time"]
    table = result_tables.pooling(result)
    assert result_tables.text(table) in capsys.readouterr().out
    assert [cells[0] for cells in table.rows] == [label for label, *_ in bench_pooling.SIMILARITIES.values()]
    for name, cells in zip(bench_pooling.SIMILARITIES, table.rows, strict=True):
        assert cells[2:4] == [result_tables.medians(row, who) for who in (f"eager_{name}", name)]
        assert cells[4] == result_tables.quartiles(row["against"][f"eager_{name}"])
        assert (cells[-1] == "-") == (name != "max")
