"""InfoNCE of the token interaction in both directions, without the logit matrix.

It runs ``drl_fast::token_interaction`` and its backward in blocks of texts.

    x_ab  = s * logits_ab                                       -inf if b is another pair of a's owner
    loss  = 1/2B sum_a [ lse_b x_ab - x_aa ]  +  1/2B sum_b [ lse_a x_ab - x_bb ]
    dx_ab = 1/2B [ exp(x_ab - lse_b x_ab) + exp(x_ab - lse_a x_ab) - 2 (a = b) ]

The forward pass keeps a running maximum and sum of exponentials for every row and column. A log-sum-exp stays in two
parts, the maximum and the log of the sum: adding them would lose the digits that distinguish a well-trained positive's
probability from 1.

In one process, the forward pass of a training step scores all pairs at once and keeps their logits and matches (on CUDA
also maxima, for the weights' gradients) if these fit ``KEPT_BYTES``; shapes alone decide. Otherwise, and over a group,
the forward pass keeps none, and the backward pass scores each block once more, now with its matches. Both ways give the
same bits.

Memory in addition to the inputs: 6 numbers per training example, one block (``BLOCK_BYTES``), the logits and matches if
they are kept, and in the backward pass the gradients in float32. Time: a training step of ``token_interaction`` and
about 15 passes over the logits, plus one more forward pass if nothing is kept.

Over a group every rank scores its own texts against the videos of all ranks (distributed/exchange.py). The sums of rows
stay on the rank; the sums of columns and the gradients of videos return to the rank that owns the videos.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..distributed.exchange import Exchange, WeightedTokens
from ..numerics import accumulation_dtype
from . import token_interaction as op
from .no_double_backward import differentiable_once

# Size of one block's logits, matches and maxima.
BLOCK_BYTES = 16 << 20
# Most bytes of logits, matches and maxima to keep for the backward pass: enough for 2,364 pairs of 32 words and 12
# frames; on CUDA with learned weights, whose maxima are kept as well, for 1,404.
KEPT_BYTES = 256 << 20
# Copies of a block of logits that exist at once: logits, exponentials, temporaries.
COPIES = 4
# The fewest words in a block. The operator packs all videos again for every block, which costs about as much as 32
# multiply-adds per element: with 2048 words that is under 2 % of the block's product.
LEAST_WORDS = 2048


class Rule(NamedTuple):
    """Options of the token interaction."""

    normalize: bool
    zero_competes: bool


def token_contrastive_loss(
    text: Tensor,
    video: Tensor,
    text_weight: Tensor,
    video_weight: Tensor,
    logit_scale: float | Tensor,
    text_mask: Tensor | None,
    video_mask: Tensor | None,
    owner: Tensor | None,
    rule: Rule,
    exchange: Exchange,
) -> Tensor:
    """Compute the loss of checked arguments, differentiable once in features, weights and ``logit_scale``."""
    tensors = (text, video, text_weight, video_weight, logit_scale, text_mask, video_mask, owner)
    # Autograd does not tell a Function's forward which inputs need gradients.
    train = torch.is_grad_enabled()
    needs = tuple(train and isinstance(x, Tensor) and x.requires_grad for x in tensors[:5])
    loss, *_ = Loss.apply(*tensors, rule, exchange, needs)
    return loss


class Loss(torch.autograd.Function):
    """Return the loss and what the backward needs.

    That is: log-sum-exps in two parts, (2, A) of own rows and (2, B) of all columns; then, if they are kept, logits and
    matches of all pairs. ``needs``: which of the first five inputs need gradients.
    """

    @staticmethod
    def forward(
        text_features: Tensor,
        video_features: Tensor,
        text_weight: Tensor,
        video_weight: Tensor,
        scale: float | Tensor,
        text_mask: Tensor | None,
        video_mask: Tensor | None,
        owner: Tensor | None,
        rule: Rule,
        exchange: Exchange,
        needs: tuple[bool, ...],
    ) -> tuple[Tensor, ...]:
        text = WeightedTokens(text_features, text_weight, text_mask, owner)
        video = WeightedTokens(video_features, video_weight, video_mask, owner)
        matches = any(needs[:4])
        maxima = any(needs[2:4])
        pair = text.weight.itemsize + kept_bytes(text, video, rule, matches, maxima)
        size = len(text.weight) * len(video.weight) * pair
        keeps = exchange.group is None and any(needs) and size <= KEPT_BYTES
        # Not the packed form: the backward pass works on blocks of texts.
        kept = score(text, video, rule, matches, maxima)[:4] if keeps else ()
        rows, positive = empty_sums(text.features), text.weight.new_empty(len(text.features))
        visit = exchange.start(video, merge_sums, [2 * count for count in exchange.rows])
        for source, videos in visit:
            columns = empty_sums(videos.features)
            for block in blocks(text, videos, rule):
                part, own = cut(text, block), block.start if source == exchange.rank else None
                logits = kept[0][block] if kept else score(part, videos, rule)[0]
                x = scaled(logits, scale, part, videos, own)
                if own is not None:
                    positive[block] = x.diagonal(own)
                add_logits(rows[:, block], x, 1)
                add_logits(columns, x, 0)
            visit.give(columns.flatten())
        columns = visit.result().view(2, -1)
        rows[1].log_()
        columns = torch.stack((columns[0], columns[1].log()))
        # Subtract the positive from the maximum first: the difference is exact if the positive is the maximum.
        loss = (rows[0] - positive + rows[1]).sum() + (columns[0] - positive + columns[1]).sum()
        return exchange.add(loss) / (2 * sum(exchange.rows)), rows, exchange.gather(columns.T).T, *kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.rule, ctx.exchange, _ = inputs
        _, *found = output
        # save_for_backward takes no numbers.
        ctx.scale = None if isinstance(tensors[4], Tensor) else tensors[4]
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in tensors), *found)
        ctx.mark_non_differentiable(*found)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 11
        tensors, (rows, columns, *kept) = ctx.saved_tensors[:8], ctx.saved_tensors[8:]
        text, video, text_weight, video_weight, scale, text_mask, video_mask, owner = tensors
        with torch.no_grad():
            grads = gradients(
                grad_loss,
                WeightedTokens(text, text_weight, text_mask, owner),
                WeightedTokens(video, video_weight, video_mask, owner),
                ctx.scale if scale is None else scale,
                ctx.rule,
                ctx.exchange,
                rows,
                columns,
                kept,
                ctx.needs_input_grad[:5],
            )
        what, instead = "the token contrastive loss", "drl_fast.reference.token_contrastive_loss"
        grads = differentiable_once(grads, (grad_loss, *tensors), what, instead)
        return (*grads, *(None,) * 6)


def gradients(
    grad_loss: Tensor,
    text: WeightedTokens,
    video: WeightedTokens,
    scale: float | Tensor,
    rule: Rule,
    exchange: Exchange,
    rows: Tensor,
    columns: Tensor,
    kept: list[Tensor],
    needs: tuple[bool, ...],
) -> list[Tensor | None]:
    """Compute the gradients of text, video, their weights and the scale; None if not needed.

    ``kept``: logits, matches and maxima of all pairs, or nothing.
    Over a group of W ranks, those of features and weights are W times the whole batch's, and that of the scale is W
    times the share of this rank's texts. Their mean over ranks is then the gradient of a single process.
    """
    counts = exchange.rows
    columns_of = columns.split(counts, dim=1)
    factor = grad_loss * (len(counts) / (2 * sum(counts)))
    of_text, of_video, tokens, maxima = needs[0:4:2], needs[1:4:2], any(needs[:4]), any(needs[2:4])
    text_sums = Sums(text, of_text)
    grad_scale = text.weight.new_zeros(())
    dim = video.features.shape[2]
    sizes = [Sums.size(shape.rows, shape.frames, dim, of_video) for shape in exchange.shapes]
    visit = exchange.start(video, torch.add, sizes)
    for source, videos in visit:
        video_sums = Sums(videos, of_video)
        for block in blocks(text, videos, rule, matches=tokens, maxima=maxima):
            part, own = cut(text, block), block.start if source == exchange.rank else None
            if kept:
                logits, *found = *(x[block] for x in kept), part.features.new_empty(0)
            else:
                logits, *found = score(part, videos, rule, tokens, maxima)
            x = scaled(logits, scale, part, videos, own)
            g = softmax(x, rows[:, block].unsqueeze(2)).add_(softmax(x, columns_of[source].unsqueeze(1)))
            if own is not None:
                g.diagonal(own).sub_(2)
            g.mul_(factor)
            if needs[4]:
                grad_scale.add_((g * logits).sum())
            if tokens:
                grads = differentiate(g.mul_(scale), part, videos, found, rule, needs)
                text_sums.add(grads[0], grads[2], block)
                video_sums.add(grads[1], grads[3], slice(None))
                del grads
            del logits, found, x, g  # free this block before the next one, and before videos are exchanged
        visit.give(video_sums.flat)
        del video_sums, videos  # the exchange replaces them
    video_sums = Sums(video, of_video, visit.result())
    sums = (text_sums.features, video_sums.features, text_sums.weight, video_sums.weight)
    inputs = (text.features, video.features, text.weight, video.weight)
    cast = [None if x is None else x.to(like.dtype) for x, like in zip(sums, inputs, strict=True)]
    return [*cast, grad_scale.to(scale) if isinstance(scale, Tensor) and needs[4] else None]


class Sums:
    """One side's gradients in the dtype of sums, as views of one vector that can be sent; None if not needed."""

    def __init__(self, side: WeightedTokens, needs: tuple[bool, ...], flat: Tensor | None = None) -> None:
        rows, length, dim = side.features.shape
        size = self.size(rows, length, dim, needs)
        self.flat = side.weight.new_zeros(size) if flat is None else flat
        middle = self.size(rows, length, dim, (needs[0], False))
        self.features = self.flat[:middle].view(rows, length, dim) if needs[0] else None
        self.weight = self.flat[middle:].view(rows, length) if needs[1] else None

    @staticmethod
    def size(rows: int, length: int, dim: int, needs: tuple[bool, ...]) -> int:
        return rows * length * (dim * needs[0] + needs[1])

    def add(self, features: Tensor, weight: Tensor, rows: slice) -> None:
        if self.features is not None:
            self.features[rows].add_(features)
        if self.weight is not None:
            self.weight[rows].add_(weight)


