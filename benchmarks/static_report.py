"""Compile every Triton kernel without a GPU, as training launches it, and report what the compiler made.

    python -m benchmarks.static_report                      a table
    python -m benchmarks.static_report --json FILE          also a list of objects, one a row
    python -m benchmarks.static_report --troubles FILE      also a list of those that spill or do not compile

The public functions and the Triton launchers run on CPU tensors with a driver that launches nothing (fake_gpu.py), over
small problems and a few large ones that need other tiles. So each row is a kernel that such a call launches, with the
specialisation that Triton's just-in-time compiler chooses. Targets: sm_80, sm_90 and sm_100. The tools in Triton's
wheel read the machine code that ptxas made (machine_code.py). Nothing runs and no time is measured.

``instructions`` counts warp instructions by pipe. ``of`` says of what: "product step" is one iteration of the innermost
loop with tensor-core products, plus its share of the work that follows a product's last step, which runs once in
``steps`` iterations; "whole body" is all code of a kernel without such a loop.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from drl_fast.kernels import token_interaction_backward as backward
from torch import Tensor

import drl_fast
from drl_fast.ops import token_interaction as operator

from . import fake_gpu
from .machine_code import PIPES, Code

CAPABILITIES = (80, 90, 100)
QUICK = 90
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}


class Problem(NamedTuple):
    """One call of the token interaction, forward and backward; the odd sizes are divisible by nothing."""

    name: str
    texts: int = 128
    words: int = 32
    videos: int = 128
    frames: int = 12
    dim: int = 512
    dtype: str = "bf16"  # "tf32": float32 with TF32 allowed
    masks: bool = True
    normalize: bool = True
    both: bool = True  # both directions
    masking: str = "drl"
    train: bool = True
    weights: bool = True  # the weights need gradients
    kept: bool = True  # the forward pass keeps matches; otherwise the backward finds them again, in two blocks
    pooling: str = "max"


ALIGNED, ODD, LARGE = (128, 32, 128, 12), (57, 32, 77, 12), (1024, 32, 1024, 12)
# What --quick compiles comes first, so that its rows are the same as in a whole report.
FEW = (
    Problem("batch of 128"),
    Problem("batch of 1024", *LARGE),
    Problem("batch of 1024", *LARGE, dtype="tf32"),
    Problem("batch of 128", dtype="fp32"),
    Problem("raw tokens", normalize=False),
    Problem("batch of 128, scores only", train=False),
    Problem("57 texts, 77 videos, no masks", *ODD, masks=False),
    Problem("140 words, one direction", 57, 140, 77, both=False, dtype="fp16"),
    Problem("softmax", pooling="softmax"),
)
PROBLEMS = (
    *FEW,
    Problem("batch of 128, no masks", masks=False),
    Problem("batch of 128, features' gradients only", weights=False),
    Problem("batch of 1024, no masks", *LARGE, masks=False),
    Problem("batch of 1024, scores only", *LARGE, train=False),
    Problem("57 texts, 77 videos", *ODD),
    Problem("matches not kept", *ALIGNED, kept=False),
    Problem("matches not kept, no masks", *ALIGNED, kept=False, masks=False),
    Problem("masked tokens excluded", masking="exclude"),
    Problem("one direction", both=False),
    Problem("one direction, batch of 1024", *LARGE, both=False),
    Problem("16 words", words=16),
    Problem("64 words, 64 frames", 1024, 64, 1024, 64),
    Problem("77 words, 20 frames", 57, 77, 77, 20),
    Problem("77 words, 20 frames, batch of 1024", 1024, 77, 1024, 20),
    Problem("140 words", words=140),
    Problem("140 words, 57 texts, 77 videos", 57, 140, 77),
    Problem("140 words, no masks", words=140, masks=False),
    Problem("260 frames", 57, 32, 77, 260),
    Problem("raw tokens, batch of 1024", *LARGE, normalize=False),
    Problem("raw tokens, 57 texts, 77 videos", *ODD, normalize=False),
    Problem("raw tokens, scores only", train=False, normalize=False),
    *(Problem("batch of 128", dtype=dtype) for dtype in ("fp16", "tf32")),
    *(Problem("batch of 1024", *LARGE, dtype=dtype) for dtype in ("fp16", "fp32")),
    *(Problem("57 texts, 77 videos", *ODD, dtype=dtype) for dtype in ("fp16", "tf32", "fp32")),
    *(Problem("140 words", words=140, dtype=dtype) for dtype in ("tf32", "fp32")),
    *(Problem(f"D = {dim}", dim=dim) for dim in (64, 100, 128, 768)),
    *(Problem(f"batch of 1024, D = {dim}", *LARGE, dim=dim) for dim in (64, 128)),
    Problem("softmax, no masks", masks=False, pooling="softmax"),
    Problem("softmax, 77 words, 20 frames", 57, 77, 77, 20, pooling="softmax"),
    Problem("softmax, 140 words", words=140, pooling="softmax"),
    *(Problem("softmax", dtype=dtype, pooling="softmax") for dtype in ("fp16", "tf32", "fp32")),
    Problem("logsumexp", pooling="logsumexp"),
    Problem("logsumexp, one direction", both=False, pooling="logsumexp"),
)
# Kernels with products on the tensor cores; --quick compiles the others for one architecture only.
PRODUCTS = ("interaction_forward", "multiply_tiles", "soft_forward", "soft_coefficients", "rerank_forward")


class Matched(NamedTuple):
    """One call of the channel decorrelation loss, forward and backward."""

    name: str
    rows: int = 128
    words: int = 32
    frames: int = 12
    dtype: str = "bf16"
    full: bool = True  # the whole cross-correlation, or its diagonal


FEW_MATCHED = (Matched("full"), Matched("diagonal", dtype="fp32", full=False))
MATCHED = (
    *FEW_MATCHED,
    *(Matched("full", dtype=dtype) for dtype in ("fp16", "fp32")),
    *(Matched("diagonal", dtype=dtype, full=False) for dtype in ("bf16", "fp16")),
    Matched("full, 77 pairs", 77),
    Matched("full, more frames than words", words=12, frames=32),
    Matched("full, one token a row", words=1, frames=1),
    Matched("diagonal, one token a row", words=1, frames=1, full=False),
)


class Reranked(NamedTuple):
    """One call of rerank, forward: its backward launches no Triton kernel."""

    name: str
    texts: int = 16
    words: int = 32
    candidates: int = 100  # of each text
    frames: int = 12
    dtype: str = "bf16"
    normalize: bool = True
    both: bool = True
    pooling: str = "max"


FEW_RERANKED = (Reranked("rerank"), Reranked("rerank", dtype="fp32"), Reranked("rerank, softmax", pooling="softmax"))
RERANKED = (
    *FEW_RERANKED,
    *(Reranked("rerank", dtype=dtype) for dtype in ("fp16", "tf32")),
    *(Reranked(f"rerank, {words} words", words=words) for words in (16, 64, 77)),
    Reranked("rerank, 77 words", words=77, dtype="fp32"),
    Reranked("rerank, raw tokens", normalize=False),
    Reranked("rerank, one direction", both=False),
    *(Reranked("rerank, 140 words", words=140, dtype=dtype) for dtype in ("bf16", "fp32")),
    Reranked("rerank, 140 words, softmax", words=140, pooling="softmax"),
    Reranked("rerank, softmax", dtype="fp32", pooling="softmax"),
    Reranked("rerank, logsumexp", pooling="logsumexp"),
)


def tensors(texts: int, words: int, videos: int, frames: int, dim: int, dtype: str, masks: bool) -> list[Tensor | None]:
    """Allocate both sides' features, weights and masks. Nobody reads the features."""
    sides = (texts, words), (videos, frames)
    features = [torch.empty((*side, dim), dtype=DTYPES[dtype]) for side in sides]
    return [*features, *(torch.ones(side) for side in sides), *(torch.ones(side) if masks else None for side in sides)]


