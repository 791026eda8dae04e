"""Real tokens first: rows with masks become dense slots, and gradients of slots become gradients of rows.

    slot s of row r   <-  the s-th real token x of the row, as it is; masked tokens are never read
    scale             =   1 / |x|  (float32; 0 where |x| <= 1e-12 or overflows; 1 if tokens are used as they are)
    weight            =   the token's weight; NaN where the token has a NaN or Inf, whose slot then holds zeros
    grad x            =   scale (G - u <u, G>),  u = scale x,  G the gradient of the unit token

Words (text) of all rows share one array of slots; a row gets a multiple of ``grain`` of them, or, as a length class,
the smallest of 16, 32, 64, 128 that holds it, rows of a class side by side. Frames (video) keep one stride for every
row, and their companions (scale, weight, position) are frame-major, so that a tile of videos reads them side by side.

        words   | r0 w0 w1 w2 . | r1 w0 . . . | r2 ...          '.' copies the row's first token (``copies``, for
        frames  | r0 f0 f1 f2 | r1 f0 . . | ...                 maxima) or is zero with position -2 (for gradients)

A program takes a few slots of one row, D channels on chip; bytes: D itemsize read and written a slot; no product.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

NORM_EPS = 1e-12
PAD_POSITION = -2
NOWHERE = 1 << 30  # the position of a row's slots where there is no token to copy
# A class below 16 words would cut the waste on short captions further, at one more launch and twice the chunk tables.
GRAIN = 16
LONGEST_CLASS = 128
# Zeroed slots behind the last word: the last tile of any kernel reads that far.
TAIL = 128


@triton.jit
def row_layout(
    mask,
    length,
    slots,
    real,
    rows,
    tokens,
    mask_row,
    mask_token,
    MASKED: tl.constexpr,
    CLASSES: tl.constexpr,
    GRAIN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: how many real tokens, how many slots it needs, and where its real tokens stand."""
    row = tl.program_id(0)
    count = tl.where(row < rows, tokens, 0)
    if MASKED:
        n = tl.arange(0, BLOCK)
        there = tl.load(mask + row.to(tl.int64) * mask_row + n * mask_token, mask=n < count, other=0) != 0
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
    length,
    start,
    real,
    packed,
    scale,
    weight,
    position,
    chunk_row,
    rows,
    tokens,
    dim,
    blocks,
    companion_rows,
    x_row,
    x_token,
    x_channel,
    w_row,
    w_token,
    D: tl.constexpr,
    CHANNELS: tl.constexpr,
    SLOTS: tl.constexpr,
    FRAMES: tl.constexpr,
    MASKED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    COPIES: tl.constexpr,
    GRAIN: tl.constexpr,
    TAIL: tl.constexpr,
    PAD: tl.constexpr,
    TINY: tl.constexpr,
):
    """SLOTS slots of one row."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    count = tl.load(length + row)
    if FRAMES:
        begin, end = row * tokens, tokens
    else:
        begin = tl.load(start + row).to(tl.int64)
        end = tl.where(row == rows, TAIL, tl.load(start + rows + 1 + row))
    channel = tl.arange(0, CHANNELS)[None, :]
    for s0 in range(tl.program_id(0) % blocks * SLOTS, end, blocks * SLOTS):
        s = s0 + tl.arange(0, SLOTS)
        is_real = s < count
        filled = s < (tl.where(count > 0, end, 0) if COPIES else count)
        token = tl.where(is_real, s, 0)
        if MASKED:
            token = tl.load(real + row * tokens + token, mask=filled, other=0)
        at = row * x_row + token[:, None].to(tl.int64) * x_token + channel.to(tl.int64) * x_channel
        x = tl.load(features + at, mask=filled[:, None] & (channel < dim), other=0.0)
        wide = x.to(tl.float32)
        broken = tl.sum(wide * 0.0, 1) != 0.0
        inverse = tl.where(filled & (broken == 0), 1.0, 0.0)
        if NORMALIZE:
            norm = tl.sqrt_rn(tl.sum(wide * wide, 1))
            alive = (norm > TINY) & (norm < float("inf"))
            inverse = tl.where(alive, tl.div_rn(tl.full((SLOTS,), 1.0, tl.float32), tl.where(alive, norm, 1.0)), 0.0)
        w = tl.zeros((SLOTS,), tl.float32)
        if WEIGHTED:
            at = row * w_row + token.to(tl.int64) * w_token
            w = tl.load(weights + at, mask=is_real, other=0.0).to(tl.float32)
        w = tl.where(broken & is_real, float("nan"), w)
        slot = begin + s
        inside = s < end
        clean = tl.where((inverse == 0.0)[:, None], 0.0, wide).to(x.dtype)
        tl.store(packed + slot[:, None] * D + channel, clean, mask=inside[:, None] & (channel < D))
        companion = s * companion_rows + row if FRAMES else slot
        tl.store(scale + companion, inverse, mask=inside)
        tl.store(weight + companion, w, mask=inside)
        tl.store(position + companion, tl.where(filled, token, PAD), mask=inside)
        if not FRAMES:
            whose = tl.where(row < rows, row, -1).to(tl.int32) + s * 0
            tl.store(chunk_row + slot // GRAIN, whose, mask=inside & (s % GRAIN == 0))


@triton.jit
def unpack_gradient(
    grad,
    features,
    out,
    length,
    start,
    scale,
    position,
    factor,
    tokens,
    dim,
    blocks,
    companion_rows,
    x_row,
    x_token,
    x_channel,
    D: tl.constexpr,
    CHANNELS: tl.constexpr,
    SLOTS: tl.constexpr,
    FRAMES: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """SLOTS real tokens of a row: unit tokens' gradients become those of the raw features, in their padded places."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    s = tl.program_id(0) % blocks * SLOTS + tl.arange(0, SLOTS)
    is_real = s < tl.load(length + row)
    slot = (row * tokens if FRAMES else tl.load(start + row).to(tl.int64)) + s
    companion = s * companion_rows + row if FRAMES else slot
    token = tl.load(position + companion, mask=is_real, other=0)[:, None].to(tl.int64)
    channel = tl.arange(0, CHANNELS)[None, :]
    inside = is_real[:, None] & (channel < dim)
    g = tl.load(grad + slot[:, None] * D + channel, mask=inside, other=0.0) * tl.load(factor)
    if NORMALIZE:
        inverse = tl.load(scale + companion, mask=is_real, other=0.0)[:, None]
        at = row * x_row + token * x_token + channel.to(tl.int64) * x_channel
        x = tl.load(features + at, mask=inside, other=0.0).to(tl.float32)
        unit = x * inverse
        g = tl.where(inverse == 0.0, 0.0, (g - unit * tl.sum(unit * g, 1)[:, None]) * inverse)
    tl.store(out + (row * tokens + token) * dim + channel, g.to(out.dtype.element_ty), mask=inside)


