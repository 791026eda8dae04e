"""Operator ``drl_fast::soft_token_interaction`` and its backward: softmax or logsumexp in place of the maximum.

With S the similarities of one token with the tokens of the other side, T the temperature and p = softmax(S / T):

    softmax:    m = sum_j p_j S_j            d m / d S_j = p_j (1 + (S_j - m) / T)
    logsumexp:  m = T log sum_j exp(S_j / T) d m / d S_j = p_j

``zero_competes`` adds a similarity of 0 for every masked token of the row. The forward pass keeps nothing: d loss / d S
is dense, so the backward pass computes S again, block by block, and then both products with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..numerics import accumulation_dtype
from . import gpu
from .chunked import soft_token_interaction as chunked
from .dispatch import LIBRARY
from .token_interaction import empty_gradients, no_second_derivative

LIBRARY.define(
    "soft_token_interaction(Tensor text, Tensor video, Tensor text_weight, Tensor? video_weight, Tensor? text_mask, "
    "Tensor? video_mask, bool normalize, bool zero_competes, bool logsumexp, float temperature) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
LIBRARY.define(
    "soft_token_interaction_backward(Tensor grad_logits, Tensor text, Tensor video, Tensor text_weight, "
    "Tensor? video_weight, Tensor? text_mask, Tensor? video_mask, bool normalize, bool zero_competes, bool logsumexp, "
    "float temperature, bool[4] output_mask) "
    "-> (Tensor grad_text, Tensor grad_video, Tensor grad_text_weight, Tensor grad_video_weight)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
LIBRARY.impl("soft_token_interaction", chunked.forward, "CompositeExplicitAutograd")
LIBRARY.impl("soft_token_interaction_backward", chunked.backward, "CompositeExplicitAutograd")
LIBRARY.impl("soft_token_interaction", gpu.soft_token_interaction, "CUDA")
LIBRARY.impl("soft_token_interaction_backward", gpu.soft_token_interaction_backward, "CUDA")

soft_token_interaction = torch.ops.drl_fast.soft_token_interaction.default


@torch.library.register_fake("drl_fast::soft_token_interaction", lib=LIBRARY)
def _(text: Tensor, video: Tensor, *_: Any) -> Tensor:
    return text.new_empty((len(text), len(video)), dtype=accumulation_dtype(text.dtype))


@torch.library.register_fake("drl_fast::soft_token_interaction_backward", lib=LIBRARY)
def _(
    grad_logits: Tensor, text: Tensor, video: Tensor, text_weight: Tensor, video_weight: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty_gradients(text, video, text_weight, video_weight, options[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.normalize, ctx.zero_competes, ctx.logsumexp, ctx.temperature = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad_logits: Tensor) -> tuple[Tensor | None, ...]:
    needed = list(ctx.needs_input_grad[:4])
    options = ctx.normalize, ctx.zero_competes, ctx.logsumexp, ctx.temperature
    grads = torch.ops.drl_fast.soft_token_interaction_backward(grad_logits, *ctx.saved_tensors, *options, needed)
    return (*(grad if need else None for grad, need in zip(grads, needed, strict=True)), *(None,) * 6)


torch.library.register_autograd("drl_fast::soft_token_interaction", _differentiate, setup_context=_save, lib=LIBRARY)
torch.library.register_autograd("drl_fast::soft_token_interaction_backward", no_second_derivative, lib=LIBRARY)