def interact(problem: Problem) -> None:
    """Call the token interaction and, in training, its backward."""
    p = problem
    text, video, *weights, text_mask, video_mask = tensors(*p[1:8])
    text, video = (x.requires_grad_(p.train) for x in (text, video))
    if not p.both:
        weights[1] = None
    weights = [None if x is None else x.requires_grad_(p.train and p.weights) for x in weights]
    options = {"normalize": p.normalize, "masking": p.masking, "bidirectional": p.both, "pooling": p.pooling}
    logits = drl_fast.token_interaction(text, video, *weights, text_mask, video_mask, **options)
    if p.train:
        logits.backward(torch.empty_like(logits))


def decorrelate(problem: Matched) -> None:
    """Call the channel decorrelation loss and its backward."""
    p = problem
    inputs = tensors(p.rows, p.words, p.rows, p.frames, 512, p.dtype, True)
    for x in inputs[:4]:
        x.normal_().requires_grad_()
    drl_fast.cdcr_loss(*inputs, alpha_on=1.0, alpha_off=0.06 if p.full else 0.0).backward()


def rerank(problem: Reranked) -> None:
    """Call rerank."""
    p = problem
    rows = p.texts * p.candidates
    text, candidates, *companions = tensors(p.texts, p.words, rows, p.frames, 512, p.dtype, True)
    if not p.both:
        companions[1] = None
    offsets = torch.arange(p.texts + 1) * p.candidates
    options = {"normalize": p.normalize, "bidirectional": p.both, "pooling": p.pooling}
    drl_fast.rerank(text, candidates, *companions, offsets=offsets, **options)


