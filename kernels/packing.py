"""Pack the real tokens of both sides into dense slots (layout.py), and turn gradients of slots into those of the rows.

    slot s of row r   <-  the s-th real token x of the row; masked tokens are never read. Unchanged, except that unit
                          tokens in float16 are multiplied by a power of two, and their gradients too
    scale             =   1 / |x|  (float32; 0 where |x| <= 1e-12 or overflows; 1 without normalisation)
    weight            =   the token's weight; NaN if the token holds a NaN or Inf; its slot is then zero
    grad x            =   H - u <u, H>,  u = scale x,  H the gradient of the token's raw dot products times the tokens

Slots beyond a row's real tokens hold copies of its first real token: a copy changes no maximum and, because it comes
later, wins no tie. Their weight is 0.

Tile: a few slots of one row x all D channels, on chip. Per slot: D itemsize bytes read and written, 2 D FLOP.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import layout, tuning

NORM_EPS = 1e-12
NOWHERE = tl.constexpr(-1)  # position of a slot without a token; -2 - n is that of a copy of word n
# The same values for the kernels, which can only read constexpr globals.
CHUNK, TAIL, TINY = tl.constexpr(layout.CHUNK), tl.constexpr(layout.TAIL), tl.constexpr(NORM_EPS)
VIDEO_BLOCK, COUNT_BLOCK = tl.constexpr(layout.VIDEO_BLOCK), tl.constexpr(layout.COUNT_BLOCK)
CLASSES = tl.constexpr(layout.CLASSES)
ONE_TWICE, EXPONENT_BITS = tl.constexpr(254 << 23), tl.constexpr(255 << 23)
# A chunk's properties: the chunks of its text in a tile, 1 to 8, and flags.
CHUNKS_OF_TEXT, LEAD, HAS_MASKED, IS_EMPTY = tl.constexpr(15), tl.constexpr(16), tl.constexpr(32), tl.constexpr(64)
LONGEST_CLASS = tl.constexpr(layout.LONGEST_CLASS)
# Shapes change with the last batch of an epoch. Compiling for their divisibility would compile again for it.
SIZES = ["texts", "words", "videos", "frames"]


class Strided(NamedTuple):
    """A tensor and its strides; passed to kernels."""

    data: Tensor
    strides: tuple[int, ...]


class Side(NamedTuple):
    """One side of the interaction, not packed."""

    features: Tensor  # (rows, N, D), any strides
    weight: Tensor | None  # (rows, N)
    mask: Tensor | None  # (rows, N) bool


class Sizes(NamedTuple):
    """Numbers of texts, words (Nt), videos and frames (Nv); every kernel's last arguments."""

    texts: int
    words: int
    videos: int
    frames: int


class Form(NamedTuple):
    """Compile-time constants of the kernels in this module."""

    dim: int  # D
    padded: int  # D'
    channels: int  # the power of two that holds D'
    slots: int  # slots per step
    words: int  # the power of two that holds Nt
    frames: int  # the power of two that holds Nv
    most: int  # the most slots of a text
    long: bool  # texts may take several tiles
    normalize: bool
    rescale: bool  # multiply tokens by powers of two, so that their norms lie in [1, 2)
    video_holes: bool  # a frame's slot may differ from its position
    clear: bool  # zero every unused word slot, not only the tail

    def of_slots(self) -> Form:
        """Keep only what kernels on slots depend on, so that they are not compiled again for the rest."""
        return self._replace(dim=0, channels=0, slots=0, words=0, frames=0, long=False, normalize=False, rescale=False)


class Packed(NamedTuple):
    """Both sides in slots."""

    data: Tensor  # 1-D, layout.packed_size elements of the features' dtype
    sizes: Sizes
    form: Form

    @property
    def word_slots(self) -> int:
        return layout.word_slots(self.sizes.texts, self.sizes.words)

    @property
    def videos(self) -> int:
        """Videos with padding."""
        return layout.padded_videos(self.sizes.videos)


