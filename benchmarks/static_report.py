"""Compile every Triton kernel without a GPU and report registers, spills, shared memory and tensor-core instructions.

    python -m benchmarks.static_report                      a table
    python -m benchmarks.static_report --json FILE          also a list of objects, one a row

Targets: sm_80, sm_90 and sm_100, at the tiles of kernels/tuning.py. The tools in Triton's wheel read the machine code
that ptxas made. Nothing runs and no time is measured: ``predicted_share`` comes from the cost model below. It is the
share of the tensor cores' rate (float32: the FMA units') that one tile could reach if only the counted work took time.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from drl_fast.kernels import cdcr, cdcr_backward, cdcr_tokens, packing, tuning
from drl_fast.kernels import token_interaction as forward
from drl_fast.kernels import token_interaction_backward as backward
from drl_fast.kernels.cdcr_tokens import Channels, Choices, UnitTokens
from drl_fast.kernels.packing import PackedRows, Strided
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHS = ("sm_80", "sm_90", "sm_100")
QUICK_ARCH = "sm_90"
INSTRUCTION = {"mma": r"\bHMMA", "wgmma": r"\bHGMMA", "tcgen05": r"\bUTC\w*MMA"}
SIZE = {"bf16": 2, "fp16": 2, "fp32": 4}

# The cost model, per SM and clock: FLOP of dense half-precision products, of float32 FMAs, bytes from L2, and lane
# instructions issued. From the chips' published peak rates at their boost clocks; L2 is an assumption.
FLOP_HALF = {"sm_80": 2048, "sm_90": 4096, "sm_100": 8192}
FLOP_FP32 = {"sm_80": 128, "sm_90": 256, "sm_100": 256}
BYTES_L2 = {"sm_80": 44, "sm_90": 36, "sm_100": 36}
ISSUE = 128
# Instructions per similarity (forward) or coefficient (backward) outside the product, counted in sm_90 machine code.
WORK = {"scores": 4.5, "matches": 8.5, "weights": 5.0, "exact": 10.5, "coefficient": 9.0}


@dataclass
class Job:
    """One compilation."""

    fn: Any
    arch: str
    dtype: str  # Triton's name of the tokens' type
    what: str  # the launch in words
    # By name, grouped as the launcher groups them: a type ("*fp32", "i32"; "i64:16" is a multiple of 16), or the value
    # that Triton compiles in (None, or a stride of 1).
    arguments: dict[str, Any]
    constants: dict[str, Any]  # the kernel's constexpr parameters
    options: dict[str, Any]
    # Of a tile with a product: FLOP, bytes, instructions outside the product.
    cost: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @property
    def config(self) -> dict[str, Any]:
        """The constants that the report shows."""
        form, tile, source = self.constants.get("FORM"), self.constants.get("TILE"), "static"
        shown = {name: self.constants[name] for name in ("SLOTS", "D") if name in self.constants}
        if form is not None:
            shown = {"SLOTS": form.slots, "D": form.dim}
        if isinstance(tile, tuning.Tile):
            shown = {"BM": tile.m, "BN": tile.n, "BK": tile.k, **shown, "TMA": tile.tma}
            source = tile.source
        return {**shown, **{name: self.options[name] for name in ("num_warps", "num_stages")}, "chosen": source}


def jobs(dim: int = 512, quick: bool = False) -> Iterator[Job]:
    """Every kernel at its tuned configurations; ``quick``: kernels without tensor-core products for one chip only."""
    for arch in ARCHS:
        for kind, dtype, modes in (
            ("keyed", "bf16", ("scores", "matches", "weights")),
            ("keyed", "fp16", ("matches",)),
            ("exact", "bf16", ("scores", "matches")),
            ("tf32", "fp32", ("matches",)),
            ("fp32", "fp32", ("matches",)),
        ):
            for slots in (16, 32, 64, 128) if kind == "keyed" and dtype == "bf16" else (16, 128):
                yield from (forward_job(arch, kind, dtype, mode, slots, dim) for mode in modes)
        yield forward_job(arch, "keyed", "bf16", "matches", 128, dim, long=True)
        yield forward_job(arch, "exact", "bf16", "scores", 32, dim, both=False)
        for precision, dtype in (("half", "bf16"), ("half", "fp16"), ("tf32", "fp32"), ("fp32", "fp32")):
            for d in (dim, 128, 64) if dtype == "bf16" else (dim,):
                yield from (backward_job(arch, side, precision, dtype, d) for side in tuning.SIDES)
                yield backward_job(arch, "video", precision, dtype, d, add=True)
        if not quick or arch == QUICK_ARCH:
            yield from packing_jobs(arch, dim)
    for arch in (QUICK_ARCH,) if quick else ARCHS:
        yield from cdcr_jobs(arch, dim)


def packed(dtype: str, *, frames: bool = False, classes: bool = False) -> PackedRows:
    """Types of one side in slots."""
    return PackedRows(
        features=f"*{dtype}",
        order="*i64" if classes else None,
        class_begin="*i32" if classes else None,
        **dict.fromkeys(("start", "chunk_row"), None if frames else "*i32"),
        **dict.fromkeys(("scale", "weight"), "*fp32"),
        **dict.fromkeys(("position", "length"), "*i32"),
        **dict.fromkeys(("rows", "tokens", "allocated", "dim", "most_slots"), "i32"),
    )


def descriptor(dtype: str, rows: int, columns: int, tile: tuning.Tile) -> str | None:
    return f"tensordesc<{dtype}[{rows},{columns}]>" if tile.tma else None


def forward_job(
    arch: str, kind: str, dtype: str, mode: str, slots: int, dim: int, *, long: bool = False, both: bool = True
) -> Job:
    tile, both = tuning.forward_tile(arch, kind, slots), both and not long
    work = WORK["exact" if mode == "matches" and kind != "keyed" else mode]
    form = forward.Form(
        slots=slots,
        dim=dim,
        both=both,
        mode={"scores": forward.SCORES, "matches": forward.MATCHES, "weights": forward.WEIGHTS}[mode].value,
        keyed=kind == "keyed",
        precision="tf32" if kind == "tf32" else "ieee",
        none=255,
        long=long,
        add=False,
        text_holes=True,
        video_holes=True,
    )
    return Job(
        forward.interaction_forward,
        arch,
        dtype,
        f"{kind} {mode}, {slots} words" + (", long captions" if long else "") + ("" if both else ", one direction"),
        {
            "words": packed(dtype, classes=not long),
            "frames": packed(dtype, frames=True),
            "word_tiles": descriptor(dtype, tile.n, tile.k, tile),
            "frame_tiles": descriptor(dtype, tile.m, tile.k, tile),
            "out": forward.Outputs("*fp32", ("i64",) * 2, "*u8", ("i64",) * 3, "*u8"),
            "partials": forward.Partials("*fp32", "*fp32" if both else None) if mode == "weights" else None,
            **{"group": "i32", "tile_base": "i32", "zero_competes": "i1", "factor": "fp32"},
        },
        {"TILE": tile, "FORM": form},
        tuning.launch_options(tile),
        (2.0 * tile.m * tile.n * dim, float((tile.m + tile.n) * dim * SIZE[dtype]), work * tile.m * tile.n),
    )


def backward_job(arch: str, side: str, precision: str, dtype: str, dim: int, *, add: bool = False) -> Job:
    tile = tuning.backward_tile(arch, side, precision, dim, add=add)
    other = descriptor(dtype, tile.k, tile.m, tile)
    arguments = {
        "words": packed(dtype),
        "frames": packed(dtype, frames=True),
        "pairs": backward.Pairs("*fp32", "*u8", "*u8", "*fp32", "fp32"),
        "grad": "*fp32",
    }
    constants = {"TILE": tile, "D": dim, "PRECISION": "tf32" if precision == "tf32" else "ieee"}
    if side == "text":
        fn, arguments = backward.interaction_backward_text, {**arguments, "frame_tiles": other, "most_frames": "*i32"}
    else:
        fn, arguments = backward.interaction_backward_video, {**arguments, "word_tiles": other}
        constants["ADD"] = add
    what = f"{precision}, D = {dim}" + (", later block" if add else "")
    bytes_ = float(tile.m * tile.k * SIZE[dtype] + tile.k * tile.n * (1 + 5 / 16))
    cost = (2.0 * tile.m * tile.n * tile.k, bytes_, WORK["coefficient"] * tile.k * tile.n)
    return Job(fn, arch, dtype, what, arguments, constants, tuning.launch_options(tile), cost)


def packing_jobs(arch: str, dim: int) -> Iterator[Job]:
    options = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}
    features, weights = Strided("*bf16", ("i64",) * 3), Strided("*fp32", ("i64",) * 2)
    types = dict.fromkeys(("dim", "blocks", "rows", "tokens", "parts"), "i32") | {"part_stride": "i64"}
    types |= dict.fromkeys(("length", "slots", "real"), "*i32") | dict.fromkeys(("factor", "partial"), "*fp32")
    types |= {"features": features, "weights": weights, "mask": Strided("*u8", ("i64",) * 2), "grad": "*fp32"}

    def job(fn: Any, what: str, constants: dict[str, Any], **more: Any) -> Job:
        return Job(fn, arch, "bf16", what, types | more, constants, options)

    yield job(packing.row_layout, "length classes", {"CLASSES": True, "GRAIN": packing.GRAIN, "BLOCK": 32})
    tile = {"D": dim, "CHANNELS": 512, "SLOTS": 8, "NORMALIZE": True}
    for side in ("words", "frames"):
        rows = packed("bf16", frames=side == "frames")
        yield job(packing.pack_slots, side, {**tile, "COPIES": True}, packed=rows)
        yield job(packing.unpack_gradient, side, tile, packed=rows, out="*bf16")
        yield job(packing.unpack_weight_gradient, side, {"BLOCK": 32, "ADD": True}, packed=rows, out="*fp32")


def cdcr_jobs(arch: str, dim: int) -> Iterator[Job]:
    """CDCR's kernels at 32 words and 12 frames, and at one token a row; half precisions differ in one product."""
    flat = {"ROWS": cdcr_tokens.ROWS, "BD": cdcr_tokens.channel_block(dim)}
    width, choices = "i32:16", Choices("*i16", "*fp32", "i32")
    types = dict.fromkeys(("rows", "tokens", "parts", "tiles", "pairs"), "i32") | {"index": "*i16", "dim": width}
    types |= dict.fromkeys(("mask", "own_mask", "other_mask"), Strided("*u8", ("i64", "i64")))
    types |= dict.fromkeys(("choices", "own_choices", "other_choices"), choices)
    types |= dict.fromkeys(("count", "partial"), "*fp64") | {"channels": Channels("*fp64", "i32", width)}
    types |= dict.fromkeys(("inverse", "weighted", "partners", "pull", "grad_weight"), "*fp32")

    def jobs(fn: Any, what: str, constants: dict[str, Any], unit: bool = True, **more: Any) -> Iterator[Job]:
        options = cdcr_tokens.OPTIONS | more.pop("options", {})
        for dtype in ("bf16", "fp16", "fp32") if fn is cdcr.cdcr_partners else ("bf16", "fp32"):
            # Features are dense, masks need not be.
            features = Strided(f"*{dtype}", ("i64:16", "i64:16", 1))
            side = UnitTokens(features, "*fp32" if unit else None, "i32")
            tokens = {"own": side, "other": side, "features": features, "grad": f"*{dtype}"}
            yield Job(fn, arch, dtype, what, types | tokens | more, constants, options)

    yield from jobs(cdcr_tokens.cdcr_norms, "norms", flat)
    yield from jobs(cdcr.cdcr_moments, "unit tokens", flat)
    for keep in (None, "*fp32"):
        what = "product rows of anchors" if keep else "diagonal"
        yield from jobs(cdcr.cdcr_correlate, what, flat, weighted=keep, partners=keep)
    for own, other in ((32, 12), (12, 32), (1, 1)):
        size, unit = f"{own} x {other}", own > 1
        tile = {"TILE": cdcr_tokens.pair_tile(own, other, cdcr_tokens.MOST, dim)}
        yield from jobs(cdcr.cdcr_partners, size, tile, unit)
        tile = {"TILE": cdcr_tokens.pair_tile(own, other, cdcr_tokens.LEAST, dim)}
        if own <= other:
            yield from jobs(cdcr.cdcr_product_rows, size, tile, unit, options=cdcr.PRODUCT_ROWS)
        for form, rows in (("diagonal", None), ("full", "*fp32")):
            kept, short = {"to_weighted": rows, "to_partners": rows}, {"SHORT": own < other}
            options = cdcr_backward.GRADIENT
            yield from jobs(cdcr_backward.cdcr_gradient, f"{form}, {size}", tile | short, unit, options=options, **kept)


