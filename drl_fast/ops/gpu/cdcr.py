"""CDCR's operators on CUDA tensors: the Triton kernels, or chunked PyTorch where they do not serve.

They do not serve float64, a GPU without bfloat16 tensor cores, and an installation without Triton.
"""

from __future__ import annotations

from torch import Tensor

from .. import dispatch
from ..chunked import cdcr as chunked
from ._device import on_device_of


def statistics(
    text: Tensor, video: Tensor, text_mask: Tensor | None, video_mask: Tensor | None, normalize: bool, both: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not dispatch.triton_serves(text):
        return chunked.statistics(text, video, text_mask, video_mask, normalize, both)
    # Here, not above: importing drl_fast must not import Triton.
    from drl_fast.kernels import cdcr as kernels

    with on_device_of(text):
        return kernels.statistics(text, video, text_mask, video_mask, normalize, both)


def correlation(
    text: Tensor,
    video: Tensor,
    text_weight: Tensor,
    video_weight: Tensor | None,
    video_index: Tensor,
    text_index: Tensor,
    channels: Tensor,
    normalize: bool,
    full: bool,
) -> tuple[Tensor, Tensor]:
    arguments = (text, video, text_weight, video_weight, video_index, text_index, channels, normalize, full)
    if not dispatch.triton_serves(text):
        return chunked.correlation(*arguments)
    from drl_fast.kernels import cdcr as kernels

    with on_device_of(text):
        return kernels.correlation(*arguments)


def gradient(
    text: Tensor,
    video: Tensor,
    text_weight: Tensor,
    video_weight: Tensor | None,
    video_index: Tensor,
    text_index: Tensor,
    channels: Tensor,
    pull: Tensor,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    arguments = (text, video, text_weight, video_weight, video_index, text_index, channels, pull, normalize)
    if not dispatch.triton_serves(text):
        return chunked.gradient(*arguments)
    from drl_fast.kernels import cdcr_backward as kernels

    with on_device_of(text):
        return kernels.gradient(*arguments)


GPU = {"cdcr_statistics": statistics, "cdcr_correlation": correlation, "cdcr_gradient": gradient}