@triton.jit
def companions(packed, texts, videos, frames, MOST: tl.constexpr, D: tl.constexpr):
    """Return pointers to scale, weight, position, factor, length, first slot, a chunk's text and properties, slots by
    class.
    """
    rows = (texts * MOST + TAIL).to(tl.int64) + tl.cdiv(videos, VIDEO_BLOCK).to(tl.int64) * VIDEO_BLOCK * frames
    scale = (packed + rows * D).to(tl.pointer_type(tl.float32), bitcast=True)
    weight = scale + rows
    position = (weight + rows).to(tl.pointer_type(tl.int32), bitcast=True)
    factor = (position + rows).to(tl.pointer_type(tl.float32), bitcast=True)
    length = position + 2 * rows
    start = length + texts + tl.cdiv(videos, VIDEO_BLOCK) * VIDEO_BLOCK
    chunk_text = start + texts + 1
    chunk_about = chunk_text + (texts * MOST + TAIL) // CHUNK
    by_class = chunk_about + (texts * MOST + TAIL) // CHUNK
    return scale, weight, position, factor, length, start, chunk_text, chunk_about, by_class


@triton.jit
def slots_for(count, LONG: tl.constexpr):
    """Return the number of slots of a text with ``count`` real words."""
    if LONG:
        return tl.maximum(tl.cdiv(count, LONGEST_CLASS), 1) * LONGEST_CLASS
    else:
        return tl.where(count <= 16, 16, tl.where(count <= 32, 32, tl.where(count <= 64, 64, 128)))


@triton.jit
def class_of(slots, LONG: tl.constexpr):
    """Return a text's place in the order of classes: 0 for 128 slots, 3 for 16. All long texts are of class 0."""
    if LONG:
        return slots * 0
    else:
        return tl.where(slots == 128, 0, tl.where(slots == 64, 1, tl.where(slots == 32, 2, 3)))


@triton.jit
def _count(mask, row, rows, tokens):
    """Count the real tokens of COUNT_BLOCK rows."""
    count = tl.where(row < rows, tokens, 0)
    if mask is not None:
        count = tl.zeros((COUNT_BLOCK,), tl.int32)
        for n0 in tl.range(0, tokens, 32):
            n = n0 + tl.arange(0, 32)[None, :]
            flag = mask + row[:, None].to(tl.int64) * tokens + n
            there = tl.load(flag, mask=(row < rows)[:, None] & (n < tokens), other=0)
            count += tl.sum((there != 0).to(tl.int32), 1)
    return count


@triton.jit(do_not_specialize=SIZES)
def count_tokens(text_mask, video_mask, packed, texts, words, videos, frames, FORM: tl.constexpr):
    """Count the real tokens of COUNT_BLOCK rows; for texts also sum their slots by class."""
    _, _, _, _, length, _, _, _, by_class = companions(packed, texts, videos, frames, FORM.most, FORM.padded)
    text_blocks = tl.cdiv(texts, COUNT_BLOCK)
    block = tl.program_id(0)
    if block < text_blocks:
        row = block * COUNT_BLOCK + tl.arange(0, COUNT_BLOCK)
        count = _count(text_mask, row, texts, words)
        tl.store(length + row, count, mask=row < texts)
        need = slots_for(count, FORM.long)
        kind = tl.arange(0, CLASSES)
        here = (row < texts)[:, None] & (class_of(need, FORM.long)[:, None] == kind[None, :])
        tl.store(by_class + block * CLASSES + kind, tl.sum(tl.where(here, need[:, None], 0), 0))
    else:
        row = (block - text_blocks) * COUNT_BLOCK + tl.arange(0, COUNT_BLOCK)
        tl.store(length + texts + row, _count(video_mask, row, videos, frames))


@triton.jit
def total_slots(by_class, texts):
    """Return the number of word slots in use."""
    total = tl.zeros((COUNT_BLOCK, CLASSES), tl.int32)
    kind = tl.arange(0, CLASSES)[None, :]
    for j0 in tl.range(0, tl.cdiv(texts, COUNT_BLOCK), COUNT_BLOCK):
        j = j0 + tl.arange(0, COUNT_BLOCK)[:, None]
        total += tl.load(by_class + j * CLASSES + kind, mask=j < tl.cdiv(texts, COUNT_BLOCK), other=0)
    return tl.sum(tl.sum(total, 1), 0)


