"""The benchmark of training on features: a small run, and its divided step against the engine's."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import bench_features
import harness
from bench_features import Plan, Steps

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make 12 videos with 4 captions each, 64 channels wide."""
    for name, value in {"VIDEOS": 12, "CAPTIONS": 4, "TEST_VIDEOS": 5, "DIM": 64, "FRAMES": 3}.items():
        monkeypatch.setattr(bench_features, name, value)


@pytest.mark.usefixtures("small")
def test_the_divided_step_equals_the_engines(tmp_path: Path) -> None:
    bench_features.write_store(tmp_path / "store", 1)
    config = bench_features.configured(tmp_path / "store", 8, "fp32", "seqTransf")
    divided, whole = (Steps(tmp_path / "store", config, "cpu") for _ in range(2))
    for _ in range(2):
        divided.divided_step(lambda part: None)
        whole.step()
    for (name, x), y in zip(divided.head.named_parameters(), whole.head.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def in_this_process(factory: str, **arguments: Any) -> dict[str, Any]:
    warm_up, call = getattr(bench_features, factory.split(":")[1])(**arguments)
    warm_up()
    return {"status": "ok", **call()}


@pytest.mark.usefixtures("small")
def test_a_small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    plan = Plan(1, 1, (4, 8), ("fp32",), rounds=1, shared=8, clip="small", pairs=2)
    monkeypatch.setattr(bench_features, "PLANS", {"quick": plan})
    monkeypatch.setattr(harness, "measure_apart", in_this_process)
    monkeypatch.setattr(sys, "argv", ["bench_features.py", "--quick", "--out", str(tmp_path), "--threads", "1"])
    monkeypatch.setattr(bench_features.tempfile, "mkdtemp", lambda prefix: str(tmp_path / "data"))
    # The rounding part takes a ninth of the data.
    monkeypatch.setattr(bench_features, "SMALLEST", 1)
    bench_features.main()
    assert not (tmp_path / "data").exists()
    (path,) = tmp_path.glob("*/features_quick.json")
    result = harness.load(path)
    assert (result["store"][0]["videos"], result["store"][0]["captions"]) == (17, 53)
    assert [(row["batch"], row["temporal"]) for row in result["time"]] == [
        (4, "seqTransf"),
        (8, "seqTransf"),
        (4, None),
        (8, None),
    ]
    for row in result["time"]:
        ms = {name: found["median"] for name, found in row["ms"].items()}
        assert ms["step"] == pytest.approx(ms["load"] + ms["temporal"] + ms["optimizer"] + ms["ours"], rel=0.01)
        assert row["epoch_seconds"] == pytest.approx(48 // row["batch"] * ms["step"] / 1e3, rel=0.01)
    assert [(row["form"], row["chunk"]) for row in result["memory"]] == [("ours", 0), ("dense", 0)] * 2 + [
        ("ours", 256)
    ]
    assert [row["dtype"] for row in result["rounding"]] == ["fp16", "bf16"]
    assert all(0 < row["similarity_moved"] < 0.1 for row in result["rounding"])
    shown = capsys.readouterr().out
    for title in (
        "A training step on features",
        "Peak memory",
        "Time relative to running without it",
        "rounding stored",
    ):
        assert title in shown