def score(
    text: WeightedTokens, video: WeightedTokens, rule: Rule, matches: bool = False, maxima: bool = False
) -> tuple[Tensor, ...]:
    """Return logits and what the operator keeps for its backward."""
    return op.token_interaction(
        text.features, video.features, text.weight, video.weight, text.mask, video.mask, *rule, matches, maxima
    )


def differentiate(
    grad_logits: Tensor,
    text: WeightedTokens,
    video: WeightedTokens,
    kept: list[Tensor],
    rule: Rule,
    needs: tuple[bool, ...],
) -> tuple[Tensor, ...]:
    """Compute gradients of text, video, text weight and video weight; those not needed may be empty."""
    return torch.ops.drl_fast.token_interaction_backward(
        grad_logits,
        text.features,
        video.features,
        text.weight,
        video.weight,
        text.mask,
        video.mask,
        *kept,
        rule.normalize,
        rule.zero_competes,
        list(needs[:4]),
    )


def blocks(
    text: WeightedTokens, video: WeightedTokens, rule: Rule, *, matches: bool = False, maxima: bool = False
) -> Iterator[slice]:
    """Cut texts into blocks of similar size; what a block needs against all videos fits ``BLOCK_BYTES``.

    That is its logits and, if wanted, matches and maxima.
    """
    count, length = text.weight.shape
    others = len(video.weight)
    a_pair = COPIES * text.weight.itemsize + kept_bytes(text, video, rule, matches, maxima)
    rows = max(1, BLOCK_BYTES // (a_pair * max(1, others)), LEAST_WORDS // length)
    pieces = -(-count // rows) if others else 0
    for piece in range(pieces):
        yield slice(piece * count // pieces, (piece + 1) * count // pieces)


def kept_bytes(text: WeightedTokens, video: WeightedTokens, rule: Rule, matches: bool, maxima: bool) -> int:
    """Return the bytes of one pair's matches and maxima; 0 if no matches are wanted."""
    return op.bytes_of_pair(text.features, video.features, True, maxima, rule.normalize) if matches else 0


def cut(side: WeightedTokens, rows: slice) -> WeightedTokens:
    """Take some rows of one side."""
    mask, owner = (None if x is None else x[rows] for x in (side.mask, side.owner))
    return WeightedTokens(side.features[rows], side.weight[rows], mask, owner)


def scaled(
    logits: Tensor, scale: float | Tensor, text: WeightedTokens, video: WeightedTokens, own: int | None
) -> Tensor:
    """Scale logits; -inf for other pairs of one owner. ``own``: the column of text 0's video; None: on another rank."""
    x = logits * scale
    if text.owner is not None and video.owner is not None:
        same = text.owner[:, None] == video.owner
        if own is not None:
            same.diagonal(own).fill_(False)
        x = x.masked_fill(same, -torch.inf)
    return x


def empty_sums(features: Tensor) -> Tensor:
    """Start running maxima and sums of exponentials (2, rows). Finite, because -inf minus -inf would be NaN."""
    dtype = accumulation_dtype(features.dtype)
    state = torch.zeros((2, len(features)), dtype=dtype, device=features.device)
    state[0] = torch.finfo(dtype).min
    return state


def add_logits(state: Tensor, x: Tensor, dim: int) -> None:
    """Update running maxima and sums with the logits along ``dim``."""
    top = torch.maximum(state[0], x.amax(dim))
    state[1] = state[1] * (state[0] - top).exp() + (x - top.unsqueeze(dim)).exp().sum(dim)
    state[0] = top


def merge_sums(one: Tensor, other: Tensor) -> Tensor:
    """Merge the maxima and sums of two parts, each (2 * columns,)."""
    (top, total), (other_top, other_total) = one.view(2, -1), other.view(2, -1)
    highest = torch.maximum(top, other_top)
    return torch.cat((highest, total * (top - highest).exp() + other_total * (other_top - highest).exp()))


def softmax(x: Tensor, parts: Tensor) -> Tensor:
    """Compute exp(x - log-sum-exp) from the log-sum-exp's two parts."""
    return (x - parts[0]).sub_(parts[1]).exp_()
