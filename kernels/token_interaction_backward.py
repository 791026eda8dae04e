"""Backward of the token interaction: gradients of features and weights, computed from the matches and maxima.

    C[a,i,b,f] = g[a,b] (w_ai [word i of a chose frame f of b] + w_bf [frame f of b chose word i of a]) / 2
                 / (|t_ai| |v_bf|)                                    the gradient of the raw dot product <t_ai, v_bf>
    H_ai = sum_bf C[a,i,b,f] v_bf           H_bf = sum_ai C[a,i,b,f] t_ai
    grad w_ai = sum_b g[a,b] m_t[a,i,b] / 2       grad w_bf = sum_a g[a,b] m_v[a,f,b] / 2

packing.unpack turns H into the gradient of a raw token.

C is sparse (one entry per word and video, one per frame and text), but gathering tokens by match would be bound by
memory. So C is written in blocks, in the features' dtype, and two matrix products multiply each block:

      H of words (slots x D)   += C (slots x columns)   V (columns x D)
      H of frames (columns x D) += C^T (columns x slots)  T (slots x D)

A block has at most COLUMNS columns, one per frame and video, and as many word slots as COEFFICIENT_BYTES allow, so
memory is bounded. No atomics: each result has one owner that adds in a fixed order.

The library multiplies where the number of word slots is known on the host (texts of equal length), and float32, which
then uses TF32 only if torch allows it. Elsewhere :func:`multiply_tiles` does, which ends at the words in use: captions
fill about half of their padded rows, and only the device knows how much. Its tile is BM x BN results of either product:
2 BM BN FLOP per step of K, (BM + BN) itemsize bytes read.

The launcher also loops over blocks of text rows. A block's matches are kept ones, or the forward kernel finds them
again; the gradients have the same bits in both cases.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import layout, packing, tuning
from .packing import Packed, Side
from .token_interaction import FRACTION, forward, maxima_dtype

CHUNK = packing.CHUNK
# Size of the largest block of coefficients, and its most columns. Blocks that fit an H100's L2 cache (24 to 32 MiB) are
# slower there, although these pass through memory: they need more launches, their products leave more of the GPU idle
# in the last wave, and expand_coefficients has fewer frames to spread its start over (docs/gpu.md has the times).
COEFFICIENT_BYTES, COLUMNS = 128 << 20, 16384
# No frame, and no word or frame chosen: values that no match has, which are 0 or more, or -1 for "none".
NO_FRAME, NOTHING = tl.constexpr(-2), tl.constexpr(-3)
# Every warp of expand_coefficients loads the numbers of the frames again, so few warps are faster.
EXPAND_WARPS = 2
# Videos of a program that sums over texts.
SOME_VIDEOS = tl.constexpr(32)
# Bytes of matches and maxima in a block of text rows. Each block costs a packing and a pass over all video gradients,
# so there should be few; but a block must be small beside the memory of a training step.
BLOCK_BYTES = 256 << 20
# A block has a multiple of this many rows, so that its part of every tensor is aligned to 16 bytes.
BLOCK_ROWS = 16


class Block(NamedTuple):
    """A block of coefficients: word slots ``slot`` to ``slot + slots``, and frames of some videos."""

    slot: int
    slots: int
    frame: int
    frames: int
    video: int
    videos: int
    column: int  # the row of the frames' gradients of its first column

    @property
    def columns(self) -> int:
        return self.frames * self.videos

    @property
    def place(self) -> tuple[int, int, int, int, int]:
        """Return the arguments of kernels that write it."""
        return self.slot, self.frame, self.video, self.frames, self.videos


# Write a block of coefficients into a tensor.
Expand = Callable[[Block, Tensor], None]
# The kernel's parameters for Block.place.
PLACE = ["slot", "frame", "video", "block_frames", "block_videos"]


@triton.jit
def _place(position, f, frames_of, FORM: tl.constexpr):
    """Return the position in its padded row of frame f of each video, NO_FRAME beyond the video's ``frames_of``."""
    exists = f < frames_of
    if FORM.video_holes:
        return tl.load(position, mask=exists, other=NO_FRAME)
    else:
        return tl.where(exists, f, NO_FRAME)