def source(job: Job) -> ASTSource:
    """Spell the arguments' types as Triton's launcher does: pointers are multiples of 16."""
    constants: dict[Any, Any] = dict(job.constants)
    attributes = {}

    def spell(x: Any, path: tuple[int, ...]) -> Any:
        if isinstance(x, tuple):
            parts = [spell(part, (*path, i)) for i, part in enumerate(x)]
            return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
        if not isinstance(x, str):
            constants[path] = x
            return "constexpr"
        kind, _, multiple = x.partition(":")
        if multiple or kind.startswith("*"):
            attributes[path] = [["tt.divisibility", 16]]
        return kind

    signature = {
        name: "constexpr" if name in job.constants else spell(job.arguments[name], (i,))
        for i, name in enumerate(job.fn.arg_names)
    }
    return ASTSource(job.fn, signature=signature, constexprs=constants, attrs=attributes)


def compile_job(job: Job) -> dict[str, Any]:
    """Compile, disassemble, and count."""
    compiled = triton.compile(source(job), target=GPUTarget("cuda", int(job.arch[3:]), 32), options=job.options)
    usage, sass = disassemble(compiled.asm["cubin"])
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
    counts = {name: len(re.findall(pattern, sass)) for name, pattern in INSTRUCTION.items()}
    waits = len(re.findall(r"HGMMA.*gsb0", sass))
    return {
        "kernel": job.fn.__name__,
        "arch": job.arch,
        "dtype": job.dtype,
        "what": job.what,
        "config": job.config,
        "registers": registers,
        "spill_bytes": stack if re.search(r"\b(STL|LDL)\b", sass) else 0,
        "shared_bytes": compiled.metadata.shared,
        "tensor_core": next((name for name in ("tcgen05", "wgmma", "mma") if counts[name]), ""),
        "tensor_core_instructions": max(counts.values()),
        "serialised": counts["wgmma"] > 1 and waits >= counts["wgmma"],
        # A transposed product as another product's operand: Triton has miscompiled that on Hopper.
        "register_operand": bool(re.search(r"dot_op<\{[^}]*parent = #linear", compiled.asm["ttgir"])),
        "flop_per_tile": job.cost[0],
        "bytes_per_tile": job.cost[1],
        "predicted_share": predicted_share(job),
    }


