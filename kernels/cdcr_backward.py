"""Backward kernel of CDCR: gradients of the raw tokens and of the anchors' weights.

    to_x~ = w A y~,  to_y~ = A^T (w x~)          A = d loss / d C: a diagonal, or (D, D) by torch.mm on product rows
    grad x_d = (to_x~_d - offset_d - x~_d along_d) / std_d       through the channel's mean and deviation; y alike
    G_p = grad x (p an anchor) + sum over the anchors that chose p of grad y,  y = p's own token for all of them
    grad w = sum_d x~_d (A y~)_d
    grad raw = (G - u <u, G>) / |x|,  u the unit token

            D in blocks of BD, twice
          +------+------+------+          A program owns PAIRS OWN tokens of one side. First walk: <u, G> and grad w;
    OWN   | G_p  | ...  |      |          second: G again, and the gradient. Without norms one walk does.
          +------+------+------+          Anchors that chose p: cdcr_tokens.sum_of_choosers.

On chip: G, u and what is added to it, one block of channels. No atomics: a token's gradient is its own program's.
Bytes a walk: own tokens and those that chose them, and partners gathered; written once. FLOP: 2 OWN OTHER a channel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cdcr import product_rows, short_side
from .cdcr_tokens import (
    DEPTH,
    LEAST,
    OPTIONS,
    Term,
    channel_block,
    count_choosers,
    pair_tile,
    read_units,
    standardize,
    sum_of_choosers,
    terms,
)

# The widest kernel here: twice the warps, and registers that leave room for two programs a multiprocessor.
GRADIENT = {**OPTIONS, "num_warps": 8, "num_stages": 1, "maxnreg": 128}


@triton.jit
def _through_statistics(to_x, x, count, channels, role, roles, d, dim):
    """To unit tokens from standardised ones that count so often."""
    inverse_std = tl.load(channels + (roles + role) * dim + d, mask=d < dim, other=0.0).to(tl.float32)
    offset = tl.load(channels + (2 * roles + role) * dim + d, mask=d < dim, other=0.0).to(tl.float32)
    along = tl.load(channels + (3 * roles + role) * dim + d, mask=d < dim, other=0.0).to(tl.float32)
    return (to_x - count[:, None] * (offset[None, :] + x * along[None, :])) * inverse_std[None, :]


@triton.jit
def _to_anchors(
    x,
    other,
    inverse,
    partner,
    pair,
    at,
    there,
    channels,
    pull,
    to_weighted,
    role,
    roles,
    d,
    tokens,
    dim,
    stride_pair,
    stride_token,
    stride_channel,
    FULL: tl.constexpr,
    SHORT: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """d loss / d (w x~) of anchors."""
    if FULL:
        row = at if SHORT else pair * tokens + partner
        inside = there[:, None] & (d < dim)[None, :]
        return tl.load(to_weighted + row[:, None] * dim + d[None, :], mask=inside, other=0.0)
    else:
        y = read_units(
            other, inverse, pair, partner, there, d, dim, tokens, stride_pair, stride_token, stride_channel, NORMALIZE
        )
        y = standardize(y, there, channels, role + 1, roles, d, dim)
        return y * tl.load(pull + d, mask=d < dim, other=0.0)[None, :]


@triton.jit
def _to_partners(
    other,
    inverse,
    index,
    weight,
    channels,
    pull,
    to_partners,
    role,
    roles,
    position,
    pair,
    at,
    there,
    first,
    d,
    pairs,
    tokens,
    dim,
    stride_pair,
    stride_token,
    stride_channel,
    PAIRS: tl.constexpr,
    OTHER: tl.constexpr,
    FULL: tl.constexpr,
    SHORT: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """d loss / d y~ of partners, from all anchors that chose them."""
    if FULL and SHORT:
        inside = there[:, None] & (d < dim)[None, :]
        return tl.load(to_partners + at[:, None] * dim + d[None, :], mask=inside, other=0.0)
    else:
        to_y = sum_of_choosers(
            other,
            inverse,
            index,
            weight,
            channels,
            to_partners,
            role,
            roles,
            position,
            pair,
            first,
            d,
            pairs,
            tokens,
            dim,
            stride_pair,
            stride_token,
            stride_channel,
            PAIRS,
            OTHER,
            NORMALIZE,
            FULL,
        )
        return to_y if FULL else to_y * tl.load(pull + d, mask=d < dim, other=0.0)[None, :]


@triton.jit
def cdcr_gradient(
    own,
    other,
    own_inverse,
    other_inverse,
    own_index,
    other_index,
    own_weight,
    other_weight,
    channels,
    pull,
    to_weighted,
    to_partners,
    grad,
    grad_weight,
    pairs,
    own_tokens,
    other_tokens,
    dim,
    roles,
    anchor_role,
    chooser_role,
    own_pair,
    own_token,
    own_channel,
    other_pair,
    other_token,
    other_channel,
    PAIRS: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
    BD: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ANCHORS: tl.constexpr,
    PARTNERS: tl.constexpr,
    FULL: tl.constexpr,
    SHORT: tl.constexpr,
):
    """Gradients of OWN tokens of PAIRS pairs, which are ANCHORS of one term, PARTNERS of the other, or both."""
    chunks = tl.cdiv(own_tokens, OWN)
    first = tl.program_id(0) // chunks * PAIRS
    r = tl.arange(0, PAIRS * OWN)
    pair, token = (first + r // OWN).to(tl.int64), tl.program_id(0) % chunks * OWN + r % OWN
    inside = (pair < pairs) & (token < own_tokens)
    at = pair * own_tokens + token
    partner = tl.full((PAIRS * OWN,), -1, tl.int32)
    if ANCHORS:
        partner = tl.load(own_index + at, mask=inside, other=-1).to(tl.int32)
    anchor = partner >= 0
    w = tl.load(own_weight + at, mask=anchor, other=0.0)[:, None]
    chosen = tl.zeros((PAIRS * OWN,), tl.float32)
    if PARTNERS:
        chosen = count_choosers(other_index, token, pair, first, pairs, other_tokens, PAIRS, OTHER)
    needed = anchor | (chosen > 0)
    along_unit, of_weight = tl.zeros((PAIRS * OWN,), tl.float32), tl.zeros((PAIRS * OWN,), tl.float32)
    blocks = tl.cdiv(dim, BD)
    for step in tl.range(0, 2 * blocks if NORMALIZE else blocks):
        again = tl.zeros((PAIRS * OWN,), tl.int32) + step >= blocks
        d = step % blocks * BD + tl.arange(0, BD)
        u = read_units(
            own, own_inverse, pair, token, needed, d, dim, own_tokens, own_pair, own_token, own_channel, NORMALIZE
        )
        g = tl.zeros((PAIRS * OWN, BD), tl.float32)
        if ANCHORS:
            x = standardize(u, anchor, channels, anchor_role, roles, d, dim)
            to_x = _to_anchors(
                x,
                other,
                other_inverse,
                tl.maximum(partner, 0),
                pair,
                at,
                anchor,
                channels,
                pull,
                to_weighted,
                anchor_role,
                roles,
                d,
                other_tokens,
                dim,
                other_pair,
                other_token,
                other_channel,
                FULL,
                SHORT,
                NORMALIZE,
            )
            of_weight += tl.where(again, 0.0, tl.sum(x * to_x, 1))
            g += _through_statistics(w * to_x, x, anchor.to(tl.float32), channels, anchor_role, roles, d, dim)
        if PARTNERS:
            to_y = _to_partners(
                other,
                other_inverse,
                other_index,
                other_weight,
                channels,
                pull,
                to_partners,
                chooser_role,
                roles,
                token,
                pair,
                at,
                chosen > 0,
                first,
                d,
                pairs,
                other_tokens,
                dim,
                other_pair,
                other_token,
                other_channel,
                PAIRS,
                OTHER,
                FULL,
                SHORT,
                NORMALIZE,
            )
            y = standardize(u, chosen > 0, channels, chooser_role + 1, roles, d, dim)
            g += _through_statistics(to_y, y, chosen, channels, chooser_role + 1, roles, d, dim)
        if NORMALIZE:
            along_unit += tl.where(again, 0.0, tl.sum(u * g, 1))
            inverse = tl.load(own_inverse + at, mask=needed, other=0.0)[:, None]
            g = tl.where(inverse == 0.0, 0.0, (g - u * along_unit[:, None]) * inverse)
        out = inside[:, None] & (d < dim)[None, :]
        if NORMALIZE:
            out &= again[:, None]
        tl.store(grad + at[:, None] * dim + d[None, :], g.to(grad.dtype.element_ty), mask=out)
    if ANCHORS:
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
    """Gradients of both features, contiguous and in their dtype, and of both weights, float32; (0, Nv) for none."""
    channels, pull = channels.contiguous(), pull.contiguous()
    found = terms(text, video, (text_weight, video_weight), (video_index, text_index), normalize)
    features = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (text, video)]
    weights = [torch.empty(term.weight.shape, dtype=torch.float32, device=text.device) for term in found]
    if pull.dim() == 1:
        _walk(found, channels, pull, None, features, weights, normalize)
    else:
        for block, weighted, partners, _ in product_rows(found, channels, normalize):
            back = (partners @ pull.T, weighted @ pull)
            of_block = ([x[block] for x in kind] for kind in (features, weights))
            _walk([term.of(block) for term in found], channels, pull, back, *of_block, normalize)
    if video_weight is None:
        weights.append(torch.empty((0, video.shape[1]), dtype=torch.float32, device=text.device))
    return features[0], features[1], weights[0], weights[1]


def _walk(
    found: list[Term],
    channels: Tensor,
    pull: Tensor,
    back: tuple[Tensor, Tensor] | None,
    features: list[Tensor],
    weights: list[Tensor],
    normalize: bool,
) -> None:
    """Gradients of both sides; ``back``: d loss / d product rows, weighted anchors' and partners', (terms, rows, D)."""
    sides = (found[0].anchors, found[0].partners)
    for s, grad in enumerate(features):
        own, other = sides[s], sides[1 - s]
        as_anchors = found[s] if s < len(found) else None
        as_partners = found[1 - s] if 1 - s < len(found) else None
        nothing = found[0]  # stands in for a term that there is not, and is not read
        anchors, choosing = as_anchors or nothing, as_partners or nothing
        to_weighted, to_partners = (pull, pull) if back is None else (back[0][anchors.nth], back[1][choosing.nth])
        (pairs, n, dim), m = own.features.shape, other.features.shape[1]
        tile = pair_tile(n, m, LEAST)
        cdcr_gradient[(triton.cdiv(pairs, tile["PAIRS"]) * triton.cdiv(n, tile["OWN"]),)](
            own.features,
            other.features,
            own.inverse,
            other.inverse,
            anchors.index,
            choosing.index,
            anchors.weight,
            choosing.weight,
            channels,
            pull,
            to_weighted,
            to_partners,
            grad,
            weights[s] if as_anchors else grad,
            pairs,
            n,
            m,
            dim,
            channels.shape[1],
            2 * anchors.nth,
            2 * choosing.nth,
            *own.features.stride(),
            *other.features.stride(),
            **tile,
            BD=channel_block(dim, DEPTH),
            NORMALIZE=normalize,
            ANCHORS=as_anchors is not None,
            PARTNERS=as_partners is not None,
            FULL=back is not None,
            SHORT=s == short_side(found),
            **GRADIENT,
        )
