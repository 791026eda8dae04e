"""Each text against candidates of its own, in blocks of candidates: batched products, one per candidate.

A block gathers the text of each of its candidates. So its temporaries, (candidates, Nt, D), (candidates, Nv, D) and
(candidates, Nt, Nv), are bounded, the offsets are never read on the host, and ragged candidates cost nothing extra.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ... import autocast
from ...numerics import accumulation_dtype
from .soft_token_interaction import Pooled, pool
from .token_interaction import LARGEST, best, through_norm, unit, weighted_sum

# Tokens of a block's longer side. On a CPU a block should stay in cache.
BLOCK_TOKENS = {"cpu": 1152}
BLOCK_TOKENS_ELSEWHERE = 1 << 15


class Tokens(NamedTuple):
    """One side's tokens, one row for each candidate of the block."""

    tokens: Tensor  # (rows, N, D) float32 or float64; masked ones are 0
    inverse_norm: Tensor | None  # (rows, N, 1); None without normalisation
    real: Tensor  # (rows, N) bool
    weight: Tensor | None  # (rows, N); 0 for masked tokens

    def of(self, owner: Tensor) -> Tokens:
        """Return the rows of these owners."""
        inverse = None if self.inverse_norm is None else self.inverse_norm[owner]
        weight = None if self.weight is None else self.weight[owner]
        return Tokens(self.tokens[owner], inverse, self.real[owner], weight)

    def zeros(self, zero_competes: bool) -> Tensor:
        """Return how many masked tokens of each row take part with similarity 0, (rows, 1)."""
        return ((~self.real).sum(1, keepdim=True) * zero_competes).to(self.tokens.dtype)

    def alive(self) -> Tensor:
        return self.real.any(1)


class Options(NamedTuple):
    """How S is pooled."""

    zero_competes: bool
    pooling: str
    temperature: float


def load(
    features: Tensor, weight: Tensor | None, mask: Tensor | None, normalize: bool, rows: slice = slice(None)
) -> Tokens:
    """Normalise the features of some rows of one side."""
    features, weight, mask = features[rows], part(weight, rows), part(mask, rows)
    real = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device) if mask is None else mask
    tokens, inverse = unit(features, mask, normalize)
    return Tokens(tokens, inverse, real, None if weight is None else torch.where(real, weight, 0))


def part(x: Tensor | None, rows: slice) -> Tensor | None:
    return None if x is None else x[rows]


