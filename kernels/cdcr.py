"""Forward kernels of CDCR: partners, channel statistics, and the correlation of standardised channels.

    partner of i  = argmax over the real tokens j of the pair's other side of <x_i, y_j>         unit tokens, lowest j
    mean_d, scatter_d = of channel d over all anchors, and over all partners
    x~_d          = ((x_d - mean_d) - rest_d) / std_d            the mean in two float32 parts, so that none is lost
    C_de          = sum over anchors of w x~_d y~_e              alpha_off = 0: its diagonal alone, O(N D)
    sums_d        = sum over anchors of w x~_d, and of w y~_d

        anchors of all pairs, flat              pairs side by side, each with room for OWN tokens
      +----+-------- D --------+                +---------- OTHER -----+
      |    | ROWS x BD | ...   |  a part of     | pair 0 |  0  |       |  PAIRS OWN x PAIRS OTHER: similarities, or who
      | i ~> partner's ROWS x BD  the anchors   |   0    | pair 1 |    |  chose whom, with zeros between the pairs
      +----+-------------------+                +----------------------+

On chip: a tile of anchors and one of their partners, gathered as they are read; sums of a part of the anchors in
float64. No atomics: parts are written and added up in one order. Norms (float32, a token each) are found first.
Bytes: each token is read once as an anchor and once a choice as a partner, in every pass: 2 N D itemsize; FLOP: some
ten a channel and anchor, and 2 Nt Nv D a pair and direction for the partners. The full form writes and reads product
rows, 8 min(Nt, Nv) D bytes a pair and term, and multiplies them in torch.mm: 2 min(Nt, Nv) D^2 FLOP.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cdcr_tokens import (
    DEPTH,
    LEAST,
    MOST,
    OPTIONS,
    ROWS,
    Term,
    Tokens,
    channel_block,
    count_choosers,
    norms,
    pair_tile,
    read_units,
    standardize,
    sum_of_choosers,
    terms,
)
from .packing import Side

# Sums over anchors are kept in so many parts at most: enough programs for a GPU, little to add up.
MOST_PARTS = 256
# With four warps a form of it spills.
PRODUCT_ROWS = {**OPTIONS, "num_warps": 8}
# The full form's products go by blocks of pairs, whose rows take this much memory a tensor.
BLOCK_BYTES = 1 << 26
NOBODY = tl.constexpr(1 << 30)


@triton.jit
def _anchors(index, tile, rows, tokens, ROWS: tl.constexpr):
    """Places, pairs, positions and partners of a tile of anchors, and which of them there are."""
    at = (tl.zeros((ROWS,), tl.int64) + tile) * ROWS + tl.arange(0, ROWS)
    partner = tl.load(index + at, mask=at < rows, other=-1).to(tl.int64)
    return at, at // tokens, at % tokens, tl.maximum(partner, 0), partner >= 0


@triton.jit
def cdcr_partners(
    own,
    other,
    own_inverse,
    other_inverse,
    own_mask,
    other_mask,
    index,
    pairs,
    own_tokens,
    other_tokens,
    dim,
    own_pair,
    own_token,
    own_channel,
    other_pair,
    other_token,
    other_channel,
    own_mask_pair,
    own_mask_token,
    other_mask_pair,
    other_mask_token,
    PAIRS: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
    BD: tl.constexpr,
    NORMALIZE: tl.constexpr,
    OWN_MASKED: tl.constexpr,
    OTHER_MASKED: tl.constexpr,
):
    """The best match of OWN tokens of PAIRS pairs among the other side's."""
    chunks = tl.cdiv(own_tokens, OWN)
    first = tl.program_id(0) // chunks * PAIRS
    r = tl.arange(0, PAIRS * OWN)
    pair, token = (first + r // OWN).to(tl.int64), (tl.program_id(0) % chunks * OWN + r % OWN).to(tl.int64)
    inside = (pair < pairs) & (token < own_tokens)
    real = inside
    if OWN_MASKED:
        real &= tl.load(own_mask + pair * own_mask_pair + token * own_mask_token, mask=inside, other=0) != 0
    top = tl.full((PAIRS * OWN,), float("-inf"), tl.float32)
    best = tl.full((PAIRS * OWN,), NOBODY, tl.int32)
    for chunk in tl.range(0, tl.cdiv(other_tokens, OTHER)):
        a = tl.arange(0, PAIRS * OTHER)
        a_pair, a_token = (first + a // OTHER).to(tl.int64), (chunk * OTHER + a % OTHER).to(tl.int64)
        there = (a_pair < pairs) & (a_token < other_tokens)
        if OTHER_MASKED:
            flag = other_mask + a_pair * other_mask_pair + a_token * other_mask_token
            there &= tl.load(flag, mask=there, other=0) != 0
        s = tl.zeros((PAIRS * OWN, PAIRS * OTHER), tl.float32)
        for d0 in tl.range(0, dim, BD):
            d = (d0 + tl.arange(0, BD)).to(tl.int64)
            x = own + (pair * own_pair + token * own_token)[:, None] + d[None, :] * own_channel
            x = tl.load(x, mask=real[:, None] & (d < dim)[None, :], other=0.0)
            y = other + (a_pair * other_pair + a_token * other_token)[:, None] + d[None, :] * other_channel
            y = tl.load(y, mask=there[:, None] & (d < dim)[None, :], other=0.0)
            s = tl.dot(x, y.T, s, input_precision="ieee")
        if NORMALIZE:
            s *= tl.load(own_inverse + pair * own_tokens + token, mask=real, other=0.0)[:, None]
            s *= tl.load(other_inverse + a_pair * other_tokens + a_token, mask=there, other=0.0)[None, :]
        # A NaN is the best there is.
        s = tl.where(s != s, float("inf"), s)
        candidate = (pair[:, None] == a_pair[None, :]) & real[:, None] & there[None, :]
        here = tl.max(tl.where(candidate, s, float("-inf")), 1)
        first_best = tl.min(tl.where(candidate & (s == here[:, None]), a_token.to(tl.int32)[None, :], NOBODY), 1)
        # Strictly: the lowest position keeps a tie.
        best = tl.where((here > top) | (best == NOBODY), first_best, best)
        top = tl.maximum(top, here)
    tl.store(index + pair * own_tokens + token, tl.where(best == NOBODY, -1, best).to(tl.int16), mask=inside)


@triton.jit
def _merge(x, there, here, before, mean, scatter):
    """Mean and scatter with one more tile in them, by Chan et al.'s update; the tile's own are found in two passes."""
    # Relative to one of its values: of a constant channel nothing is left then, not even rounding.
    pivot = tl.where(here > 0, tl.max(tl.where(there[:, None], x, float("-inf")), 0), 0.0)
    away = tl.where(there[:, None], x - pivot[None, :], 0.0)
    shift = tl.sum(away, 0) / tl.maximum(here, 1).to(tl.float32)
    rest = tl.where(there[:, None], away - shift[None, :], 0.0)
    ours, total = here.to(tl.float64), tl.maximum(before + here, 1).to(tl.float64)
    delta = pivot.to(tl.float64) + shift.to(tl.float64) - mean
    scatter += tl.sum(rest * rest, 0).to(tl.float64) + delta * delta * (ours * before.to(tl.float64) / total)
    return mean + delta * (ours / total), scatter


@triton.jit
def cdcr_moments(
    own,
    other,
    own_inverse,
    other_inverse,
    index,
    count,
    partial,
    rows,
    own_tokens,
    other_tokens,
    dim,
    parts,
    tiles,
    own_pair,
    own_token,
    own_channel,
    other_pair,
    other_token,
    other_channel,
    ROWS: tl.constexpr,
    BD: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """Number, mean and scatter of the anchors of one part and of their partners, BD channels."""
    blocks = tl.cdiv(dim, BD)
    part = tl.program_id(0) // blocks
    d = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    x_mean, x_scatter = tl.zeros((BD,), tl.float64), tl.zeros((BD,), tl.float64)
    y_mean, y_scatter = tl.zeros((BD,), tl.float64), tl.zeros((BD,), tl.float64)
    before = tl.sum(tl.zeros((ROWS,), tl.int32), 0)
    for tile in tl.range(part * tiles, (part + 1) * tiles):
        _, pair, token, partner, there = _anchors(index, tile, rows, own_tokens, ROWS)
        here = tl.sum(there.to(tl.int32), 0)
        x = read_units(
            own, own_inverse, pair, token, there, d, dim, own_tokens, own_pair, own_token, own_channel, NORMALIZE
        )
        x_mean, x_scatter = _merge(x, there, here, before, x_mean, x_scatter)
        y = read_units(
            other,
            other_inverse,
            pair,
            partner,
            there,
            d,
            dim,
            other_tokens,
            other_pair,
            other_token,
            other_channel,
            NORMALIZE,
        )
        y_mean, y_scatter = _merge(y, there, here, before, y_mean, y_scatter)
        before += here
    at = partial + part * dim + d
    step = parts * dim
    tl.store(at, x_mean, mask=d < dim)
    tl.store(at + step, y_mean, mask=d < dim)
    tl.store(at + 2 * step, x_scatter, mask=d < dim)
    tl.store(at + 3 * step, y_scatter, mask=d < dim)
    # Every block of channels writes the same number.
    tl.store(count + part, before.to(tl.float64))


@triton.jit
def cdcr_correlate(
    own,
    other,
    own_inverse,
    other_inverse,
    index,
    weight,
    channels,
    partial,
    weighted,
    partners,
    rows,
    own_tokens,
    other_tokens,
    dim,
    parts,
    tiles,
    role,
    roles,
    own_pair,
    own_token,
    own_channel,
    other_pair,
    other_token,
    other_channel,
    ROWS: tl.constexpr,
    BD: tl.constexpr,
    NORMALIZE: tl.constexpr,
    KEEP: tl.constexpr,
):
    """C's diagonal and both sums over the anchors of one part, BD channels; KEEP: also their product rows."""
    blocks = tl.cdiv(dim, BD)
    part = tl.program_id(0) // blocks
    d = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    cross, sum_x, sum_y = tl.zeros((BD,), tl.float64), tl.zeros((BD,), tl.float64), tl.zeros((BD,), tl.float64)
    for tile in tl.range(part * tiles, (part + 1) * tiles):
        row, pair, token, partner, there = _anchors(index, tile, rows, own_tokens, ROWS)
        w = tl.load(weight + row, mask=there, other=0.0)[:, None]
        x = read_units(
            own, own_inverse, pair, token, there, d, dim, own_tokens, own_pair, own_token, own_channel, NORMALIZE
        )
        x = standardize(x, there, channels, role, roles, d, dim) * w
        y = read_units(
            other,
            other_inverse,
            pair,
            partner,
            there,
            d,
            dim,
            other_tokens,
            other_pair,
            other_token,
            other_channel,
            NORMALIZE,
        )
        y = standardize(y, there, channels, role + 1, roles, d, dim)
        cross += tl.sum(x * y, 0).to(tl.float64)
        sum_x += tl.sum(x, 0).to(tl.float64)
        sum_y += tl.sum(w * y, 0).to(tl.float64)
        if KEEP:
            inside = (row < rows)[:, None] & (d < dim)[None, :]
            tl.store(weighted + row[:, None] * dim + d[None, :], x, mask=inside)
            tl.store(partners + row[:, None] * dim + d[None, :], y, mask=inside)
    at = partial + part * dim + d
    step = parts * dim
    tl.store(at, sum_x, mask=d < dim)
    tl.store(at + step, sum_y, mask=d < dim)
    tl.store(at + 2 * step, cross, mask=d < dim)


@triton.jit
def cdcr_product_rows(
    own,
    other,
    own_inverse,
    other_inverse,
    index,
    weight,
    channels,
    weighted,
    partners,
    pairs,
    own_tokens,
    other_tokens,
    dim,
    role,
    roles,
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
):
    """Product rows of OWN partners of PAIRS pairs, each with the sum of the other side's anchors that chose it."""
    chunks, blocks = tl.cdiv(own_tokens, OWN), tl.cdiv(dim, BD)
    d = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    tile = tl.program_id(0) // blocks
    first = tile // chunks * PAIRS
    r = tl.arange(0, PAIRS * OWN)
    pair, token = (first + r // OWN).to(tl.int64), tile % chunks * OWN + r % OWN
    there = count_choosers(index, token, pair, first, pairs, other_tokens, PAIRS, OTHER) > 0
    x = sum_of_choosers(
        other,
        other_inverse,
        index,
        weight,
        channels,
        weighted,
        role,
        roles,
        token,
        pair,
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
        NORMALIZE,
        False,
    )
    y = read_units(
        own, own_inverse, pair, token, there, d, dim, own_tokens, own_pair, own_token, own_channel, NORMALIZE
    )
    y = standardize(y, there, channels, role + 1, roles, d, dim)
    inside = ((pair < pairs) & (token < own_tokens))[:, None] & (d < dim)[None, :]
    at = (pair * own_tokens + token)[:, None] * dim + d[None, :]
    tl.store(weighted + at, x, mask=inside)
    tl.store(partners + at, y, mask=inside)


def statistics(
    text: Tensor, video: Tensor, text_mask: Tensor | None, video_mask: Tensor | None, normalize: bool, both: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Partners (B, Nt) and (B, Nv) int16, -1 where there is no anchor; mean and scatter (roles, D) float64."""
    sides = [Side(text, None, text_mask), Side(video, None, video_mask)]
    tokens = [norms(side, normalize) for side in sides]
    index = [_partners(sides[s], sides[1 - s], tokens[s], tokens[1 - s], normalize) for s in (0, 1)]
    found = [_moments(tokens[s], tokens[1 - s], index[s], normalize) for s in ((0, 1) if both else (0,))]
    mean, scatter = (torch.cat(kind) for kind in zip(*found, strict=True))
    return index[0], index[1], mean, scatter


def _partners(side: Side, other_side: Side, own: Tokens, other: Tokens, normalize: bool) -> Tensor:
    (pairs, n, dim), m = own.features.shape, other.features.shape[1]
    index = torch.empty((pairs, n), dtype=torch.int16, device=own.features.device)
    tile = pair_tile(n, m, MOST)
    masks = [None if x.mask is None else x.mask.view(torch.uint8) for x in (side, other_side)]
    strides = [stride for mask in masks for stride in ((0, 0) if mask is None else mask.stride())]
    cdcr_partners[(triton.cdiv(pairs, tile["PAIRS"]) * triton.cdiv(n, tile["OWN"]),)](
        own.features,
        other.features,
        own.inverse,
        other.inverse,
        *(index if mask is None else mask for mask in masks),
        index,
        pairs,
        n,
        m,
        dim,
        *own.features.stride(),
        *other.features.stride(),
        *strides,
        **tile,
        BD=channel_block(dim, DEPTH),
        NORMALIZE=normalize,
        OWN_MASKED=masks[0] is not None,
        OTHER_MASKED=masks[1] is not None,
        **OPTIONS,
    )
    return index


def _moments(own: Tokens, other: Tokens, index: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """Mean and scatter (2, D), of the anchors and of their partners."""
    (pairs, n, dim), m = own.features.shape, other.features.shape[1]
    parts, tiles = _split(pairs * n)
    block = channel_block(dim)
    count = torch.empty((parts, 1), dtype=torch.float64, device=index.device)
    partial = torch.empty((2, 2, parts, dim), dtype=torch.float64, device=index.device)
    cdcr_moments[(parts * triton.cdiv(dim, block),)](
        own.features,
        other.features,
        own.inverse,
        other.inverse,
        index,
        count,
        partial,
        pairs * n,
        n,
        m,
        dim,
        parts,
        tiles,
        *own.features.stride(),
        *other.features.stride(),
        ROWS=ROWS,
        BD=block,
        NORMALIZE=normalize,
        **OPTIONS,
    )
    # The parts' means and scatters become everyone's, by the same update as inside a part.
    means, scatters = partial
    mean = (count * means).sum(1) / count.sum().clamp(min=1)
    return mean, (scatters + count * (means - mean[:, None]).square()).sum(1)


def _split(rows: int) -> tuple[int, int]:
    """Parts that anchors are summed in, and tiles of ROWS of each; by their number alone, so that bits repeat."""
    tiles = triton.cdiv(rows, ROWS)
    each = max(1, triton.cdiv(tiles, MOST_PARTS))
    return max(1, triton.cdiv(tiles, each)), each


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
    """C of each term, its diagonal (terms, D) or all of it (terms, D, D), float32; sums (roles, D) float64."""
    channels, dim = channels.contiguous(), text.shape[2]
    found = terms(text, video, (text_weight, video_weight), (video_index, text_index), normalize)
    if not full:
        total = torch.stack([correlate(term, channels, normalize) for term in found])
        return total[:, 2].to(torch.float32), total[:, :2].flatten(0, 1)
    cross = torch.zeros((len(found), dim, dim), dtype=torch.float32, device=text.device)
    total = torch.zeros((len(found), 3, dim), dtype=torch.float64, device=text.device)
    for _, weighted, partners, sums in product_rows(found, channels, normalize):
        cross = torch.baddbmm(cross, weighted.transpose(1, 2), partners)
        total += sums
    return cross, total[:, :2].flatten(0, 1)


def correlate(term: Term, channels: Tensor, normalize: bool, rows: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Sums of weighted anchors and of partners, and C's diagonal, (3, D) float64; fills each anchor's product rows."""
    own, other = term.anchors, term.partners
    (pairs, n, dim), m = own.features.shape, other.features.shape[1]
    parts, tiles = _split(pairs * n)
    block = channel_block(dim)
    partial = torch.empty((3, parts, dim), dtype=torch.float64, device=channels.device)
    cdcr_correlate[(parts * triton.cdiv(dim, block),)](
        own.features,
        other.features,
        own.inverse,
        other.inverse,
        term.index,
        term.weight,
        channels,
        partial,
        *(rows or (term.weight, term.weight)),
        pairs * n,
        n,
        m,
        dim,
        parts,
        tiles,
        2 * term.nth,
        channels.shape[1],
        *own.features.stride(),
        *other.features.stride(),
        ROWS=ROWS,
        BD=block,
        NORMALIZE=normalize,
        KEEP=rows is not None,
        **OPTIONS,
    )
    return partial.sum(1)


def short_side(found: list[Term]) -> int:
    """The side whose tokens the full form has product rows for: as anchors of one term, as partners of the other."""
    anchors, partners = found[0].anchors, found[0].partners
    return int(partners.features.shape[1] < anchors.features.shape[1])


def product_rows(
    found: list[Term], channels: Tensor, normalize: bool
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """By blocks of pairs: C = weighted^T partners, both (terms, rows, D) float32, and the sums (terms, 3, D)."""
    short = short_side(found)
    side = next(x for term in found for x, s in ((term.anchors, term.nth), (term.partners, 1 - term.nth)) if s == short)
    pairs, slots, dim = side.features.shape
    step = max(1, BLOCK_BYTES // (4 * len(found) * slots * dim))
    for first in range(0, pairs, step):
        block = slice(first, min(first + step, pairs))
        shape = (2, len(found), (block.stop - first) * slots, dim)
        weighted, partners = torch.empty(shape, dtype=torch.float32, device=channels.device)
        sums = []
        for nth, term in enumerate(found):
            rows, part = (weighted[nth], partners[nth]), term.of(block)
            by_anchor = term.nth == short
            sums.append(correlate(part, channels, normalize, rows if by_anchor else None))
            if not by_anchor:
                _rows_of_partners(part, channels, normalize, rows)
        yield block, weighted, partners, torch.stack(sums)


def _rows_of_partners(term: Term, channels: Tensor, normalize: bool, rows: tuple[Tensor, Tensor]) -> None:
    own, other = term.partners, term.anchors
    (pairs, n, dim), m = own.features.shape, other.features.shape[1]
    tile, block = pair_tile(n, m, LEAST), channel_block(dim, DEPTH)
    programs = triton.cdiv(pairs, tile["PAIRS"]) * triton.cdiv(n, tile["OWN"]) * triton.cdiv(dim, block)
    cdcr_product_rows[(programs,)](
        own.features,
        other.features,
        own.inverse,
        other.inverse,
        term.index,
        term.weight,
        channels,
        *rows,
        pairs,
        n,
        m,
        dim,
        2 * term.nth,
        channels.shape[1],
        *own.features.stride(),
        *other.features.stride(),
        **tile,
        BD=block,
        NORMALIZE=normalize,
        **PRODUCT_ROWS,
    )
