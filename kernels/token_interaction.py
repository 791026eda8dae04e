"""Forward kernel of the token interaction: scores, matches, or the weights' gradients, from one similarity tile.

    S[b,f,a,i]  = <v_bf, t_ai> / (|v_bf| |t_ai|)          raw tokens on the tensor cores, norms applied after
    m_t[a,i,b]  = max_f S      m_v[a,f,b] = max_i S       (and 0, where a masked token's similarity competes)
    logits[a,b] = (sum_i w_ai m_t[a,i,b] + sum_f w_bf m_v[a,f,b]) / 2
    matches     = the two argmaxes, lowest index first, as positions in the padded rows
    grad w_ai   = sum_b g[a,b] m_t[a,i,b] / 2,  grad w_bf = sum_a g[a,b] m_v[a,f,b] / 2

Tile: BM videos (one frame of each at a time) x BN words = BN / SLOTS captions of SLOTS word slots. A program keeps its
words and walks over the frames; K = D in steps of BK.

        BN words of BN/SLOTS captions          on chip: the running m_t (and its frame) for the whole tile,
      +---------+---------+---------+          the partial sum of m_v a (video, caption), nothing else.
   BM |  frame f of BM videos  . t  |  for f   Words lie along a thread's own registers and 4 neighbours, so that the
      +---------+---------+---------+          maximum over words needs no shared memory.

FLOP per tile and frame: 2 BM BN D. Bytes read: (BM + BN) D itemsize; written once a tile: 4 BM BN/SLOTS, in training
BM BN bytes, and BM BN/SLOTS bytes a frame.

Slots beyond a row's real tokens hold copies of its first real token (packing.py): a copy never changes a maximum and,
standing later, never wins a tie, so no mask is needed in the loop.

KEYED (16-bit unit tokens, |S| < 2): S + 6 lies in (4, 8), where a float32 is fixed point with step 2^-21. Shifted left
by 8 with 255 - index below, an unsigned maximum gives value and lowest index at once; an index of 255 is "none", the
masked 0. A NaN never gets here: it travels in the weights (packing.py). Otherwise value and index are kept apart.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import packing, tuning
from .packing import LONGEST_CLASS, Packed, Side
from .tuning import Tile

# What a launch writes.
SCORES = tl.constexpr(0)
MATCHES = tl.constexpr(1)
WEIGHTS = tl.constexpr(2)

OFFSET = tl.constexpr(6.0)
EXPONENT = tl.constexpr(0x40000000)  # the bits of a float in [4, 8) that the shift pushes out
ZERO_KEY = tl.constexpr(0xC0000000)  # the key of value 0 that names no token
NOBODY = tl.constexpr(255)  # no slot, in a key; x ^ 255 is 255 - x
LARGE = tl.constexpr(packing.NOWHERE)  # no slot, where value and slot are kept apart


@triton.jit
def _key_value(key):
    return ((key >> 8) | EXPONENT).to(tl.float32, bitcast=True) - OFFSET


@triton.jit
def _over_words(s, floor, MODE: tl.constexpr, KEYED: tl.constexpr):
    """Value and slot of the maximum of s (BM, captions, SLOTS) over words; floor (captions,): a masked 0 competes."""
    slot = tl.arange(0, s.shape[2])[None, None, :]
    if KEYED and MODE == MATCHES:
        key = (s.to(tl.uint32, bitcast=True) << 8) + (slot ^ NOBODY).to(tl.uint32)
        best = tl.maximum(tl.max(key, axis=2), tl.where(floor, ZERO_KEY, 0).to(tl.uint32)[None, :])
        value = _key_value(best)
        index = ((best & NOBODY) ^ NOBODY).to(tl.int32)
    elif KEYED:
        value = tl.maximum(tl.max(s, axis=2), tl.where(floor, OFFSET, 0.0)[None, :]) - OFFSET
        index = value.to(tl.int32)
    else:
        value = tl.max(s, axis=2)
        zero_wins = floor[None, :] & (value < 0)
        index = value.to(tl.int32)
        if MODE == MATCHES:
            index = tl.min(tl.where(s == value[:, :, None], slot, LARGE), axis=2)
            index = tl.where(zero_wins, LARGE, index)
        value = tl.where(zero_wins, 0.0, value)
    return value, index


@triton.jit
def _start(BM: tl.constexpr, BN: tl.constexpr, MODE: tl.constexpr, KEYED: tl.constexpr):
    """The running maximum over frames before the first frame, and its frame where that is kept apart."""
    frame = tl.full((BM, BN), LARGE, tl.int32)
    if KEYED and MODE == MATCHES:
        best = tl.zeros((BM, BN), tl.uint32)
    elif KEYED:
        best = tl.zeros((BM, BN), tl.float32)
    else:
        best = tl.full((BM, BN), float("-inf"), tl.float32)
    return best, frame


@triton.jit
def _over_frames(best, frame, s, position, MODE: tl.constexpr, KEYED: tl.constexpr):
    """Take one more frame, known by its position in the padded row ((1, 1) or (BM, 1))."""
    if KEYED and MODE == MATCHES:
        best = tl.maximum(best, (s.to(tl.uint32, bitcast=True) << 8) + (position ^ NOBODY).to(tl.uint32))
    elif KEYED:
        best = tl.maximum(best, s)
    else:
        if MODE == MATCHES:
            frame = tl.where(s > best, position, frame)
        best = tl.maximum(best, s)
    return best, frame


@triton.jit
def _finish(best, frame, floor, MODE: tl.constexpr, KEYED: tl.constexpr):
    """Value and frame of the maximum over frames (BM, BN); floor (BM,): a masked 0 competes."""
    if KEYED and MODE == MATCHES:
        best = tl.maximum(best, tl.where(floor, ZERO_KEY, 0).to(tl.uint32)[:, None])
        value = _key_value(best)
        frame = ((best & NOBODY) ^ NOBODY).to(tl.int32)
    elif KEYED:
        value = tl.maximum(best, tl.where(floor, OFFSET, 0.0)[:, None]) - OFFSET
    else:
        zero_wins = floor[:, None] & (best < 0)
        value = tl.where(zero_wins, 0.0, best)
        frame = tl.where(zero_wins, LARGE, frame)
    return value, frame


@triton.jit
def _frame_similarity(
    text,
    video,
    b0,
    c0,
    f,
    v_stride,
    scale_v,
    scale_t,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    KEYED: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    """S of frame f of BM videos with BN words; plus OFFSET if KEYED."""
    acc = tl.zeros((BM, BN), tl.float32)
    if not TMA:
        kk = tl.arange(0, BK)[None, :]
        v_rows = video + (b0 + tl.arange(0, BM))[:, None].to(tl.int64) * v_stride + (f * D + kk)
        t_rows = text + (c0 + tl.arange(0, BN))[:, None].to(tl.int64) * D + kk
    for k in tl.range(0, D, BK):
        if TMA:
            v = video.load([b0, f * D + k])
            t = text.load([c0, k])
        else:
            v = tl.load(v_rows + k)
            t = tl.load(t_rows + k)
        acc = tl.dot(v, t.T, acc, input_precision=PRECISION)
    # Loaded frame by frame: held over the loop, the words' norms would cost 32 registers a thread.
    r = acc * tl.load(scale_v)[:, None]
    scale = tl.broadcast_to(tl.load(scale_t)[None, :], BM, BN)
    return tl.fma(r, scale, tl.full((BM, BN), OFFSET, tl.float32)) if KEYED else r * scale


@triton.jit
def _store_choices(
    slot,
    text_index,
    at,
    text_position,
    c0,
    mask,
    SLOTS: tl.constexpr,
    KEYED: tl.constexpr,
    HOLES: tl.constexpr,
    NONE: tl.constexpr,
):
    """Which word each video's frame chose, slots (BM, captions) turned into places in the padded captions."""
    found = slot < (NOBODY if KEYED else LARGE)
    if HOLES:
        of_slot = c0 + tl.arange(0, slot.shape[1])[None, :] * SLOTS + slot
        slot = tl.load(text_position + of_slot, mask=found, other=LARGE)
        found = slot < LARGE
    tl.store(text_index + at, tl.where(found, slot, NONE).to(text_index.dtype.element_ty), mask=mask)