@triton.jit
def _first_slot(length, by_class, row, count, texts, LONG: tl.constexpr):
    """Return a text's first slot: after all texts of larger classes, and the earlier ones of its own."""
    block = row // COUNT_BLOCK
    need = slots_for(count, LONG)
    mine = class_of(need, LONG)
    kind = tl.arange(0, CLASSES)[None, :]
    before = tl.zeros((COUNT_BLOCK, CLASSES), tl.int32)
    for j0 in tl.range(0, tl.cdiv(texts, COUNT_BLOCK), COUNT_BLOCK):
        j = j0 + tl.arange(0, COUNT_BLOCK)[:, None]
        slots = tl.load(by_class + j * CLASSES + kind, mask=j < tl.cdiv(texts, COUNT_BLOCK), other=0)
        before += tl.where((kind < mine) | ((kind == mine) & (j < block)), slots, 0)
    others = block * COUNT_BLOCK + tl.arange(0, COUNT_BLOCK)
    slots = slots_for(tl.load(length + others, mask=others < row, other=0), LONG)
    same = (others < row) & (class_of(slots, LONG) == mine)
    return tl.sum(tl.sum(before, 1), 0) + tl.sum(tl.where(same, slots, 0), 0)


@triton.jit
def original(position):
    """Return a word slot's position, for a copy that of the copied word."""
    return tl.where(position < NOWHERE, -2 - position, position)


@triton.jit
def _real(mask, row, tokens, BLOCK: tl.constexpr):
    """Return which of a row's tokens are real, 0 or 1."""
    n = tl.arange(0, BLOCK)
    if mask is None:
        return (n < tokens).to(tl.int32)
    else:
        return (tl.load(mask + row * tokens + n, mask=n < tokens, other=0) != 0).to(tl.int32)


