"""Compile the kernels as training launches them, for every architecture in the tile tables, without a GPU.

`make test` compiles a part with the installed Triton; `make fuzz` compiles all, and all with Triton 3.6.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
from benchmarks.machine_code import Code
from benchmarks.static_report import operand_bytes

# The report takes minutes, so all tests share one run.
pytestmark = pytest.mark.xdist_group("static report")
ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "benchmarks" / "results" / "static" / "kernels.json"
COMMITTED_36 = COMMITTED.with_name("kernels_triton_3.6.json")
# `make fuzz` puts it here.
TRITON_36 = ROOT / ".venv" / ".triton-3.6"
WHOLE = bool(os.environ.get("DRL_FAST_FUZZ"))
ARCHS = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05"}
SHARED = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448}
# sm_80's entries also serve GPUs with less shared memory (8.6, 8.9, 12.x).
SHARED_SMALL = 101376
SOFT = ("soft_forward", "soft_coefficients")
PRODUCTS = ("interaction_forward", "multiply_tiles", *SOFT, "rerank_forward")
INTERACTION = (*PRODUCTS, "count_tokens", "pack_rows", "expand_coefficients", "unpack_gradients")
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
# Forms that spill today: architecture, kernel, tokens, and the problem that launches them. Spills cost speed only.
SPILLS = {
    "sm_80 cdcr_partners fp32 diagonal",
    "sm_100 interaction_forward tf32 140 words",
    "sm_90 soft_forward bf16 softmax, 77 words, 20 frames",
    "sm_100 soft_forward bf16 softmax, 77 words, 20 frames",
}


def run(file: Path, *options: str, triton: Path | None = None) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "benchmarks.static_report", "--json", str(file), *options]
    path = {"PYTHONPATH": str(triton)} if triton else {}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **path})
    assert done.returncode == 0, done.stderr[-2000:]
    assert "nothing measured" in done.stdout
    if triton:
        assert done.stdout.startswith("triton 3.6."), done.stdout[:80]
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(tmp_path_factory.mktemp("static") / "report.json", *([] if WHOLE else ["--quick"]))


def name(row: dict[str, Any]) -> str:
    return f"{row['arch']} {row['kernel']} {row['dtype']} {row['problem']}"


def test_every_launched_kernel_compiles(rows: list[dict[str, Any]]) -> None:
    assert [(name(row), row["error"]) for row in rows if "error" in row] == []


def test_every_kernel_on_every_architecture(rows: list[dict[str, Any]]) -> None:
    for arch in ARCHS:
        kernels = {row["kernel"] for row in rows if row["arch"] == arch}
        assert kernels >= {*PRODUCTS} - ({*SOFT, "rerank_forward"} if arch != "sm_90" and not WHOLE else set())
        if WHOLE or arch == "sm_90":
            assert kernels >= {*INTERACTION, *CDCR}
    assert {row["dtype"] for row in rows if row["kernel"] == "interaction_forward"} == {"bf16", "fp16", "fp32", "tf32"}


def test_nothing_else_spills(rows: list[dict[str, Any]]) -> None:
    expected = {spill for spill in SPILLS if WHOLE or spill in {name(row) for row in rows}}
    assert {name(row) for row in rows if row["spill_bytes"]} == expected
    assert all(0 < row["registers"] <= 255 for row in rows)


def test_shared_memory_fits(rows: list[dict[str, Any]]) -> None:
    assert [name(row) for row in rows if row["shared_bytes"] > SHARED[row["arch"]]] == []
    assert [name(row) for row in rows if row["arch"] == "sm_80" and row["shared_bytes"] > SHARED_SMALL] == []


def test_products_run_on_the_tensor_cores(rows: list[dict[str, Any]]) -> None:
    """Except full float32, which tensor cores cannot compute."""
    for row in rows:
        if row["kernel"] in PRODUCTS:
            assert row["tensor_core"] == ("" if row["dtype"] == "fp32" else ARCHS[row["arch"]]), name(row)
        else:
            half = row["kernel"] == SMALL_PRODUCT and row["dtype"] != "fp32"
            assert row["tensor_core"] == ("mma" if half else ""), name(row)
        assert bool(row["tensor_core"]) == bool(row["tensor_core_instructions"]), name(row)


def test_products_are_not_serialised(rows: list[dict[str, Any]]) -> None:
    """ptxas does not warn if it makes every product wait for the previous one."""
    assert [name(row) for row in rows if row["serialised"]] == []


def test_no_product_reads_another_from_registers(rows: list[dict[str, Any]]) -> None:
    """Triton has miscompiled a transposed product that is an operand of the next one."""
    assert [name(row) for row in rows if row["register_operand"]] == []


def test_no_copy_overtakes_another_warp_group(rows: list[dict[str, Any]]) -> None:
    """Triton could omit the barrier between a WGMMA of 8 warps and the next copy to its operands."""
    assert [(name(row), row["missing_barriers"]) for row in rows if row["missing_barriers"]] == []
    assert any(row["tensor_core"] == "wgmma" and row["num_warps"] > 4 for row in rows)


# A step of a pipelined product with 8 warps: the wait, a barrier, and the copy to the buffer of an earlier step.
LOOP = """
        /*0100*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
.L_x_4:
        /*0110*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR21+0x19000], R4 ;
        /*0120*/                   WARPGROUP.ARRIVE ;
        /*0130*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR28], R24, gsb0 ;
        /*0140*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0150*/                   {barrier}
        /*0160*/              @!P1 BRA `(.L_x_2) ;
        /*0170*/                   {write}
.L_x_2:
        /*0180*/               @P1 BRA `(.L_x_4) ;
        /*0190*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*01a0*/                   STS.64 [R185+UR24+0x18000], R20 ;
        /*01b0*/                   EXIT ;
