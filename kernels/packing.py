"""Pack real tokens into dense slots, and unpack gradients of slots into the padded rows.

    slot s of row r   <-  the s-th real token x of the row, unchanged; masked tokens are never read
    scale             =   1 / |x|  (float32; 0 where |x| <= 1e-12 or overflows; 1 without normalisation)
    weight            =   the token's weight; NaN if the token holds a NaN or Inf; its slot is then zero
    grad x            =   scale (G - u <u, G>),  u = scale x,  G the gradient of the unit token

All rows of words (text) share one array of slots. A row has a multiple of ``grain`` slots or, with length classes, the
smallest of 16, 32, 64, 128 slots that holds it; rows of one class are adjacent. Frames (video) have the same number of
slots in every row. Their companion arrays (scale, weight, position) are frame-major, so that a tile of videos reads
adjacent values.

        words   | r0 w0 w1 w2 . | r1 w0 . . . | r2 ...          '.' is a copy of the row's first token (``copies``, for
        frames  | r0 f0 f1 f2 | r1 f0 . . | ...                 maxima), or zero with position -2 (for gradients)

Tile: a few slots of one row x all D channels, on chip. Per slot: D itemsize bytes read and written, 2 D FLOP.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# A length class of 8 would waste less on short captions, but costs one more launch and doubles the chunk tables.
GRAIN = 16
LONGEST_CLASS = 128
# Zeroed slots after the last word. No kernel reads beyond them.
TAIL = 128
NORM_EPS = 1e-12
NOWHERE = tl.constexpr(1 << 30)  # position of a slot in a row without a token to copy
PADDING = tl.constexpr(-2)  # position of a zero slot
# The same values for the kernels, which can only read constexpr globals.
CHUNK, TAIL_SLOTS, TINY = tl.constexpr(GRAIN), tl.constexpr(TAIL), tl.constexpr(NORM_EPS)


class Strided(NamedTuple):
    """A tensor and its strides; passed to kernels."""

    data: Tensor
    strides: tuple[int, ...]


class Side(NamedTuple):
    """One side of the interaction, not packed."""

    features: Tensor  # (rows, N, D), any strides
    weight: Tensor | None  # (rows, N)
    mask: Tensor | None  # (rows, N) bool


class PackedRows(NamedTuple):
    """One side in slots; also passed to kernels. Companion arrays are (slots,) or, for frames, (N, allocated)."""

    features: Tensor  # words (slots, D'), frames (rows allocated, N D'); D' is D padded with zeros
    scale: Tensor
    weight: Tensor
    position: Tensor  # int32, the token's index in the padded row
    length: Tensor  # int32, real tokens of each row; words have one more row, the tail
    start: Tensor | None  # words: (2, rows + 1) int32, first slot and number of slots; the last column is the tail
    order: Tensor | None  # words by length class: the rows in slot order
    class_begin: Tensor | None  # words by length class: start of each class in ``order``, and the end of the last
    chunk_row: Tensor | None  # words: the row of each GRAIN slots, -1 in the tail
    rows: int
    tokens: int  # N
    allocated: int  # last dimension of a companion array
    dim: int  # D'
    most_slots: int  # the most slots of a row


@triton.jit
def row_layout(
    mask, length, slots, real, rows, tokens, CLASSES: tl.constexpr, GRAIN: tl.constexpr, BLOCK: tl.constexpr
):
    """Count one row's real tokens, choose its number of slots, and list the indices of its real tokens."""
    row = tl.program_id(0)
    count = tl.where(row < rows, tokens, 0)
    if mask is not None:
        n = tl.arange(0, BLOCK)
        flag = mask.data + row.to(tl.int64) * mask.strides[0] + n * mask.strides[1]
        there = tl.load(flag, mask=n < count, other=0) != 0
        rank = tl.cumsum(there.to(tl.int32), 0) - 1
        count = tl.sum(there.to(tl.int32), 0)
        tl.store(real + row.to(tl.int64) * tokens + rank, n, mask=there)
    need = tl.cdiv(count, GRAIN) * GRAIN
    if CLASSES:
        need = tl.where(count <= 16, 16, tl.where(count <= 32, 32, tl.where(count <= 64, 64, 128)))
    tl.store(length + row, count)
    tl.store(slots + row, tl.where(row < rows, need, 0))