AnyProblem = Problem | Matched | Reranked


@contextmanager
def _setting(problem: AnyProblem) -> Iterator[None]:
    """Set what a problem needs besides its arguments."""
    precision = torch.backends.cuda.matmul.fp32_precision
    with ExitStack() as stack:
        torch.backends.cuda.matmul.fp32_precision = "tf32" if problem.dtype == "tf32" else "ieee"
        stack.callback(setattr, torch.backends.cuda.matmul, "fp32_precision", precision)
        if isinstance(problem, Problem) and not problem.kept:
            stack.enter_context(mock.patch.dict(operator.MATCH_BUDGET, cpu=0))
            # Half of the rows' matches and maxima.
            block = problem.texts * problem.videos * (problem.words + problem.frames) * 3 // 2
            stack.enter_context(mock.patch.object(backward, "BLOCK_BYTES", block))
        yield


def launches(
    capability: int, problem: AnyProblem, quick: bool = False
) -> tuple[list[fake_gpu.Launch], list[tuple[str, str]]]:
    """Run one problem as on a GPU of this compute capability; return its launches, and what does not compile."""
    fake_gpu.install(capability)
    failures: list[tuple[str, str]] = []

    def wanted(kernel: str) -> bool:
        return not quick or capability == QUICK or kernel in PRODUCTS

    with (
        fake_gpu.serving_cpu_tensors(),
        _setting(problem),
        fake_gpu.library_products(),
        fake_gpu.compiled_kernels(wanted, failures) as found,
    ):
        call = {Problem: interact, Matched: decorrelate, Reranked: rerank}[type(problem)]
        call(problem)
    return found, failures


def _problems(capability: int, quick: bool) -> tuple[AnyProblem, ...]:
    if not quick:
        return (*PROBLEMS, *MATCHED, *RERANKED)
    return (*FEW, *FEW_MATCHED, *FEW_RERANKED) if capability == QUICK else FEW[:3]


def report(quick: bool = False) -> Iterator[dict[str, Any]]:
    """Yield a row for each compiled kernel, at the first problem that launches it, and for each that fails."""
    for capability in CAPABILITIES:
        seen: set[Any] = set()
        for problem in _problems(capability, quick):
            found, failures = launches(capability, problem, quick)
            about = {"arch": f"sm_{capability}", "dtype": problem.dtype, "problem": problem.name}
            for kernel, error in failures:
                if (kernel, error) not in seen:
                    yield {"kernel": kernel, **about, "error": error}
            seen |= set(failures)
            for launch in found:
                if launch.compiled and launch.compiled.hash not in seen:
                    seen.add(launch.compiled.hash)
                    yield {"kernel": launch.kernel, **about, **figures(launch)}


def figures(launch: fake_gpu.Launch) -> dict[str, Any]:
    """Disassemble a launched kernel and count."""
    compiled = launch.compiled
    constants, metadata = constants_of(compiled), compiled.metadata
    code = Code(fake_gpu.machine_code(compiled.asm["cubin"]))
    spilled = code.mnemonics("STL") + code.mnemonics("LDL")
    return {
        "what": in_words(constants),
        "aligned": aligned(compiled.src),
        "grid": launch.grid[0],
        "num_warps": metadata.num_warps,
        "num_stages": metadata.num_stages,
        "registers": compiled.n_regs,
        # The stack per thread; at least 4 bytes if anything is stored to it or read from it.
        "spill_bytes": max(compiled.n_spills, 4 if spilled else 0),
        "shared_bytes": metadata.shared,
        "tensor_core": code.tensor_core,
        "tensor_core_instructions": sum(code.count({i})["tensor"] for i in range(len(code.blocks))),
        "serialised": code.serialised,
        # A transposed product as another product's operand: Triton has miscompiled that on Hopper.
        "register_operand": bool(re.search(r"dot_op<\{[^}]*parent = #linear", compiled.asm["ttgir"])),
        "missing_barriers": code.missing_barriers(metadata.num_warps, operand_bytes(compiled.asm["ttgir"])),
        **instructions(code, constants),
    }


def constants_of(compiled: Any) -> dict[str, Any]:
    """Return a compiled kernel's constexpr parameters by name; not the values that Triton compiled in by itself."""
    names = compiled.src.fn.arg_names
    declared = {p.name for p in compiled.src.fn.params if p.is_constexpr}
    found = {names[path[0]]: value for path, value in compiled.src.constants.items() if len(path) == 1}
    return {name: found[name] for name in names if name in found and name in declared}