def blocks(text: Tensor, candidates: Tensor) -> Iterator[slice]:
    """Yield the candidates of each block."""
    edge = BLOCK_TOKENS.get(text.device.type, BLOCK_TOKENS_ELSEWHERE)
    rows = max(1, edge // max(text.shape[1], candidates.shape[1]))
    for first in range(0, len(candidates), rows):
        yield slice(first, min(first + rows, len(candidates)))


def owners(offsets: Tensor, candidates: Tensor) -> Tensor:
    """Return each candidate's text. Wrong offsets, which cannot be checked on an accelerator, read no other memory."""
    row = torch.arange(len(candidates), device=offsets.device)
    return torch.searchsorted(offsets[1:].contiguous(), row, right=True).clamp(max=max(0, len(offsets) - 2))


def pool_side(s: Tensor, dim: int, other: Tokens, own: Tokens, options: Options) -> Pooled:
    """Pool S (rows, Nt, Nv) over ``dim``, the tokens of ``other``: a value for each token of ``own``."""
    takes_part, zeros = other.real.unsqueeze(3 - dim), other.zeros(options.zero_competes)
    if options.pooling != "max":
        counts = own.real & other.alive()[:, None]
        return pool(s, dim, takes_part, zeros, options.pooling == "logsumexp", options.temperature, counts)
    value, index = best(s, dim, takes_part, zeros > 0, own.real, LARGEST)
    position = torch.arange(s.shape[dim], device=s.device).view((1, -1, 1) if dim == 1 else (1, 1, -1))
    return Pooled(value, (index.unsqueeze(dim) == position).to(s.dtype))


def forward(
    text: Tensor,
    candidates: Tensor,
    text_weight: Tensor,
    candidate_weight: Tensor | None,
    text_mask: Tensor | None,
    candidate_mask: Tensor | None,
    offsets: Tensor,
    normalize: bool,
    zero_competes: bool,
    pooling: str,
    temperature: float,
) -> Tensor:
    """Compute the scores (candidates,)."""
    how = Options(zero_competes, pooling, temperature)
    scores = text.new_empty(len(candidates), dtype=accumulation_dtype(text.dtype))
    owner = owners(offsets, candidates)
    with autocast.off(text.device.type):
        texts = load(text, text_weight, text_mask, normalize)
        for rows in blocks(text, candidates):
            t = texts.of(owner[rows])
            v = load(candidates, candidate_weight, candidate_mask, normalize, rows)
            s = t.tokens @ v.tokens.transpose(1, 2)
            assert t.weight is not None
            total = weighted_sum(pool_side(s, 2, v, t, how).value, t.weight)
            if v.weight is not None:
                total = (total + weighted_sum(pool_side(s, 1, t, v, how).value, v.weight)) / 2
            scores[rows] = torch.where(t.alive() & v.alive(), total, 0)
    return scores


def backward(
    grad_scores: Tensor,
    text: Tensor,
    candidates: Tensor,
    text_weight: Tensor,
    candidate_weight: Tensor | None,
    text_mask: Tensor | None,
    candidate_mask: Tensor | None,
    offsets: Tensor,
    normalize: bool,
    zero_competes: bool,
    pooling: str,
    temperature: float,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of both features and both weights; one that ``output_mask`` leaves out is empty."""
    how = Options(zero_competes, pooling, temperature)
    of_text, of_candidates, of_text_weight, of_candidate_weight = output_mask
    of_candidate_weight = of_candidate_weight and candidate_weight is not None
    owner = owners(offsets, candidates)
    with autocast.off(text.device.type):
        texts = load(text, text_weight, text_mask, normalize)
        grad_text = texts.tokens.new_zeros(text.shape if of_text else 0)
        grad_text_weight = texts.tokens.new_zeros(text.shape[:2] if of_text_weight else 0)
        grad_candidates = candidates.new_empty(candidates.shape if of_candidates else 0)
        grad_candidate_weight = texts.tokens.new_empty(candidates.shape[:2] if of_candidate_weight else 0)
        for rows in blocks(text, candidates):
            t = texts.of(owner[rows])
            v = load(candidates, candidate_weight, candidate_mask, normalize, rows)
            s = t.tokens @ v.tokens.transpose(1, 2)
            # The score of a pair with an empty side is constant, but the upstream gradient may be NaN.
            g = torch.where(t.alive() & v.alive(), grad_scores[rows].to(s.dtype), 0)
            g = g if v.weight is None else g / 2
            by_word = pool_side(s, 2, v, t, how)
            assert t.weight is not None
            coefficient = where_not_zero(by_word.slope, t.weight[:, :, None])
            if of_text_weight:
                add_to_owners(grad_text_weight, owner[rows], torch.where(t.real, by_word.value * g[:, None], 0))
            if v.weight is not None:
                by_frame = pool_side(s, 1, t, v, how)
                coefficient = coefficient + where_not_zero(by_frame.slope, v.weight[:, None, :])
                if of_candidate_weight:
                    grad_candidate_weight[rows] = torch.where(v.real, by_frame.value * g[:, None], 0)
            coefficient = where_not_zero(coefficient, g[:, None, None])
            if of_text:
                add_to_owners(grad_text, owner[rows], coefficient @ v.tokens)
            if of_candidates:
                grad = coefficient.transpose(1, 2) @ t.tokens
                grad_candidates[rows] = through_norm(grad, v.tokens, v.inverse_norm, v.real).to(candidates.dtype)
        if of_text:
            grad_text = through_norm(grad_text, texts.tokens, texts.inverse_norm, texts.real)
    return grad_text.to(text.dtype), grad_candidates, grad_text_weight, grad_candidate_weight


def where_not_zero(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply x by a factor, which may be infinite or NaN; 0 stays 0."""
    return torch.where(x == 0, 0, x * factor)


def add_to_owners(total: Tensor, owner: Tensor, rows: Tensor) -> None:
    """Add each of ``rows`` to its owner's row of ``total``, in an order that does not change from run to run."""
    if total.device.type == "cuda":
        # index_add_ would add in any order; this sorts first.
        total.index_put_((owner,), rows, accumulate=True)
    else:
        total.index_add_(0, owner, rows)
