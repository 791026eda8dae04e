"""Operator ``drl_fast::rerank`` and its backward: each text against candidates of its own.

Text a owns the candidates ``offsets[a]:offsets[a + 1]``; the operator takes all candidates in one row, (R, Nv, D). The
forward pass keeps nothing. The backward pass computes the similarities again; on CUDA it is that of chunked PyTorch,
batched products in float32, also where a Triton kernel serves the forward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..numerics import accumulation_dtype
from . import gpu
from .chunked import rerank as chunked
from .dispatch import LIBRARY
from .token_interaction import empty_gradients

LIBRARY.define(
    "rerank(Tensor text, Tensor candidates, Tensor text_weight, Tensor? candidate_weight, Tensor? text_mask, "
    "Tensor? candidate_mask, Tensor offsets, bool normalize, bool zero_competes, str pooling, float temperature) "
    "-> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
LIBRARY.define(
    "rerank_backward(Tensor grad_scores, Tensor text, Tensor candidates, Tensor text_weight, Tensor? candidate_weight, "
    "Tensor? text_mask, Tensor? candidate_mask, Tensor offsets, bool normalize, bool zero_competes, str pooling, "
    "float temperature, bool[4] output_mask) "
    "-> (Tensor grad_text, Tensor grad_candidates, Tensor grad_text_weight, Tensor grad_candidate_weight)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
LIBRARY.impl("rerank", chunked.forward, "CompositeExplicitAutograd")
LIBRARY.impl("rerank_backward", chunked.backward, "CompositeExplicitAutograd")
LIBRARY.impl("rerank", gpu.rerank, "CUDA")
LIBRARY.impl("rerank_backward", gpu.rerank_backward, "CUDA")

rerank = torch.ops.drl_fast.rerank.default


@torch.library.register_fake("drl_fast::rerank", lib=LIBRARY)
def _(text: Tensor, candidates: Tensor, *_: Any) -> Tensor:
    return text.new_empty(candidates.shape[0], dtype=accumulation_dtype(text.dtype))


@torch.library.register_fake("drl_fast::rerank_backward", lib=LIBRARY)
def _(
    grad_scores: Tensor,
    text: Tensor,
    candidates: Tensor,
    text_weight: Tensor,
    candidate_weight: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty_gradients(text, candidates, text_weight, candidate_weight, options[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, normalize, zero_competes, pooling, temperature = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = normalize, zero_competes, pooling, temperature


def _differentiate(ctx: Any, grad_scores: Tensor) -> tuple[Tensor | None, ...]:
    needed = list(ctx.needs_input_grad[:4])
    grads = torch.ops.drl_fast.rerank_backward(grad_scores, *ctx.saved_tensors, *ctx.options, needed)
    return (*(grad if need else None for grad, need in zip(grads, needed, strict=True)), *(None,) * 7)


def _no_second_derivative(ctx: Any, *_: Tensor) -> None:
    raise NotImplementedError("drl_fast: rerank has no second derivative; compute it with drl_fast.reference.rerank")


torch.library.register_autograd("drl_fast::rerank", _differentiate, setup_context=_save, lib=LIBRARY)
torch.library.register_autograd("drl_fast::rerank_backward", _no_second_derivative, lib=LIBRARY)
