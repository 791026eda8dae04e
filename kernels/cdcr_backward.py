"""Backward kernel of CDCR: gradients of the raw tokens and of the anchors' weights.

    to_x~ = w A y~,  to_y~ = A^T (w x~)          A = d loss / d C: a diagonal, or (D, D) by torch.mm on product rows
    grad x_d = (to_x~_d - offset_d - x~_d along_d) / std_d       also through mean and deviation; the same for y
    G_p = grad x (if p is an anchor) + sum over the anchors that chose p of grad y,  y being token p itself
    grad w = sum_d x~_d (A y~)_d
    grad raw = (G - u <u, G>) / |x|,  u the unit token

            D in blocks of BD, twice
          +------+------+------+          A program owns PAIRS OWN tokens of one side. The first pass computes <u, G>
    OWN   | G_p  | ...  |      |          and grad w, the second the gradient. Without norms one pass is enough.
          +------+------+------+          Sums over the anchors that chose p: cdcr_tokens.sum_of_choosers.

On chip: G, u and one addend, for one block of channels. No atomics: each program writes its own tokens' gradients.
Bytes read per pass: own tokens, tokens that chose them, and partners. Gradients are written once. FLOP: 2 OWN OTHER per
channel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cdcr import product_rows, short_side
from .cdcr_tokens import (
    LEAST,
    OPTIONS,
    Channels,
    Term,
    channel_statistics,
    count_choosers,
    pair_tile,
    read_units,
    standardize,
    sum_of_choosers,
    terms,
)

# This kernel holds the most values: use eight warps, and limit registers so that a multiprocessor runs two programs.
GRADIENT = {**OPTIONS, "num_warps": 8, "num_stages": 1, "maxnreg": 128}


@triton.jit
def _through_statistics(to_x, x, count, channels, role, d):
    """Turn the gradient of standardised channels into that of unit tokens; a token counts ``count`` times."""
    table, roles, dim = channels.table, channels.roles, channels.dim
    inverse_std = tl.load(table + (roles + role) * dim + d, mask=d < dim, other=0.0).to(tl.float32)
    offset = tl.load(table + (2 * roles + role) * dim + d, mask=d < dim, other=0.0).to(tl.float32)
    along = tl.load(table + (3 * roles + role) * dim + d, mask=d < dim, other=0.0).to(tl.float32)
    return (to_x - count[:, None] * (offset[None, :] + x * along[None, :])) * inverse_std[None, :]


@triton.jit
def _to_anchors(other, partner, pair, at, there, channels, role, pull, to_weighted, d, SHORT: tl.constexpr):
    """Return d loss / d (w x~) of anchors."""
    if to_weighted is not None:
        row = at if SHORT else pair * other.tokens + partner
        inside = there[:, None] & (d < channels.dim)[None, :]
        return tl.load(to_weighted + row[:, None] * channels.dim + d[None, :], mask=inside, other=0.0)
    else:
        y = read_units(other, pair, partner, there, d, channels.dim)
        y = standardize(y, there, channels, role + 1, d)
        return y * tl.load(pull + d, mask=d < channels.dim, other=0.0)[None, :]


@triton.jit
def _to_partners(
    other,
    choices,
    channels,
    pull,
    to_partners,
    position,
    pair,
    at,
    there,
    first,
    d,
    pairs,
    TILE: tl.constexpr,
    SHORT: tl.constexpr,
):
    """Return d loss / d y~ of partners, from all anchors that chose them."""
    if to_partners is not None and SHORT:
        inside = there[:, None] & (d < channels.dim)[None, :]
        return tl.load(to_partners + at[:, None] * channels.dim + d[None, :], mask=inside, other=0.0)
    else:
        to_y = sum_of_choosers(other, choices, channels, to_partners, position, pair, first, d, pairs, TILE)
        if to_partners is None:
            to_y *= tl.load(pull + d, mask=d < channels.dim, other=0.0)[None, :]
        return to_y


@triton.jit
def cdcr_gradient(
    own,
    other,
    own_choices,
    other_choices,
    channels,
    pull,
    to_weighted,
    to_partners,
    grad,
    grad_weight,
    pairs,
    TILE: tl.constexpr,
    SHORT: tl.constexpr,
):
    """Compute the gradients of TILE.own tokens of TILE.pairs pairs: anchors of one term, partners of another, or both.

    ``own_choices`` is None if the tokens are not anchors, ``other_choices`` if they are not partners. ``to_weighted``
    and ``to_partners`` (d loss / d product rows) are None in the diagonal form.
    """
    M: tl.constexpr = TILE.pairs * TILE.own
    BD: tl.constexpr = TILE.channels
    dim = channels.dim
    chunks = tl.cdiv(own.tokens, TILE.own)
    first = tl.program_id(0) // chunks * TILE.pairs
    r = tl.arange(0, M)
    pair, token = (first + r // TILE.own).to(tl.int64), tl.program_id(0) % chunks * TILE.own + r % TILE.own
    inside = (pair < pairs) & (token < own.tokens)
    at = pair * own.tokens + token
    partner = tl.full((M,), -1, tl.int32)
    w = tl.zeros((M, 1), tl.float32)
    if own_choices is not None:
        partner = tl.load(own_choices.index + at, mask=inside, other=-1).to(tl.int32)
        w = tl.load(own_choices.weight + at, mask=partner >= 0, other=0.0)[:, None]
    anchor = partner >= 0
    chosen = tl.zeros((M,), tl.float32)
    if other_choices is not None:
        chosen = count_choosers(other_choices.index, token, pair, first, pairs, other.tokens, TILE)
    needed = anchor | (chosen > 0)
    along_unit, of_weight = tl.zeros((M,), tl.float32), tl.zeros((M,), tl.float32)
    blocks = tl.cdiv(dim, BD)
    for step in tl.range(0, 2 * blocks if own.inverse is not None else blocks):
        again = tl.zeros((M,), tl.int32) + step >= blocks
        d = step % blocks * BD + tl.arange(0, BD)
        u = read_units(own, pair, token, needed, d, dim)
        g = tl.zeros((M, BD), tl.float32)
        if own_choices is not None:
            x = standardize(u, anchor, channels, own_choices.role, d)
            to_x = _to_anchors(
                other,
                tl.maximum(partner, 0),
                pair,
                at,
                anchor,
                channels,
                own_choices.role,
                pull,
                to_weighted,
                d,
                SHORT,
            )
            of_weight += tl.where(again, 0.0, tl.sum(x * to_x, 1))
            g += _through_statistics(w * to_x, x, anchor.to(tl.float32), channels, own_choices.role, d)
        if other_choices is not None:
            to_y = _to_partners(
                other,
                other_choices,
                channels,
                pull,
                to_partners,
                token,
                pair,
                at,
                chosen > 0,
                first,
                d,
                pairs,
                TILE,
                SHORT,
            )
            y = standardize(u, chosen > 0, channels, other_choices.role + 1, d)
            g += _through_statistics(to_y, y, chosen, channels, other_choices.role + 1, d)
        out = inside[:, None] & (d < dim)[None, :]
        if own.inverse is not None:
            along_unit += tl.where(again, 0.0, tl.sum(u * g, 1))
            inverse = tl.load(own.inverse + at, mask=needed, other=0.0)[:, None]
            g = tl.where(inverse == 0.0, 0.0, (g - u * along_unit[:, None]) * inverse)
            out &= again[:, None]
        tl.store(grad + at[:, None] * dim + d[None, :], g.to(grad.dtype.element_ty), mask=out)
    if own_choices is not None:
        tl.store(grad_weight + at, of_weight, mask=inside)


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
    """Return gradients of both features (their dtype, contiguous) and both weights (float32; (0, Nv) if None)."""
    statistics, pull = channel_statistics(channels), pull.contiguous()
    found = terms(text, video, (text_weight, video_weight), (video_index, text_index), normalize)
    features = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (text, video)]
    weights = [torch.empty(term.weight.shape, dtype=torch.float32, device=text.device) for term in found]
    if pull.dim() == 1:
        _side_gradients(found, statistics, pull, None, features, weights)
    else:
        for block, weighted, partners, _ in product_rows(found, statistics):
            back = (partners @ pull.T, weighted @ pull)
            of_block = ([x[block] for x in kind] for kind in (features, weights))
            _side_gradients([term.of(block) for term in found], statistics, pull, back, *of_block)
    if video_weight is None:
        weights.append(torch.empty((0, video.shape[1]), dtype=torch.float32, device=text.device))
    return features[0], features[1], weights[0], weights[1]


def _side_gradients(
    found: list[Term],
    channels: Channels,
    pull: Tensor,
    back: tuple[Tensor, Tensor] | None,
    features: list[Tensor],
    weights: list[Tensor],
) -> None:
    """Fill both sides' gradients; ``back`` is d loss / d product rows (terms, rows, D) of anchors and of partners."""
    sides = (found[0].anchors, found[0].partners)
    for s, grad in enumerate(features):
        own, other = sides[s], sides[1 - s]
        anchors = found[s] if s < len(found) else None
        choosing = found[1 - s] if 1 - s < len(found) else None
        pairs, n, dim = own.shape
        tile = pair_tile(n, other.tokens, LEAST, dim)
        cdcr_gradient[(triton.cdiv(pairs, tile.pairs) * triton.cdiv(n, tile.own),)](
            own,
            other,
            anchors and anchors.choices,
            choosing and choosing.choices,
            channels,
            pull,
            back[0][anchors.nth] if back and anchors else None,
            back[1][choosing.nth] if back and choosing else None,
            grad,
            weights[s] if anchors else None,
            pairs,
            TILE=tile,
            SHORT=s == short_side(found),
            **GRADIENT,
        )
