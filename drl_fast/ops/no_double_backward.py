"""Gradients that can be taken once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def differentiable_once(
    grads: Sequence[Tensor | None], sources: Sequence[object], what: str, instead: str
) -> list[Tensor | None]:
    """The same gradients; where the graph is to live on (``create_graph=True``), differentiating them raises.

    ``once_differentiable`` would drop the second derivative's term in silence wherever another path has one.

    Args:
        grads: what a backward returns.
        sources: everything that they depend on.
        what: whose second derivative is missing, for the message.
        instead: what has one.
    """
    if not torch.is_grad_enabled():
        return list(grads)
    tensors = [x for x in sources if isinstance(x, Tensor) and x.requires_grad]
    return [None if x is None else _Once.apply(x, what, instead, *tensors) for x in grads]


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(grad: Tensor, what: str, instead: str, *sources: Tensor) -> Tensor:
        return grad.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.what, ctx.instead, *_ = inputs

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise NotImplementedError(f"drl_fast: {ctx.what} has no second derivative; compute it with {ctx.instead}")
