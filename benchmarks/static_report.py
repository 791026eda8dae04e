"""What the Triton kernels compile to, found without a GPU: registers, spills, shared memory, tensor-core instructions.

    python -m benchmarks.static_report                      a table
    python -m benchmarks.static_report --json FILE          and a list of objects, one a row

Every kernel is compiled ahead of time for sm_80, sm_90 and sm_100 at the configurations of kernels/tuning.py, and the
machine code that ptxas made is read with the tools that Triton ships. Nothing is run and no time is measured:
``predicted_share`` comes from the cost model below, the share of the tensor cores' (float32: the FMA units') rate that
one tile could reach if nothing but the counted work took time.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from drl_fast.kernels import packing, tuning
from drl_fast.kernels import token_interaction as forward
from drl_fast.kernels import token_interaction_backward as backward
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import static_cdcr

ARCHS = ("sm_80", "sm_90", "sm_100")
QUICK_ARCH = "sm_90"
INSTRUCTION = {"mma": r"\bHMMA", "wgmma": r"\bHGMMA", "tcgen05": r"\bUTC\w*MMA"}
# Shared memory that one block may have.
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448}

# The cost model, per SM and clock: FLOP of dense half-precision products, of float32 FMAs, bytes from L2, and lane
# instructions issued. From the chips' published peak rates at their boost clocks; L2 is an assumption.
FLOP_HALF = {"sm_80": 2048, "sm_90": 4096, "sm_100": 8192}
FLOP_FP32 = {"sm_80": 128, "sm_90": 256, "sm_100": 256}
BYTES_L2 = {"sm_80": 44, "sm_90": 36, "sm_100": 36}
ISSUE = 128
# Instructions a similarity (forward) or coefficient (backward) outside the product, counted in sm_90 machine code.
WORK = {"scores": 4.5, "matches": 8.5, "weights": 5.0, "exact": 10.5, "coefficient": 9.0}


@dataclass
class Job:
    """One compilation."""

    fn: Any
    arch: str
    dtype: str  # Triton's name of the tokens' type
    what: str  # the launch in words
    constants: dict[str, Any]
    warps: int
    stages: int
    blocks: dict[str, list[int]] = field(default_factory=dict)  # descriptor arguments
    flop: float = 0.0
    bytes: float = 0.0
    work: float = 0.0  # instructions outside the product
    source: str = "static"
    types: dict[str, str] | None = None  # of the arguments, where their names do not say it
    divisible: list[str] = field(default_factory=list)  # arguments that are multiples of 16, beside addresses
    options: dict[str, Any] = field(default_factory=dict)  # of the launch, beside warps and stages


INT32 = (
    "text_position",
    "video_position",
    "position",
    "text_length",
    "video_length",
    "length",
    "start",
    "class_begin",
    "chunk_row",
    "most_frames",
    "slots",
    "real",
)
SCALARS = {"zero_competes": "i1", "factor": "fp32"}


def signature(job: Job) -> dict[str, str]:
    """Argument types as the launchers pass them."""
    if job.types is not None:
        return job.types
    types = {}
    for name in job.fn.arg_names:
        if name in job.constants:
            types[name] = "constexpr"
        elif name in job.blocks:
            types[name] = f"tensordesc<{job.dtype}{job.blocks[name]}>".replace(" ", "")
        elif name in ("text", "video", "features", "packed") or (name == "out" and "dim" in job.fn.arg_names):
            types[name] = f"*{job.dtype}"
        elif name in ("video_index", "text_index", "mask"):
            types[name] = "*u8"
        elif name == "order":
            types[name] = "*i64"
        elif name in INT32:
            types[name] = "*i32"
        elif name.startswith(("logits_", "index_", "x_", "w_", "mask_")) or name == "part_stride":
            types[name] = "i64"
        elif name in SCALARS and not (name == "factor" and job.fn is packing.unpack_gradient):
            types[name] = SCALARS[name]
        elif name in FLOATS or name == "factor":
            types[name] = "*fp32"
        else:
            types[name] = "i32"
    return types


FLOATS = (
    "text_scale",
    "video_scale",
    "text_weight",
    "video_weight",
    "scale",
    "weight",
    "weights",
    "logits",
    "grad_logits",
    "text_partial",
    "video_partial",
    "partial",
    "grad",
    "boost",
    "out",
)


def jobs(dim: int = 512, quick: bool = False) -> Iterator[Job]:
    """Every kernel at its tuned configurations; ``quick``: of those without a tensor-core product, one chip's."""
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