def in_words(constants: dict[str, Any]) -> str:
    """Spell constants: of tuples the fields, of flags only those that are set."""
    words = []

    def spell(name: str, value: Any) -> None:
        if hasattr(value, "_fields"):
            if {"m", "n", "k"} <= set(value._fields):
                words.append(f"{value.m} x {value.n} x {value.k}")
                value = value._replace(m=None, n=None, k=None)
            for field in value._fields:
                if field not in ("warps", "stages", "source", "programs"):
                    spell(field, getattr(value, field))
        elif value is True:
            words.append(name)
        elif isinstance(value, str):
            words.append(value)
        elif value is not None and value is not False:
            words.append(f"{name} {value}")

    for name, value in constants.items():
        spell(name.lower(), value)
    return ", ".join(words)


def aligned(source: Any) -> str:
    """Say which sizes Triton found to be multiples of 16, and which to be 1: "16: dim; 1: blocks"."""

    def path(at: tuple[int, ...]) -> str:
        return ".".join([source.fn.arg_names[at[0]], *map(str, at[1:])])

    def kind(at: tuple[int, ...]) -> Any:
        value = source.signature[source.fn.arg_names[at[0]]]
        for i in at[1:]:
            value = value[i]
        return value

    declared = {p.name for p in source.fn.params if p.is_constexpr}
    sixteen = [path(at) for at, hints in source.attrs.items() if hints and str(kind(at)).startswith(("i", "u"))]
    one = [
        path(at)
        for at, value in source.constants.items()
        if value is not None and source.fn.arg_names[at[0]] not in declared
    ]
    return "; ".join(f"{name}: {', '.join(found)}" for name, found in (("16", sixteen), ("1", one)) if found)


def operand_bytes(ttgir: str) -> int:
    """Return the size of the shared memory that may hold a WGMMA's operands: of all buffers as large as one."""
    found = re.findall(r"ttg\.local_alloc [^\n]*-> !ttg\.memdesc<([\dx]+)x[a-z]+(\d+),", ttgir)
    sizes = [math.prod(map(int, shape.split("x"))) * int(bits) // 8 for shape, bits in found]
    # The smallest operand has 64 x 16 elements of 16 bits.
    return sum(size for size in sizes if size >= 2048)


def instructions(code: Code, constants: dict[str, Any]) -> dict[str, Any]:
    """Count instructions by pipe, in a product's step or else in the whole body."""
    parts = code.product_loop()
    steps = steps_of(constants)
    if parts is None or steps is None:
        counts = code.count(range(len(code.blocks)))
        return {"of": "whole body", "instructions": {name: counts[name] for name in PIPES if counts[name]}}
    step, sweep, _ = parts
    counts = Counter({name: step[name] + sweep[name] / steps for name in PIPES})
    shown = {name: round(counts[name], 1) for name in PIPES if counts[name]}
    return {"of": "product step", "steps": steps, "instructions": shown}


def steps_of(constants: dict[str, Any]) -> int | None:
    """Return the steps in which a product goes through the channels, if the kernel has such a tile."""
    tile, form = constants.get("TILE"), constants.get("FORM")
    if not hasattr(tile, "k"):
        return None
    channels = getattr(form, "dim", None)
    return max(1, -(-channels // tile.k)) if channels else 1


def line(r: dict[str, Any]) -> str:
    """Show one row."""
    start = f"{r['arch']:7}{r['kernel']:22}{r['dtype']:5}"
    if "error" in r:
        return f"{start}{r['problem']}: does not compile: {r['error']}"
    return (
        f"{start}{r['registers']:4} reg{r['spill_bytes']:5} B spilled{r['shared_bytes']:7} B shared"
        f"  {r['tensor_core']:8}{'SERIALISED ' if r['serialised'] else ''}"
        f"{'MISSING BARRIER ' if r['missing_barriers'] else ''}{r['problem']}: {r['what']}"
    )


def save(rows: list[dict[str, Any]], file: Path) -> None:
    """Write one row per line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile every Triton kernel and report the result; needs no GPU.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows as a JSON list")
    troubles = "also write the rows that spill or do not compile as a JSON list"
    parser.add_argument("--troubles", type=Path, metavar="FILE", help=troubles)
    quick = f"fewer problems; only kernels with tensor-core products, except for sm_{QUICK}"
    parser.add_argument("--quick", action="store_true", help=quick)
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("the static report compiles the kernels, and the interpreter does not; unset TRITON_INTERPRET")
    print(f"triton {triton.__version__}; static, nothing measured", flush=True)
    rows = []
    # A cache of its own: no stale binary is read.
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        for found in report(arguments.quick):
            rows.append(found)
            print(line(found), flush=True)
    if arguments.json:
        save(rows, arguments.json)
    if arguments.troubles:
        save([found for found in rows if "error" in found or found["spill_bytes"]], arguments.troubles)


if __name__ == "__main__":
    main()
