"""Operator ``drl_fast::token_interaction`` and its backward.

In training the forward pass keeps the matches: which token each token chose. They take one byte each for up to 255
tokens per row, else two, and are all that the backward pass needs of the similarities. On CUDA they are kept only up to
``MATCH_BUDGET``; beyond it the backward pass finds them again, block by block. The C++ extension serves CPU tensors,
the Triton kernels CUDA tensors, chunked PyTorch everything else.

The matches' last axis is the video: ``video_index`` (A, Nt, B) holds the frame that word i of text a chose in video b,
``text_index`` (A, Nv, B) the word that frame j of video b chose in text a. "None chosen" is 255 in uint8 and -1 in
int16. Matches that are not kept are empty tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..numerics import accumulation_dtype, index_dtype
from . import gpu
from .chunked import token_interaction as chunked
from .dispatch import LIBRARY

LIBRARY.define(
    "token_interaction(Tensor text, Tensor video, Tensor text_weight, Tensor? video_weight, Tensor? text_mask, "
    "Tensor? video_mask, bool normalize, bool zero_competes, bool keep_matches) "
    "-> (Tensor logits, Tensor video_index, Tensor text_index)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
LIBRARY.define(
    "token_interaction_backward(Tensor grad_logits, Tensor text, Tensor video, Tensor text_weight, "
    "Tensor? video_weight, Tensor? text_mask, Tensor? video_mask, Tensor video_index, Tensor text_index, "
    "bool normalize, bool zero_competes, bool[4] output_mask) "
    "-> (Tensor grad_text, Tensor grad_video, Tensor grad_text_weight, Tensor grad_video_weight)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
# This dispatch key comes after CPU's and CUDA's: it serves every device without a kernel.
LIBRARY.impl("token_interaction", chunked.forward, "CompositeExplicitAutograd")
LIBRARY.impl("token_interaction_backward", chunked.backward, "CompositeExplicitAutograd")
LIBRARY.impl("token_interaction", gpu.token_interaction, "CUDA")
LIBRARY.impl("token_interaction_backward", gpu.token_interaction_backward, "CUDA")

token_interaction = torch.ops.drl_fast.token_interaction.default

# Bytes of matches that a training step may keep, by device type; other types keep all. Finding them again costs one
# more product, a fifth to a third of the step. Beyond this budget the matches would limit the batch size more than
# features and activations do. 1 GiB suffices for a batch of 4,900 with 32 words and 12 frames.
MATCH_BUDGET = {"cuda": 1 << 30}


def keeps_matches(text: Tensor, video: Tensor, both: bool) -> bool:
    """Say whether training keeps the matches (of ``both`` directions or the first); device and shapes decide."""
    budget = MATCH_BUDGET.get(text.device.type)
    if budget is None:
        return True
    a, nt, _ = text.shape
    b, nv, _ = video.shape
    a_pair = nt * index_dtype(nv).itemsize + (nv * index_dtype(nt).itemsize if both else 0)
    return a * b * a_pair <= budget


def public_index(index: Tensor) -> Tensor:
    """Turn an operator's (A, N, B) matches into int64 (A, B, N) with -1 for "none chosen"."""
    wide = index.transpose(1, 2).to(torch.int64)
    return wide.masked_fill(wide == 255, -1) if index.dtype == torch.uint8 else wide


@torch.library.register_fake("drl_fast::token_interaction", lib=LIBRARY)
def _(
    text: Tensor, video: Tensor, text_weight: Tensor, video_weight: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *_, keep_matches = options
    a, nt, _ = text.shape
    b, nv, _ = video.shape
    return (
        text.new_empty((a, b), dtype=accumulation_dtype(text.dtype)),
        text.new_empty((a, nt, b) if keep_matches else (0,), dtype=index_dtype(nv)),
        text.new_empty((a, nv, b) if keep_matches and video_weight is not None else (0,), dtype=index_dtype(nt)),
    )


@torch.library.register_fake("drl_fast::token_interaction_backward", lib=LIBRARY)
def _(
    grad_logits: Tensor, text: Tensor, video: Tensor, text_weight: Tensor, video_weight: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_text, of_video, of_text_weight, of_video_weight = options[-1]
    of_video_weight = of_video_weight and video_weight is not None
    dtype = text_weight.dtype
    return (
        text.new_empty(text.shape if of_text else (0,)),
        video.new_empty(video.shape if of_video else (0,)),
        text.new_empty(text.shape[:2] if of_text_weight else (0,), dtype=dtype),
        video.new_empty(video.shape[:2] if of_video_weight else (0,), dtype=dtype),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    text, video, text_weight, video_weight, text_mask, video_mask, normalize, zero_competes, keep_matches = inputs
    _, *matches = output
    if not keeps_matches(text, video, video_weight is not None):
        # The caller may have asked for them; the graph still does not keep them.
        matches = [x.new_empty(0) for x in matches]
    elif not keep_matches:
        raise RuntimeError("drl_fast::token_interaction needs keep_matches=True if an input requires gradients")
    ctx.save_for_backward(text, video, text_weight, video_weight, text_mask, video_mask, *matches)
    ctx.normalize, ctx.zero_competes = normalize, zero_competes
    # Otherwise autograd allocates zeros for the matches' gradients, as large as the matches.
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_logits: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_logits is None:
        return (None,) * 9
    needed = list(ctx.needs_input_grad[:4])
    grads = torch.ops.drl_fast.token_interaction_backward(
        grad_logits, *ctx.saved_tensors, ctx.normalize, ctx.zero_competes, needed
    )
    return (*(grad if need else None for grad, need in zip(grads, needed, strict=True)), *(None,) * 5)


def _no_second_derivative(ctx: Any, *_: Tensor) -> None:
    raise NotImplementedError(
        "drl_fast: the token interaction has no second derivative; compute it with drl_fast.reference.token_interaction"
    )


torch.library.register_autograd("drl_fast::token_interaction", _differentiate, setup_context=_save, lib=LIBRARY)
torch.library.register_autograd("drl_fast::token_interaction_backward", _no_second_derivative, lib=LIBRARY)
