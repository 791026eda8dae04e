"""Gather all ranks' rows, with gradients, for losses that need the whole logit matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .group import Group


def gather_rows(x: Tensor, group: Group, counts: list[int]) -> Tensor:
    """Concatenate every rank's rows (counts[rank], ...) into (sum of counts, ...).

    The backward pass sums each row's gradient over ranks and returns it to its owner. If every rank computes the loss
    of the whole batch, the result is W times too large, and DDP's mean over ranks cancels that.
    """
    if x.dtype == torch.bool:  # not every backend sends booleans
        return torch.cat(group.gather(x.to(torch.uint8), counts)) != 0
    return _Gather.apply(x, group, counts)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, counts: list[int]) -> Tensor:
        ctx.group, ctx.counts = group, counts
        return torch.cat(group.gather(x, counts))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        parts = [part.reshape(-1) for part in gradient.split(ctx.counts)]
        first, *others = ctx.group.return_to_owners(parts)
        for other in others:  # in rank order: the same bits every time
            first = first + other
        return first.view(ctx.counts[ctx.group.rank], *gradient.shape[1:]), None, None
