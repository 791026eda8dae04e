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


@pytest.mark.parametrize("option", [name for name in bench_model.OPTIONS if name != "compile"])
def test_every_option_takes_a_step(option: str) -> None:
    trainer = bench_model.Trainer("small", 8, 2, 3, "cpu", bench_model.OPTIONS[option][0])
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    laps = bench_model.timed_step(trainer, ("ours",))
    assert {name for name, _ in laps} == {"before", *bench_model.TOWERS, "ours", "adam"}
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    towers = {name for name in moved if name.startswith("clip.") and name != "clip.logit_scale"}
    assert any(name.startswith("temporal.") for name in moved)
    assert bool(towers) == (option not in ("freeze: clip", "features"))
    if option == "lora: 8":
        assert all(".lora_" in name for name in towers)
    if option == "freeze_layers":
        assert {name.split("resblocks.")[1][0] for name in towers if "resblocks." in name} == {"1"}


def test_options_are_compared_with_the_plain_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = bench_model.Towers("small", (1, 2), 1, ("plain", "features"), words=8, frames=2, steps=1)
    monkeypatch.setattr(bench_model, "TOWER_PLANS", {"quick": plan})
    monkeypatch.setattr(
        sys, "argv", ["bench_model.py", "--towers", "--quick", "--out", str(tmp_path), "--threads", "1"]
    )
    bench_model.main()
    (path,) = tmp_path.glob("*/towers_quick.json")
    result = harness.load(path)
    assert [(row["option"], row["status"]) for row in result["options"]] == [("plain", "ok"), ("features", "ok")]
    for row in result["options"]:
        assert [found["batch"] for found in row["result"]] == [1, 2]
        for found in row["result"]:
            parts = sum(ms for part, ms in found["ms"].items() if part != "step")
            assert found["ms"]["step"] == pytest.approx(parts, rel=0.01)
            assert found["peak_mb"] > 0
    shown = capsys.readouterr().out
    assert "What makes a training step faster" in shown
    assert "largest batch in 16 GB, extrapolated" in shown
