"""Shared parts of CDCR's kernels: norms, unit tokens, standardised channels, and sums over matches.

    u = x / |x|                           float32; 0 where |x| <= 1e-12
    u~_d = ((u_d - mean_d) - rest_d) / std_d                 mean and rest: a float64 mean in two float32 parts
    chose[p, a] = 1 if anchor a has partner p                within a pair only: zeros between pairs
    Z_p = sum_a chose[p, a] w_a u~_a                         a matrix product instead of atomic additions

                 PAIRS OTHER anchors a
               +-------+-------+             Kernels of one side tile its tokens flat: ROWS tokens of all pairs. Kernels
    PAIRS OWN  | 0 1 0 | . . . | pair 0      of two sides tile by pairs: PAIRS pairs side by side with OWN slots for one
    tokens p   | . . . | 1 0 0 | pair 1      side and OTHER for the other; longer rows take several chunks. Short rows
               +-------+-------+             share a tile: 16 pairs of one token each.

On chip: one tile of tokens, at most CHANNELS wide. Bytes: each token once for its norm, D itemsize. FLOP: 2 D per token
for the norm, 2 OWN OTHER per channel and tile for Z.

Multiplications and additions are not fused: a channel must round the same way in every pass, or a constant channel
would not cancel exactly.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .packing import TINY, Strided, strided

# Tokens and channels of a tile.
ROWS = 32
CHANNELS = 128
# Channels of a tile, or of one step, in kernels with a matrix product.
DEPTH = 64
# The smallest and the largest side of a matrix product.
LEAST, MOST = 16, 32
OPTIONS: dict[str, Any] = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": False}


class UnitTokens(NamedTuple):
    """One side's tokens and their norms; also passed to kernels."""

    features: Strided  # (B, N, D)
    inverse: Tensor | None  # (B, N) float32, 1 / norm; None without normalisation
    tokens: int  # N

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.features.data.shape)

    def of(self, pairs: slice) -> UnitTokens:
        features = self.features._replace(data=self.features.data[pairs])
        return self._replace(features=features, inverse=None if self.inverse is None else self.inverse[pairs])


class Choices(NamedTuple):
    """The partner of each anchor; passed to kernels."""

    index: Tensor  # (B, Na) int16, -1 where there is no anchor
    weight: Tensor  # (B, Na) float32
    role: int  # the anchors' role in Channels; their partners' role is the next


class Channels(NamedTuple):
    """Statistics of the channels; passed to kernels."""

    table: Tensor  # (kinds, roles, D) float64: mean, 1 / std, and for the gradient offset and along
    roles: int
    dim: int


class PairTile(NamedTuple):
    """A tile of a kernel of two sides: pairs, slots per pair of each side, and channels per step."""

    pairs: int
    own: int
    other: int
    channels: int


class Term(NamedTuple):
    """Anchors of one side, their partners on the other, and the anchors' weights."""

    nth: int
    anchors: UnitTokens
    partners: UnitTokens
    index: Tensor  # (B, Na) int16, -1 where there is no anchor
    weight: Tensor  # (B, Na) float32

    @property
    def choices(self) -> Choices:
        return Choices(self.index, self.weight, 2 * self.nth)

    def of(self, pairs: slice) -> Term:
        own, other = self.anchors.of(pairs), self.partners.of(pairs)
        return Term(self.nth, own, other, self.index[pairs], self.weight[pairs])


@triton.jit
def read_tokens(x, pair, position, there, d, dim):
    """Read channels d of tokens, (rows, BD) float32; zeros for tokens that are not there."""
    at = (pair * x.strides[0] + position.to(tl.int64) * x.strides[1])[:, None]
    at = at + d.to(tl.int64)[None, :] * x.strides[2]
    return tl.load(x.data + at, mask=there[:, None] & (d < dim)[None, :], other=0.0).to(tl.float32)


@triton.jit
def read_units(side, pair, position, there, d, dim):
    """Read channels d of unit tokens, (rows, BD) float32; zeros for tokens that are not there."""
    x = read_tokens(side.features, pair, position, there, d, dim)
    if side.inverse is not None:
        x *= tl.load(side.inverse + pair * side.tokens + position, mask=there, other=0.0)[:, None]
    return x


@triton.jit
def standardize(x, there, channels, role, d):
    """Return x~ (rows, BD) of unit tokens; zeros for tokens that are not there."""
    wide = tl.load(channels.table + role * channels.dim + d, mask=d < channels.dim, other=0.0)
    mean = wide.to(tl.float32)
    rest = (wide - mean.to(tl.float64)).to(tl.float32)
    of_role = channels.table + (channels.roles + role) * channels.dim + d
    inverse_std = tl.load(of_role, mask=d < channels.dim, other=0.0).to(tl.float32)
    return tl.where(there[:, None], ((x - mean[None, :]) - rest[None, :]) * inverse_std[None, :], 0.0)


