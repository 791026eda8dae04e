"""Softmax or logsumexp pooling in place of the token interaction's maximum: forward kernel and coefficients.

With T the temperature and the sums over the frames f of video b that take part (m_v likewise over the words of text a):

    N_t[a,i,b] = T log sum_f exp(S / T)      p = exp((S - N_t) / T)
    logsumexp:   m_t = N_t                   d m_t / d S = p
    softmax:     m_t = sum_f p S             d m_t / d S = p (1 + (S - m_t) / T)
    logits[a,b] = (sum_i w_ai m_t[a,i,b] + sum_f w_bf m_v[a,f,b]) / 2

If masked zeros compete, each masked token of the row adds a similarity of 0; the packed form has their number, since it
counts the real ones. S, its tiles and the two sweeps of long texts are those of token_interaction.py.

Over frames the sum is that of an online softmax: a new largest S rescales the earlier terms. Over words, all of which
lie in the tile, it has two passes, the maximum and the sum. Sums run in frame order and in :func:`word_sums`' order, so
a pair's score has the same bits in every batch.

The forward pass keeps nothing. The backward pass works on blocks of text rows like token_interaction_backward.py: the
forward kernel finds N and m of a block again, and :func:`soft_coefficients` computes S again, one block of coefficients
at a time. So the products, and the sums of weights' gradients with m in place of the maxima, are those of the maximum.

    C[a,i,b,f] = g[a,b] (w_ai d m_t / d S + w_bf d m_v / d S) / 2 / (|t_ai| |v_bf|)

Tile of both kernels: BM videos x BN word slots, one frame of each video at a time. FLOP per tile and frame: 2 BM BN D.
Bytes read: (BM + BN) D itemsize. Bytes written by the coefficients' kernel: BM BN itemsize, per tile and frame; by the
forward kernel in the backward pass, per token and pair of rows: 4 (logsumexp) or 8.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import layout, packing, tuning
from .packing import Packed, Side
from .token_interaction import (
    CHUNK,
    Form,
    descriptors,
    frame_similarity,
    halves,
    join,
    launch,
    match_address,
    product_kind,
    spread,
    sweeps,
    word_sums,
)
from .token_interaction_backward import PLACE, Block, Evaluated, gradients

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _pooled(top, total, weighted, temperature, FORM: tl.constexpr):
    """Return N and m from the largest S, the sum of e = exp((S - top) / T), and that of e S."""
    normalizer = top + temperature * tl.log(total)
    return normalizer, normalizer if FORM.pooling == "logsumexp" else weighted / total


@triton.jit
def _add_frame(top, total, weighted, s, exists, rate):
    """Add one more frame to the sums over frames (BM, BN), where it exists (BM,); ``rate``: log2(e) / T."""
    gap = tl.where(exists[:, None], s - top, float("-inf"))  # that of -inf adds 0
    # One of the two exponentials of an online softmax is 1.
    e = tl.exp2(-tl.abs(gap) * rate)
    old, new = tl.where(gap > 0, e, 1.0), tl.where(gap > 0, 1.0, e)
    # A frame that does not exist may have an infinite S.
    s = tl.where(exists[:, None], s, 0.0)
    return tl.where(gap > 0, s, top), total * old + new, weighted * old + new * s


@triton.jit
def _over_words(s, real, zeros, about, temperature, FORM: tl.constexpr):
    """Pool s (BM, BN) over each text's real words (BN,) and its zeros (chunks,); return N and m, (BM, chunks)."""
    BM: tl.constexpr = s.shape[0]
    CHUNKS: tl.constexpr = s.shape[1] // CHUNK
    rate = LOG2_E / temperature
    top = tl.reshape(tl.where(real[None, :], s, float("-inf")), (BM, CHUNKS, CHUNK))
    top = join(tl.max(top, axis=2), about, FORM.most, "max")
    top = tl.maximum(top, tl.where(zeros > 0, 0.0, float("-inf"))[None, :])
    e = tl.where(real[None, :], tl.exp2((s - spread(top)) * rate), 0.0)
    total = word_sums(e, about, FORM)
    # Without zeros exp(-top / T) may overflow.
    total += tl.where((zeros > 0)[None, :], zeros[None, :] * tl.exp2(-top * rate), 0.0)
    weighted = total
    if FORM.pooling != "logsumexp":
        weighted = word_sums(tl.where(real[None, :], e * s, 0.0), about, FORM)
    return _pooled(top, total, weighted, temperature, FORM)


