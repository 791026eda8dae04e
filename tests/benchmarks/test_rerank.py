"""The benchmark of rerank: all forms compute the same thing, and a run fills its table."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import bench_rerank
import harness
import result_tables
from bench_rerank import Reranking, draw, make


@pytest.mark.parametrize("mode", bench_rerank.MODES)
def test_all_forms_compute_the_same_thing(mode: str) -> None:
    inputs = draw(Reranking(3, 7, 5, 4, 16))
    found = [make(form, mode, inputs)() for form in bench_rerank.FORMS]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-6, rtol=1e-5)


def test_a_run_compares_rerank_with_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_rerank.py", "--quick", "--threads", "1", "--out", str(tmp_path)])
    monkeypatch.setitem(bench_rerank.SHAPES, "quick", (Reranking(4, 16, 50, 8, 256),))
    monkeypatch.setitem(bench_rerank.SECONDS, "quick", 0.01)
    bench_rerank.main()
    (saved,) = tmp_path.glob("*/*")
    assert saved.name == "rerank_quick.json"
    result = harness.load(saved)
    table = result_tables.rerank(result)
    assert result_tables.text(table) in capsys.readouterr().out
    labels = [label for name, (label, _) in bench_rerank.FORMS.items() if name != "rerank"]
    assert [cells[0] for cells in table.rows] == labels * len(bench_rerank.MODES)
    for row in result["time"]:
        assert set(row["results"]) == {bench_rerank.YARDSTICK, *bench_rerank.FORMS}
    assert all(row["status"] == "ok" for row in result["memory"])
