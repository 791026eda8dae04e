"""Backward kernels of the token interaction: gradients of the unit tokens, from the matches alone.

    C[a,i,b,f] = g[a,b] (w_ai [word i of a chose frame f of b] + w_bf [frame f of b chose word i of a]) / 2
    G_ai = sum_bf C[a,i,b,f] v_bf / |v_bf|        G_bf = sum_ai C[a,i,b,f] t_ai / |t_ai|
    then packing.unpack turns the gradient G of a unit token into that of the raw one

C is sparse (one entry a word and video, one a frame and caption) but gathers starve a GPU, so a tile of C is rebuilt on
chip and multiplied on the tensor cores. No atomics: each program owns its part of G and adds in one order.

      transposed:   G^T (D x words) += v^T (D x videos)  C (videos x words)     one frame of BK videos a step
                    G^T (D x videos) += t^T (D x words)  C (words x videos)     BK words a step, one frame a program

On chip: the accumulator and one tile of C. C is always the right operand, so it goes through shared memory once and is
never a register operand: ptxas does not serialise the products, and no product's result feeds another.
FLOP a step: 2 BM BN BK; bytes: BM BK itemsize of tokens, BK BN of words' choices, 5 BK BN / 16 of frames' and of g.

Words come in chunks of GRAIN slots, each of one caption, so that what belongs to a pair is loaded once a chunk.

The launcher walks over blocks of text rows. A block's matches are a part of the kept ones, or found again by the
forward's kernel: nothing else differs, so neither do the bits. G_bf grows from block to block in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import tuning
from .packing import GRAIN, LONGEST_CLASS, NORM_EPS, TAIL, Packed, Side, pack_frames, pack_words, unpack, unpack_weight
from .token_interaction import WEIGHTS, Outputs, forward, sweep
from .tuning import Tile

CHUNK = tl.constexpr(GRAIN)
# Bytes of matches in a block of text rows. Large: a block ends with a pass over all video gradients, and starts with
# packing. Small beside what a training step holds anyway: batches up to 2,400 at 32 words x 12 frames are one block.
BLOCK_BYTES = 256 << 20
# Rows in a block are a multiple of this, so that a block's part of any tensor starts at 16 bytes, as the whole does.
BLOCK_ROWS = 16


@triton.jit
def interaction_backward_text(
    video,
    video_scale,
    video_weight,
    video_position,
    most_frames,
    text_weight,
    text_position,
    chunk_row,
    start,
    video_index,
    text_index,
    grad_logits,
    grad,
    boost,
    texts,
    videos,
    text_tokens,
    video_tokens,
    video_rows,
    factor,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BOTH: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    """BM channels of BN words' gradients."""
    CHUNKS: tl.constexpr = BN // CHUNK
    parts: tl.constexpr = (D + BM - 1) // BM
    t0 = tl.program_id(0) // parts * BN
    d0 = tl.program_id(0) % parts * BM
    if t0 >= tl.load(start + texts):
        return
    slot = t0 + tl.arange(0, BN)
    row = tl.load(chunk_row + t0 // CHUNK + tl.arange(0, CHUNKS)).to(tl.int64)
    there = row >= 0
    word = tl.load(text_position + slot)
    word3 = tl.reshape(word, (1, CHUNKS, CHUNK))
    weight = tl.load(text_weight + slot)
    of_word = tl.reshape(tl.broadcast_to(row[:, None], CHUNKS, CHUNK), (BN,)) * text_tokens + word
    scale_all = tl.load(boost) * factor
    channel = d0 + tl.arange(0, BM)
    acc = tl.zeros((BM, BN), tl.float32)
    # One loop, not two: what an outer loop would keep for an inner one costs registers that there are not.
    most = tl.load(most_frames)
    for step in tl.range(0, tl.cdiv(videos, BK) * most):
        b0 = step // most * BK
        b = b0 + tl.arange(0, BK)
        of_frame = step % most * video_rows + b
        frame = tl.load(video_position + of_frame)
        pair = there[None, :] & (b < videos)[:, None]
        g = tl.load(grad_logits + row[None, :] * videos + b[:, None], mask=pair, other=0.0) * scale_all
        ok = (word >= 0)[None, :] & (b < videos)[:, None]
        chosen = tl.load(video_index + of_word[None, :] * videos + b[:, None], mask=ok, other=0).to(tl.int32)
        c = tl.where(chosen == frame[:, None], weight[None, :], 0.0)
        c = tl.reshape(c, (BK, CHUNKS, CHUNK))
        if BOTH:
            match = text_index + (row[None, :] * video_tokens + frame[:, None]) * videos + b[:, None]
            by_frame = tl.load(match, mask=pair & (frame >= 0)[:, None], other=0).to(tl.int32)
            share = tl.load(video_weight + of_frame)[:, None, None]
            c += tl.where(by_frame[:, :, None] == word3, share, 0.0)
        c = c * (g * tl.load(video_scale + of_frame)[:, None])[:, :, None]
        if TMA:
            v = video.load([b0, step % most * D + d0])
        else:
            v_rows = video + b[:, None].to(tl.int64) * (video_tokens * D) + (step % most * D + channel)[None, :]
            v = tl.load(v_rows, mask=(channel < D)[None, :], other=0.0)
        acc = tl.dot(v.T, tl.reshape(c, (BK, BN)).to(v.dtype), acc, input_precision=PRECISION)
    target = grad + slot[None, :].to(tl.int64) * D + channel[:, None]
    tl.store(target, acc, mask=(channel < D)[:, None])


@triton.jit
def interaction_backward_video(
    text,
    text_scale,
    text_weight,
    text_position,
    chunk_row,
    start,
    video_weight,
    video_position,
    video_length,
    video_index,
    text_index,
    grad_logits,
    grad,
    boost,
    texts,
    videos,
    text_tokens,
    video_tokens,
    video_rows,
    factor,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BOTH: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    ADD: tl.constexpr,
):
    """BM channels of the gradients of one frame of BN videos; if ADD, added to those of earlier blocks of text rows."""
    CHUNKS: tl.constexpr = BK // CHUNK
    parts: tl.constexpr = (D + BM - 1) // BM
    blocks = tl.cdiv(videos, BN)
    d0 = tl.program_id(0) % parts * BM
    b0 = tl.program_id(0) // parts % blocks * BN
    f = tl.program_id(0) // parts // blocks
    b = b0 + tl.arange(0, BN)
    if f >= tl.max(tl.load(video_length + b), 0):
        return
    of_frame = f * video_rows + b
    frame = tl.load(video_position + of_frame)
    share = tl.load(video_weight + of_frame)[None, None, :]
    scale_all = tl.load(boost) * factor
    channel = d0 + tl.arange(0, BM)
    acc = tl.zeros((BM, BN), tl.float32)
    if ADD:
        # Now, not at the end: there the tile just computed stands in the registers as well.
        earlier = grad + (b[None, :].to(tl.int64) * video_tokens + f) * D + channel[:, None]
        acc = tl.load(earlier, mask=(channel < D)[:, None], other=0.0)
    for t0 in tl.range(0, tl.load(start + texts), BK):
        slot = t0 + tl.arange(0, BK)
        row = tl.load(chunk_row + t0 // CHUNK + tl.arange(0, CHUNKS)).to(tl.int64)
        word = tl.load(text_position + slot)
        pair = (row >= 0)[:, None] & (b < videos)[None, :]
        g = tl.load(grad_logits + row[:, None] * videos + b[None, :], mask=pair, other=0.0) * scale_all
        of_word = tl.reshape(tl.broadcast_to(row[:, None], CHUNKS, CHUNK), (BK,)) * text_tokens + word
        ok = (word >= 0)[:, None] & (b < videos)[None, :]
        chosen = tl.load(video_index + of_word[:, None] * videos + b[None, :], mask=ok, other=0).to(tl.int32)
        c = tl.where(chosen == frame[None, :], tl.load(text_weight + slot)[:, None], 0.0)
        c = tl.reshape(c, (CHUNKS, CHUNK, BN))
        if BOTH:
            match = text_index + (row[:, None] * video_tokens + frame[None, :]) * videos + b[None, :]
            by_frame = tl.load(match, mask=pair & (frame >= 0)[None, :], other=0).to(tl.int32)
            c += tl.where(by_frame[:, None, :] == tl.reshape(word, (CHUNKS, CHUNK, 1)), share, 0.0)
        c = c * g[:, None, :] * tl.reshape(tl.load(text_scale + slot), (CHUNKS, CHUNK, 1))
        if TMA:
            t = text.load([t0, d0])
        else:
            t_rows = text + slot[:, None].to(tl.int64) * D + channel[None, :]
            t = tl.load(t_rows, mask=(channel < D)[None, :], other=0.0)
        acc = tl.dot(t.T, tl.reshape(c, (BK, BN)).to(t.dtype), acc, input_precision=PRECISION)
    target = grad + (b[None, :].to(tl.int64) * video_tokens + f) * D + channel[:, None]
    tl.store(target, acc, mask=(channel < D)[:, None])


class Block(NamedTuple):
    """Some rows of text, and what belongs to their pairs with every video."""

    rows: slice
    text: Side
    grad_logits: Tensor  # (rows, B) float32
    video_index: Tensor
    text_index: Tensor


class Shared(NamedTuple):
    """What every block needs of the video side."""

    video: Side
    frames: Packed | None  # where gradients of features are wanted
    grad_frames: Tensor | None  # (rows_allocated, N D') float32, the sum over blocks so far
    boost: Tensor
    normalize: bool

    @property
    def both(self) -> bool:
        return self.video.weight is not None


def backward(
    grad_logits: Tensor,
    text: Side,
    video: Side,
    video_index: Tensor,
    text_index: Tensor,
    normalize: bool,
    zero_competes: bool,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Gradients of both features (their dtype) and both weights (float32); no elements where ``output_mask`` is False.

    Matches without elements were not kept: each block of text rows finds its own again.
    """
    both = video.weight is not None
    grads = _outputs(text, video, (*output_mask[:3], output_mask[3] and both))
    a, b = len(text.features), len(video.features)
    if a == 0 or b == 0:
        return grads
    grad_logits = grad_logits.to(torch.float32).contiguous()
    boost = _boost(grad_logits, text, video, normalize)
    frames = grad_frames = None
    if output_mask[0] or output_mask[1]:
        block = max(_tile("text", text).k, _tile("video", text).n)
        frames = pack_frames(video, tuning.STEP, block, normalize, copies=False)
        grad_frames = torch.empty(frames.tokens.shape, dtype=torch.float32, device=boost.device)
    shared = Shared(video, frames, grad_frames, boost, normalize)
    step = _rows_of_a_block(text, video)
    for start in range(0, a, step):
        rows = slice(start, start + step)
        part = Side(*(None if x is None else x[rows] for x in text))
        if len(video_index):
            matches = video_index[rows], text_index[rows] if both else text_index
        else:
            matches = forward(part, video, normalize, zero_competes, True)[1:]
        _take(Block(rows, part, grad_logits[rows], *matches), shared, grads)
        del matches  # before the next block's are found
    if len(grads[1]):
        unpack(grad_frames, video, frames, 1 / boost, normalize, grads[1], frames=True)
    return grads


def _outputs(text: Side, video: Side, wanted: Sequence[bool]) -> tuple[Tensor, ...]:
    """Memory for the gradients; zeros where masked tokens, or a side whose other side has no rows, keep them."""
    written = len(text.features) > 0 and len(video.features) > 0
    grads = []
    for i, (side, want) in enumerate(zip((text, video, text, video), wanted, strict=True)):
        # Contiguous whatever the features' strides: that is what the operator's fake promises.
        new = torch.empty if side.mask is None and written else torch.zeros
        shape, dtype = (side.features.shape, side.features.dtype) if i < 2 else (side.features.shape[:2], torch.float32)
        grads.append(new(shape if want else (0,), dtype=dtype, device=side.features.device))
    return tuple(grads)


def _rows_of_a_block(text: Side, video: Side) -> int:
    """How many text rows make a block: from shapes alone, so that keeping matches has no part in it."""
    nt, (b, nv, _) = text.features.shape[1], video.features.shape
    a_pair = nt * (1 if nv <= 255 else 2) + (nv * (1 if nt <= 255 else 2) if video.weight is not None else 0)
    return max(1, BLOCK_BYTES // (b * a_pair) // BLOCK_ROWS) * BLOCK_ROWS


def _take(block: Block, shared: Shared, grads: tuple[Tensor, ...]) -> None:
    """Write a block's gradients, and add to the video's."""
    of_text, of_video, *of_weights = (len(x) > 0 for x in grads)
    if shared.frames is not None:
        words = pack_words(block.text, tuning.STEP, shared.normalize, grain=GRAIN, classes=False, copies=False)
        if of_text:
            grad = _text(words, block, shared)
            unpack(grad, block.text, words, 1 / shared.boost, shared.normalize, grads[0][block.rows], frames=False)
            del grad
        if of_video:
            _video(words, block, shared)
        del words  # packed anew by the last pass, which wants other slots
    if any(of_weights):
        weight_gradients(block, shared.video, shared.normalize, grads[2], grads[3])


def weight_gradients(block: Block, video: Side, normalize: bool, of_text: Tensor, of_video: Tensor) -> None:
    """Gradients of both sides' weights, (A, Nt) and (B, Nv), float32: a block's rows, and a block's share of the sum.

    The maxima are found again, at the price of one product: kept from the forward they would take two to four times the
    matches' memory. Where the matches name nobody the maximum was the masked 0. No atomics: partial sums, then one sum
    in a fixed order. A gradient without elements is not wanted.
    """
    text, b, nt = block.text, video.features.shape[0], block.text.features.shape[1]
    nv, both, add = video.features.shape[1], video.weight is not None, block.rows.start > 0
    together = nt <= LONGEST_CLASS and both
    if together or len(of_text):
        out = Outputs(block.grad_logits, (b, 1), block.video_index, (nt * b, b, 1), block.text_index)
        p = sweep(text, video, out, WEIGHTS, together, normalize, False, 0.5 if both else 1.0)
        if len(of_text):
            unpack_weight(p.by_word, p.words, of_text[block.rows], frames=False, add=False)
        if together and len(of_video):
            unpack_weight(p.by_frame.flatten(1), p.frames, of_video, frames=True, add=add)
    if len(of_video) and not together:
        out = Outputs(block.grad_logits, (1, b), block.text_index, (1, b, nv * b), block.text_index)
        p = sweep(video, text, out, WEIGHTS, False, normalize, False, 0.5)
        unpack_weight(p.by_word, p.words, of_video, frames=False, add=add)


def _tile(side: str, text: Side, add: bool = False) -> Tile:
    features = text.features
    arch, precision = tuning.architecture(features.device), tuning.product(features.dtype)
    return tuning.backward_tile(arch, side, precision, features.shape[2], add=add)


def _text(words: Packed, block: Block, shared: Shared) -> Tensor:
    """Gradients (slots, D') float32 of a block's unit words, times the boost."""
    tile, frames = _tile("text", block.text), shared.frames
    grad = torch.empty(words.tokens.shape, dtype=torch.float32, device=shared.boost.device)
    # The tail only serves reads beyond the last word; no gradient belongs there.
    tiles = triton.cdiv(len(grad) - TAIL, tile.n)
    interaction_backward_text[(tiles * triton.cdiv(words.dim, tile.m),)](
        _operand(frames.tokens, tile),
        frames.scale,
        frames.weight,
        frames.position,
        frames.length.amax(),
        words.weight,
        words.position,
        words.chunk_row,
        words.start,
        block.video_index,
        block.text_index,
        block.grad_logits,
        grad,
        shared.boost,
        *_sizes(block, shared),
        **_options(words, block, shared, tile),
    )
    return grad


def _video(words: Packed, block: Block, shared: Shared) -> None:
    """Add a block's share of the unit frames' gradients, times the boost."""
    add, frames, (b, nv, _) = block.rows.start > 0, shared.frames, shared.video.features.shape
    tile = _tile("video", block.text, add)
    blocks, parts = triton.cdiv(b, tile.n), triton.cdiv(words.dim, tile.m)
    interaction_backward_video[(nv * blocks * parts,)](
        _operand(words.tokens, tile),
        words.scale,
        words.weight,
        words.position,
        words.chunk_row,
        words.start,
        frames.weight,
        frames.position,
        frames.length,
        block.video_index,
        block.text_index,
        block.grad_logits,
        shared.grad_frames,
        shared.boost,
        *_sizes(block, shared),
        **_options(words, block, shared, tile),
        ADD=add,
    )


def _sizes(block: Block, shared: Shared) -> tuple[int | float, ...]:
    (a, nt, _), (b, nv, _) = block.text.features.shape, shared.video.features.shape
    return a, b, nt, nv, shared.frames.rows_allocated, 0.5 if shared.both else 1.0


def _options(words: Packed, block: Block, shared: Shared, tile: Tile) -> dict[str, object]:
    tf32 = tuning.product(block.text.features.dtype) == "tf32"
    return {
        "D": words.dim,
        "BM": tile.m,
        "BN": tile.n,
        "BK": tile.k,
        "BOTH": shared.both,
        "PRECISION": "tf32" if tf32 else "ieee",
        "TMA": tile.tma,
        **tuning.launch_options(tile),
    }


def _operand(tokens: Tensor, tile: Tile) -> object:
    return TensorDescriptor.from_tensor(tokens, [tile.k, tile.m]) if tile.tma else tokens


def _boost(grad_logits: Tensor, text: Side, video: Side, normalize: bool) -> Tensor:
    """A power of two that brings the largest coefficient near float16's upper end; 1 for other dtypes.

    Gradients of a mean over many pairs lie below what float16 can hold. Of all rows, so that blocks add up. Found on
    the device: no synchronisation.
    """
    if text.features.dtype != torch.float16:
        return torch.ones((), dtype=torch.float32, device=grad_logits.device)
    (weight, scale), (video_weight, video_scale) = _peaks(text, normalize), _peaks(video, normalize)
    peak = grad_logits.abs().amax() * torch.maximum(weight, video_weight) * 2 * torch.maximum(scale, video_scale)
    exponent = (14 - peak.log2().ceil()).nan_to_num(0.0, 0.0, 0.0).clamp(-100, 100)
    return torch.ldexp(torch.ones_like(peak), exponent.to(torch.int32))


def _peaks(side: Side, normalize: bool) -> tuple[Tensor, Tensor]:
    """The largest weight and the largest 1 / |x| of one side's real tokens."""
    zero = torch.zeros((), dtype=torch.float32, device=side.features.device)
    real = torch.ones_like(zero, dtype=torch.bool) if side.mask is None else side.mask
    weight = zero
    if side.weight is not None:
        weight = torch.where(real, side.weight.to(torch.float32), 0.0).nan_to_num(0.0, 0.0, 0.0).abs().amax()
    if not normalize:
        return weight, zero + 1
    norm = torch.linalg.vector_norm(side.features, dim=-1, dtype=torch.float32)
    alive = real & (norm > NORM_EPS) & (norm < torch.inf)
    return weight, torch.where(alive, 1 / norm, 0.0).amax()