@triton.jit
def _of_words(x, SLOTS: tl.constexpr):
    """(captions,) repeated for each of a caption's slots, (captions SLOTS,)."""
    return tl.reshape(tl.broadcast_to(x[:, None], x.shape[0], SLOTS), (x.shape[0] * SLOTS,))


@triton.jit
def _take_frame(
    s,
    out,
    g,
    t_floor,
    mask,
    at,
    text_index,
    text_position,
    weight,
    partial,
    c0,
    SLOTS: tl.constexpr,
    BOTH: tl.constexpr,
    MODE: tl.constexpr,
    KEYED: tl.constexpr,
    HOLES: tl.constexpr,
    NONE: tl.constexpr,
):
    """What a frame's S (BM, BN) means for its videos: their words' maximum, and who that was."""
    CAPTIONS: tl.constexpr = s.shape[1] // SLOTS
    if BOTH:
        value, slot = _over_words(tl.reshape(s, (s.shape[0], CAPTIONS, SLOTS)), t_floor, MODE, KEYED)
    if MODE == WEIGHTS and BOTH:
        chosen = tl.load(text_index + at, mask=mask, other=NOBODY) != NOBODY
        tl.store(partial, tl.sum(tl.where(chosen, value * g, 0.0), axis=1))
    elif MODE != WEIGHTS:
        # One direction: the weight is 0, or NaN where the frame is.
        out += value * tl.load(weight)[:, None] if BOTH else tl.load(weight)[:, None]
    if MODE == MATCHES and BOTH:
        _store_choices(slot, text_index, at, text_position, c0, mask, SLOTS, KEYED, HOLES, NONE)
    return out


