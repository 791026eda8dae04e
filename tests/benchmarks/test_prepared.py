"""The benchmark of prepared videos: what it times computes the same thing, and its tables show every row."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import bench_prepared
import harness
import result_tables
from bench_prepared import Plan, Problem


def test_all_calls_score_the_same_pairs() -> None:
    problem = Problem(40)
    for name in bench_prepared.STORAGE:
        problem.prepare(name)
    results = {name: call() for name, call in problem.calls(*problem.queries(3)).items()}
    want = results["unprepared"]
    assert torch.equal(results["float32"], want)
    for name in ("float16", "bfloat16"):
        torch.testing.assert_close(results[name], want, atol=1e-3, rtol=0)
        assert not torch.equal(results[name], want)
    assert torch.equal(results["topk"][0], want.topk(bench_prepared.K).values)
    assert results["product"].shape == (3 * bench_prepared.TOKENS, 40 * bench_prepared.TOKENS)


def test_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(bench_prepared.PLANS, "quick", Plan(1, 40, (1, 3), seconds=0.01, rounds=2))
    monkeypatch.setattr(sys, "argv", ["bench_prepared.py", "--quick", "--threads", "1", "--out", str(tmp_path)])
    bench_prepared.main()
    (saved,) = tmp_path.glob("*/*")
    assert saved.name == "prepared_quick.json"
    result = harness.load(saved)
    shown = capsys.readouterr().out
    for make in (result_tables.prepared, result_tables.prepared_storage):
        assert result_tables.text(make(result)) in shown
    table = result_tables.prepared(result)
    assert [cells[0] for cells in table.rows] == ["1", "3"]
    assert all(len(cells) == len(table.columns) for cells in table.rows)
    assert [row["dtype"] for row in result["error"]] == ["float16", "bfloat16"]


def test_only_the_cpu_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_prepared.py", "--device", "cuda"])
    with pytest.raises(SystemExit):
        bench_prepared.main()
    assert "--device must be cpu" in capsys.readouterr().err