def forward_job(
    arch: str, kind: str, dtype: str, mode: str, slots: int, dim: int, *, long: bool = False, both: bool = True
) -> Job:
    tile, both = tuning.forward_tile(arch, kind, slots), both and not long
    modes = {"scores": forward.SCORES, "matches": forward.MATCHES, "weights": forward.WEIGHTS}
    constants = {
        "SLOTS": slots,
        "D": dim,
        "BM": tile.m,
        "BN": tile.n,
        "BK": tile.k,
        "BOTH": both,
        "MODE": modes[mode].value,
        "KEYED": kind == "keyed",
        "PRECISION": "tf32" if kind == "tf32" else "ieee",
        "NONE": 255,
        "SORTED": not long,
        "LONG": long,
        "ADD": False,
        "TEXT_HOLES": True,
        "VIDEO_HOLES": True,
        "TMA": tile.tma,
    }
    size = 4 if dtype == "fp32" else 2
    work = WORK["exact" if mode == "matches" and kind != "keyed" else mode] * tile.m * tile.n
    return Job(
        forward.interaction_forward,
        arch,
        dtype,
        f"{kind} {mode}, {slots} words" + (", long captions" if long else "") + ("" if both else ", one direction"),
        constants,
        tile.warps,
        tile.stages,
        {"text": [tile.n, tile.k], "video": [tile.m, tile.k]} if tile.tma else {},
        2.0 * tile.m * tile.n * dim,
        float((tile.m + tile.n) * dim * size),
        work,
        tile.source,
    )


def backward_job(arch: str, side: str, precision: str, dtype: str, dim: int, *, add: bool = False) -> Job:
    tile = tuning.backward_tile(arch, side, precision, dim, add=add)
    fn = backward.interaction_backward_text if side == "text" else backward.interaction_backward_video
    other, size = "video" if side == "text" else "text", 4 if dtype == "fp32" else 2
    constants = {
        "D": dim,
        "BM": tile.m,
        "BN": tile.n,
        "BK": tile.k,
        "BOTH": True,
        "PRECISION": "tf32" if precision == "tf32" else "ieee",
        "TMA": tile.tma,
        **({"ADD": add} if side == "video" else {}),
    }
    return Job(
        fn,
        arch,
        dtype,
        f"{precision}, D = {dim}" + (", later block" if add else ""),
        constants,
        tile.warps,
        tile.stages,
        {other: [tile.k, tile.m]} if tile.tma else {},
        2.0 * tile.m * tile.n * tile.k,
        float(tile.m * tile.k * size + tile.k * tile.n * (1 + 5 / 16)),
        WORK["coefficient"] * tile.k * tile.n,
        tile.source,
    )


def packing_jobs(arch: str, dim: int) -> Iterator[Job]:
    shared = {"D": dim, "CHANNELS": 512, "SLOTS": 8, "NORMALIZE": True}
    pack = {
        **shared,
        "MASKED": True,
        "WEIGHTED": True,
        "COPIES": True,
        "GRAIN": packing.GRAIN,
        "TAIL": packing.TAIL,
        "PAD": packing.NOWHERE,
        "TINY": packing.NORM_EPS,
    }
    layout = {"MASKED": True, "CLASSES": True, "GRAIN": packing.GRAIN, "BLOCK": 32}
    yield Job(packing.row_layout, arch, "bf16", "length classes", layout, 4, 3)
    for frames in (False, True):
        side = "frames" if frames else "words"
        yield Job(packing.pack_slots, arch, "bf16", side, {**pack, "FRAMES": frames}, 4, 3)
        yield Job(packing.unpack_gradient, arch, "bf16", side, {**shared, "FRAMES": frames}, 4, 3)
        constants = {"BLOCK": 32, "FRAMES": frames, "ADD": True}
        yield Job(packing.unpack_weight_gradient, arch, "bf16", side, constants, 4, 3)


def cdcr_jobs(arch: str, dim: int) -> Iterator[Job]:
    for launch in static_cdcr.launches(dim):
        for dtype in launch.dtypes:
            yield Job(
                launch.fn,
                arch,
                dtype,
                launch.what,
                launch.fixed(),
                launch.options["num_warps"],
                launch.options["num_stages"],
                types=launch.signature(dtype),
                divisible=launch.divisible(),
                options=launch.options,
            )