@triton.jit
def _take_words(
    value,
    frame,
    out,
    g,
    here,
    mask,
    at,
    video_index,
    weight,
    partial,
    SLOTS: tl.constexpr,
    MODE: tl.constexpr,
    KEYED: tl.constexpr,
    NONE: tl.constexpr,
):
    """What the maxima over frames (BM, BN) mean for their words' captions, and who they were."""
    BM: tl.constexpr = value.shape[0]
    BN: tl.constexpr = value.shape[1]
    CAPTIONS: tl.constexpr = BN // SLOTS
    if MODE == WEIGHTS:
        chosen = tl.load(video_index + at, mask=mask, other=NONE) != NONE
        share = tl.reshape(tl.broadcast_to(g[:, :, None], BM, CAPTIONS, SLOTS), (BM, BN))
        # Columns beyond the last caption are another class's.
        tl.store(partial, tl.sum(tl.where(chosen, value * share, 0.0), axis=0), mask=_of_words(here, SLOTS))
    else:
        weights = tl.reshape(tl.load(weight), (1, CAPTIONS, SLOTS))
        out += tl.sum(tl.reshape(value, (BM, CAPTIONS, SLOTS)) * weights, axis=2)
    if MODE == MATCHES:
        frame = frame if KEYED else tl.where(frame == LARGE, NONE, frame)
        tl.store(video_index + at, frame.to(video_index.dtype.element_ty), mask=mask)
    return out


@triton.jit
def _store_logits(out, scored, at, mask, ADD: tl.constexpr):
    # A pair with an empty side scores 0 whatever the other side's weights are.
    out = tl.where(scored, out, 0.0)
    if ADD:
        out += tl.load(at, mask=mask, other=0.0)
    tl.store(at, out, mask=mask)