@triton.jit
def _store(normalizers, pooled, at, normalizer, value, mask):
    """Store N and m. With logsumexp ``pooled`` is None, and m alone is stored: it equals N, but is 0 in empty rows."""
    tl.store(normalizers + at, value if pooled is None else normalizer, mask=mask)
    if pooled is not None:
        tl.store(pooled + at, value, mask=mask)


@triton.jit
def _store_words(
    normalizer,
    value,
    position,
    chunk_text,
    c0,
    b0,
    normalizers,
    pooled,
    texts,
    words,
    videos,
    frames,
    FORM: tl.constexpr,
):
    """Store N and m (BM, BN) of the words from slot c0."""
    BM: tl.constexpr = value.shape[0]
    BN: tl.constexpr = value.shape[1]
    if BN > 16:
        # One half after the other: the addresses of a whole tile would need too many registers.
        normalizer_0, normalizer_1 = halves(normalizer)
        value_0, value_1 = halves(value)
        c1 = c0 + BN // 2
        _store_words(
            normalizer_0, value_0, position, chunk_text, c0, b0, normalizers, pooled, texts, words, videos, frames, FORM
        )
        _store_words(
            normalizer_1, value_1, position, chunk_text, c1, b0, normalizers, pooled, texts, words, videos, frames, FORM
        )
    else:
        column = c0 + tl.arange(0, BN)
        place = tl.load(position + column)
        text = tl.load(chunk_text + column // CHUNK).to(tl.int64)
        b = b0 + tl.arange(0, BM)
        rows = words + frames if FORM.joint else words
        row = place + frames if FORM.swapped else place
        at = match_address(text[None, :], row[None, :], b[:, None].to(tl.int64), texts, rows, videos, FORM)
        _store(normalizers, pooled, at, normalizer, value, (place >= 0)[None, :] & (b < videos)[:, None])


@triton.jit(do_not_specialize=packing.SIZES)
def soft_forward(
    packed,
    word_tiles,
    frame_tiles,
    logits,
    normalizers,
    pooled,
    temperature,
    texts,
    words,
    videos,
    frames,
    TILE: tl.constexpr,
    FORM: tl.constexpr,
):
    """Score tiles of TILE.m videos and TILE.n word slots; tokens come by descriptor if TILE.tma."""
    BM: tl.constexpr = TILE.m
    BN: tl.constexpr = TILE.n
    CHUNKS: tl.constexpr = BN // CHUNK
    scale, weight, position, _, length, start, chunk_text, chunk_about, _ = packing.companions(
        packed, texts, videos, frames, FORM.most, FORM.dim
    )
    word_rows = texts * FORM.most + packing.TAIL
    padded = tl.cdiv(videos, packing.VIDEO_BLOCK) * packing.VIDEO_BLOCK
    blocks = tl.cdiv(videos, BM)
    units = texts if FORM.long else tl.cdiv(tl.load(start + texts), BN)
    rate = LOG2_E / temperature
    unit = tl.program_id(0)
    while unit < units * blocks:
        b0 = unit % blocks * BM
        first, tiles = unit // blocks * BN, 1
        if FORM.long:
            first = tl.load(start + unit // blocks)
            tiles = tl.cdiv(tl.load(length + unit // blocks), BN)
        b = b0 + tl.arange(0, BM)
        most = tl.max(tl.load(length + texts + b), 0)
        total = tl.zeros((BM, CHUNKS), tl.float32)
        for tile in tl.range(0, tiles if FORM.long else 1):
            c0 = first + tile * BN
            v_zeros = ((frames - tl.load(length + texts + b)) if FORM.zero_competes else b * 0).to(tl.float32)
            top = tl.broadcast_to(tl.where(v_zeros > 0, 0.0, float("-inf"))[:, None], BM, BN)
            mass = tl.broadcast_to(v_zeros[:, None], BM, BN)
            weighted = tl.zeros((BM, BN), tl.float32)
            for f in tl.range(0, most, flatten=True):
                row = word_rows + f * padded + b0
                s = frame_similarity(packed, scale, word_tiles, frame_tiles, row, c0, TILE, FORM)
                # Load for each frame what belongs to the tile: keeping it over the loop would cost registers.
                exists = f < tl.load(length + texts + b)
                of_video = tl.load(weight + row + tl.arange(0, BM))
                if FORM.both:
                    about = tl.load(chunk_about + c0 // CHUNK + tl.arange(0, CHUNKS))
                    text = tl.load(chunk_text + c0 // CHUNK + tl.arange(0, CHUNKS))
                    zeros = tl.zeros((CHUNKS,), tl.float32)
                    if FORM.zero_competes:
                        count = tl.load(length + text, mask=text >= 0, other=0)
                        zeros = (words - count).to(tl.float32)
                    real = tl.load(position + c0 + tl.arange(0, BN)) >= 0
                    normalizer, value = _over_words(s, real, zeros, about, temperature, FORM)
                    total += tl.where(exists[:, None], value * of_video[:, None], 0.0)
                    if FORM.matches:
                        place = b * 0 + f
                        if FORM.video_holes:
                            place = tl.load(position + row + tl.arange(0, BM))
                        at = match_address(
                            text[None, :].to(tl.int64),
                            words + place[:, None],
                            b[:, None].to(tl.int64),
                            texts,
                            words + frames,
                            videos,
                            FORM,
                        )
                        # A text's first chunk writes for the text. The pooled value of an empty one is 0.
                        value = tl.where(((about & packing.IS_EMPTY) == 0)[None, :], value, 0.0)
                        here = ((about & packing.LEAD) != 0)[None, :] & exists[:, None]
                        _store(normalizers, pooled, at, normalizer, value, here)
                else:
                    # With one direction only a frame with a NaN counts, whose weight is NaN.
                    total += tl.where(of_video != of_video, of_video, 0.0)[:, None]
                # After the words: in the other order the compiler keeps more registers.
                top, mass, weighted = _add_frame(top, mass, weighted, s, exists, rate)
            normalizer, value = _pooled(top, mass, weighted, temperature, FORM)
            if FORM.matches:
                alive = tl.load(length + texts + b) > 0
                _store_words(
                    normalizer,
                    tl.where(alive[:, None], value, 0.0),
                    position,
                    chunk_text,
                    c0,
                    b0,
                    normalizers,
                    pooled,
                    texts,
                    words,
                    videos,
                    frames,
                    FORM,
                )
            about = tl.load(chunk_about + c0 // CHUNK + tl.arange(0, CHUNKS))
            of_words = tl.load(weight + c0 + tl.arange(0, BN))
            real = tl.load(position + c0 + tl.arange(0, BN)) >= 0
            total += word_sums(tl.where(real[None, :], value * of_words[None, :], 0.0), about, FORM)
        about = tl.load(chunk_about + first // CHUNK + tl.arange(0, CHUNKS))
        text = tl.load(chunk_text + first // CHUNK + tl.arange(0, CHUNKS)).to(tl.int64)
        pair = match_address(text[None, :], 0, b[:, None].to(tl.int64), texts, 1, videos, FORM)
        inside = ((about & packing.LEAD) != 0)[None, :] & (b < videos)[:, None]
        # A pair with an empty side scores 0, even if the other side has infinite weights.
        scored = ((about & packing.IS_EMPTY) == 0)[None, :] & (tl.load(length + texts + b) > 0)[:, None]
        total = tl.where(scored, total * FORM.factor, 0.0)
        if FORM.add:
            total += tl.load(logits + pair, mask=inside, other=0.0)
        tl.store(logits + pair, total, mask=inside)
        unit += tl.num_programs(0)


@triton.jit
def _slope(s, normalizer, value, temperature, FORM: tl.constexpr):
    """Return the derivative of a pooled value with respect to S."""
    p = tl.exp2((s - normalizer) * (LOG2_E / temperature))
    return p if FORM.pooling == "logsumexp" else p * (1.0 + (s - value) / temperature)


@triton.jit(do_not_specialize=[*packing.SIZES, *PLACE])
def soft_coefficients(
    packed,
    word_tiles,
    frame_tiles,
    grad_logits,
    normalizers,
    pooled,
    boost,
    temperature,
    out,
    texts,
    words,
    videos,
    frames,
    slot,
    frame,
    video,
    block_frames,
    block_videos,
    CLEAR: tl.constexpr,
    TILE: tl.constexpr,
    FORM: tl.constexpr,
):
    """Write a block of coefficients for BN word slots, BM videos and all frames of the block.

    ``pooled`` is None for logsumexp. CLEAR: also write the rows after the words in use.
    """
    BM: tl.constexpr = TILE.m
    BN: tl.constexpr = TILE.n
    CHUNKS: tl.constexpr = BN // CHUNK
    scale, weight, position, _, length, start, chunk_text, _, _ = packing.companions(
        packed, texts, videos, frames, FORM.most, FORM.dim
    )
    word_rows = texts * FORM.most + packing.TAIL
    padded = tl.cdiv(videos, packing.VIDEO_BLOCK) * packing.VIDEO_BLOCK
    tiles = block_videos // BM
    c0 = slot + tl.program_id(0) // tiles * BN
    b0 = video + tl.program_id(0) % tiles * BM
    used = tl.load(start + texts)
    # Rows after the words in use are zero up to the next multiple of a product's steps; nobody reads the others.
    if c0 >= (word_rows if CLEAR else used + packing.TAIL):
        return
    column, chunk, b = c0 + tl.arange(0, BN), c0 // CHUNK + tl.arange(0, CHUNKS), b0 + tl.arange(0, BM)
    text = tl.load(chunk_text + chunk, mask=chunk * CHUNK < used, other=-1)
    inside = (text >= 0)[None, :] & (b < videos)[:, None]
    text = tl.where(text >= 0, text, 0).to(tl.int64)[None, :]
    g = tl.load(grad_logits + text * videos + b[:, None], mask=inside, other=0.0) * FORM.factor
    if boost is not None:
        g *= tl.load(boost)
    place = tl.load(position + column, mask=column < used, other=-1)
    real = (place >= 0)[None, :] & (b < videos)[:, None]
    word_text = tl.load(chunk_text + column // CHUNK, mask=place >= 0, other=0).to(tl.int64)
    rows = words + frames if FORM.both else words
    at = (word_text * rows + place)[None, :] * videos + b[:, None]
    normalizer = tl.load(normalizers + at, mask=real, other=0.0)
    value = normalizer if FORM.pooling == "logsumexp" else tl.load(pooled + at, mask=real, other=0.0)
    for f in tl.range(frame, frame + block_frames, flatten=True):
        row = word_rows + f * padded + b0
        s = frame_similarity(packed, scale, word_tiles, frame_tiles, row, c0, TILE, FORM)
        c = _slope(s, normalizer, value, temperature, FORM) * tl.load(weight + column)[None, :]
        if FORM.both:
            f_place = b * 0 + f
            if FORM.video_holes:
                f_place = tl.load(position + row + tl.arange(0, BM))
            f_at = (text * rows + words + f_place[:, None]) * videos + b[:, None]
            exists = inside & (f < tl.load(length + texts + b))[:, None]
            f_normalizer = tl.load(normalizers + f_at, mask=exists, other=0.0)
            f_value = f_normalizer if FORM.pooling == "logsumexp" else tl.load(pooled + f_at, mask=exists, other=0.0)
            by_frame = _slope(s, spread(f_normalizer), spread(f_value), temperature, FORM)
            c += by_frame * tl.load(weight + row + tl.arange(0, BM))[:, None]
        # The norms: this is the gradient of the raw dot product.
        norms = tl.load(scale + column)[None, :] * tl.load(scale + row + tl.arange(0, BM))[:, None]
        # Select after multiplying: nothing of a token that does not exist may become NaN.
        there = real & (f < tl.load(length + texts + b))[:, None]
        c = tl.where(there, c * spread(g) * norms, 0.0)
        target = (column - slot)[None, :] * (block_frames * block_videos)
        target += ((f - frame) * block_videos + b - video)[:, None]
        # The block's slots may end within the tile.
        tl.store(out + target, c.to(out.dtype.element_ty), mask=(column < texts * FORM.most)[None, :])


def forward(
    text: Side, video: Side, normalize: bool, zero_competes: bool, logsumexp: bool, temperature: float
) -> Tensor:
    """Return logits (A, B) float32. If the video has no weights, compute only the text's direction, not halved."""
    return _score(text, video, normalize, zero_competes, logsumexp, temperature, keep=False)[0]


def _score(
    text: Side,
    video: Side,
    normalize: bool,
    zero_competes: bool,
    logsumexp: bool,
    temperature: float,
    *,
    keep: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Packed | None, Form | None]:
    """Return logits and, to keep, N and m (A, Nt + Nv, B) float32, the packed sides and their form.

    With one direction N and m are (A, Nt, B). For logsumexp they are the same, and m is None.
    """
    (a, words, _), (b, frames, _) = text.features.shape, video.features.shape
    rows = words + frames if video.weight is not None else words
    new = functools.partial(text.features.new_empty, dtype=torch.float32)
    logits = new((a, b))
    normalizers = new((a, rows, b)) if keep else None
    pooled = new((a, rows, b)) if keep and not logsumexp else None
    if a == 0 or b == 0:
        return logits, normalizers, pooled, None, None
    options = {"zero_competes": zero_competes, "matches": keep, "keyed": False}
    packings = []
    pooling = "logsumexp" if logsumexp else "softmax"
    for packed, form in sweeps(text, video, normalize, pooling=pooling, **options):
        launch(soft_forward, packed, form, logits, normalizers, pooled, temperature)
        packings.append((packed, form))
    return logits, normalizers, pooled, *packings[0]


def backward(
    grad_logits: Tensor,
    text: Side,
    video: Side,
    normalize: bool,
    zero_competes: bool,
    logsumexp: bool,
    temperature: float,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Compute the gradients of both features (their dtype) and both weights (float32); empty if not asked for."""
    both = video.weight is not None
    tokens = text.features.shape[1] + (video.features.shape[1] if both else 0)

    def evaluate(part: Side, rows: slice, grad_logits: Tensor, boost: Tensor | None) -> Evaluated:
        scored = _score(part, video, normalize, zero_competes, logsumexp, temperature, keep=True)
        _, normalizers, pooled, packed, form = scored
        expand = functools.partial(
            _expand, packed, form._replace(both=both), (grad_logits, normalizers, pooled, boost, temperature)
        )
        return Evaluated(packed if any(output_mask[:2]) else None, expand, normalizers if pooled is None else pooled)

    return gradients(grad_logits, text, video, output_mask, tokens * (4 if logsumexp else 8), evaluate)


def _expand(
    packed: Packed, form: Form, arguments: tuple[Tensor | float | None, ...], block: Block, out: Tensor
) -> None:
    tile, _ = tuning.forward_tile(out.device, product_kind(packed, form), layout.CHUNK, block.slots, block.videos)
    soft_coefficients[(-(-block.slots // tile.n) * (block.videos // tile.m),)](
        packed.data,
        *descriptors(packed, tile),
        *arguments,
        out,
        *packed.sizes,
        *block.place,
        CLEAR=packed.form.clear,
        TILE=tile,
        FORM=form,
        **tuning.launch_options(tile),
    )
