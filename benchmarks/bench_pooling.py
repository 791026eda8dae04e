"""The similarities of other retrieval models against eager code: a training step's time and peak memory.

    python benchmarks/bench_pooling.py [--quick | --full]

The token interaction with the maximum, softmax and logsumexp (both directions, with weights); every word's own maximum
or soft maximum (``token_maxsim``, one direction); and the mean of the maxima (``maxsim``, one direction). A step
computes the gradients of all inputs for a given gradient of the result. Writes ``<out>/<machine>/pooling.json``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import drl_fast
import eager
from comparison import PRODUCT, Comparison, Contestant, Plan, gradient_step, main, similarities
from harness import Call
from problems import SEED, Problem, Shape, batches

TEMPERATURE = 0.01  # X-CLIP's
SOFTMAX = {"pooling": "softmax", "temperature": TEMPERATURE}
LOGSUMEXP = {"pooling": "logsumexp", "temperature": TEMPERATURE}
EAGER_SOFTMAX = {"pool": eager.softmax_pool(TEMPERATURE)}
EAGER_LOGSUMEXP = {"pool": eager.logsumexp_pool(TEMPERATURE)}

Similarity = Callable[..., Tensor]
Maker = Callable[[Problem], Call]


def both_directions(function: Similarity, **options: Any) -> Maker:
    """Return a maker of training steps on features, weights and masks."""
    return lambda p: gradient_step(lambda: function(*p.inputs(), **options), p.leaves(), p.grad)


def one_direction(function: Similarity, grad: Callable[[Problem], Tensor], **options: Any) -> Maker:
    """Return a maker of training steps on features and masks; ``grad`` draws the gradient of the result."""

    def make(problem: Problem) -> Call:
        tokens = problem.text, problem.video
        masks = problem.text_mask, problem.video_mask
        return gradient_step(lambda: function(*tokens, *masks, **options), tokens, grad(problem))

    return make


def grad_of_words(problem: Problem) -> Tensor:
    """Draw a gradient of an (A, B, Nt) result."""
    b, generator = problem.shape.batch, torch.Generator().manual_seed(SEED + 2)
    return torch.randn(b, b, problem.shape.nt, generator=generator).to(problem.text.device)


def interactions(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[Maker, Maker]:
    return both_directions(drl_fast.token_interaction, **ours), both_directions(eager.token_interaction, **theirs)


def of_words(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[Maker, Maker]:
    return (
        one_direction(drl_fast.token_maxsim, grad_of_words, **ours),
        one_direction(eager.token_maxsim, grad_of_words, **theirs),
    )


# --- who is measured --------------------------------------------------------------------------------------------------
MEANS = (
    one_direction(drl_fast.maxsim, lambda p: p.grad, normalize=True, reduction="mean"),
    one_direction(eager.mean_maxsim, lambda p: p.grad),
)
# Name -> label, (our maker, the eager form's), A x B x Nt x Nv tensors that the eager form holds at its peak.
SIMILARITIES = {
    "max": ("`token_interaction`", interactions({}, {}), 3),
    "softmax": ("`token_interaction`, softmax", interactions(SOFTMAX, EAGER_SOFTMAX), 8),
    "logsumexp": ("`token_interaction`, logsumexp", interactions(LOGSUMEXP, EAGER_LOGSUMEXP), 6),
    "token_max": ("`token_maxsim`", of_words({}, {}), 3),
    "token_softmax": ("`token_maxsim`, softmax", of_words(SOFTMAX, EAGER_SOFTMAX), 6),
    "mean": ("`maxsim`, mean", MEANS, 3),
}


def contestants() -> tuple[Contestant, ...]:
    """Return the product, and every similarity followed by its eager form."""
    found = [PRODUCT]
    for name, (label, (ours, theirs), tensors) in SIMILARITIES.items():
        found.append(Contestant(name, label, ours, "drl-fast"))
        form = "as public code has it (benchmarks/eager.py)"
        found.append(Contestant(f"eager_{name}", f"{label}, eager", theirs, form, similarities(tensors)))
    return tuple(found)


COMPARISON = Comparison(
    "pooling", {"train": contestants()}, against={name: (f"eager_{name}",) for name in SIMILARITIES}
)


# --- plans ------------------------------------------------------------------------------------------------------------
def _plan(minutes: float, shapes: tuple[Shape, ...], memory: tuple[Shape, ...], **rest: Any) -> Plan:
    return Plan(minutes, {"train": shapes}, {c.name: memory for c in contestants()[1:]}, **rest)


REAL = Shape(256, lengths="real")
PLANS = {
    "quick": _plan(1, batches(Shape(0), 64), batches(Shape(0), 64)),
    "default": _plan(3, batches(Shape(0), 64, 256), batches(Shape(0), 256)),
    "full": _plan(13, (*batches(Shape(0), 64, 256, 512), REAL), (*batches(Shape(0), 64, 256, 512), REAL), rounds=5),
}

if __name__ == "__main__":
    main(COMPARISON, PLANS, __doc__, temperature=TEMPERATURE)
