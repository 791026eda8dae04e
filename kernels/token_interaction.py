"""Forward kernel of the token interaction: scores, matches, or the weights' gradients, from one tile of similarities.

    S[b,f,a,i]  = <v_bf, t_ai> / (|v_bf| |t_ai|)          raw tokens on the tensor cores, norms applied afterwards
    m_t[a,i,b]  = max_f S      m_v[a,f,b] = max_i S       (and 0, if a masked token's similarity competes)
    logits[a,b] = (sum_i w_ai m_t[a,i,b] + sum_f w_bf m_v[a,f,b]) / 2
    matches     = the two argmaxes, lowest index first, as positions in the padded rows
    grad w_ai   = sum_b g[a,b] m_t[a,i,b] / 2,  grad w_bf = sum_a g[a,b] m_v[a,f,b] / 2

Tile: BM videos (one frame of each at a time) x BN words = BN / SLOTS captions of SLOTS word slots. A program keeps its
words and loops over the frames; K = D in steps of BK.

        BN words of BN/SLOTS captions          on chip: the running m_t (and its frame) of the whole tile,
      +---------+---------+---------+          and the partial sum of m_v for each (video, caption).
   BM |  frame f of BM videos  . t  |  for f   A caption's words lie in the registers of 4 adjacent threads, so the
      +---------+---------+---------+          maximum over words needs no shared memory.

FLOP per tile and frame: 2 BM BN D. Bytes read: (BM + BN) D itemsize. Bytes written per tile: 4 BM BN/SLOTS; in training
also BM BN, and BM BN/SLOTS per frame.

Slots beyond a row's real tokens hold copies of its first real token (packing.py). A copy does not change a maximum and,
because it comes later, does not win a tie. So the loop needs no mask.

KEYED (16-bit unit tokens, |S| < 2): S + 6 lies in (4, 8), where a float32 is fixed point with step 2^-21. Shift its
bits left by 8 and put 255 - index in the low byte: an unsigned maximum then gives the value and its lowest index at
once. Index 255 is "none", the masked 0. NaN cannot occur here: the weights carry it (packing.py). In the other forms
value and index are separate.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import packing, tuning
from .packing import LONGEST_CLASS, PackedRows, Side

# What a launch writes.
SCORES = tl.constexpr(0)
MATCHES = tl.constexpr(1)
WEIGHTS = tl.constexpr(2)

OFFSET = tl.constexpr(6.0)
EXPONENT = tl.constexpr(0x40000000)  # the bits of a float in [4, 8) that the shift drops
ZERO_KEY = tl.constexpr(0xC0000000)  # the key of value 0 without a token
NOBODY = tl.constexpr(255)  # "no slot" in a key; x ^ 255 is 255 - x
LARGE = packing.NOWHERE  # "no slot" in the other forms


class Form(NamedTuple):
    """Compile-time constants of the forward kernel, in addition to the tile."""

    slots: int  # slots per caption
    dim: int  # D'
    both: bool  # both directions
    mode: int  # SCORES, MATCHES or WEIGHTS
    keyed: bool
    precision: str  # of the product: "ieee" or "tf32"
    none: int  # the index of "none chosen"
    long: bool  # captions may take several tiles
    add: bool  # add to the logits of the other direction
    text_holes: bool  # a word's slot may differ from its position
    video_holes: bool  # the same for frames


class Outputs(NamedTuple):
    """The output tensors of a sweep; also passed to the kernel."""

    logits: Tensor
    logits_strides: tuple[int, int]  # caption, row
    index: Tensor
    index_strides: tuple[int, int, int]  # caption, word, row
    text_index: Tensor


class Partials(NamedTuple):
    """Partial sums of the weights' gradients; also passed to the kernel."""

    by_word: Tensor  # (blocks of rows, word slots)
    by_frame: Tensor | None  # (tiles of words, N, rows)


@triton.jit
def _key_value(key):
    return ((key >> 8) | EXPONENT).to(tl.float32, bitcast=True) - OFFSET


