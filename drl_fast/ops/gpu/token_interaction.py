"""The token interaction on CUDA tensors: the Triton kernels, or chunked PyTorch where they do not serve.

They do not serve float64, a GPU without bfloat16 tensor cores, and an installation without Triton.
"""

from __future__ import annotations

from torch import Tensor

from .. import dispatch
from ..chunked import token_interaction as chunked
from ._device import on_device_of


def forward(
    text: Tensor,
    video: Tensor,
    text_weight: Tensor,
    video_weight: Tensor | None,
    text_mask: Tensor | None,
    video_mask: Tensor | None,
    normalize: bool,
    zero_competes: bool,
    keep_matches: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if not dispatch.triton_serves(text):
        return chunked.forward(
            text, video, text_weight, video_weight, text_mask, video_mask, normalize, zero_competes, keep_matches
        )
    # Here, not above: importing drl_fast must not import Triton.
    from drl_fast.kernels import token_interaction as kernels
    from drl_fast.kernels.packing import Side

    with on_device_of(text):
        return kernels.forward(
            Side(text, text_weight, text_mask),
            Side(video, video_weight, video_mask),
            normalize,
            zero_competes,
            keep_matches,
        )


def backward(
    grad_logits: Tensor,
    text: Tensor,
    video: Tensor,
    text_weight: Tensor,
    video_weight: Tensor | None,
    text_mask: Tensor | None,
    video_mask: Tensor | None,
    video_index: Tensor,
    text_index: Tensor,
    normalize: bool,
    zero_competes: bool,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not dispatch.triton_serves(text):
        return chunked.backward(
            grad_logits,
            text,
            video,
            text_weight,
            video_weight,
            text_mask,
            video_mask,
            video_index,
            text_index,
            normalize,
            zero_competes,
            output_mask,
        )
    from drl_fast.kernels import token_interaction_backward as kernels
    from drl_fast.kernels.packing import Side

    with on_device_of(text):
        return kernels.backward(
            grad_logits,
            Side(text, text_weight, text_mask),
            Side(video, video_weight, video_mask),
            video_index,
            text_index,
            normalize,
            zero_competes,
            output_mask,
        )
