"""Contrastive losses of the token interaction from tokens, without the logit matrix.

It runs ``drl_fast::token_interaction`` (or its soft form) and its backward in blocks of texts.

    x_ab  = s * logits_ab                                       -inf if b is another pair of a's owner
    InfoNCE, with P_a the positives of text a, Q_b those of video b, and weights u_a, v_b (see Positives):
    loss  = sum_a u_a [ lse_b x_ab - mean over P_a of x_ab ]  +  sum_b v_b [ lse_a x_ab - mean over Q_b of x_ab ]
    dx_ab = u_a [ exp(x_ab - lse_b x_ab) - (b in P_a) / |P_a| ]  +  v_b [ exp(x_ab - lse_a x_ab) - (a in Q_b) / |Q_b| ]
    Sigmoid, with y = x + bias and z = 1 at positives, -1 elsewhere:
    loss  = 1/A sum_ab log(1 + exp(-z_ab y_ab))            dy_ab = -z_ab sigmoid(-z_ab y_ab) / A

InfoNCE's forward pass keeps a running maximum and sum of exponentials for every row and column. A log-sum-exp stays in
two parts, the maximum and the log of the sum: adding them would lose the digits that distinguish a well-trained
positive's probability from 1.

In one process, the forward pass of a training step scores all pairs at once and keeps their logits and matches (on CUDA
also maxima, for the weights' gradients) if these fit ``KEPT_BYTES``; shapes alone decide. Otherwise, and over a group,
the forward pass keeps none, and the backward pass scores each block once more, now with its matches. Both ways give the
same bits. Soft pooling has no matches: only logits are kept.

Memory in addition to the inputs: 7 numbers per training example, one block (``BLOCK_BYTES``), the logits and matches if
they are kept, and in the backward pass the gradients in float32. Time: a training step of ``token_interaction`` and
about 15 passes over the logits, plus one more forward pass if nothing is kept.

Over a group every rank scores its own texts against the videos of all ranks (distributed/exchange.py). The sums of rows
stay on the rank; the sums of columns and the gradients of videos return to the rank that owns the videos. A text's
positives are videos of its own rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..distributed.exchange import Exchange, WeightedTokens
from ..numerics import accumulation_dtype, positive_mask
from . import token_interaction as op
from .no_double_backward import differentiable_once
from .soft_token_interaction import soft_token_interaction

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
    bidirectional: bool = True
    pooling: str = "max"
    temperature: float = 1.0


class Positives(NamedTuple):
    """The positives of this rank's texts, among its own videos, and the weights of InfoNCE's terms.

    A text without a positive has the weight 0; so has every text if only the other direction is wanted. Otherwise the
    weight is 1 / (directions * texts of all ranks that have a positive). Videos likewise.
    """

    columns: Tensor | None
    """(A,) int64, -1 for none, or (A, B) bool; None: the diagonal."""
    per_text: Tensor
    """(A,) number of positives."""
    per_video: Tensor
    """(B,)"""
    text_weight: Tensor
    """(A,)"""
    video_weight: Tensor
    """(B,)"""

    def among(self, rows: slice) -> Tensor | None:
        """Return the positives of some texts as bool (rows, B); None: the diagonal."""
        return None if self.columns is None else positive_mask(self.columns[rows], len(self.per_video))


class Options(NamedTuple):
    """What to compute: the interaction's options and the loss's."""

    rule: Rule
    sigmoid: bool
    texts: int
    """Texts of all ranks."""
    directions: tuple[bool, bool] = (True, True)
    """InfoNCE from text to video, and from video to text."""


def token_contrastive_loss(
    text: Tensor,
    video: Tensor,
    text_weight: Tensor,
    video_weight: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    text_mask: Tensor | None,
    video_mask: Tensor | None,
    owner: Tensor | None,
    positives: Positives,
    options: Options,
    exchange: Exchange,
) -> Tensor:
    """Compute the loss of checked arguments, differentiable once in features, weights, scale and bias."""
    tensors = (text, video, text_weight, video_weight, logit_scale, logit_bias, text_mask, video_mask, owner)
    # Autograd does not tell a Function's forward which inputs need gradients.
    train = torch.is_grad_enabled()
    needs = tuple(train and isinstance(x, Tensor) and x.requires_grad for x in tensors[:LEAVES])
    loss, *_ = Loss.apply(*tensors, *positives, options, exchange, needs)
    return loss


# The inputs that may need gradients come first: features, weights, scale, bias.
LEAVES = 6


class Loss(torch.autograd.Function):
    """Return the loss and what the backward needs.

    That is, with InfoNCE: log-sum-exps in two parts, (2, A) of own rows and (3, B) of all columns with their weights.
    Then, if they are kept, logits and matches of all pairs. ``needs``: which of the first inputs need gradients.
    """

    @staticmethod
    def forward(
        text_features: Tensor,
        video_features: Tensor,
        text_weight: Tensor,
        video_weight: Tensor,
        scale: float | Tensor,
        bias: float | Tensor,
        text_mask: Tensor | None,
        video_mask: Tensor | None,
        owner: Tensor | None,
        columns: Tensor | None,
        per_text: Tensor,
        per_video: Tensor,
        weight_of_text: Tensor,
        weight_of_video: Tensor,
        options: Options,
        exchange: Exchange,
        needs: tuple[bool, ...],
    ) -> tuple[Tensor, ...]:
        text = WeightedTokens(text_features, text_weight, text_mask, owner)
        video = WeightedTokens(video_features, video_weight, video_mask, owner)
        positives = Positives(columns, per_text, per_video, weight_of_text, weight_of_video)
        matches = any(needs[:4])
        maxima = any(needs[2:4])
        pair = text.weight.itemsize + kept_bytes(text, video, options.rule, matches, maxima)
        size = len(text.weight) * len(video.weight) * pair
        keeps = exchange.group is None and any(needs) and size <= KEPT_BYTES
        # Not the packed form: the backward pass works on blocks of texts.
        kept = score(text, video, options.rule, matches, maxima)[:4] if keeps else ()
        run = sigmoid_forward if options.sigmoid else softmax_forward
        return *run(text, video, scale, bias, positives, options, exchange, kept), *kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.options, ctx.exchange, _ = inputs
        _, *found = output
        # save_for_backward takes no numbers.
        ctx.numbers = [None if isinstance(x, Tensor) else x for x in tensors[4:LEAVES]]
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in tensors), *found)
        ctx.tensors = len(tensors)
        ctx.mark_non_differentiable(*found)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        none = (None,) * (ctx.tensors + 3)
        if grad_loss is None:
            return none
        tensors, found = ctx.saved_tensors[: ctx.tensors], ctx.saved_tensors[ctx.tensors :]
        text, video, text_weight, video_weight, scale, bias, text_mask, video_mask, owner, *positives = tensors
        with torch.no_grad():
            grads = gradients(
                grad_loss,
                WeightedTokens(text, text_weight, text_mask, owner),
                WeightedTokens(video, video_weight, video_mask, owner),
                ctx.numbers[0] if scale is None else scale,
                ctx.numbers[1] if bias is None else bias,
                Positives(*positives),
                ctx.options,
                ctx.exchange,
                found,
                ctx.needs_input_grad[:LEAVES],
            )
        what, instead = "the token contrastive loss", "drl_fast.reference.token_contrastive_loss"
        grads = differentiable_once(grads, (grad_loss, *tensors), what, instead)
        return (*grads, *none[LEAVES:])


def scaled_blocks(
    text: WeightedTokens,
    videos: WeightedTokens,
    scale: float | Tensor,
    rule: Rule,
    kept: tuple[Tensor, ...],
    own: bool,
) -> Iterator[tuple[slice, Tensor]]:
    """Yield the rows of each block of texts and their scaled logits; ``own``: the videos are this rank's."""
    for block in blocks(text, videos, rule):
        part = cut(text, block)
        logits = kept[0][block] if kept else score(part, videos, rule)[0]
        yield block, scaled(logits, scale, part, videos, block.start if own else None)


