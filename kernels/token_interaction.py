"""Forward kernel of the token interaction: scores, matches and maxima from one tile of similarities.

    S[b,f,a,i]  = <v_bf, t_ai> / (|v_bf| |t_ai|)          raw tokens on the tensor cores, norms applied afterwards
    m_t[a,i,b]  = max_f S      m_v[a,f,b] = max_i S       (and 0, if a masked token's similarity competes)
    logits[a,b] = (sum_i w_ai m_t[a,i,b] + sum_f w_bf m_v[a,f,b]) / 2
    matches     = the two argmaxes, lowest index first, as positions in the padded rows; those of masked tokens are not
                  written
    maxima      = m_t and m_v, for the gradients of the weights

Tile: BM videos (one frame of each at a time) x BN slots of words. A program keeps its words and loops over the frames;
K = D in steps of BK. Programs take tiles in turn until the words in use are done; only the device knows their number.

        BN word slots: texts of 16 to 128 slots   on chip: the running m_t (and its frame) of the whole tile,
      +---------+----+----+-------------+         and the partial sum of m_v for each (video, chunk of 16 slots).
   BM |  frame f of BM videos  . t      |  for f  A chunk's words lie in the registers of 4 adjacent threads, so the
      +---------+----+----+-------------+         maximum over words needs no shared memory.

The maximum over a text's words is that over each of its chunks, then over the chunks of the text (:func:`join`): one
compiled kernel serves texts of every length, mixed in one tile.

FLOP per tile and frame: 2 BM BN D. Bytes read: (BM + BN) D itemsize. Bytes written per tile: 4 per pair; in training
also one (matches) or three (and maxima) per slot and video, and per frame, video and text.

Slots beyond a row's real tokens hold copies of its first real token (packing.py). A copy does not change a maximum and,
because it comes later, does not win a tie. So the loop needs no mask.

KEYED (16-bit unit tokens, |S| < 2): S + 6 lies in (4, 8), where a float32 is fixed point with step 2^-21. Shift its
bits left by 8 and put 255 - index in the low byte: an unsigned maximum then gives the value and its lowest index at
once. Index 255 is "none", the masked 0. NaN cannot occur here: the weights carry it (packing.py). In the other forms
value and index are separate.

Bits: a pair's score depends on neither the tile nor the text's place in it. S sums D in order; sums over words add 8
slots inside a warp, then pairs of sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import layout, packing, tuning
from .packing import Packed, Side

CHUNK = packing.CHUNK
OFFSET = tl.constexpr(6.0)
EXPONENT = tl.constexpr(0x40000000)  # the bits of a float in [4, 8) that the shift drops
ZERO_KEY = tl.constexpr(0xC0000000)  # the key of value 0 without a token
ZERO_BITS = tl.constexpr(0x400000)  # the fixed-point bits of value 0
# Maxima of keyed products are int16 with this many fractional bits: 2^-21 is the step of the keys.
FRACTION = tl.constexpr(14)
DROPPED = tl.constexpr(21 - 14)
ROUNDING = tl.constexpr(1 << (21 - 14 - 1))
NOBODY = tl.constexpr(255)  # "no slot" in a key; x ^ 255 is 255 - x
LARGE = tl.constexpr(1 << 30)  # "no slot" in the other forms


class Form(NamedTuple):
    """Compile-time constants of the kernels that compute similarities, in addition to the tile."""

    dim: int  # D'
    most: int  # the most slots of a text
    long: bool  # texts may take several tiles
    both: bool  # both directions
    matches: bool  # write matches, or what the backward of soft pooling needs
    keyed: bool
    precision: str  # of the product: "ieee" or "tf32"
    none: int  # the index of "none chosen"
    zero_competes: bool
    swapped: bool  # the outputs' texts are the kernel's videos
    add: bool  # add to the logits of the other direction
    joint: bool  # maxima hold both directions
    factor: float
    text_holes: bool  # a word's slot may differ from its position
    video_holes: bool  # the same for frames
    pooling: str | None = None  # "softmax", "logsumexp" or None, the maximum


@triton.jit
def _key_value(key):
    return ((key >> 8) | EXPONENT).to(tl.float32, bitcast=True) - OFFSET


@triton.jit
def _join_two(x, about, WIDTH: tl.constexpr, HOW: tl.constexpr):
    """Join neighbouring groups of WIDTH / 2 chunks of x (BM, chunks) in texts of at least WIDTH chunks."""
    BM: tl.constexpr = x.shape[0]
    CHUNKS: tl.constexpr = x.shape[1]
    if WIDTH > CHUNKS:
        return x
    else:
        HALF: tl.constexpr = WIDTH // 2
        halves = tl.reshape(x, (BM, CHUNKS // WIDTH, 2, HALF))
        if HOW == "max":
            one = tl.max(halves, axis=2)
        elif HOW == "min":
            one = tl.min(halves, axis=2)
        else:
            one = tl.sum(halves, axis=2)
        one = tl.broadcast_to(one[:, :, None, :], BM, CHUNKS // WIDTH, 2, HALF)
        return tl.where(((about & packing.CHUNKS_OF_TEXT) >= WIDTH)[None, :], tl.reshape(one, (BM, CHUNKS)), x)


@triton.jit
def join(x, about, MOST: tl.constexpr, HOW: tl.constexpr):
    """Replace each chunk's value in x (BM, chunks) by that of its text; about (chunks,): the text's properties."""
    if MOST >= 32:
        x = _join_two(x, about, 2, HOW)
    if MOST >= 64:
        x = _join_two(x, about, 4, HOW)
    if MOST >= 128:
        x = _join_two(x, about, 8, HOW)
    return x


@triton.jit
def spread(x):
    """Give every slot its chunk's value: x (BM, chunks) as (BM, BN)."""
    BM: tl.constexpr = x.shape[0]
    CHUNKS: tl.constexpr = x.shape[1]
    return tl.reshape(tl.broadcast_to(x[:, :, None], BM, CHUNKS, CHUNK), (BM, CHUNKS * CHUNK))


