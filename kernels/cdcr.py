"""Forward kernels of CDCR: partners, channel statistics, and the correlation of standardised channels.

    partner of i  = argmax over the real tokens j of the pair's other side of <x_i, y_j>         unit tokens, lowest j
    mean_d, scatter_d = mean and sum of squared deviations of channel d, over all anchors and over all partners
    x~_d          = ((x_d - mean_d) - rest_d) / std_d            the mean in two float32 parts, to keep all digits
    C_de          = sum over anchors of w x~_d y~_e              alpha_off = 0: only its diagonal, O(N D)
    sums_d        = sum over anchors of w x~_d, and of w y~_d

        anchors of all pairs, flat              pairs side by side, each with room for OWN tokens
      +----+-------- D --------+                +---------- OTHER -----+
      |    | ROWS x BD | ...   |  a part of     | pair 0 |  0  |       |  PAIRS OWN x PAIRS OTHER: similarities, or who
      | i ~> partner's ROWS x BD  the anchors   |   0    | pair 1 |    |  chose which token, with zeros between pairs
      +----+-------------------+                +----------------------+

On chip: a tile of anchors and a tile of their partners, gathered while loading; sums over a part of the anchors in
float64. No atomics: parts are written and added up in a fixed order. An earlier kernel computes the norms (one float32
per token). Bytes: every pass reads each token once as an anchor and once per anchor that chose it: 2 N D itemsize.
FLOP: about ten per channel and anchor, and 2 Nt Nv D per pair and direction for the partners. The full form writes and
reads product rows, 8 min(Nt, Nv) D bytes per pair and term, and multiplies them in torch.mm: 2 min(Nt, Nv) D^2 FLOP.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cdcr_tokens import (
    LEAST,
    MOST,
    OPTIONS,
    ROWS,
    Channels,
    Term,
    UnitTokens,
    channel_block,
    channel_statistics,
    count_choosers,
    pair_tile,
    read_units,
    standardize,
    sum_of_choosers,
    terms,
    unit_tokens,
)
from .packing import strided

# Sums over anchors have at most this many parts: enough programs to fill a GPU, and few parts to add up.
MOST_PARTS = 256
# cdcr_product_rows spills registers with four warps in one of its forms.
PRODUCT_ROWS = {**OPTIONS, "num_warps": 8}
# The full form multiplies blocks of pairs; the product rows of a block take at most this many bytes per tensor.
BLOCK_BYTES = 1 << 26
NOBODY = tl.constexpr(1 << 30)


@triton.jit
def _anchors(index, tile, rows, tokens, ROWS: tl.constexpr):
    """Return flat indices, pairs, positions and partners of a tile of anchors, and which of them exist."""
    at = (tl.zeros((ROWS,), tl.int64) + tile) * ROWS + tl.arange(0, ROWS)
    partner = tl.load(index + at, mask=at < rows, other=-1).to(tl.int64)
    return at, at // tokens, at % tokens, tl.maximum(partner, 0), partner >= 0


@triton.jit
def cdcr_partners(own, other, own_mask, other_mask, index, pairs, dim, TILE: tl.constexpr):
    """Find the best match of TILE.own tokens of TILE.pairs pairs among the other side's tokens."""
    OWN: tl.constexpr = TILE.own
    OTHER: tl.constexpr = TILE.other
    M: tl.constexpr = TILE.pairs * OWN
    N: tl.constexpr = TILE.pairs * OTHER
    chunks = tl.cdiv(own.tokens, OWN)
    first = tl.program_id(0) // chunks * TILE.pairs
    r = tl.arange(0, M)
    pair, token = (first + r // OWN).to(tl.int64), (tl.program_id(0) % chunks * OWN + r % OWN).to(tl.int64)
    inside = (pair < pairs) & (token < own.tokens)
    real = inside
    if own_mask is not None:
        own_flag = own_mask.data + pair * own_mask.strides[0] + token * own_mask.strides[1]
        real &= tl.load(own_flag, mask=inside, other=0) != 0
    top = tl.full((M,), float("-inf"), tl.float32)
    best = tl.full((M,), NOBODY, tl.int32)
    for chunk in tl.range(0, tl.cdiv(other.tokens, OTHER)):
        a = tl.arange(0, N)
        a_pair, a_token = (first + a // OTHER).to(tl.int64), (chunk * OTHER + a % OTHER).to(tl.int64)
        there = (a_pair < pairs) & (a_token < other.tokens)
        if other_mask is not None:
            flag = other_mask.data + a_pair * other_mask.strides[0] + a_token * other_mask.strides[1]
            there &= tl.load(flag, mask=there, other=0) != 0
        s = tl.zeros((M, N), tl.float32)
        for d0 in tl.range(0, dim, TILE.channels):
            d = (d0 + tl.arange(0, TILE.channels)).to(tl.int64)
            x, y = own.features, other.features
            x = x.data + (pair * x.strides[0] + token * x.strides[1])[:, None] + d[None, :] * x.strides[2]
            x = tl.load(x, mask=real[:, None] & (d < dim)[None, :], other=0.0)
            y = y.data + (a_pair * y.strides[0] + a_token * y.strides[1])[:, None] + d[None, :] * y.strides[2]
            y = tl.load(y, mask=there[:, None] & (d < dim)[None, :], other=0.0)
            s = tl.dot(x, y.T, s, input_precision="ieee")
        if own.inverse is not None:
            s *= tl.load(own.inverse + pair * own.tokens + token, mask=real, other=0.0)[:, None]
            s *= tl.load(other.inverse + a_pair * other.tokens + a_token, mask=there, other=0.0)[None, :]
        # NaN counts as the maximum.
        s = tl.where(s != s, float("inf"), s)
        candidate = (pair[:, None] == a_pair[None, :]) & real[:, None] & there[None, :]
        here = tl.max(tl.where(candidate, s, float("-inf")), 1)
        first_best = tl.min(tl.where(candidate & (s == here[:, None]), a_token.to(tl.int32)[None, :], NOBODY), 1)
        # Strictly greater: the lowest position wins a tie.
        best = tl.where((here > top) | (best == NOBODY), first_best, best)
        top = tl.maximum(top, here)
    tl.store(index + pair * own.tokens + token, tl.where(best == NOBODY, -1, best).to(tl.int16), mask=inside)


@triton.jit
def _merge(x, there, here, before, mean, scatter):
    """Update mean and scatter with one more tile (Chan et al.), whose own mean and scatter take two passes over it."""
    # Subtract one of the tile's values first: a constant channel then becomes exactly 0, without rounding.
    pivot = tl.where(here > 0, tl.max(tl.where(there[:, None], x, float("-inf")), 0), 0.0)
    away = tl.where(there[:, None], x - pivot[None, :], 0.0)
    shift = tl.sum(away, 0) / tl.maximum(here, 1).to(tl.float32)
    rest = tl.where(there[:, None], away - shift[None, :], 0.0)
    ours, total = here.to(tl.float64), tl.maximum(before + here, 1).to(tl.float64)
    delta = pivot.to(tl.float64) + shift.to(tl.float64) - mean
    scatter += tl.sum(rest * rest, 0).to(tl.float64) + delta * delta * (ours * before.to(tl.float64) / total)
    return mean + delta * (ours / total), scatter


@triton.jit
def cdcr_moments(own, other, index, count, partial, rows, dim, parts, tiles, ROWS: tl.constexpr, BD: tl.constexpr):
    """Compute number, mean and scatter of the anchors of one part and of their partners, for BD channels."""
    blocks = tl.cdiv(dim, BD)
    part = tl.program_id(0) // blocks
    d = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    x_mean, x_scatter = tl.zeros((BD,), tl.float64), tl.zeros((BD,), tl.float64)
    y_mean, y_scatter = tl.zeros((BD,), tl.float64), tl.zeros((BD,), tl.float64)
    before = tl.sum(tl.zeros((ROWS,), tl.int32), 0)
    for tile in tl.range(part * tiles, (part + 1) * tiles):
        _, pair, token, partner, there = _anchors(index, tile, rows, own.tokens, ROWS)
        here = tl.sum(there.to(tl.int32), 0)
        x = read_units(own, pair, token, there, d, dim)
        x_mean, x_scatter = _merge(x, there, here, before, x_mean, x_scatter)
        y = read_units(other, pair, partner, there, d, dim)
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
    choices,
    channels,
    partial,
    weighted,
    partners,
    rows,
    parts,
    tiles,
    ROWS: tl.constexpr,
    BD: tl.constexpr,
):
    """Compute C's diagonal and both sums over the anchors of one part, for BD channels; store product rows if asked."""
    dim = channels.dim
    blocks = tl.cdiv(dim, BD)
    part = tl.program_id(0) // blocks
    d = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    cross, sum_x, sum_y = tl.zeros((BD,), tl.float64), tl.zeros((BD,), tl.float64), tl.zeros((BD,), tl.float64)
    for tile in tl.range(part * tiles, (part + 1) * tiles):
        row, pair, token, partner, there = _anchors(choices.index, tile, rows, own.tokens, ROWS)
        w = tl.load(choices.weight + row, mask=there, other=0.0)[:, None]
        x = read_units(own, pair, token, there, d, dim)
        x = standardize(x, there, channels, choices.role, d) * w
        y = read_units(other, pair, partner, there, d, dim)
        y = standardize(y, there, channels, choices.role + 1, d)
        cross += tl.sum(x * y, 0).to(tl.float64)
        sum_x += tl.sum(x, 0).to(tl.float64)
        sum_y += tl.sum(w * y, 0).to(tl.float64)
        if weighted is not None:
            inside = (row < rows)[:, None] & (d < dim)[None, :]
            tl.store(weighted + row[:, None] * dim + d[None, :], x, mask=inside)
            tl.store(partners + row[:, None] * dim + d[None, :], y, mask=inside)
    at = partial + part * dim + d
    step = parts * dim
    tl.store(at, sum_x, mask=d < dim)
    tl.store(at + step, sum_y, mask=d < dim)
    tl.store(at + 2 * step, cross, mask=d < dim)


@triton.jit
def cdcr_product_rows(own, other, choices, channels, weighted, partners, pairs, TILE: tl.constexpr):
    """Store the product rows of TILE.own partners of TILE.pairs pairs: y~, and the sum of the anchors that chose it."""
    dim = channels.dim
    chunks, blocks = tl.cdiv(own.tokens, TILE.own), tl.cdiv(dim, TILE.channels)
    d = tl.program_id(0) % blocks * TILE.channels + tl.arange(0, TILE.channels)
    tile = tl.program_id(0) // blocks
    first = tile // chunks * TILE.pairs
    r = tl.arange(0, TILE.pairs * TILE.own)
    pair, token = (first + r // TILE.own).to(tl.int64), tile % chunks * TILE.own + r % TILE.own
    there = count_choosers(choices.index, token, pair, first, pairs, other.tokens, TILE) > 0
    x = sum_of_choosers(other, choices, channels, None, token, pair, first, d, pairs, TILE)
    y = read_units(own, pair, token, there, d, dim)
    y = standardize(y, there, channels, choices.role + 1, d)
    inside = ((pair < pairs) & (token < own.tokens))[:, None] & (d < dim)[None, :]
    at = (pair * own.tokens + token)[:, None] * dim + d[None, :]
    tl.store(weighted + at, x, mask=inside)
    tl.store(partners + at, y, mask=inside)


def statistics(
    text: Tensor, video: Tensor, text_mask: Tensor | None, video_mask: Tensor | None, normalize: bool, both: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return partners (B, Nt) and (B, Nv) int16, -1 without an anchor, and mean and scatter (roles, D) float64."""
    masks = (text_mask, video_mask)
    sides = [unit_tokens(x, mask, normalize) for x, mask in zip((text, video), masks, strict=True)]
    index = [_partners(sides[s], sides[1 - s], masks[s], masks[1 - s]) for s in (0, 1)]
    found = [_moments(sides[s], sides[1 - s], index[s]) for s in ((0, 1) if both else (0,))]
    mean, scatter = (torch.cat(kind) for kind in zip(*found, strict=True))
    return index[0], index[1], mean, scatter


def _partners(own: UnitTokens, other: UnitTokens, own_mask: Tensor | None, other_mask: Tensor | None) -> Tensor:
    pairs, n, dim = own.shape
    index = torch.empty((pairs, n), dtype=torch.int16, device=own.features.data.device)
    tile = pair_tile(n, other.tokens, MOST, dim)
    cdcr_partners[(triton.cdiv(pairs, tile.pairs) * triton.cdiv(n, tile.own),)](
        own, other, strided(own_mask), strided(other_mask), index, pairs, dim, TILE=tile, **OPTIONS
    )
    return index


def _moments(own: UnitTokens, other: UnitTokens, index: Tensor) -> tuple[Tensor, Tensor]:
    """Compute mean and scatter (2, D) of the anchors and of their partners."""
    pairs, n, dim = own.shape
    parts, tiles = _split(pairs * n)
    block = channel_block(dim)
    count = torch.empty((parts, 1), dtype=torch.float64, device=index.device)
    partial = torch.empty((2, 2, parts, dim), dtype=torch.float64, device=index.device)
    cdcr_moments[(parts * triton.cdiv(dim, block),)](
        own, other, index, count, partial, pairs * n, dim, parts, tiles, ROWS=ROWS, BD=block, **OPTIONS
    )
    # Merge the parts' means and scatters by the same update as inside a part.
    means, scatters = partial
    mean = (count * means).sum(1) / count.sum().clamp(min=1)
    return mean, (scatters + count * (means - mean[:, None]).square()).sum(1)


def _split(rows: int) -> tuple[int, int]:
    """Choose the number of parts and the tiles per part, from the number of anchors only, so that results repeat."""
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
    """Return C of each term, its diagonal (terms, D) or all of it (terms, D, D), float32; sums (roles, D) float64."""
    statistics, dim = channel_statistics(channels), text.shape[2]
    found = terms(text, video, (text_weight, video_weight), (video_index, text_index), normalize)
    if not full:
        total = torch.stack([correlate(term, statistics) for term in found])
        return total[:, 2].to(torch.float32), total[:, :2].flatten(0, 1)
    cross = torch.zeros((len(found), dim, dim), dtype=torch.float32, device=text.device)
    total = torch.zeros((len(found), 3, dim), dtype=torch.float64, device=text.device)
    for _, weighted, partners, sums in product_rows(found, statistics):
        cross = torch.baddbmm(cross, weighted.transpose(1, 2), partners)
        total += sums
    return cross, total[:, :2].flatten(0, 1)


def correlate(term: Term, channels: Channels, rows: tuple[Tensor | None, Tensor | None] = (None, None)) -> Tensor:
    """Sum weighted anchors, partners and C's diagonal, (3, D) float64; fill each anchor's product ``rows`` if given."""
    pairs, n, dim = term.anchors.shape
    parts, tiles = _split(pairs * n)
    block = channel_block(dim)
    partial = torch.empty((3, parts, dim), dtype=torch.float64, device=channels.table.device)
    cdcr_correlate[(parts * triton.cdiv(dim, block),)](
        term.anchors,
        term.partners,
        term.choices,
        channels,
        partial,
        *rows,
        pairs * n,
        parts,
        tiles,
        ROWS=ROWS,
        BD=block,
        **OPTIONS,
    )
    return partial.sum(1)


def short_side(found: list[Term]) -> int:
    """Return the side with fewer tokens, 0 (text) or 1 (video): in the full form its tokens have the product rows."""
    return int(found[0].partners.tokens < found[0].anchors.tokens)


def product_rows(found: list[Term], channels: Channels) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Yield blocks of pairs with C's factors ``weighted``, ``partners`` (terms, rows, D) and the sums (terms, 3, D)."""
    short = short_side(found)
    pairs, slots, dim = (found[0].anchors, found[0].partners)[short].shape
    step = max(1, BLOCK_BYTES // (4 * len(found) * slots * dim))
    for first in range(0, pairs, step):
        block = slice(first, min(first + step, pairs))
        shape = (2, len(found), (block.stop - first) * slots, dim)
        weighted, partners = torch.empty(shape, dtype=torch.float32, device=channels.table.device)
        sums = []
        for nth, term in enumerate(found):
            rows, part = (weighted[nth], partners[nth]), term.of(block)
            if term.nth == short:
                sums.append(correlate(part, channels, rows))
            else:
                sums.append(correlate(part, channels))
                _rows_of_partners(part, channels, rows)
        yield block, weighted, partners, torch.stack(sums)


def _rows_of_partners(term: Term, channels: Channels, rows: tuple[Tensor, Tensor]) -> None:
    own, other = term.partners, term.anchors
    pairs, n, dim = own.shape
    tile = pair_tile(n, other.tokens, LEAST, dim)
    programs = triton.cdiv(pairs, tile.pairs) * triton.cdiv(n, tile.own) * triton.cdiv(dim, tile.channels)
    cdcr_product_rows[(programs,)](own, other, term.choices, channels, *rows, pairs, TILE=tile, **PRODUCT_ROWS)