def softmax_forward(
    text: WeightedTokens,
    video: WeightedTokens,
    scale: float | Tensor,
    bias: float | Tensor,
    positives: Positives,
    options: Options,
    exchange: Exchange,
    kept: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """Compute InfoNCE and the log-sum-exps of own rows and of all columns, with the columns' weights.

    Those of a direction that is not wanted have no terms, and the weight 0.
    """
    rows, row_hits = empty_sums(text.features), text.weight.new_zeros(len(text.features))
    column_hits = video.weight.new_zeros(len(video.features))
    visit = exchange.start(video, merge_sums, [2 * count for count in exchange.rows])
    for source, videos in visit:
        columns = empty_sums(videos.features)
        for block, x in scaled_blocks(text, videos, scale, options.rule, kept, source == exchange.rank):
            if source == exchange.rank:
                among = positives.among(block)
                if among is None:
                    row_hits[block] = column_hits[block] = x.diagonal(block.start)
                else:
                    hit = torch.where(among, x, 0)
                    row_hits[block] = hit.sum(1)
                    column_hits += hit.sum(0)
            if options.directions[0]:
                add_logits(rows[:, block], x, 1)
            if options.directions[1]:
                add_logits(columns, x, 0)
        visit.give(columns.flatten())
    columns = visit.result().view(2, -1)
    rows[1].log_()
    columns = torch.stack((columns[0], columns[1].log(), positives.video_weight))
    row_hits /= positives.per_text.clamp(min=1)
    column_hits /= positives.per_video.clamp(min=1)
    loss = _weighted(positives.text_weight, rows, row_hits) + _weighted(positives.video_weight, columns, column_hits)
    return exchange.add(loss), rows, exchange.gather(columns.T).T


def _weighted(weight: Tensor, sums: Tensor, hits: Tensor) -> Tensor:
    """Sum weight * (log-sum-exp - positive); a term without weight may be infinite or NaN."""
    # Subtract the positive from the maximum first: the difference is exact if the positive is the maximum.
    return torch.where(weight > 0, weight * (sums[0] - hits + sums[1]), 0).sum()


def sigmoid_forward(
    text: WeightedTokens,
    video: WeightedTokens,
    scale: float | Tensor,
    bias: float | Tensor,
    positives: Positives,
    options: Options,
    exchange: Exchange,
    kept: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """Compute the sigmoid loss."""
    loss = text.weight.new_zeros(())
    visit = exchange.start(video, torch.add, [0 for _ in exchange.rows])
    for source, videos in visit:
        for block, x in scaled_blocks(text, videos, scale, options.rule, kept, source == exchange.rank):
            y = x + bias
            if source == exchange.rank:
                negate_positives(y, positives.among(block), block.start)
            loss += F.softplus(y).sum()
        visit.give(loss.new_empty(0))
    return (exchange.add(loss) / options.texts,)


def negate_positives(y: Tensor, among: Tensor | None, own: int) -> None:
    """Change the sign at positives, in place."""
    if among is None:
        y.diagonal(own).neg_()
    else:
        y.copy_(torch.where(among, -y, y))


def softmax_slope(
    x: Tensor,
    rows: Tensor,
    columns: Tensor,
    text_weight: Tensor,
    positives: Positives,
    directions: tuple[bool, bool],
    block: slice | None,
) -> Tensor:
    """Compute d InfoNCE / d x of some rows; ``block`` says which, if the columns are this rank's videos, else None."""
    among = None if block is None else positives.among(block)
    terms = []
    if directions[0]:
        p = softmax(x, rows.unsqueeze(2))
        if block is not None:
            _subtract(p, among, block, positives.per_text[block, None])
        terms.append(p.mul_(text_weight[:, None]))
    if directions[1]:
        p = softmax(x, columns.unsqueeze(1))
        if block is not None:
            _subtract(p, among, block, positives.per_video)
        terms.append(p.mul_(columns[2]))
    return terms[0] if len(terms) == 1 else terms[0].add_(terms[1])


def _subtract(p: Tensor, among: Tensor | None, block: slice, count: Tensor) -> None:
    """Subtract 1 / count at the positives, in place."""
    if among is None:
        p.diagonal(block.start).sub_(1)
    else:
        p.sub_(torch.where(among, 1 / count.clamp(min=1), 0))


def sigmoid_slope(y: Tensor, factor: Tensor, positives: Positives, block: slice | None) -> Tensor:
    """Compute factor * d (sum of the sigmoid loss's terms) / d y; ``block`` as above."""
    if block is None:
        return y.sigmoid().mul_(factor)
    among = positives.among(block)
    negate_positives(y, among, block.start)
    g = y.sigmoid().mul_(factor)
    negate_positives(g, among, block.start)
    return g


def gradients(
    grad_loss: Tensor,
    text: WeightedTokens,
    video: WeightedTokens,
    scale: float | Tensor,
    bias: float | Tensor,
    positives: Positives,
    options: Options,
    exchange: Exchange,
    found: tuple[Tensor, ...],
    needs: tuple[bool, ...],
) -> list[Tensor | None]:
    """Compute the gradients of text, video, their weights, scale and bias; None if not needed.

    ``found``: what the forward pass returned besides the loss.
    Over a group of W ranks, those of features and weights are W times the whole batch's, and those of scale and bias
    are W times the share of this rank's texts. Their mean over ranks is then the gradient of a single process.
    """
    rule, counts = options.rule, exchange.rows
    factor = grad_loss * len(counts)
    rows = columns = text.weight.new_empty((3, 0))
    kept = list(found)
    if options.sigmoid:
        factor = factor / options.texts
    else:
        rows, columns, *kept = kept
        columns = torch.cat((columns[:2], columns[2:] * factor))
    columns_of = columns.split([0] * len(counts) if options.sigmoid else counts, dim=1)
    of_text, of_video, tokens, maxima = needs[0:4:2], needs[1:4:2], any(needs[:4]), any(needs[2:4])
    text_sums = Sums(text, of_text)
    grad_scale, grad_bias = text.weight.new_zeros(()), text.weight.new_zeros(())
    dim = video.features.shape[2]
    sizes = [Sums.size(shape.rows, shape.frames, dim, of_video) for shape in exchange.shapes]
    visit = exchange.start(video, torch.add, sizes)
    for source, videos in visit:
        video_sums = Sums(videos, of_video)
        for block in blocks(text, videos, rule, matches=tokens, maxima=maxima):
            part, own = cut(text, block), block if source == exchange.rank else None
            if kept:
                logits, *matches = *(x[block] for x in kept), part.features.new_empty(0)
            else:
                logits, *matches = score(part, videos, rule, tokens, maxima)
            x = scaled(logits, scale, part, videos, None if own is None else own.start)
            if options.sigmoid:
                g = sigmoid_slope(x + bias, factor, positives, own)
            else:
                weight = positives.text_weight[block] * factor
                g = softmax_slope(x, rows[:, block], columns_of[source], weight, positives, options.directions, own)
            if needs[4]:
                grad_scale.add_((g * logits).sum())
            if needs[5]:
                grad_bias.add_(g.sum())
            if tokens:
                grads = differentiate(g.mul_(scale), part, videos, matches, rule, needs)
                text_sums.add(grads[0], grads[2], block)
                video_sums.add(grads[1], grads[3], slice(None))
                del grads
            del logits, matches, x, g  # free this block before the next one, and before videos are exchanged
        visit.give(video_sums.flat)
        del video_sums, videos  # the exchange replaces them
    video_sums = Sums(video, of_video, visit.result())
    sums = (text_sums.features, video_sums.features, text_sums.weight, video_sums.weight)
    inputs = (text.features, video.features, text.weight, video.weight)
    cast = [None if x is None else x.to(like.dtype) for x, like in zip(sums, inputs, strict=True)]
    scalars = zip((grad_scale, grad_bias), (scale, bias), needs[4:], strict=True)
    return [*cast, *(x.to(like) if isinstance(like, Tensor) and needed else None for x, like, needed in scalars)]


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
    tensors = _operands(text, video, rule)
    if rule.pooling == "max":
        return op.token_interaction(*tensors, rule.normalize, rule.zero_competes, matches, maxima)
    return soft_token_interaction(*tensors, *_soft(rule)), *(text.weight.new_empty(0) for _ in range(4))


def _operands(text: WeightedTokens, video: WeightedTokens, rule: Rule) -> tuple[Tensor | None, ...]:
    video_weight = video.weight if rule.bidirectional else None
    return text.features, video.features, text.weight, video_weight, text.mask, video.mask


def _soft(rule: Rule) -> tuple[bool, bool, bool, float]:
    return rule.normalize, rule.zero_competes, rule.pooling == "logsumexp", rule.temperature


def differentiate(
    grad_logits: Tensor,
    text: WeightedTokens,
    video: WeightedTokens,
    kept: list[Tensor],
    rule: Rule,
    needs: tuple[bool, ...],
) -> tuple[Tensor, ...]:
    """Compute gradients of text, video, text weight and video weight; those not needed may be empty."""
    tensors, wanted = _operands(text, video, rule), list(needs[:4])
    if rule.pooling != "max":
        return torch.ops.drl_fast.soft_token_interaction_backward(grad_logits, *tensors, *_soft(rule), wanted)
    return torch.ops.drl_fast.token_interaction_backward(
        grad_logits, *tensors, *kept, rule.normalize, rule.zero_competes, wanted
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
    if not matches or rule.pooling != "max":
        return 0
    return op.bytes_of_pair(text.features, video.features, rule.bidirectional, maxima, rule.normalize)


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
