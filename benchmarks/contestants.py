"""Who is measured: this library, what it replaces, and max-sim libraries where they are installed.

A contestant turns a problem into a call. ``INTERACTIONS`` compute the whole token interaction, both directions with
weights; ``MAXSIMS`` the one direction that max-sim libraries offer, forward only, on features normalised beforehand.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

import drl_fast
from benchmarks import eager
from benchmarks.harness import Call, available_bytes, installed
from benchmarks.problem import Problem, Shape, make_problem

YARDSTICK = "mm"
OURS = "drl_fast"
# Of the memory that can be had, what a contestant may be expected to need: only to refuse what cannot fit.
SAFE_SHARE = 0.55
Needs = Callable[[Shape, bool], float]


def nothing(shape: Shape, train: bool) -> float:
    return 0.0


def similarities(forward: int, train: int) -> Needs:
    """Bytes of so many A x B x Nt x Nv tensors at once."""
    return lambda shape, training: (train if training else forward) * shape.similarity_bytes()


@dataclass(frozen=True)
class Contestant:
    """``make(problem)`` returns the forward call."""

    name: str
    label: str
    make: Callable[[Problem], Call]
    note: str = ""
    package: str | None = None  # a peer's name on PyPI
    module: str | None = None  # and what it imports as
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16", "float64")
    needs: Needs = nothing  # bytes, in training or not

    def refusal(self, shape: Shape, device: str, mode: str) -> str | None:
        """Why it does not take part, or None."""
        if self.module is not None and importlib.util.find_spec(self.module) is None:
            return "not installed"
        if device.split(":")[0] not in self.devices:
            return f"needs {' or '.join(self.devices)}"
        if shape.dtype not in self.dtypes:
            return f"no {shape.dtype}"
        needed = self.needs(shape, mode == "train")
        if needed and needed > SAFE_SHARE * available_bytes(device):
            return f"skipped: needs about {needed / 1e9:.0f} GB"
        return None

    def describe(self) -> dict[str, Any]:
        about: dict[str, Any] = {"label": self.label, "note": self.note}
        if self.package:
            about |= {"package": self.package, "version": installed(self.package)}
        return about


# --- both directions --------------------------------------------------------------------------------------------------
def dense_product(problem: Problem) -> Call:
    words, frames = problem.text.detach().flatten(0, 1), problem.video.detach().flatten(0, 1).T
    return lambda: torch.mm(words, frames)


def _mm_into(problem: Problem) -> Call:
    words, frames = problem.text.detach().flatten(0, 1), problem.video.detach().flatten(0, 1).T
    out = torch.mm(words, frames)
    return lambda: torch.mm(words, frames, out=out)


def _ours(problem: Problem) -> Call:
    return lambda: drl_fast.token_interaction(*problem.inputs())


def _eager(problem: Problem) -> Call:
    return lambda: eager.token_interaction(*problem.inputs())


def _compiled(problem: Problem) -> Call:
    torch._dynamo.reset()  # past 8 shapes it would silently turn to dynamic ones, or to eager
    function = torch.compile(eager.token_interaction, dynamic=False)
    return lambda: function(*problem.inputs())


def _other_blas(problem: Problem) -> Call:
    words, frames = (x.detach().flatten(0, 1).numpy() for x in (problem.text, problem.video))
    return lambda: words @ frames.T


def product(by: str, shape: dict[str, Any], threads: int) -> tuple[Call, Call, str]:
    """Factory for a worker: the yardstick's product by torch ("mm") or by numpy's BLAS ("numpy").

    Each alone in its process: OpenBLAS lets its threads spin after a call, on the cores of whoever is measured next.
    """
    torch.set_num_threads(threads)
    ThreadpoolController().limit(limits=threads, user_api="blas")
    make = {"mm": dense_product, "numpy": _other_blas}[by]
    return make(make_problem(Shape(4))), make(make_problem(Shape(**shape))), "cpu"


def other_blas() -> dict[str, Any]:
    """Which BLAS numpy uses here, and for which processor's kernels it decided."""
    found = [row for row in ThreadpoolController().info() if row["user_api"] == "blas"]
    return {key: found[0].get(key) for key in ("internal_api", "version", "architecture")} if found else {}


# --- one direction ----------------------------------------------------------------------------------------------------
def _our_maxsim(problem: Problem) -> Call:
    query, document = problem.unit()
    return lambda: drl_fast.maxsim(query, document, problem.text_mask)


def _eager_maxsim(problem: Problem) -> Call:
    query, document = problem.unit()
    return lambda: eager.maxsim(query, document, problem.text_mask)


def _trimmed(problem: Problem) -> tuple[list[np.ndarray], np.ndarray]:
    """Real query tokens and whole documents as numpy views: these libraries know no masks."""
    query, document = problem.unit()
    lengths = problem.text_mask.sum(1).int().tolist()
    return [q[:n].numpy() for q, n in zip(query, lengths, strict=True)], document.numpy()


def _maxsim_cpu(problem: Problem) -> Call:
    os.environ.setdefault("RAYON_NUM_THREADS", str(torch.get_num_threads()))  # read once, at its first call
    import maxsim_cpu

    queries, documents = _trimmed(problem)
    return lambda: torch.from_numpy(np.stack([maxsim_cpu.maxsim_scores(q, documents) for q in queries]))


