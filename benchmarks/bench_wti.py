"""The token interaction against what people use today: time, peak memory, and the largest batch in a budget.

    python benchmarks/bench_wti.py [--quick | --full]
    python benchmarks/bench_wti.py --device cuda [--quick | --full]     # bfloat16, on a GPU

Writes ``<out>/<machine>/wti.json`` and its pictures. "forward" and "train" compute both directions with weights;
"maxsim" is the one direction that max-sim libraries offer, on features normalised beforehand.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import drl_fast
import eager
from comparison import PRODUCT, Comparison, Contestant, Plan, gradient_step, main, similarities
from harness import Call
from problems import Problem, Shape, batches

OURS = "drl_fast"


# --- both directions --------------------------------------------------------------------------------------------------
def training_step(forward: Call, problem: Problem) -> Call:
    """Return the forward with gradients of both features and both weights for a given gradient of the logits."""
    return gradient_step(forward, problem.leaves(), problem.grad)


def on_tokens(function: Callable[..., Any]) -> Callable[[Problem], Call]:
    """Return a maker of calls with features, weights and masks."""
    return lambda problem: lambda: function(*problem.inputs())


ours, eager_form = on_tokens(drl_fast.token_interaction), on_tokens(eager.token_interaction)


def compiled(problem: Problem) -> Call:
    torch._dynamo.reset()  # past 8 shapes it would silently turn to dynamic ones, or to eager
    function = torch.compile(eager.token_interaction, dynamic=False)
    return lambda: function(*problem.inputs())


# --- one direction ----------------------------------------------------------------------------------------------------
def on_unit_tokens(function: Callable[..., Any]) -> Callable[[Problem], Call]:
    """Return a maker of calls with normalised features and the queries' mask."""
    return lambda problem: lambda: function(*problem.unit, problem.text_mask)


def trimmed(problem: Problem) -> tuple[list[np.ndarray], np.ndarray]:
    """Return real query tokens and whole documents as numpy views: these libraries know no masks."""
    query, document = problem.unit
    lengths = problem.text_mask.sum(1).int().tolist()
    return [q[:n].numpy() for q, n in zip(query, lengths, strict=True)], document.numpy()


def maxsim_cpu_scores(problem: Problem) -> Call:
    os.environ.setdefault("RAYON_NUM_THREADS", str(torch.get_num_threads()))  # read once, at its first call
    import maxsim_cpu

    queries, documents = trimmed(problem)
    return lambda: torch.from_numpy(np.stack([maxsim_cpu.maxsim_scores(q, documents) for q in queries]))


def numkong_scores(problem: Problem) -> Call:
    import numkong

    queries, documents = trimmed(problem)

    def call() -> Tensor:
        packed = [numkong.maxsim_pack(d) for d in documents]
        scores = np.empty((len(queries), len(packed)), dtype=np.float32)
        for row, query in zip(scores, queries, strict=True):
            q = numkong.maxsim_pack(query)
            # It sums 1 - cosine over the query's tokens.
            row[:] = [len(query) - numkong.maxsim_packed(q, d) for d in packed]
        return torch.from_numpy(scores)

    return call


def late_interaction_scores(problem: Problem) -> Call:
    from late_interaction_kernels import MaxSimScorer

    scorer, (query, document) = MaxSimScorer(normalize=False), problem.unit
    mask = problem.text_mask.bool()
    return lambda: scorer.score(query, document, q_mask=mask)


def flash_maxsim_scores(problem: Problem) -> Call:
    from flash_maxsim import flash_maxsim_batched

    query, document = problem.unit
    lengths = problem.text_mask.sum(1).int()
    return lambda: flash_maxsim_batched(query, document, query_lengths=lengths)


# --- who is measured --------------------------------------------------------------------------------------------------
INTERACTIONS = (
    Contestant(OURS, "drl-fast", ours, "drl_fast.token_interaction"),
    Contestant("eager", "eager PyTorch", eager_form, "as public code has it (benchmarks/eager.py)", similarities(3)),
    Contestant("compile", "torch.compile", compiled, "of the eager form, static shapes", similarities(4), shaped=True),
)
ON_CPU: dict[str, Any] = {"peer": True, "devices": ("cpu",)}
ON_CUDA: dict[str, Any] = {"peer": True, "devices": ("cuda",)}
ONE_THREAD = "one call a pair, one thread, packing included, approximate first pass"
FALLBACK = "on a CPU its plain PyTorch fallback"
MAXSIMS = (
    Contestant(OURS, "drl-fast", on_unit_tokens(drl_fast.maxsim), "drl_fast.maxsim"),
    Contestant("eager", "eager PyTorch", on_unit_tokens(eager.maxsim), "einsum, max, sum", similarities(3)),
    Contestant("maxsim-cpu", "maxsim-cpu", maxsim_cpu_scores, "one call a query, real query tokens only", **ON_CPU),
    Contestant("numkong", "NumKong", numkong_scores, ONE_THREAD, **ON_CPU),
    Contestant("late-interaction-kernels", "late-interaction-kernels", late_interaction_scores, FALLBACK, peer=True),
    Contestant("flash-maxsim", "flash-maxsim", flash_maxsim_scores, "Triton kernel", **ON_CUDA),
)


