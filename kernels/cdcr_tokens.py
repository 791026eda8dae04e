"""What CDCR's kernels share: unit tokens, standardised channels, who chose whom, and norms.

    u = x / |x|                           float32; 0 where |x| <= 1e-12
    u~_d = ((u_d - mean_d) - rest_d) / std_d                 mean and rest: a float64 mean in two float32 parts
    chose[p, a] = 1 where anchor a has partner p             a pair's tokens only: zeros between pairs
    Z_p = sum_a chose[p, a] w_a u~_a                         a product on chip instead of atomic additions

                 PAIRS OTHER anchors a
               +-------+-------+             A side's tokens are tiled flat (ROWS of all pairs' together) or, where two
    PAIRS OWN  | 0 1 0 | . . . | pair 0      sides meet, by pairs: PAIRS pairs side by side with room for OWN tokens of
    tokens p   | . . . | 1 0 0 | pair 1      one side and OTHER of the other; long rows in chunks. A row of one token
               +-------+-------+             so shares a tile with 15 more pairs.

On chip: one tile of tokens, CHANNELS wide or narrower. Bytes: each token once for its norm, D itemsize; FLOP: 2 D a
token for the norm, 2 OWN OTHER a channel and tile for Z.

Multiplications and additions are never fused: a channel's rounding must be the same in every pass, or of a constant
one something would be left.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .packing import NORM_EPS, Side

# Tokens x channels that a program holds.
ROWS = 32
CHANNELS = 128
# Channels beside a product on chip, or a step of one.
DEPTH = 64
# The smallest side of a product on chip, and the largest that we give it.
LEAST, MOST = 16, 32
OPTIONS: dict[str, Any] = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": False}


@triton.jit
def read_units(
    features,
    inverse,
    pair,
    position,
    there,
    d,
    dim,
    tokens,
    stride_pair,
    stride_token,
    stride_channel,
    NORMALIZE: tl.constexpr,
):
    """Channels d of unit tokens (rows, BD), float32; zeros where there is none."""
    at = (pair * stride_pair + position.to(tl.int64) * stride_token)[:, None] + d.to(tl.int64)[None, :] * stride_channel
    x = tl.load(features + at, mask=there[:, None] & (d < dim)[None, :], other=0.0).to(tl.float32)
    if NORMALIZE:
        x *= tl.load(inverse + pair * tokens + position, mask=there, other=0.0)[:, None]
    return x


@triton.jit
def standardize(x, there, channels, role, roles, d, dim):
    """x~ (rows, BD) of unit tokens; zeros where there is none."""
    wide = tl.load(channels + role * dim + d, mask=d < dim, other=0.0)
    mean = wide.to(tl.float32)
    rest = (wide - mean.to(tl.float64)).to(tl.float32)
    inverse_std = tl.load(channels + (roles + role) * dim + d, mask=d < dim, other=0.0).to(tl.float32)
    return tl.where(there[:, None], ((x - mean[None, :]) - rest[None, :]) * inverse_std[None, :], 0.0)


@triton.jit
def choosers(index, position, pair, first, chunk, pairs, tokens, PAIRS: tl.constexpr, OTHER: tl.constexpr):
    """A chunk of the other side's anchors, and who of them chose which of ours: (rows, PAIRS OTHER) bool."""
    a = tl.arange(0, PAIRS * OTHER)
    of_pair = (first + a // OTHER).to(tl.int64)
    at = chunk * OTHER + a % OTHER
    chosen = tl.load(index + of_pair * tokens + at, mask=(of_pair < pairs) & (at < tokens), other=-1).to(tl.int32)
    hit = (chosen[None, :] == position[:, None]) & (of_pair[None, :] == pair[:, None])
    return hit, of_pair, at, chosen >= 0


@triton.jit
def count_choosers(index, position, pair, first, pairs, tokens, PAIRS: tl.constexpr, OTHER: tl.constexpr):
    """How many anchors chose each of our tokens, float32."""
    count = tl.zeros((position.shape[0],), tl.float32)
    for chunk in tl.range(0, tl.cdiv(tokens, OTHER)):
        hit, _, _, _ = choosers(index, position, pair, first, chunk, pairs, tokens, PAIRS, OTHER)
        count += tl.sum(hit.to(tl.float32), 1)
    return count


@triton.jit
def sum_of_choosers(
    other,
    inverse,
    index,
    weight,
    channels,
    rows,
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
    PAIRS: tl.constexpr,
    OTHER: tl.constexpr,
    NORMALIZE: tl.constexpr,
    GIVEN: tl.constexpr,
):
    """Sum of w x~ over the anchors that chose each of our tokens; or of their given rows. (rows, BD)"""
    total = tl.zeros((position.shape[0], d.shape[0]), tl.float32)
    for chunk in tl.range(0, tl.cdiv(tokens, OTHER)):
        hit, of_pair, at, there = choosers(index, position, pair, first, chunk, pairs, tokens, PAIRS, OTHER)
        row = of_pair * tokens + at
        if GIVEN:
            inside = there[:, None] & (d < dim)[None, :]
            x = tl.load(rows + row[:, None] * dim + d[None, :], mask=inside, other=0.0)
        else:
            x = read_units(
                other,
                inverse,
                of_pair,
                at,
                there,
                d,
                dim,
                tokens,
                stride_pair,
                stride_token,
                stride_channel,
                NORMALIZE,
            )
            x = standardize(x, there, channels, role, roles, d, dim)
            x *= tl.load(weight + row, mask=there, other=0.0)[:, None]
        total = tl.dot(hit.to(tl.float32), x, total, input_precision="ieee")
    return total


@triton.jit
def cdcr_norms(
    features,
    mask,
    inverse,
    rows,
    tokens,
    dim,
    stride_pair,
    stride_token,
    stride_channel,
    mask_pair,
    mask_token,
    ROWS: tl.constexpr,
    BD: tl.constexpr,
    MASKED: tl.constexpr,
    TINY: tl.constexpr,
):
    """1 / |x| of ROWS tokens; 0 for a zero token, and for one that is not there."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pair, token = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64)
    there = row < rows
    if MASKED:
        there &= tl.load(mask + pair * mask_pair + token * mask_token, mask=there, other=0) != 0
    square = tl.zeros((ROWS,), tl.float32)
    for d0 in tl.range(0, dim, BD):
        d = d0 + tl.arange(0, BD)
        x = read_units(
            features, inverse, pair, token, there, d, dim, tokens, stride_pair, stride_token, stride_channel, False
        )
        square += tl.sum(x * x, 1)
    norm = tl.sqrt_rn(square)
    tiny = norm <= TINY
    one = tl.full((ROWS,), 1.0, tl.float32)
    tl.store(inverse + row, tl.where(tiny, 0.0, tl.div_rn(one, tl.where(tiny, 1.0, norm))), mask=row < rows)


class Tokens(NamedTuple):
    """One side's tokens and their norms."""

    features: Tensor  # (B, N, D), any strides
    inverse: Tensor  # (B, N) float32, 1 / norm; not read where tokens are used as they are

    def of(self, pairs: slice) -> Tokens:
        return Tokens(self.features[pairs], self.inverse[pairs])


class Term(NamedTuple):
    """Anchors of one side, their partners on the other, and the anchors' weights."""

    nth: int
    anchors: Tokens
    partners: Tokens
    index: Tensor  # (B, Na) int16, -1 where there is no anchor
    weight: Tensor  # (B, Na) float32

    def of(self, pairs: slice) -> Term:
        own, other = self.anchors.of(pairs), self.partners.of(pairs)
        return Term(self.nth, own, other, self.index[pairs], self.weight[pairs])


def norms(side: Side, normalize: bool) -> Tokens:
    """Find the norms of one side's real tokens."""
    x = side.features
    pairs, tokens, dim = x.shape
    if not normalize:
        return Tokens(x, x)
    inverse = torch.empty((pairs, tokens), dtype=torch.float32, device=x.device)
    mask = None if side.mask is None else side.mask.view(torch.uint8)
    cdcr_norms[(triton.cdiv(pairs * tokens, ROWS),)](
        x,
        inverse if mask is None else mask,
        inverse,
        pairs * tokens,
        tokens,
        dim,
        *x.stride(),
        *((0, 0) if mask is None else mask.stride()),
        ROWS=ROWS,
        BD=channel_block(dim),
        MASKED=mask is not None,
        TINY=NORM_EPS,
        **OPTIONS,
    )
    return Tokens(x, inverse)


def terms(
    text: Tensor, video: Tensor, weights: tuple[Tensor | None, ...], indices: tuple[Tensor, ...], normalize: bool
) -> list[Term]:
    """The terms that have weights; an index says which tokens are real."""
    indices = tuple(index.contiguous() for index in indices)
    sides = [
        norms(Side(x, None, index >= 0 if normalize else None), normalize)
        for x, index in zip((text, video), indices, strict=True)
    ]
    return [
        Term(nth, sides[nth], sides[1 - nth], indices[nth], weight.contiguous())
        for nth, weight in enumerate(weights)
        if weight is not None
    ]


def channel_block(dim: int, most: int = CHANNELS) -> int:
    return min(most, max(LEAST, triton.next_power_of_2(dim)))


def pair_tile(own: int, other: int, most: int) -> dict[str, int]:
    """How many pairs a program takes, and room for how many tokens of each: every side of a product at least LEAST."""
    own, other = (min(most, triton.next_power_of_2(n)) for n in (own, other))
    pairs = max(1, LEAST // max(own, other))
    return {"PAIRS": pairs, "OWN": max(own, LEAST // pairs), "OTHER": max(other, LEAST // pairs)}
