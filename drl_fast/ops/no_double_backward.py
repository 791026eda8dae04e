"""Gradients that raise if they are differentiated again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def differentiable_once(
    grads: Sequence[Tensor | None], sources: Sequence[object], what: str, instead: str
) -> list[Tensor | None]:
    """Return the gradients; with ``create_graph=True``, make a second differentiation raise.

    torch's ``once_differentiable`` is not enough: if the loss also depends on the inputs on another path, it would drop
    this path's term of the second derivative without an error.

    Args:
        grads: the gradients that a backward returns.
        sources: everything that they depend on.
        what: the function without a second derivative, for the message.
        instead: the function to use instead, for the message.

    Raises:
        NotImplementedError: when the returned gradients are differentiated.
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
