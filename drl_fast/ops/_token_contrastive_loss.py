"""InfoNCE of the token interaction, both directions, without its logit matrix: no operator of its own, it runs on
``drl_fast::token_interaction`` and its backward in blocks of texts.

    x_ab  = s * logits_ab                                       -inf where b is another video of a's owner
    loss  = 1/2B sum_a [ lse_b x_ab - x_aa ]  +  1/2B sum_b [ lse_a x_ab - x_bb ]
    dx_ab = 1/2B [ exp(x_ab - lse_b x_ab) + exp(x_ab - lse_a x_ab) - 2 (a = b) ]

The forward keeps a running maximum and sum of exponentials for every row and column, the backward scores each block once
more, now with its matches. A log-sum-exp stays in two parts, top and log of the sum, until it is subtracted: their sum
would lose the digits that tell a well-trained positive's probability from 1.

Held beside the inputs: 6 numbers a pair, one block (``BLOCK_BYTES``), in the backward the gradients, summed in float32.
Time: one forward more than a training step of ``token_interaction``, about 15 passes over a block's logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import accumulation_dtype
from . import token_interaction as op

# One block's matches and logits. With 16 MiB a block of 4096 videos and 24 tokens a pair still has 1500 words.
BLOCK_BYTES = 16 << 20
# Logits, their exponentials and one temporary live at once.
COPIES = 4
# The operator lays out all videos anew for every block, at the cost of some 32 multiply-adds an element: beside 2048
# words under 2 % of the block's product.
LEAST_WORDS = 2048


class Tokens(NamedTuple):
    """One side: features (rows, N, D), weights (rows, N), mask (rows, N) or None, owner (rows,) or None."""

    features: Tensor
    weight: Tensor
    mask: Tensor | None
    owner: Tensor | None


class Rule(NamedTuple):
    """How a pair is scored."""

    normalize: bool
    zero_competes: bool


def token_contrastive_loss(text: Tokens, video: Tokens, logit_scale: float | Tensor, rule: Rule) -> Tensor:
    """The loss of checked arguments, differentiable once in features, weights and ``logit_scale``."""
    return Loss.apply(
        text.features, video.features, text.weight, video.weight, logit_scale, text.mask, video.mask, text.owner, rule,
    )[0]  # fmt: skip


class Loss(torch.autograd.Function):
    """Outputs the loss, and for the backward (2, A) and (2, B) parts of the rows' and columns' log-sum-exp."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        text, video, scale, rule = _unpack(inputs)
        rows, positive = nothing_yet(text.features), text.weight.new_empty(len(text.features))
        columns = nothing_yet(video.features)
        for block in blocks(text, video, matches=False):
            part = cut(text, block)
            logits = score(part, video, rule, False)[0]
            x = scaled(logits, scale, part, video, block.start)
            positive[block] = x.diagonal(block.start)
            absorb(rows[:, block], x, 1)
            absorb(columns, x, 0)
        rows[1].log_()
        columns[1].log_()
        # top - positive first: it is exact where the positive leads
        loss = (rows[0] - positive + rows[1]).sum() + (columns[0] - positive + columns[1]).sum()
        return loss / (2 * len(positive)), rows, columns

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        _, rows, columns = output
        *tensors, ctx.rule = inputs
        ctx.scale = None if isinstance(tensors[4], Tensor) else tensors[4]
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in tensors), rows, columns)
        ctx.mark_non_differentiable(rows, columns)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 9
        *inputs, rows, columns = ctx.saved_tensors
        if ctx.scale is not None:
            inputs[4] = ctx.scale
        with torch.no_grad():
            grads = gradients(grad_loss, _unpack((*inputs, ctx.rule)), rows, columns, ctx.needs_input_grad)
        if torch.is_grad_enabled():  # create_graph=True
            sources = [x for x in (grad_loss, *inputs) if isinstance(x, Tensor) and x.requires_grad]
            grads = [None if x is None else OnlyOnce.apply(x, *sources) for x in grads]
        return (*grads, None, None, None, None)


class OnlyOnce(torch.autograd.Function):
    """A gradient that raises where it is differentiated. (``once_differentiable`` would drop the term in silence.)"""

    @staticmethod
    def forward(grad: Tensor, *sources: Tensor) -> Tensor:
        return grad.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise NotImplementedError(
            "drl_fast: the token contrastive loss has no second derivative; compute it with "
            "drl_fast.reference.token_contrastive_loss"
        )


def gradients(
    grad_loss: Tensor,
    arguments: tuple[Tokens, Tokens, float | Tensor, Rule],
    rows: Tensor,
    columns: Tensor,
    needs: tuple[bool, ...],
) -> list[Tensor | None]:
    """Gradients of text, video, their weights and the scale, None where not needed."""
    text, video, scale, rule = arguments
    grads = Gradients(text, video, scale, needs)
    factor = grad_loss / (2 * len(text.features))
    for block in blocks(text, video, matches=grads.tokens):
        part = cut(text, block)
        logits, *matches = score(part, video, rule, grads.tokens)
        x = scaled(logits, scale, part, video, block.start)
        g = softmax(x, rows[:, block].unsqueeze(2)) + softmax(x, columns.unsqueeze(1))
        g.diagonal(block.start).sub_(2)
        grads.add(g * factor, logits, part, video, matches, block, rule)
    return grads.take()


