"""Prepared videos where the C++ kernels do not serve: unpack the lanes and run the ordinary operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...numerics import unit, zero_masked


class Rows(NamedTuple):
    """Videos as :func:`drl_fast.token_interaction` takes them."""

    tokens: Tensor  # (B, Nv, D) in the dtype of the lanes; 0 where masked
    weight: Tensor  # (B, Nv); 0 where masked
    mask: Tensor  # (B, Nv) bool


def unpack(lanes: list[Tensor], dim: int, first: int, last: int, frames: int) -> Rows:
    """Return videos ``first`` to ``last - 1`` of lanes that csrc/prepared.h describes."""
    panel, weight, position, item, count, _, shape = lanes
    rows = Rows(
        panel.new_zeros(last - first, frames, dim),
        weight.new_zeros(last - first, frames),
        torch.zeros(last - first, frames, dtype=torch.bool, device=panel.device),
    )
    columns = item.unflatten(0, (max(1, len(shape)), -1)), count.unflatten(0, (max(1, len(shape)), -1))
    step = 0
    for group, (width, slots) in enumerate(shape.tolist()):
        here = slice(step, step + width * slots)
        step += width * slots
        video, length = (x[group, :width] for x in columns)
        used = (video >= first) & (video < last) & (torch.arange(slots, device=panel.device)[:, None] < length)
        at = (video.expand_as(used)[used] - first, position[here].view(slots, width)[used].long())
        tokens = panel[here.start * dim : here.stop * dim].view(slots, dim, width).transpose(1, 2)
        for whole, part in zip(rows, (tokens, weight[here].view(slots, width), used), strict=True):
            whole[at] = part[used]
    return rows


def no_lanes(*_: Any) -> list[Tensor]:
    """Return nothing: videos stay as they are given."""
    return []


def _operands(
    both: bool,
    text: Tensor,
    text_weight: Tensor,
    text_mask: Tensor | None,
    lanes: list[Tensor],
    first: int,
    last: int,
    frames: int,
    normalize: bool,
) -> tuple[Tensor | None, ...]:
    """Return the first six arguments of the ordinary operators, whose ``normalize`` must be False."""
    rows = unpack(lanes, text.shape[2], first, last, frames)
    # Otherwise the norm's gradient would turn a NaN in a masked token into a NaN in its gradient.
    text = unit(zero_masked(text, text_mask)) if normalize else text
    text, tokens = (x.to(text_weight.dtype) for x in (text, rows.tokens))
    return text, tokens, text_weight, rows.weight if both else None, text_mask, rows.mask


def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Score texts (A, Nt, D) against prepared videos: logits (A, B), matches as the ordinary operator's."""
    *sides, zero_competes, both, keep_matches = arguments
    operands = _operands(both, *sides)
    found = torch.ops.drl_fast.token_interaction(*operands, False, zero_competes, keep_matches, keep_matches)
    return found[0], found[1], found[2]


def soft_forward(*arguments: Any) -> Tensor:
    """Score texts (A, Nt, D) against prepared videos with soft pooling: logits (A, B)."""
    *sides, zero_competes, both, logsumexp, temperature = arguments
    operands = _operands(both, *sides)
    return torch.ops.drl_fast.soft_token_interaction(*operands, False, zero_competes, logsumexp, temperature)


CHUNKED: dict[str, Callable[..., Any]] = {
    "prepare_videos": no_lanes,
    "prepared_token_interaction": forward,
    "prepared_soft_token_interaction": soft_forward,
}
