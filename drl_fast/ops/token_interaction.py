"""Operator ``drl_fast::token_interaction`` and its backward.

Forward keeps, in training only, which token each token chose (one byte each up to 255 tokens a row, int16 beyond);
the backward reads nothing else of the similarities. One schema, one gradient formula; the C++ extension serves CPU
tensors, the Triton kernels CUDA tensors, chunked PyTorch everything else.

Matches are laid out with the video last: ``video_index`` (A, Nt, B) holds the frame that word i of text a chose in
video b, ``text_index`` (A, Nv, B) the word that frame j of video b chose in text a. "None chosen" is the largest value
of uint8, or -1 in int16. Not kept: both have no elements.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import accumulation_dtype
from ._registry import LIBRARY
from .chunked import token_interaction as chunked
from .gpu import token_interaction as gpu

LIBRARY.define(
    "token_interaction(Tensor text, Tensor video, Tensor text_weight, Tensor? video_weight, Tensor? text_mask, "
    "Tensor? video_mask, bool normalize, bool zero_competes, bool keep_matches) "
    "-> (Tensor logits, Tensor video_index, Tensor text_index)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
LIBRARY.define(
    "token_interaction_backward(Tensor grad_logits, Tensor text, Tensor video, Tensor text_weight, "
    "Tensor? video_weight, Tensor? text_mask, Tensor? video_mask, Tensor video_index, Tensor text_index, "
    "bool normalize, bool need_text, bool need_video) "
    "-> (Tensor grad_text, Tensor grad_video, Tensor grad_text_weight, Tensor grad_video_weight)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
# A key below CPU's and CUDA's own: any device without a kernel of its own lands here.
LIBRARY.impl("token_interaction", chunked.forward, "CompositeExplicitAutograd")
LIBRARY.impl("token_interaction_backward", chunked.backward, "CompositeExplicitAutograd")
LIBRARY.impl("token_interaction", gpu.forward, "CUDA")
LIBRARY.impl("token_interaction_backward", gpu.backward, "CUDA")

token_interaction = torch.ops.drl_fast.token_interaction.default


def index_dtype(length: int) -> torch.dtype:
    """The dtype that indexes a row of ``length`` tokens and still has a value for "none chosen"."""
    return torch.uint8 if length <= 255 else torch.int16


def public_index(index: Tensor) -> Tensor:
    """Turn an operator's (A, N, B) matches into int64 (A, B, N) with -1 for "none chosen"."""
    wide = index.transpose(1, 2).to(torch.int64)
    return wide.masked_fill(wide == 255, -1) if index.dtype == torch.uint8 else wide


@torch.library.register_fake("drl_fast::token_interaction", lib=LIBRARY)
def _(
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
    a, nt, _ = text.shape
    b, nv, _ = video.shape
    logits = text.new_empty((a, b), dtype=accumulation_dtype(text.dtype))
    by_text = (a, nt, b) if keep_matches else (0,)
    by_video = (a, nv, b) if keep_matches and video_weight is not None else (0,)
    return (
        logits,
        text.new_empty(by_text, dtype=index_dtype(nv)),
        text.new_empty(by_video, dtype=index_dtype(nt)),
    )


@torch.library.register_fake("drl_fast::token_interaction_backward", lib=LIBRARY)
def _(
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
    need_text: bool,
    need_video: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = text_weight.dtype
    weighted = need_video and video_weight is not None
    return (
        text.new_empty(text.shape if need_text else (0,)),
        video.new_empty(video.shape if need_video else (0,)),
        text.new_empty(text.shape[:2] if need_text else (0,), dtype=dtype),
        video.new_empty(video.shape[:2] if weighted else (0,), dtype=dtype),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    text, video, text_weight, video_weight, text_mask, video_mask, normalize, _, keep_matches = inputs
    _, video_index, text_index = output
    if not keep_matches:
        raise RuntimeError("drl_fast::token_interaction needs keep_matches=True where gradients are wanted")
    ctx.save_for_backward(
        text, video, text_weight, video_weight, text_mask, video_mask, video_index, text_index
    )  # fmt: skip
    ctx.normalize = normalize
    # Else autograd hands in zeros as the matches' gradient: as many bytes as the matches once more.
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_logits: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_logits is None:
        return (None,) * 9
    text, video, text_weight, video_weight, text_mask, video_mask, video_index, text_index = ctx.saved_tensors
    t, v, wt, wv = ctx.needs_input_grad[:4]
    grad_t, grad_v, grad_wt, grad_wv = torch.ops.drl_fast.token_interaction_backward(
        grad_logits, text, video, text_weight, video_weight, text_mask, video_mask, video_index, text_index,
        ctx.normalize, t or wt, v or wv,
    )  # fmt: skip
    grads = (grad_t if t else None, grad_v if v else None, grad_wt if wt else None, grad_wv if wv else None)
    return (*grads, None, None, None, None, None)


def _no_second_derivative(ctx: Any, *_: Tensor) -> None:
    raise NotImplementedError(
        "drl_fast: the token interaction has no second derivative; compute it with drl_fast.reference.token_interaction"
    )


torch.library.register_autograd("drl_fast::token_interaction", _differentiate, setup_context=_save, lib=LIBRARY)
torch.library.register_autograd("drl_fast::token_interaction_backward", _no_second_derivative, lib=LIBRARY)
