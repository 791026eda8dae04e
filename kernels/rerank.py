"""Forward kernel of reranking: each text against candidates of its own.

    scores[r] = the logit of token_interaction.py or soft_token_interaction.py for candidate r and the text that owns it

Packing, similarities, maxima, soft pooling and the order of all sums are theirs; candidates stand in for the videos.
Only the tiles differ: a program takes one text and one block of BM candidates, and stores the scores of those that the
text owns.

    offsets[a]     offsets[a + 1]
        |               |
    |-------|-------|-------|          Unit u is a text a and block u - a, where offsets[a] // BM + a is the first unit
      block   block   block            of text a. There are R // BM + A units, so the host need not read the offsets.

Tile: BM candidates (one frame of each at a time) x BN word slots, those of the longest text. FLOP per tile and frame:
2 BM BN D. Bytes read: (BM + BN) D itemsize. A candidate meets one text only, so memory is the limit.

A text of more than 128 words takes several tiles. The sum over words needs all frames of a tile, the pooling over words
all tiles of a frame: with both directions S is then computed twice.
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
    _finish,
    _form,
    _over_frames,
    _over_words,
    _start,
    descriptors,
    frame_similarity,
    join,
    maxima_dtype,
    product_kind,
    word_sums,
)


@triton.jit
def _owner(offsets, unit, texts, BM: tl.constexpr):
    """Return the last text whose first unit is not after ``unit``."""
    low, high = unit * 0, unit * 0 + texts
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(offsets + middle) // BM + middle <= unit
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def _of_frame(s, real, about, zeros, temperature, FORM: tl.constexpr):
    """Pool s (BM, BN) over each text's words; return N and m of soft pooling, or the maximum twice."""
    if FORM.pooling is None:
        value, _, _ = _over_words(s, about, FORM)
        return value, value
    else:
        return _pool_words(s, real, tl.zeros((about.shape[0],), tl.float32) + zeros, about, temperature, FORM)


