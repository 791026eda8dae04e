"""Operator ``drl_fast::token_interaction`` and its backward.

In training the forward pass keeps the matches: which token each token chose. They take one byte each for up to 255
tokens per row, else two, and are all that the features' gradients need of the similarities. The C++ extension serves
CPU tensors, the Triton kernels CUDA tensors, chunked PyTorch everything else.

The Triton kernels also keep both sides in packed form, and for the weights' gradients the maxima (two bytes each, four
for float32); other implementations return empty tensors for these and compute what they need. On CUDA all of it is kept
only up to ``MATCH_BUDGET``; beyond it the backward pass finds it again, block by block.

The matches' last axis is the video: ``video_index`` (A, Nt, B) holds the frame that word i of text a chose in video b,
``text_index`` (A, Nv, B) the word that frame j of video b chose in text a. "None chosen" is 255 in uint8 and -1 in
int16. Matches that are not kept are empty tensors. The Triton kernels leave matches of masked tokens undefined.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..numerics import accumulation_dtype, index_dtype
from . import gpu
from .chunked import token_interaction as chunked
from .dispatch import LIBRARY, triton_serves

LIBRARY.define(
    "token_interaction(Tensor text, Tensor video, Tensor text_weight, Tensor? video_weight, Tensor? text_mask, "
    "Tensor? video_mask, bool normalize, bool zero_competes, bool keep_matches, bool keep_maxima=False) "
    "-> (Tensor logits, Tensor video_index, Tensor text_index, Tensor maxima, Tensor packed)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
LIBRARY.define(
    "token_interaction_backward(Tensor grad_logits, Tensor text, Tensor video, Tensor text_weight, "
    "Tensor? video_weight, Tensor? text_mask, Tensor? video_mask, Tensor video_index, Tensor text_index, "
    "Tensor maxima, Tensor packed, bool normalize, bool zero_competes, bool[4] output_mask) "
    "-> (Tensor grad_text, Tensor grad_video, Tensor grad_text_weight, Tensor grad_video_weight)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
# This dispatch key comes after CPU's and CUDA's: it serves every device without a kernel.
LIBRARY.impl("token_interaction", chunked.forward, "CompositeExplicitAutograd")
LIBRARY.impl("token_interaction_backward", chunked.backward, "CompositeExplicitAutograd")
LIBRARY.impl("token_interaction", gpu.token_interaction, "CUDA")
LIBRARY.impl("token_interaction_backward", gpu.token_interaction_backward, "CUDA")

token_interaction = torch.ops.drl_fast.token_interaction.default

# Bytes of matches and maxima that a training step may keep, by device type; other types keep all. Finding them again
# costs one more product. Beyond this budget they would limit the batch size more than features and activations do.
# 1 GiB suffices for a batch of 2,800 with 32 words and 12 frames, and for 4,900 if no weight needs a gradient.
MATCH_BUDGET = {"cuda": 1 << 30}


def bytes_of_pair(text: Tensor, video: Tensor, both: bool, maxima: bool, normalize: bool) -> int:
    """Return the bytes of one pair's matches, of ``both`` directions or the first, and of its ``maxima``."""
    words, frames = text.shape[1], video.shape[1]
    # Only the Triton kernels keep maxima.
    value = maxima_dtype(text, video, normalize).itemsize if maxima and text.device.type in MATCH_BUDGET else 0
    first = words * (index_dtype(frames).itemsize + value)
    return first + frames * (index_dtype(words).itemsize + value) if both else first


def keeps_matches(text: Tensor, video: Tensor, both: bool, maxima: bool, normalize: bool) -> bool:
    """Say whether training keeps the matches and, if wanted, ``maxima``; device and shapes decide."""
    budget = MATCH_BUDGET.get(text.device.type)
    pair = bytes_of_pair(text, video, both, maxima, normalize)
    return budget is None or text.shape[0] * video.shape[0] * pair <= budget


def maxima_dtype(text: Tensor, video: Tensor, normalize: bool) -> torch.dtype:
    """Return the dtype of the Triton kernels' maxima: fixed-point int16 for 16-bit unit tokens, else float32."""
    short = text.itemsize == 2 and normalize and max(text.shape[1], video.shape[1]) <= 255
    return torch.int16 if short else torch.float32