@triton.jit
def _fill(
    features,
    weights,
    mask,
    packed,
    scale,
    weight,
    position,
    factor,
    row,
    count,
    tokens,
    slots,
    first,
    step,
    COPIES: tl.constexpr,
    BLOCK: tl.constexpr,
    FORM: tl.constexpr,
):
    """Fill the slots first, first + step, ... of one row."""
    # Triton 3.6 does not accept a field of a constexpr inside a tuple: bind it to a name.
    SLOTS: tl.constexpr = FORM.slots
    # The mask has no row of a padding video; those have no real token.
    there = _real(mask, row, tl.where(count > 0, tokens, 0), BLOCK)
    rank = tl.cumsum(there, 0) - 1
    n = tl.arange(0, BLOCK)
    channel = tl.arange(0, FORM.channels)[None, :]
    for s0 in tl.range(0, slots, FORM.slots):
        s = s0 + tl.arange(0, FORM.slots)
        is_real = s < count
        filled = s < tl.where(count > 0, slots, 0)
        wanted = tl.where(is_real, s, 0)
        # The token of rank s, by comparison: a gather would need a table in memory.
        token = tl.sum(tl.where((there != 0)[None, :] & (rank[None, :] == wanted[:, None]), n[None, :], 0), 1)
        at = (row * tokens + token)[:, None] * FORM.dim + channel
        x = tl.load(features + at, mask=filled[:, None] & (channel < FORM.dim), other=0.0)
        wide = x.to(tl.float32)
        broken = tl.sum(wide * 0.0, 1) != 0.0
        inverse = tl.where(filled & (broken == 0), 1.0, 0.0)
        if FORM.normalize:
            norm = tl.sqrt_rn(tl.sum(wide * wide, 1))
            alive = (norm > TINY) & (norm < float("inf"))
            if FORM.rescale:
                # 2^-e for a norm in [2^e, 2^(e + 1)), made from its exponent's bits.
                power = ONE_TWICE - (tl.where(alive, norm, 1.0).to(tl.int32, bitcast=True) & EXPONENT_BITS)
                power = power.to(tl.float32, bitcast=True)
                wide *= power[:, None]
                norm *= power
            inverse = tl.where(alive, tl.div_rn(tl.full((SLOTS,), 1.0, tl.float32), tl.where(alive, norm, 1.0)), 0.0)
        w = tl.zeros((SLOTS,), tl.float32)
        if weights is not None:
            w = tl.load(weights + row * tokens + token, mask=is_real, other=0.0).to(tl.float32)
        w = tl.where(broken & is_real, float("nan"), w)
        slot = first + s.to(tl.int64) * step
        inside = s < slots
        clean = tl.where((inverse == 0.0)[:, None], 0.0, wide).to(x.dtype)
        tl.store(packed + slot[:, None] * FORM.padded + channel, clean, mask=inside[:, None] & (channel < FORM.padded))
        tl.store(scale + slot, inverse, mask=inside)
        if FORM.rescale:
            tl.store(factor + slot, power, mask=inside)
        tl.store(weight + slot, w, mask=inside)
        # The loop over frames is as long as the longest video, so a copy of a frame simply is that frame.
        of_copy = token if COPIES else -2 - token
        tl.store(position + slot, tl.where(is_real, token, tl.where(filled, of_copy, NOWHERE)), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def pack_rows(
    text,
    text_weight,
    text_mask,
    video,
    video_weight,
    video_mask,
    packed,
    texts,
    words,
    videos,
    frames,
    FORM: tl.constexpr,
):
    """Fill the slots of one text and of one video, and zero some slots after the last word."""
    scale, weight, position, factor, length, start, chunk_text, chunk_about, by_class = companions(
        packed, texts, videos, frames, FORM.most, FORM.padded
    )
    row = tl.program_id(0).to(tl.int64)
    word_rows = texts * FORM.most + TAIL
    padded = tl.cdiv(videos, VIDEO_BLOCK) * VIDEO_BLOCK
    if row < texts:
        count = tl.load(length + row)
        slots = slots_for(count, FORM.long)
        first = _first_slot(length, by_class, row, count, texts, FORM.long)
        tl.store(start + row, first)
        for c0 in tl.range(0, slots // CHUNK, 8):
            c = c0 + tl.arange(0, 8)
            tl.store(chunk_text + first // CHUNK + c, (row + c * 0).to(tl.int32), mask=c < slots // CHUNK)
            about = tl.minimum(slots // CHUNK, 8) + tl.where(c == 0, LEAD, 0)
            about += tl.where(count < words, HAS_MASKED, 0) + tl.where(count == 0, IS_EMPTY, 0)
            tl.store(chunk_about + first // CHUNK + c, about, mask=c < slots // CHUNK)
        _fill(
            text,
            text_weight,
            text_mask,
            packed,
            scale,
            weight,
            position,
            factor,
            row,
            count,
            words,
            slots,
            first.to(tl.int64),
            1,
            False,
            FORM.words,
            FORM,
        )
    if row < padded:
        _fill(
            video,
            video_weight,
            video_mask,
            packed,
            scale,
            weight,
            position,
            factor,
            row,
            tl.load(length + texts + row),
            frames,
            frames,
            word_rows.to(tl.int64) + row,
            padded,
            True,
            FORM.frames,
            FORM,
        )
    total = total_slots(by_class, texts)
    if row == 0:
        tl.store(start + texts, total)
    end = word_rows if FORM.clear else total + TAIL
    s = tl.arange(0, CHUNK)
    for zeroed in tl.range(total + tl.program_id(0) * CHUNK, end, tl.num_programs(0) * CHUNK):
        slot = (zeroed + s).to(tl.int64)
        tl.store(chunk_text + zeroed // CHUNK, -1)
        tl.store(chunk_about + zeroed // CHUNK, 1 + IS_EMPTY)
        tl.store(scale + slot, tl.zeros((CHUNK,), tl.float32))
        tl.store(weight + slot, tl.zeros((CHUNK,), tl.float32))
        tl.store(position + slot, s * 0 + NOWHERE)
        for d0 in tl.range(0, FORM.padded, 64):
            at = slot[:, None] * FORM.padded + d0 + tl.arange(0, 64)[None, :]
            tl.store(packed + at, tl.zeros((CHUNK, 64), packed.dtype.element_ty))


@triton.jit
def _unpack_row(
    grad,
    mask,
    packed,
    scale,
    factor,
    out,
    row,
    tokens,
    first,
    step,
    skipped,
    boost,
    BLOCK: tl.constexpr,
    FORM: tl.constexpr,
):
    """Write the gradients of one row's tokens, 0 for masked ones. ``skipped``: slots before the first row of grad."""
    there = _real(mask, row, tokens, BLOCK)
    m = tl.arange(0, BLOCK)[None, :]
    channel = tl.arange(0, FORM.channels)[None, :]
    for n0 in tl.range(0, tokens, FORM.slots):
        n = n0 + tl.arange(0, FORM.slots)
        rank = tl.sum(tl.where(m < n[:, None], there[None, :], 0), 1)
        real = tl.sum(tl.where(m == n[:, None], there[None, :], 0), 1) != 0
        slot = first + rank.to(tl.int64) * step
        inside = real[:, None] & (channel < FORM.dim)
        h = tl.load(grad + (slot - skipped)[:, None] * FORM.padded + channel, mask=inside, other=0.0)
        if boost is not None:
            h *= 1.0 / tl.load(boost)
        if FORM.normalize:
            inverse = tl.load(scale + slot, mask=real, other=0.0)[:, None]
            x = tl.load(packed + slot[:, None] * FORM.padded + channel, mask=inside, other=0.0)
            unit = x.to(tl.float32) * inverse
            h = tl.where(inverse == 0.0, 0.0, h - unit * tl.sum(unit * h, 1)[:, None])
        if FORM.rescale:
            h *= tl.load(factor + slot, mask=real, other=0.0)[:, None]
        at = (row * tokens + n)[:, None] * FORM.dim + channel
        tl.store(out + at, h.to(out.dtype.element_ty), mask=(n < tokens)[:, None] & (channel < FORM.dim))


@triton.jit(do_not_specialize=SIZES)
def unpack_gradients(
    grad_words,
    grad_frames,
    text_mask,
    video_mask,
    packed,
    boost,
    of_text,
    of_video,
    texts,
    words,
    videos,
    frames,
    FORM: tl.constexpr,
):
    """Turn the gradients of one row's slots into those of its raw features. A side that is None is not written."""
    scale, _, _, factor, _, start, _, _, _ = companions(packed, texts, videos, frames, FORM.most, FORM.padded)
    row = tl.program_id(0).to(tl.int64)
    word_rows = (texts * FORM.most + TAIL).to(tl.int64)
    padded = tl.cdiv(videos, VIDEO_BLOCK) * VIDEO_BLOCK
    if of_text is not None:
        if row < texts:
            first = tl.load(start + row).to(tl.int64)
            _unpack_row(
                grad_words,
                text_mask,
                packed,
                scale,
                factor,
                of_text,
                row,
                words,
                first,
                1,
                0,
                boost,
                FORM.words,
                FORM,
            )
    if of_video is not None:
        if row < videos:
            _unpack_row(
                grad_frames,
                video_mask,
                packed,
                scale,
                factor,
                of_video,
                row,
                frames,
                word_rows + row,
                padded,
                word_rows,
                boost,
                FORM.frames,
                FORM,
            )


def strided(x: Tensor | None) -> Strided | None:
    """Wrap a tensor of any strides for a kernel; a bool tensor becomes uint8."""
    if x is None:
        return None
    return Strided(x.view(torch.uint8) if x.dtype == torch.bool else x, x.stride())


def index_dtype(tokens: int) -> torch.dtype:
    """Return the dtype of matches: it must hold the index of each of ``tokens`` tokens, and "none"."""
    return torch.uint8 if tokens <= 255 else torch.int16


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def form_of(text: Side, video: Side, normalize: bool) -> Form:
    """Choose the constants: at most 64 bytes of features and 128 comparisons of tokens per thread and step."""
    (_, words, dim), frames = text.features.shape, video.features.shape[1]
    padded, most = layout.padded_channels(dim), layout.most_slots(words)
    channels, longest = _power_of_two(padded), _power_of_two(max(words, frames))
    slots = min(8192 // text.features.itemsize // channels, 16384 // longest, longest)
    return Form(
        dim=dim,
        padded=padded,
        channels=channels,
        slots=max(1, slots),
        words=_power_of_two(words),
        frames=_power_of_two(frames),
        most=most,
        long=most > layout.LONGEST_CLASS,
        normalize=normalize,
        # float16 could not hold coefficients that contain the inverse norms of very small tokens.
        rescale=normalize and text.features.dtype == torch.float16,
        video_holes=video.mask is not None,
        # The library multiplies all word slots, so none may hold garbage.
        clear=tuning.library_products(text.features.dtype, text.mask is not None),
    )


def sizes_of(text: Side, video: Side) -> Sizes:
    return Sizes(*text.features.shape[:2], *video.features.shape[:2])


def describe(text: Side, video: Side, normalize: bool, data: Tensor) -> Packed:
    """Describe an already packed form."""
    return Packed(data, sizes_of(text, video), form_of(text, video, normalize))


def pack(text: Side, video: Side, normalize: bool) -> Packed:
    """Pack both sides."""
    sizes, form = sizes_of(text, video), form_of(text, video, normalize)
    if layout.slots(*sizes) >= 2**31:
        raise ValueError(
            f"text has {sizes.texts} rows of up to {form.most} token slots and video {sizes.videos} rows of "
            f"{sizes.frames} frames, but the GPU kernels index at most 2^31 - 1 slots; score the rows in several calls"
        )
    text, video = (Side(*(None if x is None else x.contiguous() for x in side)) for side in (text, video))
    features = text.features
    data = features.new_empty(layout.packed_size(*sizes, form.dim, features.itemsize))
    padded = layout.padded_videos(sizes.videos)
    blocks = -(-sizes.texts // layout.COUNT_BLOCK) + padded // layout.COUNT_BLOCK
    count_tokens[(blocks,)](text.mask, video.mask, data, *sizes, FORM=form, **tuning.options(4))
    programs = max(sizes.texts, padded)
    pack_rows[(programs,)](*text, *video, data, *sizes, FORM=form, **tuning.options(4 if form.channels <= 4096 else 8))
    return Packed(data, sizes, form)


def descriptor(packed: Packed, rows: int, channels: int) -> TensorDescriptor:
    """Describe the slots (R, D') for copies of ``rows`` x ``channels`` by the GPU's tensor memory accelerator."""
    padded = packed.form.padded
    return TensorDescriptor(packed.data, [layout.slots(*packed.sizes), padded], [padded, 1], [rows, channels])


def unpack(
    grad_words: Tensor | None,
    grad_frames: Tensor | None,
    text_mask: Tensor | None,
    video_mask: Tensor | None,
    packed: Packed,
    boost: Tensor | None,
    of_text: Tensor | None,
    of_video: Tensor | None,
) -> None:
    """Turn gradients of slots (R rows of D', float32) into those of the raw features."""
    sizes, form = packed.sizes, packed.form
    text_mask, video_mask = (None if x is None else x.contiguous() for x in (text_mask, video_mask))
    programs = max(sizes.texts if of_text is not None else 0, sizes.videos if of_video is not None else 0)
    unpack_gradients[(programs,)](
        grad_words,
        grad_frames,
        text_mask,
        video_mask,
        packed.data,
        boost,
        of_text,
        of_video,
        *sizes,
        FORM=form,
        **tuning.options(4 if form.channels <= 4096 else 8),
    )