@triton.jit
def unpack_weight_gradient(
    partial,
    out,
    length,
    start,
    position,
    tokens,
    parts,
    part_stride,
    companion_rows,
    BLOCK: tl.constexpr,
    FRAMES: tl.constexpr,
    ADD: tl.constexpr,
):
    """One row: add its tokens' partial sums, always in the same order, to what stands in their padded places."""
    row = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, BLOCK)
    is_real = s < tl.load(length + row)
    companion = s * companion_rows + row if FRAMES else tl.load(start + row).to(tl.int64) + s
    token = tl.load(position + companion, mask=is_real, other=0)
    total = tl.zeros((BLOCK,), tl.float32)
    if ADD:
        total = tl.load(out + row * tokens + token, mask=is_real, other=0.0)
    at = partial + companion
    for _ in range(0, parts):
        total += tl.load(at, mask=is_real, other=0.0)
        at += part_stride
    tl.store(out + row * tokens + token, total, mask=is_real)


class Side(NamedTuple):
    """One side of the interaction as the caller gave it."""

    features: Tensor  # (rows, N, D), any strides
    weight: Tensor | None  # (rows, N)
    mask: Tensor | None  # (rows, N) bool


class Packed(NamedTuple):
    """One side in slots. Companions are (slots,) for words and (N, rows_allocated) for frames."""

    tokens: Tensor  # words (slots, D'), frames (rows_allocated, N D'); D' is D padded with zeros
    scale: Tensor
    weight: Tensor
    position: Tensor  # int32, place in the padded row
    length: Tensor  # (rows_allocated,) int32, real tokens of each row
    start: Tensor  # (2, rows + 1) int32: first slot, number of slots; the last column is the tail
    order: Tensor | None  # rows by length class
    class_begin: Tensor | None  # where in order each class begins, and the last one ends
    chunk_row: Tensor  # the row of each GRAIN word slots, -1 in the tail
    dim: int  # D'
    most_slots: int

    @property
    def rows_allocated(self) -> int:
        return self.length.shape[0]


def length_class(tokens: int) -> int:
    """The smallest class of 16, 32, 64, 128 slots that holds so many words."""
    return min(LONGEST_CLASS, max(GRAIN, triton.next_power_of_2(tokens)))


def length_classes(tokens: int) -> list[int]:
    """Every class that a row of up to ``tokens`` words may fall into."""
    return [c for c in (16, 32, 64, 128) if c <= length_class(tokens)]


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if x is None else x.stride()