@triton.jit
def _over_words(s, floor, MODE: tl.constexpr, KEYED: tl.constexpr):
    """Return value and slot of the maximum over words of s (BM, captions, SLOTS); floor (captions,): 0 competes."""
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
    """Start the running maximum over frames, and its frame."""
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
    """Update the maximum with one more frame; ``position`` (1, 1) or (BM, 1) is its index in the padded row."""
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
    """Return value and frame of the maximum over frames (BM, BN); floor (BM,): a masked 0 competes."""
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
def _frame_similarity(words, frames, word_tiles, frame_tiles, b0, c0, f, TILE: tl.constexpr, FORM: tl.constexpr):
    """Compute S of frame f of BM videos with BN words; plus OFFSET if keyed."""
    # Triton 3.6 does not accept a field of a constexpr inside a tuple: bind it to a name.
    BM: tl.constexpr = TILE.m
    BN: tl.constexpr = TILE.n
    acc = tl.zeros((BM, BN), tl.float32)
    if not TILE.tma:
        kk = tl.arange(0, TILE.k)[None, :]
        v_rows = b0 + tl.arange(0, BM)
        v_rows = frames.features + v_rows[:, None].to(tl.int64) * (frames.tokens * FORM.dim) + (f * FORM.dim + kk)
        t_rows = words.features + (c0 + tl.arange(0, BN))[:, None].to(tl.int64) * FORM.dim + kk
    for k in tl.range(0, FORM.dim, TILE.k):
        if TILE.tma:
            v = frame_tiles.load([b0, f * FORM.dim + k])
            t = word_tiles.load([c0, k])
        else:
            v = tl.load(v_rows + k)
            t = tl.load(t_rows + k)
        acc = tl.dot(v, t.T, acc, input_precision=FORM.precision)
    # Load the words' norms for each frame: keeping them over the loop would cost 32 registers per thread.
    r = acc * tl.load(frames.scale + (f * frames.allocated + (b0 + tl.arange(0, BM))))[:, None]
    scale = tl.broadcast_to(tl.load(words.scale + c0 + tl.arange(0, BN))[None, :], BM, BN)
    return tl.fma(r, scale, tl.full((BM, BN), OFFSET, tl.float32)) if FORM.keyed else r * scale


@triton.jit
def _store_choices(slot, words, out, at, c0, mask, FORM: tl.constexpr):
    """Store which word each video's frame chose: turn slots (BM, captions) into indices into the padded captions."""
    found = slot < (NOBODY if FORM.keyed else LARGE)
    if FORM.text_holes:
        of_slot = c0 + tl.arange(0, slot.shape[1])[None, :] * FORM.slots + slot
        slot = tl.load(words.position + of_slot, mask=found, other=LARGE)
        found = slot < LARGE
    tl.store(out.text_index + at, tl.where(found, slot, FORM.none).to(out.text_index.dtype.element_ty), mask=mask)


@triton.jit
def _of_words(x, SLOTS: tl.constexpr):
    """Repeat (captions,) for each slot of a caption: (captions SLOTS,)."""
    return tl.reshape(tl.broadcast_to(x[:, None], x.shape[0], SLOTS), (x.shape[0] * SLOTS,))