def _unpack(inputs: tuple[Any, ...]) -> tuple[Tokens, Tokens, float | Tensor, Rule]:
    text, video, text_weight, video_weight, scale, text_mask, video_mask, owner, rule = inputs
    return (
        Tokens(text, text_weight, text_mask, owner),
        Tokens(video, video_weight, video_mask, owner),
        scale,
        rule,
    )


def score(text: Tokens, video: Tokens, rule: Rule, keep_matches: bool) -> tuple[Tensor, Tensor, Tensor]:
    return op.token_interaction(
        text.features, video.features, text.weight, video.weight, text.mask, video.mask, *rule, keep_matches
    )


def differentiate(
    grad_logits: Tensor, text: Tokens, video: Tokens, matches: list[Tensor], rule: Rule, needs: tuple[bool, ...]
) -> tuple[Tensor, ...]:
    """Gradients of text, video, text weight, video weight; those not needed may be empty."""
    return torch.ops.drl_fast.token_interaction_backward(
        grad_logits, text.features, video.features, text.weight, video.weight, text.mask, video.mask, *matches,
        rule.normalize, needs[0] or needs[2], needs[1] or needs[3],
    )  # fmt: skip


class Gradients:
    """What the blocks add up to; only what is needed is there."""

    def __init__(self, text: Tokens, video: Tokens, scale: float | Tensor, needs: tuple[bool, ...]) -> None:
        self.needs, self.scale = needs, scale
        self.inputs = (text.features, video.features, text.weight, video.weight)
        self.tokens = any(needs[:4])
        dtype = text.weight.dtype
        self.sums = [
            torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format) if need else None
            for x, need in zip(self.inputs, needs, strict=False)
        ]
        self.scale_sum = text.weight.new_zeros(())

    def add(
        self,
        grad_x: Tensor,
        logits: Tensor,
        text: Tokens,
        video: Tokens,
        matches: list[Tensor],
        block: slice,
        rule: Rule,
    ) -> None:
        if self.needs[4]:
            self.scale_sum = self.scale_sum + (grad_x * logits).sum()
        if self.tokens:
            grads = differentiate(grad_x * self.scale, text, video, matches, rule, self.needs)
            for total, grad, rows in zip(self.sums, grads, (block, slice(None)) * 2, strict=True):
                if total is not None:
                    total[rows] += grad

    def take(self) -> list[Tensor | None]:
        grads = [None if x is None else x.to(like.dtype) for x, like in zip(self.sums, self.inputs, strict=True)]
        return [*grads, self.scale_sum.to(self.scale) if isinstance(self.scale, Tensor) and self.needs[4] else None]


def blocks(text: Tokens, video: Tokens, *, matches: bool) -> Iterator[slice]:
    """Runs of texts of about one size, whose matches and logits against all videos fit ``BLOCK_BYTES``."""
    count, length = text.features.shape[:2]
    others, frames = video.features.shape[:2]
    a_pair = COPIES * text.weight.itemsize
    if matches:
        a_pair += sum(op.index_dtype(n).itemsize * m for n, m in ((frames, length), (length, frames)))
    rows = max(1, BLOCK_BYTES // (a_pair * max(1, others)), LEAST_WORDS // length)
    pieces = -(-count // rows)
    for piece in range(pieces):
        yield slice(piece * count // pieces, (piece + 1) * count // pieces)


def cut(side: Tokens, rows: slice) -> Tokens:
    mask, owner = (None if x is None else x[rows] for x in (side.mask, side.owner))
    return Tokens(side.features[rows], side.weight[rows], mask, owner)


def scaled(logits: Tensor, scale: float | Tensor, text: Tokens, video: Tokens, first: int) -> Tensor:
    """Scaled logits, -inf for other pairs of the same owner; text 0's own video is number ``first``."""
    x = logits * scale
    if text.owner is not None and video.owner is not None:
        same = text.owner[:, None] == video.owner
        same.diagonal(first).fill_(False)
        x = x.masked_fill(same, -torch.inf)
    return x


def nothing_yet(features: Tensor) -> Tensor:
    """(2, rows) running maximum and sum of exponentials of nothing; finite, for -inf minus -inf would be NaN."""
    dtype = accumulation_dtype(features.dtype)
    state = torch.zeros((2, len(features)), dtype=dtype, device=features.device)
    state[0] = torch.finfo(dtype).min
    return state


def absorb(state: Tensor, x: Tensor, dim: int) -> None:
    """Take the logits along ``dim`` into running maxima and sums."""
    top = torch.maximum(state[0], x.amax(dim))
    state[1] = state[1] * (state[0] - top).exp() + (x - top.unsqueeze(dim)).exp().sum(dim)
    state[0] = top


def softmax(x: Tensor, parts: Tensor) -> Tensor:
    return (x - parts[0]).sub_(parts[1]).exp_()