def _lengths(side: Side, rows_allocated: int, classes: bool, grain: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, tokens = side.features.shape[:2]
    length, slots = side.features.new_empty((2, rows_allocated), dtype=torch.int32)
    mask = None if side.mask is None else side.mask.view(torch.uint8)
    real = length if mask is None else torch.empty((rows, tokens), dtype=torch.int32, device=length.device)
    row_layout[(rows_allocated,)](
        length if mask is None else mask,
        length,
        slots,
        real,
        rows,
        tokens,
        *_strides(mask),
        MASKED=mask is not None,
        CLASSES=classes,
        GRAIN=grain,
        BLOCK=triton.next_power_of_2(tokens),
    )
    return length, slots, real


def _fill(side: Side, packed: Packed, real: Tensor, frames: bool, normalize: bool, copies: bool) -> None:
    rows, tokens, dim = side.features.shape
    blocks, tile = _tile(packed, packed.most_slots)
    pack_slots[(packed.rows_allocated * blocks,)](
        side.features,
        packed.scale if side.weight is None else side.weight,
        packed.length,
        packed.start,
        real,
        packed.tokens,
        packed.scale,
        packed.weight,
        packed.position,
        packed.chunk_row,
        rows,
        tokens,
        dim,
        blocks,
        packed.rows_allocated,
        *side.features.stride(),
        *_strides(side.weight),
        D=packed.dim,
        FRAMES=frames,
        MASKED=side.mask is not None,
        WEIGHTED=side.weight is not None,
        NORMALIZE=normalize,
        COPIES=copies,
        GRAIN=GRAIN,
        TAIL=TAIL,
        PAD=NOWHERE if copies else PAD_POSITION,
        TINY=NORM_EPS,
        **tile,
    )


def _tile(packed: Packed, slots: int) -> tuple[int, dict[str, int]]:
    """Programs a row, and their shape: about 32 values a thread."""
    channels = triton.next_power_of_2(packed.dim)
    size = min(max(1, 4096 // channels), triton.next_power_of_2(slots))
    return triton.cdiv(slots, size), {"CHANNELS": channels, "SLOTS": size, "num_warps": 4 if channels <= 4096 else 8}


def pack_words(side: Side, step: int, normalize: bool, *, grain: int, classes: bool, copies: bool) -> Packed:
    """Pack text: by length class, or in the rows' own order with a multiple of ``grain`` slots each."""
    rows, tokens, dim = side.features.shape
    most = length_class(tokens) if classes else triton.cdiv(tokens, grain) * grain
    allocated = rows * most + TAIL
    if allocated >= 2**31:
        raise ValueError(
            f"text has {rows} rows of up to {most} token slots, and the GPU kernels index at most 2^31 - 1 of them; "
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
    packed = Packed(
        side.features.new_empty((allocated, d)),
        scale,
        weight,
        torch.empty(allocated, dtype=torch.int32, device=device),
        length,
        start,
        order,
        class_begin,
        torch.empty(allocated // GRAIN, dtype=torch.int32, device=device),
        d,
        most,
    )
    _fill(side, packed, real, False, normalize, copies)
    return packed


def pack_frames(side: Side, step: int, block: int, normalize: bool, *, copies: bool) -> Packed:
    """Pack video: N slots a row, rows padded to whole blocks of ``block``."""
    rows, tokens, dim = side.features.shape
    allocated = triton.cdiv(rows, block) * block
    d = triton.cdiv(dim, step) * step
    if max(allocated * tokens, tokens * d) >= 2**31:
        raise ValueError(
            f"video has {allocated} rows of {tokens} frames, and the GPU kernels index at most 2^31 - 1 frames; "
            "score the rows in several calls"
        )
    length, slots, real = _lengths(side, allocated, False, 1)
    scale, weight = torch.empty((2, tokens, allocated), dtype=torch.float32, device=length.device)
    position = torch.empty((tokens, allocated), dtype=torch.int32, device=length.device)
    packed = Packed(
        side.features.new_empty((allocated, tokens * d)),
        scale,
        weight,
        position,
        length,
        slots,
        None,
        None,
        slots,
        d,
        tokens,
    )
    _fill(side, packed, real, True, normalize, copies)
    return packed


def unpack(
    grad: Tensor, side: Side, packed: Packed, factor: Tensor, normalize: bool, out: Tensor, *, frames: bool
) -> None:
    """Write the raw features' gradient, from that of the slots' unit tokens, to real tokens' places in ``out``."""
    rows, tokens, dim = side.features.shape
    blocks, tile = _tile(packed, tokens)
    unpack_gradient[(rows * blocks,)](
        grad,
        side.features,
        out,
        packed.length,
        packed.start,
        packed.scale,
        packed.position,
        factor,
        tokens,
        dim,
        blocks,
        packed.rows_allocated,
        *side.features.stride(),
        D=packed.dim,
        FRAMES=frames,
        NORMALIZE=normalize,
        **tile,
    )


def unpack_weight(partial: Tensor, packed: Packed, out: Tensor, *, frames: bool, add: bool) -> None:
    """Sum up (parts, companions) parts of the weights' gradients, into real tokens' places of ``out`` (rows, N)."""
    rows, tokens = out.shape
    unpack_weight_gradient[(rows,)](
        partial,
        out,
        packed.length,
        packed.start,
        packed.position,
        tokens,
        partial.shape[0],
        partial.stride(0),
        packed.rows_allocated,
        BLOCK=triton.next_power_of_2(tokens),
        FRAMES=frames,
        ADD=add,
    )