def _mode(contestants: tuple[Contestant, ...], wrap: Callable[[Call, Problem], Call]) -> tuple[Contestant, ...]:
    """Return the product, which is the same in every mode, and the contestants with their calls wrapped."""
    return (PRODUCT, *(replace(c, make=lambda p, c=c: wrap(c.make(p), p)) for c in contestants))


COMPARISON = Comparison(
    "wti",
    {
        "forward": _mode(INTERACTIONS, lambda call, problem: torch.no_grad()(call)),
        "train": _mode(INTERACTIONS, training_step),
        "maxsim": _mode(MAXSIMS, lambda call, problem: torch.no_grad()(call)),
    },
)


# --- plans ------------------------------------------------------------------------------------------------------------
UP_TO_1024 = (128, 256, 512, 1024)
LONG, REAL = Shape(64, 64, 64), Shape(256, lengths="real")
ONE_WAY = (Shape(128), Shape(128, lengths="real"))
DEFAULT = (Shape(8, dim=64), *batches(Shape(0), 8, 64, 128, 256), LONG, REAL)
FULL = (
    *DEFAULT[:2],
    Shape(8, 64, 64, 64),
    *batches(Shape(0), 32, 64, 128, 256, 512),
    *batches(LONG, 64, 128),
    Shape(128, 77, 20),
    Shape(128, dim=768),
    Shape(128, dtype="bfloat16"),
    *batches(REAL, 128, 256, 512),
)


def _times(shapes: tuple[Shape, ...], one_way: tuple[Shape, ...]) -> dict[str, tuple[Shape, ...]]:
    return {"forward": shapes, "train": shapes, "maxsim": one_way}


def _memory(family: Shape, **sizes: tuple[int, ...]) -> dict[str, tuple[Shape, ...]]:
    return {name: batches(family, *some) for name, some in sizes.items()}


PLANS = {
    "quick": Plan(
        1,
        _times((Shape(128), Shape(256), REAL), ()),
        _memory(Shape(0), drl_fast=(256,), eager=(256,)),
        only={"compile": ()},
    ),
    "default": Plan(
        2,
        _times(DEFAULT, ONE_WAY),
        _memory(Shape(0), drl_fast=(256, 512, 1024), eager=(256, 512)),
        ((Shape(0), 500),),
        only={"compile": (Shape(128),)},
    ),
    "full": Plan(
        11,
        _times(FULL, ONE_WAY),
        _memory(Shape(0), drl_fast=(*UP_TO_1024, 2048, 4096), eager=UP_TO_1024, compile=UP_TO_1024),
        ((Shape(0), 500), (Shape(0), 2000)),
        only={"compile": (Shape(128), Shape(256), LONG, REAL)},
        seconds=2.0,
        rounds=7,
    ),
}


def _gpu_plan(minutes: float, sizes: tuple[int, ...], dims: tuple[int, ...]) -> Plan:
    shapes = (
        Shape(batch, nt, nv, dim, lengths, "bfloat16")
        for batch in sizes
        for nt, nv in ((32, 12), (64, 64), (77, 20))
        for dim in dims
        for lengths in ("full", "real")
    )
    half = Shape(0, dtype="bfloat16")
    used = _memory(half, drl_fast=sizes, eager=sizes, compile=sizes)
    return Plan(minutes, _times(tuple(shapes), batches(half, 128, 1024)), used, ((half, 8000),), rounds=5)


# No GPU has run these yet: the durations are guesses.
GPU_PLANS = {
    "quick": _gpu_plan(1, (128,), (512,)),
    "default": _gpu_plan(5, (128, 1024), (512,)),
    "full": _gpu_plan(60, (*UP_TO_1024, 2048, 4096), (512, 768)),
}


if __name__ == "__main__":
    main(COMPARISON, PLANS, __doc__, GPU_PLANS)
