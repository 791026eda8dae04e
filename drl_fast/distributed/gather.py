"""All ranks' rows on every rank, with gradients: for interactions whose loss needs the whole logit matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .group import Group


def gather_rows(x: Tensor, group: Group, counts: list[int]) -> Tensor:
    """Rows (counts[rank], ...) of every rank, one after the other: (sum of counts, ...).

    The backward adds what all ranks' losses want of a row and sends it home. Where every rank computes the same loss of
    the whole batch, gradients are so W times the loss's own, and DDP's mean over ranks is the one process's.
    """
    if x.dtype == torch.bool:  # which not every backend sends
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
        first, *others = ctx.group.send_home(parts)
        for other in others:  # in rank order: the same bits every time
            first = first + other
        return first.view(ctx.counts[ctx.group.rank], *gradient.shape[1:]), None, None
