"""CDCR's operators in plain PyTorch, a chunk of pairs at a time.

A term has anchors (one side's real tokens) and their partners (each anchor's best match on the other side of its own
pair). The first term's anchors are words, the second's are frames. Both are padded, (pairs, tokens, D); an index of -1
marks a position without an anchor. ``channels`` is (kinds, roles, D). The kinds are mean and 1 / std, and for the
gradient also ``offset`` and ``along`` (see ops/cdcr.py); the roles are words, their partners, frames, their partners.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ... import autocast
from ...numerics import accumulation_dtype, statistics_dtype
from .token_interaction import LARGEST, best, through_norm, unit

# Tokens of one side in a chunk. The temporaries hold about ten times as many rows of D.
CHUNK_TOKENS = 4096


class Term(NamedTuple):
    """The anchors of a chunk of pairs and their partners, as unit tokens."""

    nth: int
    anchors: Tensor  # (C, Na, D)
    partners: Tensor  # (C, Na, D)
    there: Tensor  # (C, Na, 1) bool
    chose: Tensor  # (C, Na, Np): 1 where the anchor has this partner; products with it sum by partner without atomics


def chunks(text: Tensor, video: Tensor) -> Iterator[slice]:
    """Cut the pairs into chunks of at most ``CHUNK_TOKENS`` tokens of the longer side."""
    step = max(1, CHUNK_TOKENS // max(text.shape[1], video.shape[1]))
    for first in range(0, len(text), step):
        yield slice(first, first + step)


def partners_of(index: Tensor, length: int) -> Tensor:
    """Mark the tokens that are the partner of some anchor of the other side: (C, length) bool."""
    partner = torch.zeros(len(index), length + 1, dtype=torch.bool, device=index.device)
    return partner.scatter_(1, torch.where(index >= 0, index, length).long(), True)[:, :length]


class Chunk(NamedTuple):
    """The unit tokens of some pairs, their inverse norms and their terms."""

    pairs: slice
    units: tuple[Tensor, Tensor]
    inverses: tuple[Tensor | None, Tensor | None]
    needed: tuple[Tensor, Tensor]
    terms: list[Term]


def walk(
    text: Tensor, video: Tensor, video_index: Tensor, text_index: Tensor, normalize: bool, both: bool
) -> Iterator[Chunk]:
    """Yield the pairs' tokens and terms, chunk by chunk; ``both``: frames are anchors too."""
    for pairs in chunks(text, video):
        index = (video_index[pairs], text_index[pairs])
        words, frames = index[0] >= 0, partners_of(index[0], video.shape[1])
        if both:
            words, frames = words | partners_of(index[1], text.shape[1]), frames | (index[1] >= 0)
        t, t_inverse = unit(text[pairs], words, normalize)
        v, v_inverse = unit(video[pairs], frames, normalize)
        terms = []
        for nth, (own, other) in enumerate([(t, v), (v, t)][: 2 if both else 1]):
            chosen = index[nth].long().clamp(min=0)
            partners = other.gather(1, chosen[..., None].expand(-1, -1, other.shape[2]))
            chose = (index[nth][..., None] == torch.arange(other.shape[1], device=own.device)).to(own.dtype)
            terms.append(Term(nth, own, partners, (index[nth] >= 0)[..., None], chose))
        yield Chunk(pairs, (t, v), (t_inverse, v_inverse), (words, frames), terms)