"""
WRITES = {
    "@UP4 UTMALDG.2D [UR16], [UR30] ;": True,
    "LDGSTS.E.BYPASS.128 [R3+0x8000], desc[UR48][R20.64], P5 ;": True,
    "STS.64 [R185+UR24+0x100], R20 ;": True,
    "STSM.16.MT88.4 [R5], R20 ;": True,
    # Beyond the products' operands.
    "LDGSTS.E.BYPASS.128 [R3+0x18000], desc[UR48][R20.64], P5 ;": False,
    "LDS.64 R20, [R185+UR24+0x100] ;": False,
}


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.split("[")[0].strip("@ "))
def test_a_missing_barrier_is_noticed(write: str) -> None:
    def missing(barrier: str, warps: int = 8) -> list[str]:
        return Code(LOOP.format(barrier=barrier, write=write)).missing_barriers(warps, 0x18000)

    found = missing("NOP ;")
    assert len(found) == WRITES[write]
    assert all(write.split(" [")[0] in line for line in found)
    assert missing("BAR.SYNC.DEFER_BLOCKING 0x0 ;") == []
    assert missing("NOP ;", warps=4) == []


def test_a_missing_barrier_is_noticed_around_the_loop() -> None:
    """The write comes before the wait in the text, and after it in the next step."""
    lines = LOOP.format(barrier="NOP ;", write="NOP ;").splitlines()
    lines.insert(3, "        /*0108*/                   @UP4 UTMALDG.2D [UR16], [UR30] ;")
    assert len(Code("\n".join(lines)).missing_barriers(8, 0x18000)) == 1
    lines.insert(3, "        /*0104*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;")
    assert Code("\n".join(lines)).missing_barriers(8, 0x18000) == []


def test_a_compiled_kernel_without_its_barriers_is_noticed(tmp_path: Path) -> None:
    """Remove the barriers from the machine code of the large forward tile on sm_90."""
    script = (
        "import json, sys; from benchmarks import fake_gpu, static_report as report\n"
        "launches, _ = report.launches(90, report.Problem('', *report.LARGE, train=False), True)\n"
        "(forward,) = [x.compiled for x in launches if x.kernel == 'interaction_forward']\n"
        "found = [fake_gpu.machine_code(forward.asm['cubin']), forward.asm['ttgir'], forward.metadata.num_warps]\n"
        "json.dump(found, open(sys.argv[1], 'w'))"
    )
    file = tmp_path / "code.json"
    subprocess.run([sys.executable, "-c", script, str(file)], cwd=ROOT, check=True)
    sass, ttgir, warps = json.loads(file.read_text())
    assert warps == 8
    size = operand_bytes(ttgir)
    assert 2 * 128 * 64 * 2 <= size <= SHARED["sm_90"]
    assert Code(sass).missing_barriers(warps, size) == []
    without = re.sub(r"BAR\.SYNC\S*", "NOP", sass)
    assert any("UTMALDG" in line for line in Code(without).missing_barriers(warps, size))


def overtaking_copy(triton: Path | None = None) -> list[Any]:
    path = {"PYTHONPATH": str(triton)} if triton else {}
    command = [sys.executable, "-m", "tests.kernels.overtaking_copy"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **path})
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_triton_has_the_barrier() -> None:
    """In a kernel from which Triton 3.6 omits it."""
    assert overtaking_copy() == ["wgmma", []]


@pytest.mark.skipif(not WHOLE, reason="make fuzz installs Triton 3.6")
def test_a_barrier_that_triton_omits_is_noticed() -> None:
    kind, found = overtaking_copy(TRITON_36)
    assert kind == "wgmma"
    assert len(found) == 2
    assert all("LDGSTS" in line for line in found)


def test_serialised_products_are_noticed() -> None:
    product = "        /*0130*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR28], R24{} ;\n"
    assert Code(product.format(", gsb0") * 4).serialised
    assert not Code(product.format("") * 3 + product.format(", gsb0")).serialised


def test_instructions_are_counted_by_pipe(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        counts = row["instructions"]
        # Full float32 products run on the float32 pipe, in the whole body.
        has_loop = row["kernel"] in PRODUCTS and row["dtype"] != "fp32"
        assert row["of"] == ("product step" if has_loop else "whole body"), name(row)
        assert ("tensor" in counts) == bool(row["tensor_core"]), name(row)
        assert ("local" in counts) == bool(row["spill_bytes"]) or row["of"] == "product step", name(row)
        assert counts["alu"] > 0, name(row)


def test_the_parts_of_a_loop_are_told_apart() -> None:
    """A step of 4 products, the work after the last step of each sweep, and code around the loop."""
    code = Code("""
        /*0100*/                   MOV R1, R2 ;