def predicted_share(job: Job) -> float | None:
    """Apply the cost model: the product and then the rest of a tile, or the reads from L2, whichever takes longer."""
    flop, bytes_, work = job.cost
    if not flop:
        return None
    rate = FLOP_HALF[job.arch]
    if job.dtype == "fp32":
        rate = rate / 2 if job.what.startswith("tf32") else FLOP_FP32[job.arch]
    product = flop / rate
    return round(product / max(product + work / ISSUE, bytes_ / BYTES_L2[job.arch]), 3)


def disassemble(cubin: bytes) -> tuple[str, str]:
    """Return resource usage and machine code, by the tools in Triton's wheel."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

    def call(*command: str) -> str:
        done = subprocess.run([str(tools / command[0]), *command[1:]], capture_output=True, text=True)
        return done.stdout + done.stderr if done.returncode == 0 else ""

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass = call("nvdisasm", "-c", file.name) or call("cuobjdump", "-sass", file.name)
        return call("cuobjdump", "-res-usage", file.name), sass


def line(r: dict[str, Any]) -> str:
    """Show one row."""
    share = "" if r["predicted_share"] is None else f"{r['predicted_share']:.2f}"
    return (
        f"{r['arch']:7}{r['kernel']:28}{r['dtype']:5} {r['what']:38}{r['registers']:4} reg"
        f"{r['spill_bytes']:5} B spilled{r['shared_bytes']:7} B shared  {r['tensor_core']:8}"
        f"{'SERIALISED ' if r['serialised'] else ''}{share}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile every Triton kernel and report the result; needs no GPU.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows as a JSON list")
    parser.add_argument("--dim", type=int, default=512, help="channels D (default 512)")
    quick = f"kernels without tensor-core products: {QUICK_ARCH} only"
    parser.add_argument("--quick", action="store_true", help=quick)
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("the static report compiles the kernels, and the interpreter does not; unset TRITON_INTERPRET")
    print(f"triton {triton.__version__}; static, nothing measured", flush=True)
    rows = []
    # A cache of its own: no stale binary is read.
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        for job in jobs(arguments.dim, arguments.quick):
            rows.append(compile_job(job))
            print(line(rows[-1]), flush=True)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