@triton.jit
def _over_words(s, about, FORM: tl.constexpr):
    """Return the value of a text's maximum over its words, s (BM, BN), the tile's column that has it, and the value to
    store, for each of the text's chunks; NOBODY if a masked 0 won.
    """
    BM: tl.constexpr = s.shape[0]
    CHUNKS: tl.constexpr = s.shape[1] // CHUNK
    columns = tl.arange(0, s.shape[1])[None, :]
    floor = (about & (packing.HAS_MASKED if FORM.zero_competes else packing.IS_EMPTY)) != 0  # a masked 0 competes
    if FORM.keyed and FORM.matches:
        key = (s.to(tl.uint32, bitcast=True) << 8) + (columns ^ NOBODY).to(tl.uint32)
        best = join(tl.max(tl.reshape(key, (BM, CHUNKS, CHUNK)), axis=2), about, FORM.most, "max")
        best = tl.maximum(best, tl.where(floor, ZERO_KEY, 0).to(tl.uint32)[None, :])
        value = _key_value(best)
        index = ((best & NOBODY) ^ NOBODY).to(tl.int32)
        stored = _fixed_point(best)
    elif FORM.keyed:
        best = join(tl.max(tl.reshape(s, (BM, CHUNKS, CHUNK)), axis=2), about, FORM.most, "max")
        value = tl.maximum(best, tl.where(floor, OFFSET, 0.0)[None, :]) - OFFSET
        index = value.to(tl.int32)  # not used
        stored = value
    else:
        value = join(tl.max(tl.reshape(s, (BM, CHUNKS, CHUNK)), axis=2), about, FORM.most, "max")
        zero_wins = floor[None, :] & (value < 0)
        index = value.to(tl.int32)  # not used
        if FORM.matches:
            index = tl.reshape(tl.where(s == spread(value), columns, LARGE), (BM, CHUNKS, CHUNK))
            index = join(tl.min(index, axis=2), about, FORM.most, "min")
            index = tl.where(zero_wins | (index == LARGE), NOBODY, index)
        value = tl.where(zero_wins, 0.0, value)
        stored = value
    return value, index, stored


@triton.jit
def _fixed_point(key):
    """Round a key's value to FRACTION bits after the point; as int16, which drops the exponent's bits."""
    return ((key >> 8).to(tl.int32) - ZERO_BITS + ROUNDING) >> DROPPED