@triton.jit
def interaction_forward(
    text,
    video,
    text_scale,
    video_scale,
    text_weight,
    video_weight,
    text_position,
    video_position,
    text_length,
    video_length,
    order,
    start,
    class_begin,
    logits,
    video_index,
    text_index,
    text_partial,
    video_partial,
    texts,
    videos,
    text_tokens,
    video_tokens,
    video_rows,
    partial_slots,
    group,
    tile_base,
    zero_competes,
    factor,
    logits_caption,
    logits_row,
    index_caption,
    index_token,
    index_row,
    SLOTS: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TMA: tl.constexpr,
    BOTH: tl.constexpr,
    MODE: tl.constexpr,
    KEYED: tl.constexpr,
    PRECISION: tl.constexpr,
    NONE: tl.constexpr,
    SORTED: tl.constexpr,
    LONG: tl.constexpr,
    ADD: tl.constexpr,
    TEXT_HOLES: tl.constexpr,
    VIDEO_HOLES: tl.constexpr,
):
    tile = tl.program_id(0) // tl.cdiv(videos, BM)
    b0 = (tl.program_id(0) % tl.cdiv(videos, BM)) * BM
    b = b0 + tl.arange(0, BM)
    first, end = tile * (BN // SLOTS), texts
    if SORTED:
        # The grid covers every caption being of this class; how many are is known on the device alone.
        first += tl.load(class_begin + group)
        end = tl.load(class_begin + group + 1)
        if first >= end:
            return
    nth = first + tl.arange(0, BN // SLOTS)
    here = nth < end
    caption = tl.load(order + nth, mask=here, other=0).to(tl.int64) if SORTED else nth.to(tl.int64)
    t0 = tl.load(start + (tl.load(order + first) if SORTED else first))
    t_length = tl.load(text_length + caption, mask=here, other=0)
    v_length = tl.load(video_length + b)
    inside = here[None, :] & (b < videos)[:, None]
    pair = caption[None, :] * logits_caption + b[:, None].to(tl.int64) * logits_row
    g = tl.load(logits + pair, mask=inside, other=0.0) * factor if MODE == WEIGHTS else 0.0
    out = tl.zeros((BM, BN // SLOTS), tl.float32)
    for chunk in tl.range(0, tl.cdiv(tl.max(t_length, 0), BN) if LONG else 1):
        c0 = t0 + chunk * BN
        column = tl.arange(0, BN)  # added last: offsets from one address cost no registers
        best, frame = _start(BM, BN, MODE, KEYED)
        for f in tl.range(0, tl.max(v_length, 0), flatten=True):
            of_frame = f * video_rows + b
            s = _frame_similarity(
                text,
                video,
                b0,
                c0,
                f,
                video_tokens * D,
                video_scale + of_frame,
                text_scale + c0 + column,
                D,
                BM,
                BN,
                BK,
                KEYED,
                PRECISION,
                TMA,
            )
            position = tl.full((1, 1), f, tl.int32)
            if VIDEO_HOLES and MODE != SCORES:
                position = tl.load(video_position + of_frame)[:, None]
            best, frame = _over_frames(best, frame, s, position, MODE, KEYED)
            out = _take_frame(
                s,
                out,
                g,
                t_length < tl.where(zero_competes, text_tokens, 1),
                inside & (f < v_length)[:, None],
                (caption[None, :] * video_tokens + position) * videos + b[:, None],
                text_index,
                text_position,
                video_weight + of_frame,
                video_partial + ((tile_base + tile).to(tl.int64) * video_tokens + f) * video_rows + b,
                c0,
                SLOTS,
                BOTH,
                MODE,
                KEYED,
                TEXT_HOLES,
                NONE,
            )
        value, frame = _finish(best, frame, v_length < tl.where(zero_competes, video_tokens, 1), MODE, KEYED)
        real = tl.reshape(chunk * BN + tl.arange(0, SLOTS)[None, :] < t_length[:, None], (BN,))
        of_word = _of_words(caption, SLOTS) * index_caption + tl.load(text_position + c0 + column) * index_token
        out = _take_words(
            value,
            frame,
            out,
            g,
            here,
            real[None, :] & (b < videos)[:, None],
            of_word[None, :] + b[:, None].to(tl.int64) * index_row,
            video_index,
            text_weight + c0 + column,
            text_partial + (b0 // BM).to(tl.int64) * partial_slots + c0 + column,
            SLOTS,
            MODE,
            KEYED,
            NONE,
        )
    if MODE != WEIGHTS:
        _store_logits(out * factor, (t_length > 0)[None, :] & (v_length > 0)[:, None], logits + pair, inside, ADD)


class Outputs(NamedTuple):
    """Where a sweep writes, in the caller's layout: strides of a caption, a word's place and a row."""

    logits: Tensor
    logits_strides: tuple[int, int]  # caption, row
    index: Tensor
    index_strides: tuple[int, int, int]  # caption, word, row
    text_index: Tensor


class Partials(NamedTuple):
    """Partial sums of the weights' gradients, and the slots that they belong to."""

    words: Packed
    frames: Packed
    by_word: Tensor  # (blocks of rows, word slots)
    by_frame: Tensor | None  # (tiles of words, N, rows)


def forward(
    text: Side, video: Side, normalize: bool, zero_competes: bool, keep_matches: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (A, B) float32 and, if kept, matches (A, Nt, B) and (A, Nv, B), uint8 or beyond 255 tokens int16.

    A video without weights: one direction, not halved.
    """
    both = video.weight is not None
    a, nt, _ = text.features.shape
    b, nv, _ = video.features.shape
    new = text.features.new_empty
    logits = new((a, b), dtype=torch.float32)
    video_index = _index(text, (a, nt, b) if keep_matches else (0,), nv, text.mask)
    text_index = _index(text, (a, nv, b) if keep_matches and both else (0,), nt, video.mask)
    if a == 0 or b == 0:
        return logits, video_index, text_index
    mode = MATCHES if keep_matches else SCORES
    out = Outputs(logits, (b, 1), video_index, (nt * b, b, 1), text_index)
    if nt <= LONGEST_CLASS or not both:
        sweep(text, video, out, mode, both, normalize, zero_competes, 0.5 if both else 1.0)
        return logits, video_index, text_index
    # Words beyond one tile: a frame's maximum would have to wait for the caption's next tile. Each direction by itself.
    sweep(text, video, out, mode, False, normalize, zero_competes, 0.5)
    out = Outputs(logits, (1, b), text_index, (1, b, nv * b), text_index)
    sweep(video, text, out, mode, False, normalize, zero_competes, 0.5, add=True)
    return logits, video_index, text_index


def sweep(
    words: Side,
    frames: Side,
    out: Outputs,
    mode: tl.constexpr,
    both: bool,
    normalize: bool,
    zero_competes: bool,
    factor: float,
    add: bool = False,
) -> Partials:
    """Launch the kernel over every caption and row: once, or once a length class where a mask gives lengths."""
    a, nt, _ = words.features.shape
    b, nv, _ = frames.features.shape
    arch, precision = tuning.architecture(words.features.device), tuning.product(words.features.dtype)
    keyed = precision == "half" and normalize and max(nt, nv) <= 255
    kind = precision if precision != "half" else "keyed" if keyed else "exact"
    long, step = nt > LONGEST_CLASS, tuning.STEP
    tiles = {c: tuning.forward_tile(arch, kind, c) for c in packing.length_classes(nt)}
    if words.mask is None or long:
        tiles = {c: tile for c, tile in tiles.items() if c == packing.length_class(nt)}
    block, sorted_ = tiles[packing.length_class(nt)].m, words.mask is not None and not long
    w = packing.pack_words(
        words, step, normalize, grain=LONGEST_CLASS if long else packing.GRAIN, classes=not long, copies=True
    )
    # One direction has no use for the frames' weights, but for their NaN.
    frames = frames if both else frames._replace(weight=None)
    f = packing.pack_frames(frames, step, block, normalize, copies=True)
    blocks = triton.cdiv(b, block)
    partials = Partials(w, f, w.scale, None)
    if mode == WEIGHTS:
        shape = (sum(triton.cdiv(a, t.n // c) for c, t in tiles.items()), nv, f.rows_allocated)
        by_word = w.scale.new_zeros((blocks, len(w.scale)))
        partials = Partials(w, f, by_word, w.scale.new_zeros(shape) if both else None)
    base = 0
    for group, (slots, tile) in enumerate(tiles.items()):
        captions = triton.cdiv(a, tile.n // slots)
        interaction_forward[(blocks * captions,)](
            *_operands(w.tokens, f.tokens, tile),
            w.scale,
            f.scale,
            w.weight,
            f.weight,
            w.position,
            f.position,
            w.length,
            f.length,
            w.length if w.order is None else w.order,
            w.start,
            w.length if w.class_begin is None else w.class_begin,
            out.logits,
            out.index,
            out.text_index,
            partials.by_word,
            partials.by_word if partials.by_frame is None else partials.by_frame,
            a,
            b,
            nt,
            nv,
            f.rows_allocated,
            len(w.scale),
            group,
            base,
            zero_competes,
            factor,
            *out.logits_strides,
            *out.index_strides,
            SLOTS=slots,
            D=w.dim,
            BM=tile.m,
            BN=tile.n,
            BK=tile.k,
            BOTH=both,
            MODE=mode,
            KEYED=keyed,
            PRECISION="tf32" if precision == "tf32" else "ieee",
            NONE=255 if out.index.dtype == torch.uint8 else -1,
            SORTED=sorted_,
            LONG=long,
            ADD=add,
            TEXT_HOLES=words.mask is not None or nt != slots,
            VIDEO_HOLES=frames.mask is not None,
            TMA=tile.tma,
            **tuning.launch_options(tile),
        )
        base += captions
    return partials


def _operands(words: Tensor, frames: Tensor, tile: Tile) -> tuple[object, object]:
    if not tile.tma:
        return words, frames
    return (
        TensorDescriptor.from_tensor(words, [tile.n, tile.k]),
        TensorDescriptor.from_tensor(frames, [tile.m, tile.k]),
    )


def _index(like: Side, shape: tuple[int, ...], length: int, mask: Tensor | None) -> Tensor:
    """Memory for matches; where tokens may be masked, "none" everywhere: the kernel writes real tokens' alone."""
    dtype, none = (torch.uint8, 255) if length <= 255 else (torch.int16, -1)
    if mask is None:
        return like.features.new_empty(shape, dtype=dtype)
    return like.features.new_full(shape, none, dtype=dtype)