@triton.jit
def choosers(index, position, pair, first, chunk, pairs, tokens, TILE: tl.constexpr):
    """Find which anchors, in a chunk of the other side, chose which own token: (rows, PAIRS OTHER) bool."""
    a = tl.arange(0, TILE.pairs * TILE.other)
    of_pair = (first + a // TILE.other).to(tl.int64)
    at = chunk * TILE.other + a % TILE.other
    chosen = tl.load(index + of_pair * tokens + at, mask=(of_pair < pairs) & (at < tokens), other=-1).to(tl.int32)
    hit = (chosen[None, :] == position[:, None]) & (of_pair[None, :] == pair[:, None])
    return hit, of_pair, at, chosen >= 0


@triton.jit
def count_choosers(index, position, pair, first, pairs, tokens, TILE: tl.constexpr):
    """Count the anchors that chose each own token, float32."""
    count = tl.zeros((position.shape[0],), tl.float32)
    for chunk in tl.range(0, tl.cdiv(tokens, TILE.other)):
        hit, _, _, _ = choosers(index, position, pair, first, chunk, pairs, tokens, TILE)
        count += tl.sum(hit.to(tl.float32), 1)
    return count


@triton.jit
def sum_of_choosers(other, choices, channels, rows, position, pair, first, d, pairs, TILE: tl.constexpr):
    """Sum w x~ over the anchors that chose each own token, (rows, BD); or sum their ``rows``, if given."""
    total = tl.zeros((position.shape[0], d.shape[0]), tl.float32)
    for chunk in tl.range(0, tl.cdiv(other.tokens, TILE.other)):
        hit, of_pair, at, there = choosers(choices.index, position, pair, first, chunk, pairs, other.tokens, TILE)
        row = of_pair * other.tokens + at
        if rows is not None:
            inside = there[:, None] & (d < channels.dim)[None, :]
            x = tl.load(rows + row[:, None] * channels.dim + d[None, :], mask=inside, other=0.0)
        else:
            x = read_units(other, of_pair, at, there, d, channels.dim)
            x = standardize(x, there, channels, choices.role, d)
            x *= tl.load(choices.weight + row, mask=there, other=0.0)[:, None]
        total = tl.dot(hit.to(tl.float32), x, total, input_precision="ieee")
    return total


@triton.jit
def cdcr_norms(features, mask, inverse, rows, tokens, dim, ROWS: tl.constexpr, BD: tl.constexpr):
    """Compute 1 / |x| of ROWS tokens; 0 for zero and for masked tokens."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pair, token = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64)
    there = row < rows
    if mask is not None:
        there &= tl.load(mask.data + pair * mask.strides[0] + token * mask.strides[1], mask=there, other=0) != 0
    square = tl.zeros((ROWS,), tl.float32)
    for d0 in tl.range(0, dim, BD):
        x = read_tokens(features, pair, token, there, d0 + tl.arange(0, BD), dim)
        square += tl.sum(x * x, 1)
    norm = tl.sqrt_rn(square)
    tiny = norm <= TINY
    one = tl.full((ROWS,), 1.0, tl.float32)
    tl.store(inverse + row, tl.where(tiny, 0.0, tl.div_rn(one, tl.where(tiny, 1.0, norm))), mask=row < rows)


def unit_tokens(features: Tensor, mask: Tensor | None, normalize: bool) -> UnitTokens:
    """Compute the norms of one side's real tokens."""
    pairs, tokens, dim = features.shape
    if not normalize:
        return UnitTokens(strided(features), None, tokens)
    inverse = torch.empty((pairs, tokens), dtype=torch.float32, device=features.device)
    cdcr_norms[(triton.cdiv(pairs * tokens, ROWS),)](
        strided(features),
        strided(mask),
        inverse,
        pairs * tokens,
        tokens,
        dim,
        ROWS=ROWS,
        BD=channel_block(dim),
        **OPTIONS,
    )
    return UnitTokens(strided(features), inverse, tokens)


def terms(
    text: Tensor, video: Tensor, weights: tuple[Tensor | None, ...], indices: tuple[Tensor, ...], normalize: bool
) -> list[Term]:
    """Return the terms that have weights. Tokens with an index >= 0 are real.

    Kernels gather partners without bounds checks, because a check makes the gradient's kernel spill registers. Instead
    the indices are limited to the other side's rows here, in case they have changed since the forward.
    """
    others = (video.shape[1], text.shape[1])
    indices = tuple(index.clamp(max=n - 1).contiguous() for index, n in zip(indices, others, strict=True))
    sides = [
        unit_tokens(x, index >= 0 if normalize else None, normalize)
        for x, index in zip((text, video), indices, strict=True)
    ]
    return [
        Term(nth, sides[nth], sides[1 - nth], indices[nth], weight.contiguous())
        for nth, weight in enumerate(weights)
        if weight is not None
    ]


def channel_statistics(table: Tensor) -> Channels:
    """Wrap the operator's statistics (kinds, roles, D) for the kernels."""
    return Channels(table.contiguous(), table.shape[1], table.shape[2])


def channel_block(dim: int, most: int = CHANNELS) -> int:
    """Choose the channels of a tile."""
    return min(most, max(LEAST, triton.next_power_of_2(dim)))


def pair_tile(own: int, other: int, most: int, dim: int) -> PairTile:
    """Choose the pairs of a tile and the slots of each side, so that every side of a product is at least LEAST."""
    own, other = (min(most, triton.next_power_of_2(n)) for n in (own, other))
    pairs = max(1, LEAST // max(own, other))
    return PairTile(pairs, max(own, LEAST // pairs), max(other, LEAST // pairs), channel_block(dim, DEPTH))