def public_index(index: Tensor, text_mask: Tensor | None, video_mask: Tensor | None) -> Tensor:
    """Turn matches (A, N, B) into int64 (A, B, N) with -1 for "none chosen"; the chooser's mask is given."""
    wide = index.transpose(1, 2).to(torch.int64)
    none = wide == 255 if index.dtype == torch.uint8 else wide < 0
    if text_mask is not None:
        none |= ~text_mask[:, None, :]
    if video_mask is not None:
        none |= ~video_mask[None, :, :]
    return wide.masked_fill(none, -1)


def keeps_packed(text: Tensor) -> bool:
    """Say whether the operator returns the packed form: if the Triton kernels serve the tensor."""
    return text.device.type == "cuda" and torch.cuda.is_available() and triton_serves(text)


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
    keep_maxima: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    a, nt, dim = text.shape
    b, nv, _ = video.shape
    served = keeps_packed(text)
    rows = nt + nv if video_weight is not None else nt
    size = 0
    if served and keep_matches and a * b > 0:
        from ..kernels.layout import packed_size  # the kernels' folder may be missing where they do not serve

        size = packed_size(a, nt, b, nv, dim, text.itemsize)
    return (
        text.new_empty((a, b), dtype=accumulation_dtype(text.dtype)),
        text.new_empty((a, nt, b) if keep_matches else (0,), dtype=index_dtype(nv)),
        text.new_empty((a, nv, b) if keep_matches and video_weight is not None else (0,), dtype=index_dtype(nt)),
        text.new_empty(
            (a, rows, b) if served and keep_maxima else (0,),
            dtype=maxima_dtype(text, video, normalize) if served else torch.float32,
        ),
        text.new_empty(size),
    )


@torch.library.register_fake("drl_fast::token_interaction_backward", lib=LIBRARY)
def _(
    grad_logits: Tensor, text: Tensor, video: Tensor, text_weight: Tensor, video_weight: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty_gradients(text, video, text_weight, video_weight, options[-1])


def empty_gradients(
    text: Tensor, video: Tensor, text_weight: Tensor, video_weight: Tensor | None, output_mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return tensors like the gradients of both features and both weights; without elements if not wanted."""
    of_text, of_video, of_text_weight, of_video_weight = output_mask
    of_video_weight = of_video_weight and video_weight is not None
    dtype = text_weight.dtype
    return (
        text.new_empty(text.shape if of_text else (0,)),
        video.new_empty(video.shape if of_video else (0,)),
        text.new_empty(text.shape[:2] if of_text_weight else (0,), dtype=dtype),
        video.new_empty(video.shape[:2] if of_video_weight else (0,), dtype=dtype),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    text, video, text_weight, video_weight, text_mask, video_mask, normalize, zero_competes, keep_matches, *_ = inputs
    _, *kept = output
    learned = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    if not keeps_matches(text, video, video_weight is not None, learned, normalize):
        # The caller may have asked for them; the graph still does not keep them.
        kept = [x.new_empty(0) for x in kept]
    elif not keep_matches:
        raise RuntimeError("drl_fast::token_interaction needs keep_matches=True if an input requires gradients")
    ctx.save_for_backward(text, video, text_weight, video_weight, text_mask, video_mask, *kept)
    ctx.normalize, ctx.zero_competes = normalize, zero_competes
    # Otherwise autograd allocates zeros for the matches' gradients, as large as the matches.
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_logits: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_logits is None:
        return (None,) * 10
    needed = list(ctx.needs_input_grad[:4])
    grads = torch.ops.drl_fast.token_interaction_backward(
        grad_logits, *ctx.saved_tensors, ctx.normalize, ctx.zero_competes, needed
    )
    return (*(grad if need else None for grad, need in zip(grads, needed, strict=True)), *(None,) * 6)


def no_second_derivative(ctx: Any, *_: Tensor) -> None:
    raise NotImplementedError(
        "drl_fast: the token interaction has no second derivative; compute it with drl_fast.reference.token_interaction"
    )


torch.library.register_autograd("drl_fast::token_interaction", _differentiate, setup_context=_save, lib=LIBRARY)
torch.library.register_autograd("drl_fast::token_interaction_backward", no_second_derivative, lib=LIBRARY)