@triton.jit
def _match(text_index, first, place, videos, b):
    """Return the word that each video's frame chose in the text whose matches start at row ``first``."""
    if text_index is None:
        return place
    else:
        return tl.load(text_index + (first + place) * videos + b, mask=place >= 0, other=-1).to(tl.int32)


@triton.jit(do_not_specialize=[*packing.SIZES, *PLACE])
def expand_coefficients(
    packed,
    grad_logits,
    video_index,
    text_index,
    boost,
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
    FORM: tl.constexpr,
):
    """Write CHUNK rows of a block of coefficients for VIDEO_BLOCK videos and all frames of the block."""
    BK: tl.constexpr = packing.VIDEO_BLOCK
    scale, weight, position, _, length, start, chunk_text, _, _ = packing.companions(
        packed, texts, videos, frames, FORM.most, FORM.padded
    )
    tiles = block_videos // BK
    chunk = tl.program_id(0) // tiles
    first = slot + chunk * CHUNK
    total = tl.load(start + texts)
    # Rows after the words in use are zero up to the next multiple of a product's steps; nobody reads the others.
    end = (texts * FORM.most if FORM.clear else total) + packing.TAIL
    if first >= end:
        return
    text = tl.load(chunk_text + first // CHUNK)
    there = (text >= 0) & (first < total)
    text = tl.where(there, text, 0).to(tl.int64)
    s = first + tl.arange(0, CHUNK)
    word = tl.load(position + s)
    real = word >= 0
    # What a coefficient takes from the word if it chose the frame, and if the frame chose it.
    of_choice = tl.load(scale + s)[:, None]
    of_word = of_choice * tl.load(weight + s)[:, None]
    column = tl.program_id(0) % tiles * BK + tl.arange(0, BK)
    b = video + column
    inside = b < tl.where(there, videos, 0)
    g = tl.load(grad_logits + text * videos + b, mask=inside, other=0.0)
    if text_index is not None:
        g = g * 0.5
    if boost is not None:
        g = g * tl.load(boost)
    of_row = (text * words + word)[:, None] * videos + b[None, :]
    chosen = tl.load(video_index + of_row, mask=real[:, None] & inside[None, :], other=0).to(tl.int32)
    # Frames and words that are not there have numbers that nothing equals.
    chosen = tl.where(real[:, None], chosen, NOTHING)
    word = tl.where(real, word, NOTHING)
    frames_of = tl.where(inside, tl.load(length + texts + b), 0)
    padded = tl.cdiv(videos, packing.VIDEO_BLOCK) * packing.VIDEO_BLOCK
    at = texts * FORM.most + packing.TAIL + frame * padded + b
    # block_videos, as a product with BK: the compiler then knows that stores are aligned, and makes them wide.
    width = tiles * BK
    row = (chunk * CHUNK + tl.arange(0, CHUNK)).to(tl.int64) * (block_frames * width)
    target = out + row[:, None] + column[None, :]
    # Load a frame's numbers while the one before is computed, and its position, which its match needs, earlier still.
    end = frame + block_frames
    place = _place(position + at, frame, frames_of, FORM)
    later = _place(position + at + padded, frame + 1, tl.where(frame + 1 < end, frames_of, 0), FORM)
    by_frame = _match(text_index, text * frames, place, videos, b)
    v_scale = tl.load(scale + at)
    v_weight = tl.load(weight + at)
    for f in tl.range(frame, end):
        at += padded
        next_match = _match(text_index, text * frames, later, videos, b)
        more = b < tl.where(f + 1 < end, video + block_videos, 0)
        next_scale = tl.load(scale + at, mask=more, other=0.0)
        next_weight = tl.load(weight + at, mask=more, other=0.0)
        last = _place(position + at + padded, f + 2, tl.where(f + 2 < end, frames_of, 0), FORM)
        # Select after multiplying: a NaN or Inf in g must not reach tokens that did not choose each other.
        share = g * v_scale
        c = tl.where(chosen == place[None, :], share[None, :] * of_word, 0.0)
        if text_index is not None:
            c += tl.where(by_frame[None, :] == word[:, None], (share * v_weight)[None, :] * of_choice, 0.0)
        tl.store(target, c.to(out.dtype.element_ty))
        target += width
        place, later, by_frame, v_scale, v_weight = later, last, next_match, next_scale, next_weight


@triton.jit
def _add_tile(acc, out, m, n0, rows, add, D: tl.constexpr):
    """Write acc (BM, BN) to rows m of out from column n0, or add it."""
    BM: tl.constexpr = acc.shape[0]
    BN: tl.constexpr = acc.shape[1]
    if BN > 64:
        # One half after the other: the earlier sums of a whole tile would need too many registers.
        left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
        _add_tile(left, out, m, n0, rows, add, D)
        _add_tile(right, out, m, n0 + BN // 2, rows, add, D)
    else:
        n = n0 + tl.arange(0, BN)
        inside = (m < rows)[:, None] & (n < D)[None, :]
        target = out + m[:, None].to(tl.int64) * D + n[None, :]
        earlier = tl.load(target, mask=(m < tl.where(add, rows, 0))[:, None] & (n < D)[None, :], other=0.0)
        tl.store(target, acc + earlier, mask=inside)


@triton.jit
def _multiply_tile(
    coefficients,
    coefficient_tiles,
    packed,
    token_tiles,
    out,
    program,
    rows,
    depth,
    slots,
    columns,
    tokens,
    add,
    WORDS: tl.constexpr,
    TILE: tl.constexpr,
    D: tl.constexpr,
):
    """Compute one tile of C V (WORDS) or of C^T T; ``tokens``: the packed row of the right factor's first row."""
    BM: tl.constexpr = TILE.m
    BN: tl.constexpr = TILE.n
    BK: tl.constexpr = TILE.k
    m0 = program // ((D + BN - 1) // BN) * BM
    n0 = program % ((D + BN - 1) // BN) * BN
    if (m0 >= rows) | (depth <= 0):
        return
    m = m0 + tl.arange(0, BM)
    n = n0 + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in tl.range(0, depth, BK):
        if TILE.tma:
            c = coefficient_tiles.load([m0, k]) if WORDS else coefficient_tiles.load([k, m0]).T
            x = token_tiles.load([tokens + k, n0])
        else:
            k_rows = (k + tl.arange(0, BK)).to(tl.int64)
            if WORDS:
                at = m[:, None].to(tl.int64) * columns + k_rows[None, :]
                c = tl.load(coefficients + at, mask=(m < slots)[:, None] & (k_rows < columns)[None, :], other=0.0)
            else:
                at = k_rows[:, None] * columns + m[None, :]
                c = tl.load(coefficients + at, mask=(k_rows < slots)[:, None] & (m < columns)[None, :], other=0.0).T
            x = tl.load(packed + (tokens + k_rows)[:, None] * D + n[None, :], mask=(n < D)[None, :], other=0.0)
        acc = tl.dot(c, x, acc)
    _add_tile(acc, out, m, n0, rows, add, D)


@triton.jit(do_not_specialize=[*packing.SIZES, "slot", "slots", "column", "columns", "add_words", "add_frames"])
def multiply_tiles(
    coefficients,
    word_tiles,
    frame_tiles,
    packed,
    token_tiles,
    grad_words,
    grad_frames,
    slot,
    slots,
    column,
    columns,
    add_words,
    add_frames,
    texts,
    words,
    videos,
    frames,
    TILE: tl.constexpr,
    FORM: tl.constexpr,
):
    """Multiply a block of coefficients with the tokens of both sides: one tile of either product per program.

    The block starts at word slot ``slot`` and at row ``column`` of the frames. ``add_words``, ``add_frames``: add to
    the earlier blocks' sum. A side whose gradient is None is left out. One launch for both fills a GPU better.
    """
    BM: tl.constexpr = TILE.m
    D: tl.constexpr = FORM.padded
    PARTS: tl.constexpr = (D + TILE.n - 1) // TILE.n
    _, _, _, _, _, start, _, _, _ = packing.companions(packed, texts, videos, frames, FORM.most, D)
    used = tl.minimum(tl.load(start + texts) - slot, slots)
    program = tl.program_id(0)
    of_words = 0
    if grad_words is not None:
        of_words = tl.cdiv(slots, BM) * PARTS
        if program < of_words:
            out = grad_words + slot.to(tl.int64) * D
            tokens = texts * FORM.most + packing.TAIL + column
            _multiply_tile(
                coefficients,
                word_tiles,
                packed,
                token_tiles,
                out,
                program,
                used,
                columns,
                slots,
                columns,
                tokens,
                add_words,
                True,
                TILE,
                D,
            )
    if grad_frames is not None:
        if program >= of_words:
            out = grad_frames + column.to(tl.int64) * D
            _multiply_tile(
                coefficients,
                frame_tiles,
                packed,
                token_tiles,
                out,
                program - of_words,
                columns,
                used,
                slots,
                columns,
                slot,
                add_frames,
                False,
                TILE,
                D,
            )


@triton.jit
def _sum_over_videos(maxima, grad_logits, mask, out, program, words, videos, rows, FACTOR: tl.constexpr):
    """Write the gradients of CHUNK word weights of a text."""
    BLOCK: tl.constexpr = packing.VIDEO_BLOCK
    text = (program // tl.cdiv(words, CHUNK)).to(tl.int64)
    n = program % tl.cdiv(words, CHUNK) * CHUNK + tl.arange(0, CHUNK)
    real = n < words
    if mask is not None:
        real = tl.load(mask + text * words + n, mask=real, other=0) != 0
    acc = tl.zeros((CHUNK, BLOCK), tl.float32)
    for b0 in tl.range(0, videos, BLOCK):
        b = b0 + tl.arange(0, BLOCK)
        at = (text * rows + n)[:, None] * videos + b[None, :]
        m = tl.load(maxima + at, mask=real[:, None] & (b < videos)[None, :], other=0).to(tl.float32)
        g = tl.load(grad_logits + text * videos + b, mask=b < videos, other=0.0)[None, :]
        # A NaN or Inf in g must not reach a masked word, nor one that chose no frame.
        acc += tl.where(m != 0.0, m * g, 0.0)
    tl.store(out + text * words + n, tl.sum(acc, 1) * FACTOR, mask=n < words)


@triton.jit
def _sum_over_texts(
    maxima, grad_logits, mask, out, program, texts, words, videos, frames, FACTOR: tl.constexpr, ADD: tl.constexpr
):
    """Write the gradients of one frame's weight of SOME_VIDEOS videos; ADD: add them to those of earlier texts."""
    TEXTS: tl.constexpr = 64
    f = program // tl.cdiv(videos, SOME_VIDEOS)
    b = program % tl.cdiv(videos, SOME_VIDEOS) * SOME_VIDEOS + tl.arange(0, SOME_VIDEOS)
    inside = b < videos
    real = inside
    target = b.to(tl.int64) * frames + f
    if mask is not None:
        real = tl.load(mask + target, mask=inside, other=0) != 0
    acc = tl.zeros((TEXTS, SOME_VIDEOS), tl.float32)
    for a0 in tl.range(0, texts, TEXTS):
        a = (a0 + tl.arange(0, TEXTS)).to(tl.int64)
        there = (a < texts)[:, None] & real[None, :]
        at = (a * (words + frames) + words + f)[:, None] * videos + b[None, :]
        m = tl.load(maxima + at, mask=there, other=0).to(tl.float32)
        g = tl.load(grad_logits + a[:, None] * videos + b[None, :], mask=there, other=0.0)
        acc += tl.where(m != 0.0, m * g, 0.0)
    total = tl.sum(acc, 0) * FACTOR
    if ADD:
        total += tl.load(out + target, mask=inside, other=0.0)
    tl.store(out + target, total, mask=inside)


@triton.jit(do_not_specialize=packing.SIZES)
def sum_weight_gradients(
    maxima,
    grad_logits,
    text_mask,
    video_mask,
    of_text,
    of_video,
    texts,
    words,
    videos,
    frames,
    FACTOR: tl.constexpr,
    JOINT: tl.constexpr,
    ADD: tl.constexpr,
):
    """Sum g times maxima: over texts for a frame of some videos (first: it takes longest), or over videos for words."""
    rows = words + frames if JOINT else words
    program = tl.program_id(0)
    of_frames = frames * tl.cdiv(videos, SOME_VIDEOS) if of_video is not None else 0
    if of_video is not None:
        if program < of_frames:
            _sum_over_texts(
                maxima, grad_logits, video_mask, of_video, program, texts, words, videos, frames, FACTOR, ADD
            )
    if of_text is not None:
        if program >= of_frames:
            program -= of_frames
            _sum_over_videos(maxima, grad_logits, text_mask, of_text, program, words, videos, rows, FACTOR)


class Evaluated(NamedTuple):
    """What the gradients of a block of text rows are computed from."""

    packed: Packed | None  # None without gradients of features
    expand: Expand
    maxima: Tensor  # each token's maximum or other pooled value, (rows, Nt + Nv, B)


def backward(
    grad_logits: Tensor,
    text: Side,
    video: Side,
    video_index: Tensor,
    text_index: Tensor,
    maxima: Tensor,
    packed: Tensor,
    normalize: bool,
    zero_competes: bool,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Compute the gradients of both features (their dtype) and both weights (float32); empty if not asked for.

    If the matches are empty, the forward pass did not keep them, and each block of text rows finds its own again.
    """
    both = video.weight is not None
    of_features, of_weights = any(output_mask[:2]), output_mask[2] or (output_mask[3] and both)
    found_again = len(video_index) == 0 or (of_weights and len(maxima) == 0)
    words, frames = text.features.shape[1], video.features.shape[1]
    size = maxima_dtype(text, video, normalize).itemsize if of_weights else 0
    pair = bytes_per_pair(words, frames, both, size)

    def evaluate(part: Side, rows: slice, grad_logits: Tensor, boost: Tensor | None) -> Evaluated:
        if found_again:
            kept = forward(part, video, normalize, zero_competes, True, of_weights)[1:]
        else:
            # A block of rows has slots of its own, so what the forward pass packed serves only one block of all rows.
            whole = len(part.features) == len(text.features)
            kept = (*(_rows(x, rows) for x in (video_index, text_index, maxima)), packed if whole else packed[:0])
        block = _packed(part, video, normalize, kept[3]) if of_features else None
        coefficients = Coefficients(grad_logits, kept[0], kept[1] if both else None, boost)
        return Evaluated(block, functools.partial(_expand, block, coefficients), kept[2])

    return gradients(grad_logits, text, video, output_mask, pair, evaluate)


def gradients(
    grad_logits: Tensor,
    text: Side,
    video: Side,
    output_mask: Sequence[bool],
    pair: int,
    evaluate: Callable[[Side, slice, Tensor, Tensor | None], Evaluated],
) -> tuple[Tensor, ...]:
    """Compute the gradients block by block; ``pair``: the bytes that a block needs for each of its pairs.

    ``evaluate`` gets a block's texts, their rows, their gradients of logits and the factor of the coefficients.
    """
    a, b, both = len(text.features), len(video.features), video.weight is not None
    wanted = (*output_mask[:3], output_mask[3] and both)
    of_features, of_weights = any(wanted[:2]), any(wanted[2:])
    grads = _outputs(text, video, wanted)
    if a == 0 or b == 0:
        return grads
    of_text, of_video, of_text_weight, of_video_weight = (
        x if want else None for x, want in zip(grads, wanted, strict=True)
    )
    grad_logits = grad_logits.to(torch.float32).contiguous()
    boost = _boost(grad_logits, text, video) if of_features else None
    # The blocks depend on shapes only.
    step = max(1, BLOCK_BYTES // (b * pair) // BLOCK_ROWS) * BLOCK_ROWS
    grad_frames = None
    for start in range(0, a, step):
        rows = slice(start, start + step)
        part, g = Side(*(_rows(x, rows) for x in text)), _rows(grad_logits, rows)
        found = evaluate(part, rows, g, boost)
        block = found.packed
        if block is not None:
            grad_words = g.new_empty((block.word_slots, block.form.padded)) if of_text is not None else None
            if of_video is not None and grad_frames is None:
                grad_frames = g.new_empty((block.videos * block.sizes.frames, block.form.padded))
            _multiply(block, found.expand, grad_words, grad_frames, add=start > 0)
            last = of_video if start + step >= a else None
            if of_text is not None or last is not None:
                masks = part.mask, video.mask
                packing.unpack(grad_words, grad_frames, *masks, block, boost, _rows(of_text, rows), last)
            del grad_words
        if of_weights:
            _sum_weights(found.maxima, g, part, video, _rows(of_text_weight, rows), of_video_weight, add=start > 0)
        del found, block  # free them before the next block finds its own
    return grads


def _rows(x: Tensor | None, rows: slice) -> Tensor | None:
    """Take some rows, unless it has no others."""
    return x if x is None or len(x) <= rows.stop - rows.start else x[rows]


def _outputs(text: Side, video: Side, wanted: Sequence[bool]) -> tuple[Tensor, ...]:
    """Allocate the gradients. The kernels write all of them, unless a side is empty."""
    new = torch.empty if len(text.features) and len(video.features) else torch.zeros
    grads = []
    for i, (side, want) in enumerate(zip((text, video, text, video), wanted, strict=True)):
        # Contiguous, as the operator's fake implementation says, even if the features are not.
        shape, dtype = (side.features.shape, side.features.dtype) if i < 2 else (side.features.shape[:2], torch.float32)
        grads.append(new(shape if want else (0,), dtype=dtype, device=side.features.device))
    return tuple(grads)


def bytes_per_pair(words: int, frames: int, both: bool, maxima: int) -> int:
    """Return the bytes of a pair's matches and maxima; ``maxima``: the bytes of one, 0 if they are not kept."""
    size = words * (packing.index_dtype(frames).itemsize + maxima)
    return size + frames * (packing.index_dtype(words).itemsize + maxima) if both else size


def _packed(text: Side, video: Side, normalize: bool, data: Tensor) -> Packed:
    """Describe what the forward pass packed, or pack again."""
    return packing.describe(text, video, normalize, data) if len(data) else packing.pack(text, video, normalize)


class Coefficients(NamedTuple):
    """What C is computed from with matches."""

    grad_logits: Tensor  # (texts, B) float32
    video_index: Tensor
    text_index: Tensor | None  # None with one direction
    boost: Tensor | None


def _blocks(packed: Packed) -> Iterator[Block]:
    """Cut C into blocks: some frames of all videos, or one frame of some videos."""
    slots, frames = packed.word_slots - layout.TAIL, packed.sizes.frames
    # Parts of equal size, so that no launch is much smaller than the others.
    parts = -(-packed.videos // COLUMNS)
    videos = -(-packed.videos // parts // layout.VIDEO_BLOCK) * layout.VIDEO_BLOCK
    step = max(1, COLUMNS // packed.videos)
    step = -(-frames // -(-frames // step))
    columns = min(step, frames) * videos
    most = max(1, COEFFICIENT_BYTES // (packed.data.itemsize * columns * layout.TAIL)) * layout.TAIL
    most = -(-slots // -(-slots // most) // layout.TAIL) * layout.TAIL
    for slot in range(0, slots, most):
        for frame in range(0, frames, step):
            for video in range(0, packed.videos, videos):
                some = min(videos, packed.videos - video)
                column = frame * packed.videos + video
                yield Block(slot, min(most, slots - slot), frame, min(step, frames - frame), video, some, column)


def _expand(packed: Packed, of: Coefficients, block: Block, out: Tensor) -> None:
    grid = (block.slots // layout.CHUNK * (block.videos // layout.VIDEO_BLOCK),)
    expand_coefficients[grid](
        packed.data,
        *of,
        out,
        *packed.sizes,
        *block.place,
        FORM=packed.form.of_slots(),
        **tuning.options(EXPAND_WARPS),
    )


def _multiply(
    packed: Packed, expand: Expand, grad_words: Tensor | None, grad_frames: Tensor | None, *, add: bool
) -> None:
    """Compute H of words (word slots, D'), and of frames (frames x videos, D'); add: to the present H of frames."""
    blocks = list(_blocks(packed))
    coefficients = packed.data.new_empty(max(block.slots * block.columns for block in blocks))
    for block in blocks:
        expand(block, coefficients)
        c = coefficients.as_strided((block.slots, block.columns), (block.columns, 1))
        product = _library_products if packed.form.clear else _tiled_products
        product(packed, block, c, grad_words, grad_frames, add_words=block.column > 0, add_frames=add or block.slot > 0)


def _library_products(
    packed: Packed,
    block: Block,
    c: Tensor,
    grad_words: Tensor | None,
    grad_frames: Tensor | None,
    *,
    add_words: bool,
    add_frames: bool,
) -> None:
    features = packed.data.as_strided((layout.slots(*packed.sizes), packed.form.padded), (packed.form.padded, 1))
    words = slice(block.slot, block.slot + block.slots)
    columns = slice(block.column, block.column + block.columns)
    if grad_words is not None:
        library_product(c, features[packed.word_slots :][columns], grad_words[words], add_words)
    if grad_frames is not None:
        library_product(c.T, features[words], grad_frames[columns], add_frames)


def _tiled_products(
    packed: Packed,
    block: Block,
    c: Tensor,
    grad_words: Tensor | None,
    grad_frames: Tensor | None,
    *,
    add_words: bool,
    add_frames: bool,
) -> None:
    dim = packed.form.padded
    rows = [block.slots] if grad_words is not None else []
    rows += [block.columns] if grad_frames is not None else []
    tile, programs = tuning.product_tile(c.device, rows, dim)

    def tiles(shape: list[int]) -> TensorDescriptor | None:
        return TensorDescriptor(c, [block.slots, block.columns], [block.columns, 1], shape) if tile.tma else None

    multiply_tiles[(programs,)](
        c,
        tiles([tile.m, tile.k]),
        tiles([tile.k, tile.m]),
        packed.data,
        packing.descriptor(packed, tile.k, tile.n) if tile.tma else None,
        grad_words,
        grad_frames,
        block.slot,
        block.slots,
        block.column,
        block.columns,
        add_words,
        add_frames,
        *packed.sizes,
        TILE=tile,
        FORM=packed.form.of_slots()._replace(video_holes=False),
        **tuning.launch_options(tile),
    )


def library_product(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    """Write a @ b into ``out``, float32, or add it."""
    if not a.is_cuda:
        # CPU tensors reach this only in tests: PyTorch has no CPU product of 16-bit tensors with a float32 result.
        product = a.to(torch.float32) @ b.to(torch.float32)
        out.add_(product) if accumulate else out.copy_(product)
    elif accumulate:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


def _sum_weights(
    maxima: Tensor,
    grad_logits: Tensor,
    text: Side,
    video: Side,
    of_text: Tensor | None,
    of_video: Tensor | None,
    *,
    add: bool,
) -> None:
    """Write the gradients of a block's text weights (texts, Nt), and write or add those of video weights (B, Nv)."""
    sizes, both = packing.sizes_of(text, video), video.weight is not None
    programs = 0
    if of_text is not None:
        programs += sizes.texts * -(-sizes.words // layout.CHUNK)
    if of_video is not None:
        programs += sizes.frames * -(-sizes.videos // SOME_VIDEOS.value)
    unit = 2.0**-FRACTION.value if maxima.dtype == torch.int16 else 1.0
    masks = (None if x is None else x.contiguous() for x in (text.mask, video.mask))
    sum_weight_gradients[(programs,)](
        maxima,
        grad_logits,
        *masks,
        of_text,
        of_video,
        *sizes,
        FACTOR=unit * (0.5 if both else 1.0),
        JOINT=both,
        ADD=add,
        **tuning.options(4),
    )


def _boost(grad_logits: Tensor, text: Side, video: Side) -> Tensor | None:
    """Choose a power of two that scales the largest coefficient close to float16's maximum; None for other dtypes.

    Gradients of a mean over many pairs are too small for float16. All blocks share the factor, so that they can be
    added. It is computed on the device, without synchronisation. Packed tokens of float16 have norms of at least 1, so
    their inverses do not matter.
    """
    if text.features.dtype != torch.float16:
        return None
    peak = 2 * grad_logits.abs().amax() * torch.maximum(_largest_weight(text), _largest_weight(video))
    exponent = (14 - peak.log2().ceil()).nan_to_num(0.0, 0.0, 0.0).clamp(-100, 100)
    return torch.ldexp(torch.ones_like(peak), exponent.to(torch.int32))


def _largest_weight(side: Side) -> Tensor:
    """Return the largest weight of one side's real tokens; 0 without weights."""
    if side.weight is None:
        return torch.zeros((), dtype=torch.float32, device=side.features.device)
    weight = side.weight if side.mask is None else torch.where(side.mask, side.weight, 0.0)
    return weight.to(torch.float32).nan_to_num(0.0, 0.0, 0.0).abs().amax()