@triton.jit
def _join_tiles(normalizer, value, more_normalizer, more_value, temperature, FORM: tl.constexpr):
    """Join what :func:`_of_frame` returned for two tiles of one text."""
    if FORM.pooling is None:
        value = tl.maximum(value, more_value)
        return value, value
    else:
        rate = LOG2_E / temperature
        top = tl.maximum(normalizer, more_normalizer)
        old, new = tl.exp2((normalizer - top) * rate), tl.exp2((more_normalizer - top) * rate)
        return _pooled(top, old + new, value * old + more_value * new, temperature, FORM)


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
    text = _owner(offsets, unit, texts, BM)
    b0 = (unit - text) * BM
    # Offsets that do not fit cannot be refused here, but they must not lead out of the candidates.
    if (b0 < 0) | (b0 >= videos):
        return
    b = b0 + tl.arange(0, BM)
    own = (b >= tl.load(offsets + text)) & (b < tl.load(offsets + text + 1)) & (b < videos)
    lengths = tl.where(own, tl.load(length + texts + b), 0)
    most = tl.max(lengths, 0)
    first, count = tl.load(start + text), tl.load(length + text)
    t_zeros = ((words - count) if FORM.zero_competes else count * 0).to(tl.float32)
    v_zeros = ((frames - lengths) if FORM.zero_competes else lengths * 0).to(tl.float32)
    total = tl.zeros((BM, CHUNKS), tl.float32)
    for tile in tl.range(0, tl.cdiv(count, BN) if FORM.long else 1):
        c0 = first + tile * BN
        if FORM.pooling is None:
            best, frame = _start(BM, BN, FORM)
        else:
            top = tl.broadcast_to(tl.where(v_zeros > 0, 0.0, float("-inf"))[:, None], BM, BN)
            mass = tl.broadcast_to(v_zeros[:, None], BM, BN)
            weighted = tl.zeros((BM, BN), tl.float32)
        for f in tl.range(0, most, flatten=True):
            row = word_rows + f * padded + b0
            s = frame_similarity(packed, scale, word_tiles, frame_tiles, row, c0, TILE, FORM)
            # Load for each frame what belongs to the tile: keeping it over the loop would cost registers.
            exists = f < tl.load(length + texts + b)
            of_video = tl.load(weight + row + tl.arange(0, BM))
            about = tl.load(chunk_about + c0 // CHUNK + tl.arange(0, CHUNKS))
            if FORM.both and not FORM.long:
                real = tl.load(position + c0 + tl.arange(0, BN)) >= 0
                normalizer, value = _of_frame(s, real, about, t_zeros, temperature, FORM)
                total += tl.where(exists[:, None], value * of_video[:, None], 0.0)
            if not FORM.both:
                # With one direction only a frame with a NaN counts, whose weight is NaN.
                total += tl.where(of_video != of_video, of_video, 0.0)[:, None]
            if FORM.pooling is None:
                best, frame = _over_frames(best, frame, s, tl.full((1, 1), f, tl.int32), FORM)
                if not FORM.keyed:
                    # A maximum drops a NaN that an overflowing product of raw tokens makes: put it into the score.
                    bad = tl.sum(tl.reshape(tl.where(s != s, s, 0.0), (BM, CHUNKS, CHUNK)), axis=2)
                    total += join(bad, about, FORM.most, "sum")
            else:
                top, mass, weighted = _add_frame(top, mass, weighted, s, exists, LOG2_E / temperature)
        if FORM.pooling is None:
            value = _finish(best, lengths < (frames if FORM.zero_competes else 1), FORM)
        else:
            normalizer, value = _pooled(top, mass, weighted, temperature, FORM)
        real = tl.load(position + c0 + tl.arange(0, BN)) >= 0
        about = tl.load(chunk_about + c0 // CHUNK + tl.arange(0, CHUNKS))
        terms = value * tl.load(weight + c0 + tl.arange(0, BN))[None, :]
        total += word_sums(tl.where(real[None, :], terms, 0.0), about, FORM)
    if FORM.both and FORM.long:
        for f in tl.range(0, most):
            row = word_rows + f * padded + b0
            normalizer = tl.full((BM, CHUNKS), float("-inf"), tl.float32)
            value = tl.full((BM, CHUNKS), float("-inf") if FORM.pooling is None else 0.0, tl.float32)
            for tile in tl.range(0, tl.cdiv(count, BN), flatten=True):
                c0 = first + tile * BN
                s = frame_similarity(packed, scale, word_tiles, frame_tiles, row, c0, TILE, FORM)
                about = tl.load(chunk_about + c0 // CHUNK + tl.arange(0, CHUNKS))
                real = tl.load(position + c0 + tl.arange(0, BN)) >= 0
                # The masked words' zeros count once.
                zeros = tl.where(tile == 0, t_zeros, 0.0)
                more_normalizer, more_value = _of_frame(s, real, about, zeros, temperature, FORM)
                normalizer, value = _join_tiles(normalizer, value, more_normalizer, more_value, temperature, FORM)
            of_video = tl.load(weight + row + tl.arange(0, BM))
            total += tl.where((f < tl.load(length + texts + b))[:, None], value * of_video[:, None], 0.0)
    # The tile's first chunk is the text's.
    score = tl.sum(tl.where((tl.arange(0, CHUNKS) == 0)[None, :], total, 0.0), 1) * FORM.factor
    # A pair with an empty side scores 0, even if the other side has infinite weights.
    tl.store(scores + b, tl.where((count > 0) & (lengths > 0), score, 0.0), mask=own)


def forward(
    text: Side,
    candidates: Side,
    offsets: Tensor,
    normalize: bool,
    zero_competes: bool,
    pooling: str,
    temperature: float,
) -> Tensor:
    """Return scores (R,) float32. If candidates have no weights, compute only the text's direction, not halved."""
    rows = len(candidates.features)
    # Zeros for candidates that no text owns: then the offsets do not fit.
    scores = candidates.features.new_zeros(rows, dtype=torch.float32)
    if rows == 0 or len(text.features) == 0:
        return scores
    packed = packing.pack(text, candidates, normalize)
    form = _form(
        packed,
        text,
        candidates,
        zero_competes=zero_competes,
        matches=False,
        keyed=pooling == "max" and maxima_dtype(text, candidates, normalize) == torch.int16,
        pooling=None if pooling == "max" else pooling,
    )
    most = min(form.most, layout.LONGEST_CLASS)
    # A program has one text, so its tile is no wider than the longest: the small one, unless texts need the large one.
    many = 1 << 20 if most > 64 else 1
    tile, _ = tuning.forward_tile(scores.device, product_kind(packed, form), most, many, many)
    tile = tile._replace(n=min(tile.n, most))
    rerank_forward[(rows // tile.m + len(text.features),)](
        packed.data,
        *descriptors(packed, tile),
        offsets.contiguous(),
        scores,
        temperature,
        *packed.sizes,
        TILE=tile,
        FORM=form,
        **tuning.launch_options(tile),
    )
    return scores