@triton.jit
def _start(BM: tl.constexpr, BN: tl.constexpr, FORM: tl.constexpr):
    """Start the running maximum over frames, and its frame."""
    frame = tl.full((BM, BN), LARGE, tl.int32)
    if FORM.keyed and FORM.matches:
        best = tl.zeros((BM, BN), tl.uint32)
    elif FORM.keyed:
        best = tl.zeros((BM, BN), tl.float32)
    else:
        best = tl.full((BM, BN), float("-inf"), tl.float32)
    return best, frame


@triton.jit
def _over_frames(best, frame, s, position, FORM: tl.constexpr):
    """Update the maximum with one more frame; ``position`` (1, 1) or (BM, 1) is its index in the padded row."""
    if FORM.keyed and FORM.matches:
        best = tl.maximum(best, (s.to(tl.uint32, bitcast=True) << 8) + (position ^ NOBODY).to(tl.uint32))
    elif FORM.keyed:
        best = tl.maximum(best, s)
    else:
        if FORM.matches:
            frame = tl.where(s > best, position, frame)
        best = tl.maximum(best, s)
    return best, frame


@triton.jit
def _finish(best, floor, FORM: tl.constexpr):
    """Return the value of the maximum over frames (BM, BN); floor (BM,): a masked 0 competes."""
    if FORM.keyed and FORM.matches:
        return _key_value(tl.maximum(best, tl.where(floor, ZERO_KEY, 0).to(tl.uint32)[:, None]))
    elif FORM.keyed:
        return tl.maximum(best, tl.where(floor, OFFSET, 0.0)[:, None]) - OFFSET
    else:
        return tl.where(floor[:, None] & (best < 0), 0.0, best)