def statistics(
    text: Tensor, video: Tensor, text_mask: Tensor | None, video_mask: Tensor | None, normalize: bool, both: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Find partners (B, Nt) and (B, Nv) int16, and each role's mean and sum of squared deviations, (roles, D)."""
    video_index = text.new_empty(text.shape[:2], dtype=torch.int16)
    text_index = text.new_empty(video.shape[:2], dtype=torch.int16)
    dtype = statistics_dtype(text.device)
    with autocast.off(text.device.type):
        for pairs in chunks(text, video):
            video_index[pairs], text_index[pairs] = _partners(
                text[pairs],
                video[pairs],
                None if text_mask is None else text_mask[pairs],
                None if video_mask is None else video_mask[pairs],
                normalize,
            )
        count = torch.stack([(index >= 0).sum() for index in (video_index, text_index)]).clamp(min=1).to(dtype)
        roles = 4 if both else 2
        count = count.repeat_interleave(2)[:roles, None]
        total = torch.zeros(roles, text.shape[2], dtype=dtype, device=text.device)
        for chunk in walk(text, video, video_index, text_index, normalize, both):
            total += torch.stack([_sum(x, term) for term in chunk.terms for x in (term.anchors, term.partners)])
        mean = total / count
        scatter = torch.zeros_like(mean)
        for chunk in walk(text, video, video_index, text_index, normalize, both):
            of_role = iter(mean)
            scatter += torch.stack(
                [_sum((x.to(dtype) - next(of_role)) ** 2, term) for term in chunk.terms for x in term[1:3]]
            )
    return video_index, text_index, mean, scatter


def _sum(x: Tensor, term: Term) -> Tensor:
    """Sum over a term's anchors: (C, Na, D) -> (D,)."""
    return torch.where(term.there, x, 0).sum((0, 1), dtype=statistics_dtype(x.device))


def _partners(
    text: Tensor, video: Tensor, text_mask: Tensor | None, video_mask: Tensor | None, normalize: bool
) -> tuple[Tensor, Tensor]:
    words = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device) if text_mask is None else text_mask
    frames = torch.ones(video.shape[:2], dtype=torch.bool, device=video.device) if video_mask is None else video_mask
    s = unit(text, words, normalize)[0] @ unit(video, frames, normalize)[0].transpose(1, 2)
    never = torch.zeros((), dtype=torch.bool, device=s.device)  # masked tokens do not compete with a 0 here
    _, frame_of = best(s, 2, frames[:, None, :], never, words, LARGEST)
    _, word_of = best(s, 1, words[:, :, None], never, frames, LARGEST)
    by_word, by_frame = (index.masked_fill(index == LARGEST, -1).to(torch.int16) for index in (frame_of, word_of))
    return by_word, by_frame


def _standard(x: Tensor, channels: Tensor, role: int) -> Tensor:
    """Standardise channels in x's dtype. The mean has two parts because it may be far larger than the deviation."""
    mean = channels[0, role].to(x.dtype)
    rest = (channels[0, role] - mean).to(x.dtype)
    return ((x - mean) - rest) * channels[1, role].to(x.dtype)


class Rows(NamedTuple):
    """A chunk's rows of one term's product C = weighted^T partners: one row per token of the shorter side."""

    weighted: Tensor  # (C, slots, D)
    partners: Tensor  # (C, slots, D)
    by_anchor: bool  # True: a row is an anchor; False: a partner, with the sum of the anchors that chose it


def product_rows(chunk: Chunk, term: Term, x: Tensor, y: Tensor, channels: Tensor) -> Rows:
    """Build the rows from weighted standardised anchors x and their partners y, (C, Na, D); 0 without an anchor."""
    if (term.nth == 1) == (chunk.units[1].shape[1] <= chunk.units[0].shape[1]):
        return Rows(x, y, True)
    own = _standard(chunk.units[1 - term.nth], channels, 2 * term.nth + 1)
    return Rows(term.chose.transpose(1, 2) @ x, torch.where(_was_chosen(term), own, 0), False)


