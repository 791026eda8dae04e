"""Operators that lay videos out once and score texts against them.

``prepare_videos`` normalises the videos' real tokens and lays them out for the C++ kernels, as the list of tensors that
csrc/prepared.h describes: the lanes. Other implementations return an empty list, and the caller keeps the tokens. The
two ``prepared_*`` operators are :mod:`.token_interaction` and :mod:`.soft_token_interaction` with videos ``first`` to
``last - 1`` of the lanes; ``frames`` is the padded length of a video. Only text and its weights have gradients: the
backward pass unpacks the lanes and differentiates the ordinary operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..numerics import accumulation_dtype, index_dtype
from .chunked import prepared as chunked
from .dispatch import LIBRARY
from .no_double_backward import differentiable_once

LIBRARY.define(
    "prepare_videos(Tensor video, Tensor video_weight, Tensor? video_mask, bool normalize, ScalarType dtype) "
    "-> Tensor[]"
)
LIBRARY.define(
    "prepared_token_interaction(Tensor text, Tensor text_weight, Tensor? text_mask, Tensor[] lanes, int first, "
    "int last, int frames, bool normalize, bool zero_competes, bool both, bool keep_matches) "
    "-> (Tensor logits, Tensor video_index, Tensor text_index)"
)
LIBRARY.define(
    "prepared_soft_token_interaction(Tensor text, Tensor text_weight, Tensor? text_mask, Tensor[] lanes, int first, "
    "int last, int frames, bool normalize, bool zero_competes, bool both, bool logsumexp, float temperature) -> Tensor"
)
for _name, _function in chunked.CHUNKED.items():
    LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")

prepare_videos = torch.ops.drl_fast.prepare_videos.default
prepared_token_interaction = torch.ops.drl_fast.prepared_token_interaction.default
prepared_soft_token_interaction = torch.ops.drl_fast.prepared_soft_token_interaction.default


@torch.library.register_fake("drl_fast::prepared_token_interaction", lib=LIBRARY)
def _(
    text: Tensor,
    text_weight: Tensor,
    text_mask: Tensor | None,
    lanes: list[Tensor],
    first: int,
    last: int,
    frames: int,
    normalize: bool,
    zero_competes: bool,
    both: bool,
    keep_matches: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    a, words, _ = text.shape
    b = last - first
    return (
        text.new_empty((a, b), dtype=accumulation_dtype(text.dtype)),
        text.new_empty((a, words, b) if keep_matches else (0,), dtype=index_dtype(frames)),
        text.new_empty((a, frames, b) if keep_matches and both else (0,), dtype=index_dtype(words)),
    )


@torch.library.register_fake("drl_fast::prepared_soft_token_interaction", lib=LIBRARY)
def _(
    text: Tensor, text_weight: Tensor, text_mask: Tensor | None, lanes: Any, first: int, last: int, *_: Any
) -> Tensor:
    return text.new_empty((len(text), last - first), dtype=accumulation_dtype(text.dtype))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    text, text_weight, text_mask, ctx.lanes, *ctx.options = inputs
    ctx.save_for_backward(text, text_weight, text_mask)
    ctx.set_materialize_grads(False)


def _differentiate(from_rows: Callable[..., Any], ctx: Any, grad_logits: Tensor | None) -> tuple[Any, ...]:
    grads: list[Tensor | None] = [None, None]
    if grad_logits is not None:
        text, text_weight, text_mask = ctx.saved_tensors
        needed = ctx.needs_input_grad[:2]
        leaves = [x.detach().requires_grad_(need) for x, need in zip((text, text_weight), needed, strict=True)]
        wanted = [x for x in leaves if x.requires_grad]
        with torch.enable_grad():
            logits = from_rows(*leaves, text_mask, ctx.lanes, *ctx.options)
        found = iter(torch.autograd.grad(logits, wanted, grad_logits))
        grads = [next(found) if x.requires_grad else None for x in leaves]
        # The leaves have no graph, so a second derivative must raise here.
        sources = (grad_logits, text, text_weight)
        grads = differentiable_once(grads, sources, "the token interaction", "drl_fast.reference.token_interaction")
    return (*grads, None, [None] * len(ctx.lanes), *(None,) * len(ctx.options))


def _differentiate_max(ctx: Any, grad_logits: Tensor | None, *_: None) -> tuple[Any, ...]:
    def from_rows(*inputs: Any) -> Tensor:
        *given, _ = inputs  # keep_matches, which the ordinary operator needs for its own backward pass
        arguments: tuple[Any, ...] = (*given, True)
        return chunked.forward(*arguments)[0]

    return _differentiate(from_rows, ctx, grad_logits)


def _differentiate_soft(ctx: Any, grad_logits: Tensor | None) -> tuple[Any, ...]:
    return _differentiate(chunked.soft_forward, ctx, grad_logits)


torch.library.register_autograd(
    "drl_fast::prepared_token_interaction", _differentiate_max, setup_context=_save, lib=LIBRARY
)
torch.library.register_autograd(
    "drl_fast::prepared_soft_token_interaction", _differentiate_soft, setup_context=_save, lib=LIBRARY
)