def compile_job(job: Job) -> dict[str, Any]:
    """Compile, disassemble, and count."""
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature(job).items())
        if kind.startswith("*") or name in job.divisible
    }
    source = ASTSource(job.fn, signature=signature(job), constexprs=job.constants, attrs=attributes)
    target = GPUTarget("cuda", int(job.arch[3:]), 32)
    options = {"num_warps": job.warps, "num_stages": job.stages, "enable_fp_fusion": True, **job.options}
    compiled = triton.compile(source, target=target, options=options)
    usage, sass = disassemble(compiled.asm["cubin"])
    counts = {name: len(re.findall(pattern, sass)) for name, pattern in INSTRUCTION.items()}
    stack = int(re.search(r"STACK:(\d+)", usage)[1])  # type: ignore[index]
    spilled = stack if re.search(r"\b(STL|LDL)\b", sass) else 0
    waits = len(re.findall(r"HGMMA.*gsb0", sass))
    constants = job.constants
    return {
        "kernel": job.fn.__name__,
        "arch": job.arch,
        "dtype": job.dtype,
        "what": job.what,
        "config": {
            **{k: constants[k] for k in ("BM", "BN", "BK", "SLOTS", "D", "TMA") if k in constants},
            "num_warps": job.warps,
            "num_stages": job.stages,
            "chosen": job.source,
        },
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),  # type: ignore[index]
        "spill_bytes": spilled,
        "shared_bytes": compiled.metadata.shared,
        "tensor_core": next((name for name in ("tcgen05", "wgmma", "mma") if counts[name]), ""),
        "tensor_core_instructions": max(counts.values()),
        "serialised": counts["wgmma"] > 1 and waits >= counts["wgmma"],
        "register_operand": _register_operand(compiled.asm["ttgir"]),
        "flop_per_tile": job.flop,
        "bytes_per_tile": job.bytes,
        "predicted_share": predicted_share(job),
    }


def _register_operand(ttgir: str) -> bool:
    """Whether a transposed product is another product's operand: Triton has miscompiled that on Hopper."""
    return bool(re.search(r"dot_op<\{[^}]*parent = #linear", ttgir))


def predicted_share(job: Job) -> float | None:
    """The cost model: product and the rest of a tile in turn, or the reads from L2, whichever is longer."""
    if not job.flop:
        return None
    exact = job.dtype == "fp32" and job.constants["PRECISION"] == "ieee"
    rate = FLOP_FP32[job.arch] if exact else FLOP_HALF[job.arch] / (2 if job.dtype == "fp32" else 1)
    product = job.flop / rate
    return round(product / max(product + job.work / ISSUE, job.bytes / BYTES_L2[job.arch]), 3)


def disassemble(cubin: bytes) -> tuple[str, str]:
    """Resource usage and machine code, by the tools in Triton's wheel."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

    def call(*command: str) -> str:
        done = subprocess.run([str(tools / command[0]), *command[1:]], capture_output=True, text=True)
        return done.stdout + done.stderr if done.returncode == 0 else ""

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass = call("nvdisasm", "-c", file.name) or call("cuobjdump", "-sass", file.name)
        return call("cuobjdump", "-res-usage", file.name), sass


def report(dim: int = 512, quick: bool = False) -> list[dict[str, Any]]:
    """Compile everything into a cache of its own, so that no stale binary is read."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("the static report compiles; unset TRITON_INTERPRET")
    with tempfile.TemporaryDirectory() as cache:
        before = os.environ.get("TRITON_CACHE_DIR")
        os.environ["TRITON_CACHE_DIR"] = cache
        try:
            return [compile_job(job) for job in jobs(dim, quick)]
        finally:
            os.environ.pop("TRITON_CACHE_DIR")
            if before is not None:
                os.environ["TRITON_CACHE_DIR"] = before


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile every Triton kernel and report what it became; needs no GPU.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows as a JSON list")
    parser.add_argument("--dim", type=int, default=512, help="channels D (default 512)")
    parser.add_argument(
        "--quick", action="store_true", help=f"kernels without tensor-core products: {QUICK_ARCH} alone"
    )
    arguments = parser.parse_args()
    rows = report(arguments.dim, arguments.quick)
    print(f"triton {triton.__version__}; static, nothing measured")
    for r in rows:
        share = "" if r["predicted_share"] is None else f"{r['predicted_share']:.2f}"
        print(
            f"{r['arch']:7}{r['kernel']:28}{r['dtype']:5} {r['what']:38}{r['registers']:4} reg"
            f"{r['spill_bytes']:5} B spilled{r['shared_bytes']:7} B shared  {r['tensor_core']:8}"
            f"{'SERIALISED ' if r['serialised'] else ''}{share}"
        )
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
