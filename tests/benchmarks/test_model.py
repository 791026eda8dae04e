"""The benchmark of a whole training step: a small run, and its divided step against the model's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import bench_model
import harness
from comparison import Plan
from problems import Shape

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("form", bench_model.FORMS)
def test_the_divided_step_equals_the_models(form: str) -> None:
    trainer = bench_model.Trainer("small", 8, 2, 3, "cpu")
    trainer.model(trainer.batch)["total"].backward()
    want = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    other = "ours" if form == "dense" else "dense"
    laps = bench_model.timed_step(trainer, (other, form) * 2)
    got = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    assert got.keys() == want.keys()
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, atol=1e-6, rtol=2e-3, msg=lambda m, n=name: f"{n}: {m}")
    phases = [name for name, _ in laps if name != "before"]
    towers = ["text", "image", "temporal"]
    assert phases == [*towers, other, form, other, form, *towers[::-1], "adam"]


def test_a_small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    plan = bench_model.Steps("small", {2: 1, 3: 1}, Plan(1, memory={"dense": (Shape(3, 4, 2, 8),)}), 8, 2)
    monkeypatch.setattr(bench_model, "PLANS", {"quick": plan})
    command = ["bench_model.py", "--quick", "--out", str(tmp_path), "--threads", "1", "--note", "a test"]
    monkeypatch.setattr(sys, "argv", command)
    bench_model.main()
    (path,) = tmp_path.glob("*/*")
    assert path.name == "model_quick.json"
    result = harness.load(path)
    assert result["settings"]["note"] == "a test"
    assert [row["status"] for row in (*result["phases"], *result["memory"])] == ["ok"] * 3
    for record in result["time"]:
        ms = {name: values["median"] for name, values in record["ms"].items()}
        parts = sum(ms[name] for name in (*bench_model.TOWERS, "adam"))
        assert ms["step"] == pytest.approx(parts + ms["ours"], rel=0.01)
        assert ms["step_dense"] == pytest.approx(parts + ms["dense"], rel=0.01)
    shown = capsys.readouterr().out
    assert "quick: expected duration 1 min" in shown
    assert "held by the image tower" in shown
    assert "loss alone, relative to eager" in shown


def test_a_batch_that_cannot_fit_is_left_out() -> None:
    assert not bench_model.fits("ViT-B-32", 1 << 16, "cpu")