def _numkong(problem: Problem) -> Call:
    import numkong

    queries, documents = _trimmed(problem)

    def call() -> Tensor:
        packed = [numkong.maxsim_pack(d) for d in documents]
        scores = np.empty((len(queries), len(packed)), dtype=np.float32)
        for row, query in zip(scores, queries, strict=True):
            q = numkong.maxsim_pack(query)
            # It sums 1 - cosine over the query's tokens.
            row[:] = [len(query) - numkong.maxsim_packed(q, d) for d in packed]
        return torch.from_numpy(scores)

    return call


def _late_interaction_kernels(problem: Problem) -> Call:
    from late_interaction_kernels import MaxSimScorer

    scorer, (query, document) = MaxSimScorer(normalize=False), problem.unit()
    mask = problem.text_mask.bool()
    return lambda: scorer.score(query, document, q_mask=mask)


def _flash_maxsim(problem: Problem) -> Call:
    from flash_maxsim import flash_maxsim_batched

    query, document = problem.unit()
    lengths = problem.text_mask.sum(1).int()
    return lambda: flash_maxsim_batched(query, document, query_lengths=lengths)


_PRODUCT = (
    Contestant(
        YARDSTICK, "torch.mm", dense_product, "the yardstick: one dense product of all padded tokens, nothing else"
    ),
    Contestant("mm_out", "torch.mm, out=", _mm_into, "the same into memory that is already there"),
)
INTERACTIONS = (
    *_PRODUCT,
    Contestant(OURS, "drl-fast", _ours, "drl_fast.token_interaction"),
    Contestant(
        "eager",
        "eager PyTorch",
        _eager,
        "as public retrieval code writes it (benchmarks/eager.py)",
        needs=similarities(3, 3),
    ),
    Contestant(
        "compile",
        "torch.compile",
        _compiled,
        "torch.compile of the eager form, static shapes",
        needs=similarities(3, 4),
    ),
)
MAXSIMS = (
    *_PRODUCT,
    Contestant(OURS, "drl-fast", _our_maxsim, "drl_fast.maxsim"),
    Contestant("eager", "eager PyTorch", _eager_maxsim, "einsum, max, sum", needs=similarities(3, 3)),
    Contestant(
        "maxsim-cpu",
        "maxsim-cpu",
        _maxsim_cpu,
        "one call a query, real query tokens only",
        "maxsim-cpu",
        "maxsim_cpu",
        ("cpu",),
        ("float32",),
    ),
    Contestant(
        "numkong",
        "NumKong",
        _numkong,
        "one call a pair, one thread, packing included, approximate first pass",
        "numkong",
        "numkong",
        ("cpu",),
        ("float32",),
    ),
    Contestant(
        "late-interaction-kernels",
        "late-interaction-kernels",
        _late_interaction_kernels,
        "on a CPU its plain PyTorch fallback",
        "late-interaction-kernels",
        "late_interaction_kernels",
    ),
    Contestant(
        "flash-maxsim",
        "flash-maxsim",
        _flash_maxsim,
        "Triton kernel",
        "flash-maxsim",
        "flash_maxsim",
        ("cuda",),
        ("float32", "float16", "bfloat16"),
    ),
)
BY_NAME = {c.name: c for c in INTERACTIONS}
MODES = {"forward": INTERACTIONS, "train": INTERACTIONS, "maxsim": MAXSIMS}


def training_step(forward: Call, problem: Problem) -> Call:
    """Forward, then gradients of both features and both weights for a given gradient of the logits."""

    grad = problem.grad  # drawn before anything is measured

    def step() -> tuple[Tensor, ...]:
        logits = forward()
        return logits.detach(), *torch.autograd.grad(logits, problem.leaves(), grad.to(logits.dtype))

    return step


def loss_step(forward: Call, leaves: tuple[Tensor, ...]) -> Call:
    """A loss and its gradients."""

    def step() -> tuple[Tensor, ...]:
        loss = forward()
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    return step


def make_call(contestant: Contestant, problem: Problem, mode: str) -> Call:
    """What is timed: the forward without gradients, or a training step (the yardstick is one product in both)."""
    forward = contestant.make(problem)
    if mode == "train" and contestant not in _PRODUCT:
        return training_step(forward, problem)

    def call() -> Any:
        with torch.no_grad():
            return forward()

    return call


def memory_step(contestant: str, shape: dict[str, Any], device: str, threads: int) -> tuple[Call, Call, str]:
    """Factory for a worker: a training step. Inputs count as inputs, gradients as results.

    Compiled code is warmed up at the very shape, since compiling for it takes memory of its own.
    """
    torch.set_num_threads(threads)
    who = BY_NAME[contestant]
    full = Shape(**shape)
    problem = make_problem(full, device, train=True)
    call = make_call(who, problem, "train")
    if contestant == "compile":
        return call, call, device
    tiny = make_problem(Shape(4, full.nt, full.nv, full.dim, full.lengths, full.dtype), device, train=True)
    return make_call(who, tiny, "train"), call, device
