"""Adapt the operators' schemas to the Triton launchers.

Each function launches one operator's kernels; :func:`~drl_fast.ops.dispatch.triton_or` falls back to chunked PyTorch.
The kernels are imported in the first call, because importing drl_fast must not import Triton.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from .chunked import cdcr as chunked_cdcr
from .chunked import prepared as chunked_prepared
from .chunked import rerank as chunked_rerank
from .chunked import soft_token_interaction as chunked_soft_token_interaction
from .chunked import token_interaction as chunked_token_interaction
from .dispatch import triton_or

if TYPE_CHECKING:
    from drl_fast.kernels.packing import Side


def _sides(
    text: Tensor,
    video: Tensor,
    text_weight: Tensor,
    video_weight: Tensor | None,
    text_mask: Tensor | None,
    video_mask: Tensor | None,
) -> tuple[Side, Side]:
    """Group the tensors that the token interaction's operators begin with."""
    from drl_fast.kernels.packing import Side

    return Side(text, text_weight, text_mask), Side(video, video_weight, video_mask)


# The Triton kernels have no layout of prepared videos: they pack both sides in every call.
prepare_videos = chunked_prepared.no_lanes
prepared_token_interaction = chunked_prepared.forward
prepared_soft_token_interaction = chunked_prepared.soft_forward


@triton_or(chunked_token_interaction.forward)
def token_interaction(*arguments: Any) -> tuple[Tensor, ...]:
    from drl_fast.kernels import token_interaction as kernels

    return kernels.forward(*_sides(*arguments[:6]), *arguments[6:])


@triton_or(chunked_token_interaction.backward)
def token_interaction_backward(grad_logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    from drl_fast.kernels import token_interaction_backward as kernels

    return kernels.backward(grad_logits, *_sides(*arguments[:6]), *arguments[6:])


@triton_or(chunked_soft_token_interaction.forward)
def soft_token_interaction(*arguments: Any) -> Tensor:
    from drl_fast.kernels import soft_token_interaction as kernels

    return kernels.forward(*_sides(*arguments[:6]), *arguments[6:])


@triton_or(chunked_soft_token_interaction.backward)
def soft_token_interaction_backward(grad_logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    from drl_fast.kernels import soft_token_interaction as kernels

    return kernels.backward(grad_logits, *_sides(*arguments[:6]), *arguments[6:])


@triton_or(chunked_rerank.forward)
def rerank(*arguments: Any) -> Tensor:
    from drl_fast.kernels import rerank as kernels

    return kernels.forward(*_sides(*arguments[:6]), *arguments[6:])


# There is no Triton kernel: the products of chunked PyTorch are batched already.
rerank_backward = triton_or(chunked_rerank.backward)(chunked_rerank.backward)


@triton_or(chunked_cdcr.statistics)
def cdcr_statistics(*arguments: Any) -> tuple[Tensor, ...]:
    from drl_fast.kernels import cdcr as kernels

    return kernels.statistics(*arguments)


@triton_or(chunked_cdcr.correlation)
def cdcr_correlation(*arguments: Any) -> tuple[Tensor, ...]:
    from drl_fast.kernels import cdcr as kernels

    return kernels.correlation(*arguments)


@triton_or(chunked_cdcr.gradient)
def cdcr_gradient(*arguments: Any) -> tuple[Tensor, ...]:
    from drl_fast.kernels import cdcr_backward as kernels

    return kernels.gradient(*arguments)
