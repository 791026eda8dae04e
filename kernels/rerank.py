"""Forward kernels of reranking: each text against candidates of its own, by both poolings.

    scores[r] = what token_interaction.py and soft_token_interaction.py give for candidate r and the text that owns it

Packing, similarities, maxima, soft pooling and the order of all sums are theirs: candidates stand in for the videos. So
a score has the same bits. Only the tiles differ: a program takes one text and one block of BM candidates, and computes
the score of those that the text owns.

    offsets[a]     offsets[a + 1]
        |               |              Unit offsets[a] // BM + a and those after it belong to text a: unit u is text a
    |-------|-------|-------|          and block u - a. There are R // BM + A units, whatever the offsets are, so the
      block   block   block            host need not know them.

Tile: BM candidates (one frame of each at a time) x BN word slots, those of the longest text. FLOP per tile and frame:
2 BM BN D. Bytes read: (BM + BN) D itemsize; since a candidate meets one text only, memory limits the kernel.

A text of more than 128 words takes several tiles. The sum over its words needs all frames of a tile, the maximum over
its words all tiles of a frame: with both directions, S is computed twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import layout, packing, tuning
from .packing import Side
from .soft_token_interaction import LOG2_E, _add_frame, _pooled
from .soft_token_interaction import _over_words as _pool_words
from .token_interaction import (
    CHUNK,
    Form,
    _finish,
    _form,
    _over_frames,
    _over_words,
    _start,
    descriptors,
    frame_similarity,
    maxima_dtype,
    product_kind,
    word_sums,
)


@triton.jit
def owner_of(offsets, unit, texts, BM: tl.constexpr):
    """Return the last text whose first unit is not after ``unit``."""
    low, high = unit * 0, unit * 0 + texts
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(offsets + middle) // BM + middle <= unit
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def _first_chunk(x):
    """Return the text's value, that of the tile's first chunk, from x (BM, chunks)."""
    return tl.sum(tl.where((tl.arange(0, x.shape[1]) == 0)[None, :], x, 0.0), 1)


@triton.jit(do_not_specialize=packing.SIZES)
def rerank_forward(
    packed,
    word_tiles,
    frame_tiles,
    offsets,
    scores,
    temperature,
    texts,
    words,
    videos,
    frames,
    TILE: tl.constexpr,
    FORM: tl.constexpr,
):
    """Score one block of candidates against one text; tokens come by descriptor if TILE.tma."""
    BM: tl.constexpr = TILE.m
    BN: tl.constexpr = TILE.n
    CHUNKS: tl.constexpr = BN // CHUNK
    scale, weight, position, _, length, start, _, chunk_about, _ = packing.companions(
        packed, texts, videos, frames, FORM.most, FORM.dim
    )
    word_rows = texts * FORM.most + packing.TAIL
    padded = tl.cdiv(videos, packing.VIDEO_BLOCK) * packing.VIDEO_BLOCK
    unit = tl.program_id(0)
    text = owner_of(offsets, unit, texts, BM)
    b0 = (unit - text) * BM
    b = b0 + tl.arange(0, BM)
    own = (b >= tl.load(offsets + text)) & (b < tl.load(offsets + text + 1)) & (b < videos)
    # Offsets that do not fit cannot be refused here, but they must not lead outside of the candidates.
    if (b0 >= 0) & (b0 < videos) & (tl.max(own.to(tl.int32), 0) > 0):
        first, count = tl.load(start + text), tl.load(length + text)
        tiles = tl.cdiv(count, BN) if FORM.long else 1
        most = tl.max(tl.where(own, tl.load(length + texts + b), 0), 0)
        rate = LOG2_E / temperature
        total = tl.zeros((BM, CHUNKS), tl.float32)
        for tile in tl.range(0, tiles if FORM.long else 1):
            c0 = first + tile * BN
            best, frame = _start(BM, BN, FORM)
            v_zeros = ((frames - tl.load(length + texts + b)) if FORM.zero_competes else b * 0).to(tl.float32)
            top = tl.broadcast_to(tl.where(v_zeros > 0, 0.0, float("-inf"))[:, None], BM, BN)
            mass = tl.broadcast_to(v_zeros[:, None], BM, BN)
            weighted = tl.zeros((BM, BN), tl.float32)
            for f in tl.range(0, most):
                row = word_rows + f * padded + b0
                s = frame_similarity(packed, scale, word_tiles, frame_tiles, row, c0, TILE, FORM)
                exists = f < tl.load(length + texts + b)
                of_video = tl.load(weight + row + tl.arange(0, BM))
                about = tl.load(chunk_about + c0 // CHUNK + tl.arange(0, CHUNKS))
                if FORM.both and not FORM.long:
                    value = _of_frame(s, position + c0, about, words - count, temperature, FORM)[1]
                    total += tl.where(exists[:, None], value * of_video[:, None], 0.0)
                if not FORM.both:
                    # With one direction only a frame with a NaN counts, whose weight is NaN.
                    total += tl.where(of_video != of_video, of_video, 0.0)[:, None]
                if FORM.pooling is None:
                    best, frame = _over_frames(best, frame, s, tl.full((1, 1), f, tl.int32), FORM)
                    total += _not_a_number(s, FORM)
                else:
                    top, mass, weighted = _add_frame(top, mass, weighted, s, exists, rate)
            if FORM.pooling is None:
                floor = tl.load(length + texts + b) < (frames if FORM.zero_competes else 1)
                value = _finish(best, floor, FORM)
            else:
                _, value = _pooled(top, mass, weighted, temperature, FORM)
            real = tl.load(position + c0 + tl.arange(0, BN)) >= 0
            terms = tl.where(real[None, :], value * tl.load(weight + c0 + tl.arange(0, BN))[None, :], 0.0)
            about = tl.load(chunk_about + c0 // CHUNK + tl.arange(0, CHUNKS))
            total += word_sums(terms, about, FORM)
