"""Compile the kernels for every architecture in the tile tables and check the result, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
# The report takes minutes, so all tests share one run.
pytestmark = pytest.mark.xdist_group("static report")
ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "benchmarks" / "results" / "static" / "kernels.json"
# `make fuzz` compiles every kernel for every architecture, `make test` a part.
WHOLE = bool(os.environ.get("DRL_FAST_FUZZ"))
QUICK_ARCH = "sm_90"
ARCHS = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05"}
SHARED = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448}
# sm_80's entries also serve GPUs with less shared memory (8.6, 8.9, 12.x).
SHARED_SMALL = 101376
PRODUCTS = ("interaction_forward", "interaction_backward_text", "interaction_backward_video")
# Its products are so small that it uses mma on every architecture; memory limits it.
SMALL_PRODUCT = "cdcr_partners"
CDCR = (
    "cdcr_norms",
    "cdcr_partners",
    "cdcr_moments",
    "cdcr_correlate",
    "cdcr_product_rows",
    "cdcr_gradient",
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    file = tmp_path_factory.mktemp("static") / "report.json"
    command = [sys.executable, "-m", "benchmarks.static_report", "--json", str(file), *([] if WHOLE else ["--quick"])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "nothing measured" in done.stdout
    return json.loads(file.read_text())


def name(row: dict[str, Any]) -> str:
    return f"{row['arch']} {row['kernel']} {row['dtype']} {row['what']}"


def test_every_kernel_on_every_architecture(rows: list[dict[str, Any]]) -> None:
    for arch in ARCHS:
        kernels = {row["kernel"] for row in rows if row["arch"] == arch}
        assert kernels >= {*PRODUCTS}
        if WHOLE or arch == QUICK_ARCH:
            assert kernels >= {"row_layout", "pack_slots", "unpack_gradient", "unpack_weight_gradient", *CDCR}
    for kernel in PRODUCTS:
        assert {row["dtype"] for row in rows if row["kernel"] == kernel} == {"bf16", "fp16", "fp32"}


def test_nothing_spills(rows: list[dict[str, Any]]) -> None:
    assert [name(row) for row in rows if row["spill_bytes"]] == []
    assert all(0 < row["registers"] <= 255 for row in rows)


def test_shared_memory_fits(rows: list[dict[str, Any]]) -> None:
    assert [name(row) for row in rows if row["shared_bytes"] > SHARED[row["arch"]]] == []
    assert [name(row) for row in rows if row["arch"] == "sm_80" and row["shared_bytes"] > SHARED_SMALL] == []


def test_products_run_on_the_tensor_cores(rows: list[dict[str, Any]]) -> None:
    """Except full float32, which tensor cores cannot compute."""
    for row in rows:
        if row["kernel"] in PRODUCTS:
            full_float32 = row["what"].startswith("fp32")
            assert row["tensor_core"] == ("" if full_float32 else ARCHS[row["arch"]]), name(row)
        else:
            half = row["kernel"] == SMALL_PRODUCT and row["dtype"] != "fp32"
            assert row["tensor_core"] == ("mma" if half else ""), name(row)


def test_products_are_not_serialised(rows: list[dict[str, Any]]) -> None:
    """ptxas does not warn if it makes every product wait for the previous one."""
    assert [name(row) for row in rows if row["serialised"]] == []


def test_no_product_reads_another_from_registers(rows: list[dict[str, Any]]) -> None:
    """Triton has miscompiled a transposed product that is an operand of the next one."""
    assert [name(row) for row in rows if row["register_operand"]] == []


def test_predictions_are_shares(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        share = row["predicted_share"]
        assert (share is None) == (row["kernel"] not in PRODUCTS)
        assert share is None or 0 < share <= 1
        assert share is None or (row["flop_per_tile"] > 0 and row["bytes_per_tile"] > 0)


def test_the_committed_report_describes_these_kernels(rows: list[dict[str, Any]]) -> None:
    """Kernels, forms and configurations must match the sources; registers depend on the compiler."""
    committed = json.loads(COMMITTED.read_text())
    made = [r for r in committed if WHOLE or r["arch"] == QUICK_ARCH or r["kernel"] in PRODUCTS]
    assert [(name(r), r["config"]) for r in made] == [(name(r), r["config"]) for r in rows]
    assert [name(r) for r in committed if r["spill_bytes"] or r["serialised"]] == []