@triton.jit
def pack_slots(
    features,
    weights,
    real,
    packed,
    dim,
    blocks,
    D: tl.constexpr,
    CHANNELS: tl.constexpr,
    SLOTS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    COPIES: tl.constexpr,
):
    """Fill the slots of one row, SLOTS at a time."""
    FRAMES: tl.constexpr = packed.start is None
    row = (tl.program_id(0) // blocks).to(tl.int64)
    count = tl.load(packed.length + row)
    if FRAMES:
        begin, end = row * packed.tokens, packed.tokens
    else:
        begin = tl.load(packed.start + row).to(tl.int64)
        end = tl.where(row == packed.rows, TAIL_SLOTS, tl.load(packed.start + packed.rows + 1 + row))
    channel = tl.arange(0, CHANNELS)[None, :]
    for s0 in range(tl.program_id(0) % blocks * SLOTS, end, blocks * SLOTS):
        s = s0 + tl.arange(0, SLOTS)
        is_real = s < count
        filled = s < (tl.where(count > 0, end, 0) if COPIES else count)
        token = tl.where(is_real, s, 0)
        if real is not None:
            token = tl.load(real + row * packed.tokens + token, mask=filled, other=0)
        at = row * features.strides[0] + token[:, None].to(tl.int64) * features.strides[1]
        at = at + channel.to(tl.int64) * features.strides[2]
        x = tl.load(features.data + at, mask=filled[:, None] & (channel < dim), other=0.0)
        wide = x.to(tl.float32)
        broken = tl.sum(wide * 0.0, 1) != 0.0
        inverse = tl.where(filled & (broken == 0), 1.0, 0.0)
        if NORMALIZE:
            norm = tl.sqrt_rn(tl.sum(wide * wide, 1))
            alive = (norm > TINY) & (norm < float("inf"))
            inverse = tl.where(alive, tl.div_rn(tl.full((SLOTS,), 1.0, tl.float32), tl.where(alive, norm, 1.0)), 0.0)
        w = tl.zeros((SLOTS,), tl.float32)
        if weights is not None:
            of_token = row * weights.strides[0] + token.to(tl.int64) * weights.strides[1]
            w = tl.load(weights.data + of_token, mask=is_real, other=0.0).to(tl.float32)
        w = tl.where(broken & is_real, float("nan"), w)
        slot = begin + s
        inside = s < end
        clean = tl.where((inverse == 0.0)[:, None], 0.0, wide).to(x.dtype)
        tl.store(packed.features + slot[:, None] * D + channel, clean, mask=inside[:, None] & (channel < D))
        companion = s * packed.allocated + row if FRAMES else slot
        tl.store(packed.scale + companion, inverse, mask=inside)
        tl.store(packed.weight + companion, w, mask=inside)
        tl.store(packed.position + companion, tl.where(filled, token, NOWHERE if COPIES else PADDING), mask=inside)
        if not FRAMES:
            whose = tl.where(row < packed.rows, row, -1).to(tl.int32) + s * 0
            tl.store(packed.chunk_row + slot // CHUNK, whose, mask=inside & (s % CHUNK == 0))


@triton.jit
def unpack_gradient(
    grad,
    features,
    out,
    packed,
    factor,
    dim,
    blocks,
    D: tl.constexpr,
    CHANNELS: tl.constexpr,
    SLOTS: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """Turn the gradients of SLOTS unit tokens of a row into those of the raw features, in the padded row."""
    FRAMES: tl.constexpr = packed.start is None
    row = (tl.program_id(0) // blocks).to(tl.int64)
    s = tl.program_id(0) % blocks * SLOTS + tl.arange(0, SLOTS)
    is_real = s < tl.load(packed.length + row)
    slot = (row * packed.tokens if FRAMES else tl.load(packed.start + row).to(tl.int64)) + s
    companion = s * packed.allocated + row if FRAMES else slot
    token = tl.load(packed.position + companion, mask=is_real, other=0)[:, None].to(tl.int64)
    channel = tl.arange(0, CHANNELS)[None, :]
    inside = is_real[:, None] & (channel < dim)
    g = tl.load(grad + slot[:, None] * D + channel, mask=inside, other=0.0) * tl.load(factor)
    if NORMALIZE:
        inverse = tl.load(packed.scale + companion, mask=is_real, other=0.0)[:, None]
        at = row * features.strides[0] + token * features.strides[1] + channel.to(tl.int64) * features.strides[2]
        x = tl.load(features.data + at, mask=inside, other=0.0).to(tl.float32)
        unit = x * inverse
        g = tl.where(inverse == 0.0, 0.0, (g - unit * tl.sum(unit * g, 1)[:, None]) * inverse)
    tl.store(out + (row * packed.tokens + token) * dim + channel, g.to(out.dtype.element_ty), mask=inside)


@triton.jit
def unpack_weight_gradient(partial, out, packed, parts, part_stride, BLOCK: tl.constexpr, ADD: tl.constexpr):
    """Sum the partial sums of one row's tokens in a fixed order into the padded row; ADD: to its present values."""
    FRAMES: tl.constexpr = packed.start is None
    row = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, BLOCK)
    is_real = s < tl.load(packed.length + row)
    companion = s * packed.allocated + row if FRAMES else tl.load(packed.start + row).to(tl.int64) + s
    token = tl.load(packed.position + companion, mask=is_real, other=0)
    total = tl.zeros((BLOCK,), tl.float32)
    if ADD:
        total = tl.load(out + row * packed.tokens + token, mask=is_real, other=0.0)
    at = partial + companion
    for _ in range(0, parts):
        total += tl.load(at, mask=is_real, other=0.0)
        at += part_stride
    tl.store(out + row * packed.tokens + token, total, mask=is_real)


def strided(x: Tensor | None) -> Strided | None:
    """Wrap a tensor of any strides for a kernel; a bool tensor becomes uint8."""
    if x is None:
        return None
    return Strided(x.view(torch.uint8) if x.dtype == torch.bool else x, x.stride())


def length_class(tokens: int) -> int:
    """Return the smallest class of 16, 32, 64, 128 slots that holds ``tokens`` words; 128 if none does."""
    return min(LONGEST_CLASS, max(GRAIN, triton.next_power_of_2(tokens)))


def length_classes(tokens: int) -> list[int]:
    """List the classes of rows of up to ``tokens`` words."""
    return [c for c in (16, 32, 64, 128) if c <= length_class(tokens)]


def index_dtype(tokens: int) -> torch.dtype:
    """Return the dtype of matches: it must hold the index of each of ``tokens`` tokens, and "none"."""
    return torch.uint8 if tokens <= 255 else torch.int16


def pack_words(side: Side, step: int, normalize: bool, *, grain: int, classes: bool, copies: bool) -> PackedRows:
    """Pack text by length class, or in row order with a multiple of ``grain`` slots per row."""
    rows, tokens, dim = side.features.shape
    most = length_class(tokens) if classes else triton.cdiv(tokens, grain) * grain
    allocated = rows * most + TAIL
    if allocated >= 2**31:
        raise ValueError(
            f"text has {rows} rows of up to {most} token slots, but the GPU kernels index at most 2^31 - 1 slots; "
            "score the rows in several calls"
        )
    length, slots, real = _lengths(side, rows + 1, classes, grain)
    device = length.device
    order = class_begin = None
    if side.mask is None:
        start = torch.arange(rows + 1, dtype=torch.int32, device=device) * most
        start = torch.stack([start, slots])
    elif classes:
        by_class, order = torch.sort(slots[:rows], stable=True)
        ends = by_class.cumsum(0, dtype=torch.int32)
        start = torch.stack([torch.empty_like(slots), slots])
        start[0, :rows].scatter_(0, order, ends - by_class)
        start[0, rows:] = ends[-1:]
        edges = GRAIN << torch.arange(len(length_classes(tokens)) + 1, dtype=torch.int32, device=device)
        class_begin = (by_class < edges[:, None]).sum(1, dtype=torch.int32)
    else:
        start = torch.stack([slots.cumsum(0, dtype=torch.int32) - slots, slots])
    d = triton.cdiv(dim, step) * step
    scale, weight = torch.zeros((2, allocated), dtype=torch.float32, device=device)
    packed = PackedRows(
        features=side.features.new_empty((allocated, d)),
        scale=scale,
        weight=weight,
        position=torch.empty(allocated, dtype=torch.int32, device=device),
        length=length,
        start=start,
        order=order,
        class_begin=class_begin,
        chunk_row=torch.empty(allocated // GRAIN, dtype=torch.int32, device=device),
        rows=rows,
        tokens=tokens,
        allocated=allocated,
        dim=d,
        most_slots=most,
    )
    _fill(side, packed, real, normalize, copies)
    return packed


def pack_frames(side: Side, step: int, block: int, normalize: bool, *, copies: bool) -> PackedRows:
    """Pack video with N slots per row, padded to whole blocks of ``block`` rows."""
    rows, tokens, dim = side.features.shape
    allocated = triton.cdiv(rows, block) * block
    d = triton.cdiv(dim, step) * step
    if max(allocated * tokens, tokens * d) >= 2**31:
        raise ValueError(
            f"video has {allocated} rows of {tokens} frames, but the GPU kernels index at most 2^31 - 1 frames; "
            "score the rows in several calls"
        )
    length, _, real = _lengths(side, allocated, False, 1)
    scale, weight = torch.empty((2, tokens, allocated), dtype=torch.float32, device=length.device)
    packed = PackedRows(
        features=side.features.new_empty((allocated, tokens * d)),
        scale=scale,
        weight=weight,
        position=torch.empty((tokens, allocated), dtype=torch.int32, device=length.device),
        length=length,
        start=None,
        order=None,
        class_begin=None,
        chunk_row=None,
        rows=rows,
        tokens=tokens,
        allocated=allocated,
        dim=d,
        most_slots=tokens,
    )
    _fill(side, packed, real, normalize, copies)
    return packed


def _lengths(side: Side, rows_allocated: int, classes: bool, grain: int) -> tuple[Tensor, Tensor, Tensor | None]:
    rows, tokens = side.features.shape[:2]
    length, slots = side.features.new_empty((2, rows_allocated), dtype=torch.int32)
    real = None if side.mask is None else torch.empty((rows, tokens), dtype=torch.int32, device=length.device)
    block = triton.next_power_of_2(tokens)
    row_layout[(rows_allocated,)](
        strided(side.mask), length, slots, real, rows, tokens, CLASSES=classes, GRAIN=grain, BLOCK=block
    )
    return length, slots, real


def _fill(side: Side, packed: PackedRows, real: Tensor | None, normalize: bool, copies: bool) -> None:
    blocks, tile = _tile(packed, packed.most_slots)
    pack_slots[(len(packed.length) * blocks,)](
        strided(side.features),
        strided(side.weight),
        real,
        packed,
        side.features.shape[2],
        blocks,
        D=packed.dim,
        NORMALIZE=normalize,
        COPIES=copies,
        **tile,
    )


def _tile(packed: PackedRows, slots: int) -> tuple[int, dict[str, int]]:
    """Choose the programs per row and their shape, for about 32 values per thread."""
    channels = triton.next_power_of_2(packed.dim)
    size = min(max(1, 4096 // channels), triton.next_power_of_2(slots))
    return triton.cdiv(slots, size), {"CHANNELS": channels, "SLOTS": size, "num_warps": 4 if channels <= 4096 else 8}


def unpack(grad: Tensor, side: Side, packed: PackedRows, factor: Tensor, normalize: bool, out: Tensor) -> None:
    """Turn the gradient of the slots' unit tokens into that of the raw features, in the real tokens of ``out``."""
    blocks, tile = _tile(packed, packed.tokens)
    unpack_gradient[(packed.rows * blocks,)](
        grad,
        strided(side.features),
        out,
        packed,
        factor,
        side.features.shape[2],
        blocks,
        D=packed.dim,
        NORMALIZE=normalize,
        **tile,
    )


def unpack_weight(partial: Tensor, packed: PackedRows, out: Tensor, *, add: bool) -> None:
    """Sum the weights' partial gradients (parts, companions) into the real tokens of ``out``."""
    block = triton.next_power_of_2(packed.tokens)
    unpack_weight_gradient[(packed.rows,)](
        partial, out, packed, partial.shape[0], partial.stride(0), BLOCK=block, ADD=add
    )
