"""Launches, operations and predictions, on a pretended GPU. No time is asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import harness
from benchmarks import predictions
from benchmarks.launches import Operations

WHOLE = bool(os.environ.get("DRL_FAST_FUZZ"))
STATIC = harness.RESULTS / "static"
# At 128 pairs: launches and operations of a forward and of a backward pass.
MOST = {"forward": (6, 6), "backward": (10, 10)}


def run(module: str, file: Path, *options: str) -> Any:
    command = [sys.executable, "-m", f"benchmarks.{module}", "--json", str(file), *options]
    done = subprocess.run(command, cwd=harness.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run("launches", tmp_path_factory.mktemp("launches") / "launches.json", "--quick")


def test_few_launches_and_operations(fresh: dict[str, Any]) -> None:
    for way, (launches, operations) in MOST.items():
        found = fresh["ours"][way]
        assert 0 < found["launches"] <= launches
        assert found["ops"] <= operations
        assert found["launches"] == sum(found["kernels"].values())
        assert found["ops"] == sum(found["by_name"].values())


def test_a_last_batch_compiles_nothing(fresh: dict[str, Any]) -> None:
    assert fresh["last_batch"] == {"rows": 77, "kernels_compiled": 0}


def test_the_committed_counts_are_these(fresh: dict[str, Any]) -> None:
    committed = harness.load(STATIC / "launches.json")
    assert committed["problem"] == fresh["problem"]
    assert committed["last_batch"] == fresh["last_batch"]
    for name in ("ours", "plain"):
        for way in ("forward", "backward"):
            counts, known = (
                {key: value for key, value in result[name][way].items() if not key.endswith("_us")}
                for result in (fresh, committed)
            )
            assert counts == known, (name, way)


def test_views_are_counted_apart() -> None:
    x = torch.ones(2, 3)
    with Operations() as operations:
        (x.t().reshape(-1)[1:] + 1).add_(1)
    assert operations.counted == {"aten::clone": 1, "aten::add.Tensor": 1, "aten::add_.Tensor": 1}
    assert operations.views == {"aten::t": 1, "aten::_unsafe_view": 1, "aten::slice.Tensor": 1}


def test_plain_pytorch_runs_the_same_operations_at_every_size(fresh: dict[str, Any]) -> None:
    """The predictions count them at full size, on tensors without data."""
    for way in ("forward", "backward"):
        big = predictions.plain(predictions.eager.token_interaction, (128, 32, 12, 512))[way]["operations"]
        small = fresh["plain"][way]
        empty = sum(n for name, n in small["by_name"].items() if "empty" in name)
        assert big == small["ops"] - empty


def test_plain_pytorch_costs_what_its_tensors_hold() -> None:
    shape = a, nt, nv, d = 256, 32, 12, 64
    found = predictions.plain(predictions.eager.token_interaction, shape)
    product = 2 * a * nt * a * nv * d / 1e12
    assert found["forward"]["teraflop"] == pytest.approx(product, abs=1e-3)
    assert found["backward"]["teraflop"] == pytest.approx(2 * product, abs=1e-3)
    similarity = 2 * a * nt * a * nv / 1e9
    # Written by the product, read and written by two masks, read by two maxima.
    assert found["forward"]["gigabytes"] > 7 * similarity
    assert predictions.plain(predictions.eager.premasked, shape)["forward"]["gigabytes"] < 5 * similarity


def test_the_model_takes_the_longest_time() -> None:
    """1 ms of each resource in turn; the range's ends differ in overlap and in the rate of L2."""
    rates = predictions.ASSUMPTIONS["l2_tb_per_s"]

    def low_high(**parts: float) -> tuple[float, float]:
        times = {"tensor": 0.0, "issue": 0.0, "l2": 0.0, "hbm": 0.0, "busy": 1.0, "launches": 0, **parts}
        found = predictions.range_of(**times)
        return found["low"], found["high"]

    assert low_high(tensor=1e-3) == low_high(issue=1e-3) == (1, 1)
    assert low_high(tensor=1e-3, issue=1e-3) == (1, 2)
    assert low_high(tensor=1e-3, busy=0.5) == (2, 2)
    assert low_high(hbm=predictions.ASSUMPTIONS["hbm_tb_per_s"] * 1e9) == (1, 1)
    assert low_high(l2=rates["high"] * 1e9) == (pytest.approx(rates["high"] / rates["low"], abs=1e-4), 1)
    assert low_high(launches=500) == (1, 1)


def test_every_launched_kernel_has_a_model() -> None:
    kernels = {row["kernel"] for row in harness.load(STATIC / "kernels.json")}
    # The model knows the kernels of the maximum.
    others = ("cdcr", "soft", "rerank")
    assert {kernel for kernel in kernels if not kernel.startswith(others)} <= predictions.WORK.keys()


def test_the_committed_predictions_state_their_model() -> None:
    committed = harness.load(STATIC / "predicted.json")
    assert committed["assumptions"] == json.loads(json.dumps(predictions.ASSUMPTIONS))
    assert "not measured" in committed["about"]
    assert [tuple(found["shape"]) for found in committed["shapes"]] == list(predictions.SHAPES)
    for found in committed["shapes"]:
        rows = [row for part in ("forward", "backward") for row in found["kernels"][part]]
        assert found["step"]["low"] == pytest.approx(sum(row["low"] for row in rows), abs=1e-3)
        assert all(0 < row["low"] <= row["high"] and 0 < row["busy"] <= 1 for row in rows)


@pytest.mark.skipif(not WHOLE, reason="make fuzz predicts again")
def test_the_committed_predictions_are_these(tmp_path: Path) -> None:
    """Within 5 %, because other compilers make other code."""
    fresh = run("predictions", tmp_path / "predicted.json")
    for found, known in zip(fresh["shapes"], harness.load(STATIC / "predicted.json")["shapes"], strict=True):
        for part in ("forward", "step"):
            assert found[part] == pytest.approx(known[part], rel=0.05), found["shape"]