def correlation(
    text: Tensor,
    video: Tensor,
    text_weight: Tensor,
    video_weight: Tensor | None,
    video_index: Tensor,
    text_index: Tensor,
    channels: Tensor,
    normalize: bool,
    full: bool,
) -> tuple[Tensor, Tensor]:
    """Compute each term's C, (terms, D, D) or its diagonal (terms, D), and each role's weighted sum (roles, D)."""
    terms, dim = 1 if video_weight is None else 2, text.shape[2]
    cross = channels.new_zeros((terms, dim, dim) if full else (terms, dim))
    sums = channels.new_zeros((2 * terms, dim))
    with autocast.off(text.device.type):
        for chunk in walk(text, video, video_index, text_index, normalize, terms == 2):
            for term in chunk.terms:
                w, x, y = _standardized(chunk, term, (text_weight, video_weight), channels)
                sums[2 * term.nth] += _sum(w * x, term)
                sums[2 * term.nth + 1] += _sum(w * y, term)
                if full:
                    rows = product_rows(chunk, term, w * x, y, channels)
                    cross[term.nth] += rows.weighted.flatten(0, 1).T @ rows.partners.flatten(0, 1)
                else:
                    cross[term.nth] += _sum(w * x * y, term)
    return cross.to(accumulation_dtype(text.dtype)), sums


def gradient(
    text: Tensor,
    video: Tensor,
    text_weight: Tensor,
    video_weight: Tensor | None,
    video_index: Tensor,
    text_index: Tensor,
    channels: Tensor,
    pull: Tensor,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of features and weights; ``pull`` is d loss / d C, (D, D) or its diagonal (D,)."""
    both = video_weight is not None
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (text, video)]
    weight_grads = [torch.zeros(x.shape[:2], dtype=text_weight.dtype, device=text.device) for x in (text, video)]
    with autocast.off(text.device.type):
        for chunk in walk(text, video, video_index, text_index, normalize, both):
            into = [torch.zeros_like(x) for x in chunk.units]
            for term in chunk.terms:
                w, x, y = _standardized(chunk, term, (text_weight, video_weight), channels)
                to_x, to_y, to_partner = _back_through(chunk, term, w, x, y, channels, pull)
                inverse, offset, along = (kind[2 * term.nth : 2 * term.nth + 2] for kind in channels[1:].to(x.dtype))
                weight_grads[term.nth][chunk.pairs] = (x * to_x).sum(-1)
                grad_x = (w * to_x - offset[0] - x * along[0]) * inverse[0]
                grad_y = (to_y - offset[1] - y * along[1]) * inverse[1]
                into[term.nth] += torch.where(term.there, grad_x, 0)
                into[1 - term.nth] += term.chose.transpose(1, 2) @ torch.where(term.there, grad_y, 0)
                into[1 - term.nth] += to_partner * inverse[1]
            for side, out in enumerate(grads):
                raw = through_norm(into[side], chunk.units[side], chunk.inverses[side], chunk.needed[side])
                out[chunk.pairs] = raw.to(out.dtype)
    return grads[0], grads[1], weight_grads[0], weight_grads[1] if both else weight_grads[1][:0]


def _standardized(
    chunk: Chunk, term: Term, weights: tuple[Tensor, Tensor | None], channels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return weights (C, Na, 1) and standardised anchors and partners (C, Na, D); 0 without an anchor."""
    given = weights[term.nth]
    assert given is not None
    w = torch.where(term.there, given[chunk.pairs][..., None], 0)
    x = torch.where(term.there, _standard(term.anchors, channels, 2 * term.nth), 0)
    return w, x, torch.where(term.there, _standard(term.partners, channels, 2 * term.nth + 1), 0)


def _back_through(
    chunk: Chunk, term: Term, w: Tensor, x: Tensor, y: Tensor, channels: Tensor, pull: Tensor
) -> tuple[Tensor, Tensor, Tensor | float]:
    """Return d loss / d (w x~) and d loss / d y~ per anchor, and the latter per partner; one of the last two is 0."""
    if pull.dim() == 1:
        return pull * y, w * pull * x, 0.0
    rows = product_rows(chunk, term, w * x, y, channels)
    to_weighted, to_partners = rows.partners @ pull.T, rows.weighted @ pull
    if rows.by_anchor:
        return to_weighted, to_partners, 0.0
    return term.chose @ to_weighted, torch.zeros_like(y), torch.where(_was_chosen(term), to_partners, 0)


def _was_chosen(term: Term) -> Tensor:
    return term.chose.any(1)[..., None]
