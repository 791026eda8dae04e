"""What CDCR's kernels share: unit tokens, standardised channels, who chose which token, and norms.

    u = x / |x|                           float32; 0 where |x| <= 1e-12
    u~_d = ((u_d - mean_d) - rest_d) / std_d                 mean and rest: a float64 mean in two float32 parts
    chose[p, a] = 1 where anchor a has partner p             within a pair only: zeros between pairs
    Z_p = sum_a chose[p, a] w_a u~_a                         a product on chip instead of atomic additions

                 PAIRS OTHER anchors a
               +-------+-------+             A side's tokens are tiled flat (ROWS of all pairs' together) or, where two
    PAIRS OWN  | 0 1 0 | . . . | pair 0      sides meet, by pairs: PAIRS pairs side by side with room for OWN tokens of
    tokens p   | . . . | 1 0 0 | pair 1      one side and OTHER of the other; long rows in chunks. So a row of one token
               +-------+-------+             shares a tile with 15 more pairs.

On chip: one tile of tokens, at most CHANNELS wide. Bytes: each token once for its norm, D itemsize. FLOP: 2 D a token
for the norm, 2 OWN OTHER a channel and tile for Z.

Multiplications and additions are never fused: a channel must round the same way in every pass, or a constant channel
would not cancel exactly.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .packing import TINY, Strided, strided

# Tokens x channels that a program holds.
ROWS = 32
CHANNELS = 128
# Channels beside a product on chip, or a step of one.
DEPTH = 64
# The smallest side of a product on chip, and the largest that is used.
LEAST, MOST = 16, 32
OPTIONS: dict[str, Any] = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": False}


class UnitTokens(NamedTuple):
    """One side's tokens and their norms, also as a kernel's argument."""

    features: Strided  # (B, N, D)
    inverse: Tensor | None  # (B, N) float32, 1 / norm; None where tokens are not normalised
    tokens: int  # N

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.features.data.shape)

    def of(self, pairs: slice) -> UnitTokens:
        features = self.features._replace(data=self.features.data[pairs])
        return self._replace(features=features, inverse=None if self.inverse is None else self.inverse[pairs])


class Choices(NamedTuple):
    """Who chose which partner, as a kernel's argument."""

    index: Tensor  # (B, Na) int16, -1 where there is no anchor
    weight: Tensor  # (B, Na) float32
    role: int  # of the anchors in Channels; their partners' is the next


class Channels(NamedTuple):
    """Statistics of the channels, as a kernel's argument."""

    table: Tensor  # (rows, roles, D) float64: mean, 1 / std, and for the gradient offset and along
    roles: int
    dim: int


class PairTile(NamedTuple):
    """The tokens of a program where two sides meet, and the channels of a step."""

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
    """Read channels d of tokens (rows, BD), float32; zeros where there is none."""
    at = (pair * x.strides[0] + position.to(tl.int64) * x.strides[1])[:, None]
    at = at + d.to(tl.int64)[None, :] * x.strides[2]
    return tl.load(x.data + at, mask=there[:, None] & (d < dim)[None, :], other=0.0).to(tl.float32)


@triton.jit
def read_units(side, pair, position, there, d, dim):
    """Read channels d of unit tokens (rows, BD), float32; zeros where there is none."""
    x = read_tokens(side.features, pair, position, there, d, dim)
    if side.inverse is not None:
        x *= tl.load(side.inverse + pair * side.tokens + position, mask=there, other=0.0)[:, None]
    return x


@triton.jit
def standardize(x, there, channels, role, d):
    """Return x~ (rows, BD) of unit tokens; zeros where there is none."""
    wide = tl.load(channels.table + role * channels.dim + d, mask=d < channels.dim, other=0.0)
    mean = wide.to(tl.float32)
    rest = (wide - mean.to(tl.float64)).to(tl.float32)
    of_role = channels.table + (channels.roles + role) * channels.dim + d
    inverse_std = tl.load(of_role, mask=d < channels.dim, other=0.0).to(tl.float32)
    return tl.where(there[:, None], ((x - mean[None, :]) - rest[None, :]) * inverse_std[None, :], 0.0)


@triton.jit
def choosers(index, position, pair, first, chunk, pairs, tokens, TILE: tl.constexpr):
    """Find which of a chunk of the other side's anchors chose which of our tokens: (rows, PAIRS OTHER) bool."""
    a = tl.arange(0, TILE.pairs * TILE.other)
    of_pair = (first + a // TILE.other).to(tl.int64)
    at = chunk * TILE.other + a % TILE.other
    chosen = tl.load(index + of_pair * tokens + at, mask=(of_pair < pairs) & (at < tokens), other=-1).to(tl.int32)
    hit = (chosen[None, :] == position[:, None]) & (of_pair[None, :] == pair[:, None])
    return hit, of_pair, at, chosen >= 0


@triton.jit
def count_choosers(index, position, pair, first, pairs, tokens, TILE: tl.constexpr):
    """Count the anchors that chose each of our tokens, float32."""
    count = tl.zeros((position.shape[0],), tl.float32)
    for chunk in tl.range(0, tl.cdiv(tokens, TILE.other)):
        hit, _, _, _ = choosers(index, position, pair, first, chunk, pairs, tokens, TILE)
        count += tl.sum(hit.to(tl.float32), 1)
    return count


@triton.jit
def sum_of_choosers(other, choices, channels, rows, position, pair, first, d, pairs, TILE: tl.constexpr):
    """Sum w x~ over the anchors that chose each of our tokens, (rows, BD); or their ``rows``, if there are any."""
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
    """Compute 1 / |x| of ROWS tokens; 0 for a zero token, and where there is none."""
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
    """Find the norms of one side's real tokens."""
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
    """Return the terms that have weights; an index says which tokens are real."""
    indices = tuple(index.contiguous() for index in indices)
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
    """Take the operator's statistics (rows, roles, D) as the kernels' argument."""
    return Channels(table.contiguous(), table.shape[1], table.shape[2])


def channel_block(dim: int, most: int = CHANNELS) -> int:
    return min(most, max(LEAST, triton.next_power_of_2(dim)))


def pair_tile(own: int, other: int, most: int, dim: int) -> PairTile:
    """Choose the pairs of a program and the room for each side's tokens: every side of a product is at least LEAST."""
    own, other = (min(most, triton.next_power_of_2(n)) for n in (own, other))
    pairs = max(1, LEAST // max(own, other))
    return PairTile(pairs, max(own, LEAST // pairs), max(other, LEAST // pairs), channel_block(dim, DEPTH))