.L_x_1:
        /*0110*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR28], R24, gsb0 ;
        /*0120*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0130*/                   LDS R3, [R2] ;
        /*0140*/                   SHF.L.U32 R3, R3, 0x1, RZ ;
        /*0150*/                   LOP3.LUT R3, R3, 0x1, RZ, 0xc0, !PT ;
        /*0160*/                   SEL R3, R3, R1, P0 ;
        /*0170*/                   PRMT R3, R3, 0x1, R1 ;
        /*0180*/              @!P1 BRA `(.L_x_2) ;
        /*0190*/                   FFMA R4, R4, R5, R6 ;
        /*01a0*/                   SHFL.BFLY PT, R4, R4, 0x1, 0x1f ;
.L_x_2:
        /*01b0*/               @P0 BRA `(.L_x_1) ;
        /*01c0*/                   STG.E.128 [R2.64], R4 ;
        /*01d0*/                   EXIT ;
    """)
    step, sweep, rest = code.product_loop() or ({}, {}, {})
    assert step == {"tensor": 1, "alu": 5, "lds": 1, "other": 2}
    assert sweep == {"fma": 1, "shfl": 1}
    assert rest == {"alu": 1, "stg": 1, "other": 1}


def same(made: list[dict[str, Any]], committed: list[dict[str, Any]]) -> None:
    """Kernels, forms and configurations must match the sources; registers may differ by 4."""
    keys = ("what", "aligned", "grid", "num_warps", "num_stages", "shared_bytes", "tensor_core", "error")
    known = {name(row) + row.get("what", "") + row.get("aligned", ""): row for row in committed}
    for row in made:
        other = known.get(name(row) + row.get("what", "") + row.get("aligned", ""))
        assert other is not None, f"not in the committed report: {name(row)}"
        assert [row.get(key) for key in keys] == [other.get(key) for key in keys], name(row)
        assert abs(row.get("registers", 0) - other.get("registers", 0)) <= 4, name(row)
    if WHOLE:
        assert [name(row) for row in made] == [name(row) for row in committed]


def test_the_committed_report_describes_these_kernels(rows: list[dict[str, Any]]) -> None:
    same(rows, json.loads(COMMITTED.read_text()))


@pytest.mark.skipif(not WHOLE, reason="make fuzz compiles with Triton 3.6 too")
def test_triton_3_6_compiles_the_same_launches(tmp_path: Path) -> None:
    """The oldest supported version: what fails to compile or spills with it is in the committed report."""
    assert TRITON_36.is_dir(), "make fuzz installs Triton 3.6 there"
    made = run(tmp_path / "report.json", triton=TRITON_36)
    assert len({name(row) for row in made}) > 200
    compiled = [row for row in made if "error" not in row]
    troubles = [row for row in made if "error" in row or row["spill_bytes"]]
    same(troubles, json.loads(COMMITTED_36.read_text()))
    assert [name(row) for row in compiled if row["serialised"] or row["register_operand"]] == []
    assert [name(row) for row in compiled if row["missing_barriers"]] == []
    assert [name(row) for row in compiled if row["shared_bytes"] > SHARED[row["arch"]]] == []