@triton.jit
def _take_frame(
    s, total, g, t_floor, mask, at, words, frames, of_frame, out, partials, nth_frame, b, c0, FORM: tl.constexpr
):
    """Use a frame's S (BM, BN) for its videos: add its maximum over words to the logits, and store its match."""
    SLOTS: tl.constexpr = FORM.slots
    if FORM.both:
        captions = tl.reshape(s, (s.shape[0], s.shape[1] // SLOTS, SLOTS))
        value, slot = _over_words(captions, t_floor, FORM.mode, FORM.keyed)
    if FORM.mode == WEIGHTS and FORM.both:
        chosen = tl.load(out.text_index + at, mask=mask, other=NOBODY) != NOBODY
        tl.store(partials.by_frame + nth_frame + b, tl.sum(tl.where(chosen, value * g, 0.0), axis=1))
    elif FORM.mode != WEIGHTS:
        # With one direction the weight is 0, or NaN if the frame holds a NaN.
        weight = tl.load(frames.weight + of_frame)[:, None]
        total += value * weight if FORM.both else weight
    if FORM.mode == MATCHES and FORM.both:
        _store_choices(slot, words, out, at, c0, mask, FORM)
    return total


@triton.jit
def _take_words(value, frame, total, g, here, mask, at, words, out, partials, block, c0, FORM: tl.constexpr):
    """Use the maxima over frames (BM, BN) for their captions: add them to the logits, and store the matches."""
    BM: tl.constexpr = value.shape[0]
    BN: tl.constexpr = value.shape[1]
    SLOTS: tl.constexpr = FORM.slots
    CAPTIONS: tl.constexpr = BN // SLOTS
    column = tl.arange(0, BN)
    if FORM.mode == WEIGHTS:
        chosen = tl.load(out.index + at, mask=mask, other=FORM.none) != FORM.none
        share = tl.reshape(tl.broadcast_to(g[:, :, None], BM, CAPTIONS, SLOTS), (BM, BN))
        partial = partials.by_word + block.to(tl.int64) * words.allocated + c0 + column
        # Columns beyond the last caption belong to the next length class.
        tl.store(partial, tl.sum(tl.where(chosen, value * share, 0.0), axis=0), mask=_of_words(here, SLOTS))
    else:
        weights = tl.reshape(tl.load(words.weight + c0 + column), (1, CAPTIONS, SLOTS))
        total += tl.sum(tl.reshape(value, (BM, CAPTIONS, SLOTS)) * weights, axis=2)
    if FORM.mode == MATCHES:
        frame = frame if FORM.keyed else tl.where(frame == LARGE, FORM.none, frame)
        tl.store(out.index + at, frame.to(out.index.dtype.element_ty), mask=mask)
    return total


@triton.jit
def interaction_forward(
    words,
    frames,
    word_tiles,
    frame_tiles,
    out,
    partials,
    group,
    tile_base,
    zero_competes,
    factor,
    TILE: tl.constexpr,
    FORM: tl.constexpr,
):
    """Score TILE.m videos against the captions of TILE.n word slots; tokens come by descriptor if TILE.tma."""
    BM: tl.constexpr = TILE.m
    BN: tl.constexpr = TILE.n
    SLOTS: tl.constexpr = FORM.slots
    SORTED: tl.constexpr = words.order is not None
    tile = tl.program_id(0) // tl.cdiv(frames.rows, BM)
    b0 = (tl.program_id(0) % tl.cdiv(frames.rows, BM)) * BM
    b = b0 + tl.arange(0, BM)
    first, end = tile * (BN // SLOTS), words.rows
    if SORTED:
        # The grid is large enough for all captions to be in this class; only the device knows how many are.
        first += tl.load(words.class_begin + group)
        end = tl.load(words.class_begin + group + 1)
        if first >= end:
            return
    nth = first + tl.arange(0, BN // SLOTS)
    here = nth < end
    caption = tl.load(words.order + nth, mask=here, other=0).to(tl.int64) if SORTED else nth.to(tl.int64)
    t0 = tl.load(words.start + (tl.load(words.order + first) if SORTED else first))
    t_length = tl.load(words.length + caption, mask=here, other=0)
    v_length = tl.load(frames.length + b)
    inside = here[None, :] & (b < frames.rows)[:, None]
    pair = caption[None, :] * out.logits_strides[0] + b[:, None].to(tl.int64) * out.logits_strides[1]
    g = tl.load(out.logits + pair, mask=inside, other=0.0) * factor if FORM.mode == WEIGHTS else 0.0
    total = tl.zeros((BM, BN // SLOTS), tl.float32)
    for chunk in tl.range(0, tl.cdiv(tl.max(t_length, 0), BN) if FORM.long else 1):
        c0 = t0 + chunk * BN
        column = tl.arange(0, BN)  # added to addresses last: constant offsets cost no registers
        best, frame = _start(BM, BN, FORM.mode, FORM.keyed)
        for f in tl.range(0, tl.max(v_length, 0), flatten=True):
            of_frame = f * frames.allocated + b
            s = _frame_similarity(words, frames, word_tiles, frame_tiles, b0, c0, f, TILE, FORM)
            position = tl.full((1, 1), f, tl.int32)
            if FORM.video_holes and FORM.mode != SCORES:
                position = tl.load(frames.position + of_frame)[:, None]
            best, frame = _over_frames(best, frame, s, position, FORM.mode, FORM.keyed)
            total = _take_frame(
                s,
                total,
                g,
                t_length < tl.where(zero_competes, words.tokens, 1),
                inside & (f < v_length)[:, None],
                (caption[None, :] * frames.tokens + position) * frames.rows + b[:, None],
                words,
                frames,
                of_frame,
                out,
                partials,
                ((tile_base + tile).to(tl.int64) * frames.tokens + f) * frames.allocated,
                b,
                c0,
                FORM,
            )
        floor = v_length < tl.where(zero_competes, frames.tokens, 1)
        value, frame = _finish(best, frame, floor, FORM.mode, FORM.keyed)
        real = tl.reshape(chunk * BN + tl.arange(0, SLOTS)[None, :] < t_length[:, None], (BN,))
        place = tl.load(words.position + c0 + column) * out.index_strides[1]
        of_word = _of_words(caption, SLOTS) * out.index_strides[0] + place
        total = _take_words(
            value,
            frame,
            total,
            g,
            here,
            real[None, :] & (b < frames.rows)[:, None],
            of_word[None, :] + b[:, None].to(tl.int64) * out.index_strides[2],
            words,
            out,
            partials,
            b0 // BM,
            c0,
            FORM,
        )
    if FORM.mode != WEIGHTS:
        # A pair with an empty side scores 0, even if the other side has infinite weights.
        total = tl.where((t_length > 0)[None, :] & (v_length > 0)[:, None], total * factor, 0.0)
        if FORM.add:
            total += tl.load(out.logits + pair, mask=inside, other=0.0)
        tl.store(out.logits + pair, total, mask=inside)


def forward(
    text: Side, video: Side, normalize: bool, zero_competes: bool, keep_matches: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits (A, B) float32 and, if kept, matches (A, Nt, B) and (A, Nv, B): uint8, or int16 beyond 255 tokens.

    If the video has no weights, compute only the text's direction, not halved.
    """
    both = video.weight is not None
    a, nt, _ = text.features.shape
    b, nv, _ = video.features.shape
    logits = text.features.new_empty((a, b), dtype=torch.float32)
    video_index = _index(text, (a, nt, b) if keep_matches else (0,), nv, text.mask)
    text_index = _index(text, (a, nv, b) if keep_matches and both else (0,), nt, video.mask)
    if a == 0 or b == 0:
        return logits, video_index, text_index
    mode = MATCHES if keep_matches else SCORES
    out = Outputs(logits, (b, 1), video_index, (nt * b, b, 1), text_index)
    if nt <= LONGEST_CLASS or not both:
        sweep(text, video, out, mode, both, normalize, zero_competes, 0.5 if both else 1.0)
        return logits, video_index, text_index
    # Captions take several tiles here, and a frame's maximum over words would need all of them. So run one sweep per
    # direction; the second one swaps the sides.
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
) -> tuple[PackedRows, PackedRows, Partials | None]:
    """Launch the kernel for all captions and rows, once or, with a mask, once per length class.

    Return both sides in slots and, in mode WEIGHTS, the partial sums.
    """
    a, nt, _ = words.features.shape
    b, nv, _ = frames.features.shape
    arch, precision = tuning.architecture(words.features.device), tuning.product(words.features.dtype)
    keyed = precision == "half" and normalize and max(nt, nv) <= 255
    kind = precision if precision != "half" else "keyed" if keyed else "exact"
    long, step = nt > LONGEST_CLASS, tuning.STEP
    tiles = {c: tuning.forward_tile(arch, kind, c) for c in packing.length_classes(nt)}
    if words.mask is None or long:
        tiles = {c: tile for c, tile in tiles.items() if c == packing.length_class(nt)}
    block = tiles[packing.length_class(nt)].m
    grain = LONGEST_CLASS if long else packing.GRAIN
    w = packing.pack_words(words, step, normalize, grain=grain, classes=not long, copies=True)
    # With one direction packing only marks NaN frames in the frames' weights.
    frames = frames if both else frames._replace(weight=None)
    f = packing.pack_frames(frames, step, block, normalize, copies=True)
    blocks = triton.cdiv(b, block)
    partials = None
    if mode == WEIGHTS:
        by_word = w.scale.new_zeros((blocks, w.allocated))
        shape = (sum(triton.cdiv(a, t.n // c) for c, t in tiles.items()), nv, f.allocated)
        partials = Partials(by_word, w.scale.new_zeros(shape) if both else None)
    form = Form(
        slots=0,
        dim=w.dim,
        both=both,
        mode=mode.value,
        keyed=keyed,
        precision="tf32" if precision == "tf32" else "ieee",
        none=255 if out.index.dtype == torch.uint8 else -1,
        long=long,
        add=add,
        text_holes=True,
        video_holes=frames.mask is not None,
    )
    base = 0
    for group, (slots, tile) in enumerate(tiles.items()):
        captions = triton.cdiv(a, tile.n // slots)
        interaction_forward[(blocks * captions,)](
            w,
            f,
            TensorDescriptor.from_tensor(w.features, [tile.n, tile.k]) if tile.tma else None,
            TensorDescriptor.from_tensor(f.features, [tile.m, tile.k]) if tile.tma else None,
            out,
            partials,
            group,
            base,
            zero_competes,
            factor,
            TILE=tile,
            FORM=form._replace(slots=slots, text_holes=words.mask is not None or nt != slots),
            **tuning.launch_options(tile),
        )
        base += captions
    return w, f, partials


def _index(like: Side, shape: tuple[int, ...], length: int, mask: Tensor | None) -> Tensor:
    """Allocate matches. With a mask, fill them with "none", because the kernel writes only real tokens."""
    dtype = packing.index_dtype(length)
    if mask is None:
        return like.features.new_empty(shape, dtype=dtype)
    return like.features.new_full(shape, 255 if dtype == torch.uint8 else -1, dtype=dtype)