@triton.jit
def halves(x):
    """Split the columns of x (BM, BN)."""
    BM: tl.constexpr = x.shape[0]
    return tl.split(tl.permute(tl.reshape(x, (BM, 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _store_words(
    best,
    frame,
    floor,
    position,
    chunk_text,
    c0,
    b0,
    matches,
    maxima,
    texts,
    words,
    videos,
    frames,
    FORM: tl.constexpr,
):
    """Store which frame each word chose, and the maximum over frames, for the words from slot c0."""
    BM: tl.constexpr = best.shape[0]
    BN: tl.constexpr = best.shape[1]
    if BN > 16:
        # One half after the other: the addresses of a whole tile would need too many registers.
        best_0, best_1 = halves(best)
        frame_0, frame_1 = halves(frame)
        _store_words(
            best_0, frame_0, floor, position, chunk_text, c0, b0, matches, maxima, texts, words, videos, frames, FORM
        )
        c1 = c0 + BN // 2
        _store_words(
            best_1, frame_1, floor, position, chunk_text, c1, b0, matches, maxima, texts, words, videos, frames, FORM
        )
    else:
        column = c0 + tl.arange(0, BN)
        place = tl.load(position + column)
        text = tl.load(chunk_text + column // CHUNK).to(tl.int64)
        b = b0 + tl.arange(0, BM)
        here = (place >= 0)[None, :] & (b < videos)[:, None]
        if FORM.keyed:
            best = tl.maximum(best, tl.where(floor, ZERO_KEY, 0).to(tl.uint32)[:, None])
            frame = ((best & NOBODY) ^ NOBODY).to(tl.int32)
            value = _fixed_point(best)
        else:
            frame = tl.where((floor[:, None] & (best < 0)) | (frame == LARGE), FORM.none, frame)
            value = _finish(best, floor, FORM)
        video = b[:, None].to(tl.int64)
        at = match_address(text[None, :], place[None, :], video, texts, words, videos, FORM)
        tl.store(matches + at, frame.to(matches.dtype.element_ty), mask=here)
        if maxima is not None:
            rows = words + frames if FORM.joint else words
            row = place + frames if FORM.swapped else place
            at = match_address(text[None, :], row[None, :], video, texts, rows, videos, FORM)
            tl.store(maxima + at, value.to(maxima.dtype.element_ty), mask=here)


@triton.jit
def frame_similarity(packed, scale, word_tiles, frame_tiles, row, c0, TILE: tl.constexpr, FORM: tl.constexpr):
    """Compute S of the BM frames from slot ``row`` with the BN words from slot c0; plus OFFSET if keyed."""
    # Triton 3.6 does not accept a field of a constexpr inside a tuple: bind it to a name.
    BM: tl.constexpr = TILE.m
    BN: tl.constexpr = TILE.n
    acc = tl.zeros((BM, BN), tl.float32)
    if not TILE.tma:
        kk = tl.arange(0, TILE.k)[None, :]
        v_rows = packed + (row + tl.arange(0, BM))[:, None].to(tl.int64) * FORM.dim + kk
        t_rows = packed + (c0 + tl.arange(0, BN))[:, None].to(tl.int64) * FORM.dim + kk
    for k in tl.range(0, FORM.dim, TILE.k):
        if TILE.tma:
            v = frame_tiles.load([row, k])
            t = word_tiles.load([c0, k])
        else:
            v = tl.load(v_rows + k)
            t = tl.load(t_rows + k)
        acc = tl.dot(v, t.T, acc, input_precision=FORM.precision)
    # Load the words' norms for each frame: keeping them over the loop would cost 32 registers per thread.
    r = acc * tl.load(scale + row + tl.arange(0, BM))[:, None]
    of_words = tl.broadcast_to(tl.load(scale + c0 + tl.arange(0, BN))[None, :], BM, BN)
    return tl.fma(r, of_words, tl.full((BM, BN), OFFSET, tl.float32)) if FORM.keyed else r * of_words


@triton.jit
def match_address(text, token, video, texts, tokens, videos, FORM: tl.constexpr):
    """Return the offset of a match in (texts, tokens, videos), or with swapped sides in (videos, tokens, texts)."""
    if FORM.swapped:
        return (video * tokens + token) * texts + text
    else:
        return (text * tokens + token) * videos + video


@triton.jit
def _store_frame(
    column,
    stored,
    about,
    place,
    f,
    position,
    length,
    chunk_text,
    c0,
    b0,
    matches,
    maxima,
    texts,
    words,
    videos,
    frames,
    FORM: tl.constexpr,
):
    """Store which word frame f of each video chose in each text, column (BM, chunks), and the maximum over words."""
    BM: tl.constexpr = column.shape[0]
    CHUNKS: tl.constexpr = column.shape[1]
    chunk = tl.arange(0, CHUNKS)
    b = b0 + tl.arange(0, BM)
    # A text's first chunk writes for the text.
    exists = (b < videos) & (f < tl.load(length + texts + b))
    here = ((about & packing.LEAD) != 0)[None, :] & exists[:, None]
    text = tl.load(chunk_text + c0 // CHUNK + chunk).to(tl.int64)
    if FORM.text_holes:
        word = packing.original(tl.load(position + c0 + column, mask=here & (column != NOBODY), other=-1))
        word = tl.where(word < 0, FORM.none, word)
    else:
        word = column & ((about & packing.CHUNKS_OF_TEXT) * CHUNK - 1)[None, :]
        word = tl.where(column == NOBODY, FORM.none, word)
    word = word.to(matches.dtype.element_ty)
    video = b[:, None].to(tl.int64)
    tl.store(matches + match_address(text[None, :], place, video, texts, frames, videos, FORM), word, mask=here)
    if maxima is not None:
        at = match_address(text[None, :], words + place, video, texts, words + frames, videos, FORM)
        tl.store(maxima + at, stored.to(maxima.dtype.element_ty), mask=here)


@triton.jit
def word_sums(terms, about, FORM: tl.constexpr):
    """Sum terms (BM, BN) over each text's words, in an order that no tile shape changes."""
    BM: tl.constexpr = terms.shape[0]
    CHUNKS: tl.constexpr = terms.shape[1] // CHUNK
    x = tl.sum(tl.reshape(terms, (BM, 2 * CHUNKS, CHUNK // 2)), axis=2)
    return join(tl.sum(tl.reshape(x, (BM, CHUNKS, 2)), axis=2), about, FORM.most, "sum")


@triton.jit(do_not_specialize=packing.SIZES)
def interaction_forward(
    packed,
    word_tiles,
    frame_tiles,
    logits,
    word_matches,
    frame_matches,
    maxima,
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
    unit = tl.program_id(0)
    # Not a `for` loop: Triton would not flatten the loops inside, and each frame would start with an empty pipeline.
    while unit < units * blocks:
        b0 = unit % blocks * BM
        first, tiles = unit // blocks * BN, 1
        if FORM.long:
            first = tl.load(start + unit // blocks)
            tiles = tl.cdiv(tl.load(length + unit // blocks), BN)
        most = tl.max(tl.load(length + texts + b0 + tl.arange(0, BM)), 0)
        total = tl.zeros((BM, CHUNKS), tl.float32)
        for tile in tl.range(0, tiles if FORM.long else 1):
            c0 = first + tile * BN
            best, frame = _start(BM, BN, FORM)
            for f in tl.range(0, most, flatten=True):
                row = word_rows + f * padded + b0
                s = frame_similarity(packed, scale, word_tiles, frame_tiles, row, c0, TILE, FORM)
                place = tl.full((1, 1), f, tl.int32)
                if FORM.video_holes and FORM.matches:
                    place = tl.load(position + row + tl.arange(0, BM))[:, None]
                best, frame = _over_frames(best, frame, s, place, FORM)
                of_video = tl.load(weight + row + tl.arange(0, BM))[:, None]
                # Load what the tile's texts are for each frame: keeping it over the loop would cost registers.
                about = tl.load(chunk_about + c0 // CHUNK + tl.arange(0, CHUNKS))
                if FORM.both:
                    value, column, stored = _over_words(s, about, FORM)
                    if FORM.keyed:
                        total += value * of_video
                    else:
                        # A copy's weight is 0, and its similarity may be infinite.
                        real = f < tl.load(length + texts + b0 + tl.arange(0, BM))
                        total += tl.where(real[:, None], value * of_video, 0.0)
                    if FORM.matches:
                        _store_frame(
                            column,
                            stored,
                            about,
                            place,
                            f,
                            position,
                            length,
                            chunk_text,
                            c0,
                            b0,
                            frame_matches,
                            maxima,
                            texts,
                            words,
                            videos,
                            frames,
                            FORM,
                        )
                else:
                    # With one direction only a frame with a NaN counts, whose weight is NaN.
                    total += tl.where(of_video != of_video, of_video, 0.0)
                if not FORM.keyed:
                    # A maximum drops a NaN that an overflowing product of raw tokens makes: put it into the score.
                    bad = tl.sum(tl.reshape(tl.where(s != s, s, 0.0), (BM, CHUNKS, CHUNK)), axis=2)
                    total += join(bad, about, FORM.most, "sum")
            v_floor = tl.load(length + texts + b0 + tl.arange(0, BM)) < (frames if FORM.zero_competes else 1)
            if FORM.matches:
                _store_words(
                    best,
                    frame,
                    v_floor,
                    position,
                    chunk_text,
                    c0,
                    b0,
                    word_matches,
                    maxima,
                    texts,
                    words,
                    videos,
                    frames,
                    FORM,
                )
            about = tl.load(chunk_about + c0 // CHUNK + tl.arange(0, CHUNKS))
            weights = tl.load(weight + c0 + tl.arange(0, BN))
            terms = _finish(best, v_floor, FORM) * weights[None, :]
            if not FORM.keyed:
                real = tl.load(position + c0 + tl.arange(0, BN)) >= 0
                terms = tl.where(real[None, :], terms, 0.0)
            total += word_sums(terms, about, FORM)
        b = b0 + tl.arange(0, BM)
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


def forward(
    text: Side, video: Side, normalize: bool, zero_competes: bool, keep_matches: bool, keep_maxima: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return logits (A, B) float32, matches, maxima and the packed form. What is not kept is empty.

    Matches: (A, Nt, B) and (A, Nv, B), uint8, or int16 beyond 255 tokens; undefined for masked tokens. Maxima:
    (A, Nt + Nv, B), int16 with FRACTION bits after the point for 16-bit unit tokens, else float32. If the video has no
    weights, compute only the text's direction, not halved; the maxima are then (A, Nt, B).
    """
    if keep_maxima and not keep_matches:
        raise ValueError("keep_maxima needs keep_matches: the kernel writes both or none")
    new = text.features.new_empty
    both = video.weight is not None
    a, nt, _ = text.features.shape
    b, nv, _ = video.features.shape
    logits = new((a, b), dtype=torch.float32)
    video_index = new((a, nt, b) if keep_matches else (0,), dtype=packing.index_dtype(nv))
    text_index = new((a, nv, b) if keep_matches and both else (0,), dtype=packing.index_dtype(nt))
    rows = nt + nv if both else nt
    maxima = new((a, rows, b) if keep_maxima else (0,), dtype=maxima_dtype(text, video, normalize))
    if a == 0 or b == 0:
        return logits, video_index, text_index, maxima, new(0)
    options = {"zero_competes": zero_competes, "matches": keep_matches, "keyed": maxima.dtype == torch.int16}
    data = []
    for packed, form in sweeps(text, video, normalize, **options):
        indices = (text_index, video_index) if form.swapped else (video_index, text_index)
        launch(interaction_forward, packed, form, logits, *indices, maxima if keep_maxima else None)
        data.append(packed.data)
    return logits, video_index, text_index, maxima, data[0] if keep_matches else new(0)


def maxima_dtype(text: Side, video: Side, normalize: bool) -> torch.dtype:
    """Return int16 if maxima are found as fixed-point keys, else float32."""
    longest = max(text.features.shape[1], video.features.shape[1])
    keyed = normalize and tuning.product(text.features.dtype) == "half" and longest <= 255
    return torch.int16 if keyed else torch.float32


def sweeps(text: Side, video: Side, normalize: bool, **options: Any) -> Iterator[tuple[Packed, Form]]:
    """Pack the sides and yield them with the form of each launch; ``options`` are fields of the form.

    Longer texts take several tiles, and a frame's result over all words would need all of them. So both directions then
    take one sweep each; the second one swaps the sides.
    """
    packed = packing.pack(text, video, normalize)
    form = _form(packed, text, video, **options)
    if not (form.both and form.long):
        yield packed, form
        return
    yield packed, form._replace(both=False)
    packed = packing.pack(video, text, normalize)
    yield packed, _form(packed, video, text, **options)._replace(both=False, swapped=True, add=True)


def _form(packed: Packed, text: Side, video: Side, **options: Any) -> Form:
    both = video.weight is not None
    return Form(
        dim=packed.form.padded,
        most=packed.form.most,
        long=packed.form.long,
        both=both,
        precision="tf32" if tuning.product(text.features.dtype) == "tf32" else "ieee",
        none=255 if packing.index_dtype(packed.sizes.frames) == torch.uint8 else -1,
        swapped=False,
        add=False,
        joint=both,
        factor=0.5 if both else 1.0,
        text_holes=text.mask is not None or packed.sizes.words != packed.form.most,
        video_holes=video.mask is not None,
        **options,
    )


def launch(kernel: Any, packed: Packed, form: Form, *arguments: Any) -> None:
    """Launch a kernel on all tiles of word slots and videos."""
    texts, _, videos, _ = packed.sizes
    most = min(form.most, layout.LONGEST_CLASS)
    kind = product_kind(packed, form)
    tile, programs = tuning.forward_tile(packed.data.device, kind, most, texts * form.most, videos)
    kernel[(programs,)](
        packed.data,
        *descriptors(packed, tile),
        *arguments,
        *packed.sizes,
        TILE=tile,
        FORM=form,
        **tuning.launch_options(tile),
    )


def product_kind(packed: Packed, form: Form) -> str:
    """Return the tile table's key for a product of both sides."""
    kind = tuning.product(packed.data.dtype)
    if form.pooling:
        return f"soft {kind}"
    return kind if kind != "half" else "keyed" if form.keyed else "exact"


def descriptors(packed: Packed, tile: tuning.Tile) -> tuple[TensorDescriptor | None, TensorDescriptor | None]:
    """Describe a tile's words and frames for the tensor memory accelerator, if the tile uses it."""
    if not tile.tma:
        return None, None
    return packing.descriptor(packed, tile.n, tile.k), packing.descriptor(packed, tile.m, tile.k)
