"""Backward kernels of the token interaction: gradients of the unit tokens, computed from the matches.

    C[a,i,b,f] = g[a,b] (w_ai [word i of a chose frame f of b] + w_bf [frame f of b chose word i of a]) / 2
    G_ai = sum_bf C[a,i,b,f] v_bf / |v_bf|        G_bf = sum_ai C[a,i,b,f] t_ai / |t_ai|
    packing.unpack then turns the gradient G of a unit token into that of the raw token

C is sparse (one entry per word and video, one per frame and caption), but gathering tokens by match would be bound by
memory. So a program builds a tile of C on chip and multiplies it on the tensor cores. No atomics: each program owns its
part of G and adds in a fixed order.

      transposed:   G^T (D x words) += v^T (D x videos)  C (videos x words)     one frame of BK videos per step
                    G^T (D x videos) += t^T (D x words)  C (words x videos)     BK words per step, one frame per program

On chip: the accumulator and one tile of C. C is always the right operand, which is read from shared memory: a register
operand would make ptxas serialise the products. No product's result feeds another product.
Per step: 2 BM BN BK FLOP; BM BK itemsize bytes of tokens, BK BN of the words' matches, 5 BK BN / 16 of g and the
frames' matches.

Words come in chunks of GRAIN slots of one caption, so that values of a pair are loaded once per chunk.

The launcher loops over blocks of text rows. A block's matches are kept ones, or the forward kernel finds them again;
the gradients have the same bits in both cases. G_bf accumulates from block to block in float32.
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
from .packing import (
    CHUNK,
    GRAIN,
    LONGEST_CLASS,
    NORM_EPS,
    TAIL,
    PackedRows,
    Side,
    index_dtype,
    pack_frames,
    pack_words,
    unpack,
    unpack_weight,
)
from .token_interaction import WEIGHTS, Outputs, forward, sweep
from .tuning import Tile

# Bytes of matches in a block of text rows. Each block costs a pass over all video gradients, so there should be few;
# but a block must be small beside the memory of a training step. Batches up to 2,400 with 32 words and 12 frames are
# one block.
BLOCK_BYTES = 256 << 20
# A block has a multiple of this many rows, so that its part of every tensor is aligned to 16 bytes.
BLOCK_ROWS = 16


class Pairs(NamedTuple):
    """Values of the pairs of a block of text rows; passed to kernels."""

    grad_logits: Tensor  # (rows, B) float32
    video_index: Tensor
    text_index: Tensor | None  # None with one direction
    boost: Tensor
    factor: float


@triton.jit
def interaction_backward_text(
    words,
    frames,
    frame_tiles,
    most_frames,
    pairs,
    grad,
    TILE: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute TILE.m channels of the gradients of TILE.n words; frames come by descriptor if TILE.tma."""
    BM: tl.constexpr = TILE.m
    BN: tl.constexpr = TILE.n
    BK: tl.constexpr = TILE.k
    CHUNKS: tl.constexpr = BN // CHUNK
    parts: tl.constexpr = (D + BM - 1) // BM
    t0 = tl.program_id(0) // parts * BN
    d0 = tl.program_id(0) % parts * BM
    if t0 >= tl.load(words.start + words.rows):
        return
    slot = t0 + tl.arange(0, BN)
    row = tl.load(words.chunk_row + t0 // CHUNK + tl.arange(0, CHUNKS)).to(tl.int64)
    there = row >= 0
    word = tl.load(words.position + slot)
    word3 = tl.reshape(word, (1, CHUNKS, CHUNK))
    weight = tl.load(words.weight + slot)
    of_word = tl.reshape(tl.broadcast_to(row[:, None], CHUNKS, CHUNK), (BN,)) * words.tokens + word
    scale_all = tl.load(pairs.boost) * pairs.factor
    channel = d0 + tl.arange(0, BM)
    acc = tl.zeros((BM, BN), tl.float32)
    # One loop over videos and frames instead of two: values that an outer loop keeps for an inner one would spill.
    most = tl.load(most_frames)
    for step in tl.range(0, tl.cdiv(frames.rows, BK) * most):
        b0 = step // most * BK
        b = b0 + tl.arange(0, BK)
        of_frame = step % most * frames.allocated + b
        frame = tl.load(frames.position + of_frame)
        pair = there[None, :] & (b < frames.rows)[:, None]
        g = tl.load(pairs.grad_logits + row[None, :] * frames.rows + b[:, None], mask=pair, other=0.0) * scale_all
        ok = (word >= 0)[None, :] & (b < frames.rows)[:, None]
        match = pairs.video_index + of_word[None, :] * frames.rows + b[:, None]
        chosen = tl.load(match, mask=ok, other=0).to(tl.int32)
        c = tl.where(chosen == frame[:, None], weight[None, :], 0.0)
        c = tl.reshape(c, (BK, CHUNKS, CHUNK))
        if pairs.text_index is not None:
            match = pairs.text_index + (row[None, :] * frames.tokens + frame[:, None]) * frames.rows + b[:, None]
            by_frame = tl.load(match, mask=pair & (frame >= 0)[:, None], other=0).to(tl.int32)
            share = tl.load(frames.weight + of_frame)[:, None, None]
            c += tl.where(by_frame[:, :, None] == word3, share, 0.0)
        c = c * (g * tl.load(frames.scale + of_frame)[:, None])[:, :, None]
        if TILE.tma:
            v = frame_tiles.load([b0, step % most * D + d0])
        else:
            v_rows = b[:, None].to(tl.int64) * (frames.tokens * D)
            v_rows = frames.features + v_rows + (step % most * D + channel)[None, :]
            v = tl.load(v_rows, mask=(channel < D)[None, :], other=0.0)
        acc = tl.dot(v.T, tl.reshape(c, (BK, BN)).to(v.dtype), acc, input_precision=PRECISION)
    target = grad + slot[None, :].to(tl.int64) * D + channel[:, None]
    tl.store(target, acc, mask=(channel < D)[:, None])


@triton.jit
def interaction_backward_video(
    words,
    frames,
    word_tiles,
    pairs,
    grad,
    TILE: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    ADD: tl.constexpr,
):
    """Compute TILE.m channels of the gradients of one frame of TILE.n videos; ADD: add to those of earlier blocks."""
    BM: tl.constexpr = TILE.m
    BN: tl.constexpr = TILE.n
    BK: tl.constexpr = TILE.k
    CHUNKS: tl.constexpr = BK // CHUNK
    parts: tl.constexpr = (D + BM - 1) // BM
    blocks = tl.cdiv(frames.rows, BN)
    d0 = tl.program_id(0) % parts * BM
    b0 = tl.program_id(0) // parts % blocks * BN
    f = tl.program_id(0) // parts // blocks
    b = b0 + tl.arange(0, BN)
    if f >= tl.max(tl.load(frames.length + b), 0):
        return
    of_frame = f * frames.allocated + b
    frame = tl.load(frames.position + of_frame)
    share = tl.load(frames.weight + of_frame)[None, None, :]
    scale_all = tl.load(pairs.boost) * pairs.factor
    channel = d0 + tl.arange(0, BM)
    acc = tl.zeros((BM, BN), tl.float32)
    if ADD:
        # Load them first: at the end the computed tile would need registers at the same time.
        earlier = grad + (b[None, :].to(tl.int64) * frames.tokens + f) * D + channel[:, None]
        acc = tl.load(earlier, mask=(channel < D)[:, None], other=0.0)
    for t0 in tl.range(0, tl.load(words.start + words.rows), BK):
        slot = t0 + tl.arange(0, BK)
        row = tl.load(words.chunk_row + t0 // CHUNK + tl.arange(0, CHUNKS)).to(tl.int64)
        word = tl.load(words.position + slot)
        pair = (row >= 0)[:, None] & (b < frames.rows)[None, :]
        g = tl.load(pairs.grad_logits + row[:, None] * frames.rows + b[None, :], mask=pair, other=0.0) * scale_all
        of_word = tl.reshape(tl.broadcast_to(row[:, None], CHUNKS, CHUNK), (BK,)) * words.tokens + word
        ok = (word >= 0)[:, None] & (b < frames.rows)[None, :]
        match = pairs.video_index + of_word[:, None] * frames.rows + b[None, :]
        chosen = tl.load(match, mask=ok, other=0).to(tl.int32)
        c = tl.where(chosen == frame[None, :], tl.load(words.weight + slot)[:, None], 0.0)
        c = tl.reshape(c, (CHUNKS, CHUNK, BN))
        if pairs.text_index is not None:
            match = pairs.text_index + (row[:, None] * frames.tokens + frame[None, :]) * frames.rows + b[None, :]
            by_frame = tl.load(match, mask=pair & (frame >= 0)[None, :], other=0).to(tl.int32)
            c += tl.where(by_frame[:, None, :] == tl.reshape(word, (CHUNKS, CHUNK, 1)), share, 0.0)
        c = c * g[:, None, :] * tl.reshape(tl.load(words.scale + slot), (CHUNKS, CHUNK, 1))
        if TILE.tma:
            t = word_tiles.load([t0, d0])
        else:
            t_rows = words.features + slot[:, None].to(tl.int64) * D + channel[None, :]
            t = tl.load(t_rows, mask=(channel < D)[None, :], other=0.0)
        acc = tl.dot(t.T, tl.reshape(c, (BK, BN)).to(t.dtype), acc, input_precision=PRECISION)
    target = grad + (b[None, :].to(tl.int64) * frames.tokens + f) * D + channel[:, None]
    tl.store(target, acc, mask=(channel < D)[:, None])


class Block(NamedTuple):
    """Some rows of text, and their pairs with every video."""

    rows: slice
    text: Side
    grad_logits: Tensor  # (rows, B) float32
    video_index: Tensor
    text_index: Tensor


class Shared(NamedTuple):
    """Values that all blocks share."""

    video: Side
    frames: PackedRows | None  # None if no gradients of features are wanted
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
    """Compute the gradients of both features (their dtype) and both weights (float32); empty if not asked for.

    If the matches are empty, the forward pass did not keep them, and each block of text rows finds its own again.
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
        grad_frames = torch.empty(frames.features.shape, dtype=torch.float32, device=boost.device)
    shared = Shared(video, frames, grad_frames, boost, normalize)
    step = _rows_of_a_block(text, video)
    for start in range(0, a, step):
        rows = slice(start, start + step)
        part = Side(*(None if x is None else x[rows] for x in text))
        if len(video_index):
            matches = video_index[rows], text_index[rows] if both else text_index
        else:
            matches = forward(part, video, normalize, zero_competes, True)[1:]
        _block_gradients(Block(rows, part, grad_logits[rows], *matches), shared, grads)
        del matches  # free them before the next block finds its own
    if len(grads[1]):
        unpack(grad_frames, video, frames, 1 / boost, normalize, grads[1])
    return grads


def _outputs(text: Side, video: Side, wanted: Sequence[bool]) -> tuple[Tensor, ...]:
    """Allocate the gradients. Fill them with zeros if kernels do not write all: with a mask, or if a side is empty."""
    written = len(text.features) > 0 and len(video.features) > 0
    grads = []
    for i, (side, want) in enumerate(zip((text, video, text, video), wanted, strict=True)):
        # Contiguous, as the operator's fake implementation says, even if the features are not.
        new = torch.empty if side.mask is None and written else torch.zeros
        shape, dtype = (side.features.shape, side.features.dtype) if i < 2 else (side.features.shape[:2], torch.float32)
        grads.append(new(shape if want else (0,), dtype=dtype, device=side.features.device))
    return tuple(grads)


def _rows_of_a_block(text: Side, video: Side) -> int:
    """Choose the text rows of a block from shapes only, so that it does not depend on whether matches were kept."""
    nt, (b, nv, _) = text.features.shape[1], video.features.shape
    a_pair = nt * index_dtype(nv).itemsize
    if video.weight is not None:
        a_pair += nv * index_dtype(nt).itemsize
    return max(1, BLOCK_BYTES // (b * a_pair) // BLOCK_ROWS) * BLOCK_ROWS


def _block_gradients(block: Block, shared: Shared, grads: tuple[Tensor, ...]) -> None:
    """Write the gradients of a block's text rows, and add to the video's."""
    of_text, of_video, *of_weights = (len(x) > 0 for x in grads)
    if shared.frames is not None:
        words = pack_words(block.text, tuning.STEP, shared.normalize, grain=GRAIN, classes=False, copies=False)
        if of_text:
            grad = text_gradient(words, block, shared)
            unpack(grad, block.text, words, 1 / shared.boost, shared.normalize, grads[0][block.rows])
            del grad
        if of_video:
            add_video_gradient(words, block, shared)
        del words  # free it: weight_gradients packs the text again, into other slots
    if any(of_weights):
        weight_gradients(block, shared.video, shared.normalize, grads[2], grads[3])


def weight_gradients(block: Block, video: Side, normalize: bool, of_text: Tensor, of_video: Tensor) -> None:
    """Write a block's rows of the text weights' gradient (A, Nt), and add its share to the video's (B, Nv); float32.

    The forward kernel finds the maxima again, which costs one product; keeping them would take two to four times the
    matches' memory. A match without a token means that the maximum was the masked 0. No atomics: partial sums are added
    up in a fixed order. An empty output means that its gradient is not wanted.
    """
    text, b, nt = block.text, video.features.shape[0], block.text.features.shape[1]
    nv, both, add = video.features.shape[1], video.weight is not None, block.rows.start > 0
    together = nt <= LONGEST_CLASS and both
    if together or len(of_text):
        out = Outputs(block.grad_logits, (b, 1), block.video_index, (nt * b, b, 1), block.text_index)
        words, frames, partials = sweep(text, video, out, WEIGHTS, together, normalize, False, 0.5 if both else 1.0)
        if len(of_text):
            unpack_weight(partials.by_word, words, of_text[block.rows], add=False)
        if together and len(of_video):
            unpack_weight(partials.by_frame.flatten(1), frames, of_video, add=add)
    if len(of_video) and not together:
        out = Outputs(block.grad_logits, (1, b), block.text_index, (1, b, nv * b), block.text_index)
        words, _, partials = sweep(video, text, out, WEIGHTS, False, normalize, False, 0.5)
        unpack_weight(partials.by_word, words, of_video, add=add)


def _tile(side: str, text: Side, add: bool = False) -> Tile:
    features = text.features
    arch, precision = tuning.architecture(features.device), tuning.product(features.dtype)
    return tuning.backward_tile(arch, side, precision, features.shape[2], add=add)


def text_gradient(words: PackedRows, block: Block, shared: Shared) -> Tensor:
    """Compute the gradients (slots, D') float32 of a block's unit words, times the boost."""
    tile, frames = _tile("text", block.text), shared.frames
    grad = torch.empty(words.features.shape, dtype=torch.float32, device=shared.boost.device)
    # The tail after the last word has no gradient.
    tiles = triton.cdiv(len(grad) - TAIL, tile.n)
    interaction_backward_text[(tiles * triton.cdiv(words.dim, tile.m),)](
        words,
        frames,
        _descriptor(frames.features, tile),
        frames.length.amax(),
        _pairs(block, shared),
        grad,
        **_options(words, tile),
    )
    return grad


def add_video_gradient(words: PackedRows, block: Block, shared: Shared) -> None:
    """Add a block's share of the unit frames' gradients, times the boost."""
    add, frames = block.rows.start > 0, shared.frames
    tile = _tile("video", block.text, add)
    blocks, parts = triton.cdiv(frames.rows, tile.n), triton.cdiv(words.dim, tile.m)
    interaction_backward_video[(frames.tokens * blocks * parts,)](
        words,
        frames,
        _descriptor(words.features, tile),
        _pairs(block, shared),
        shared.grad_frames,
        ADD=add,
        **_options(words, tile),
    )


def _pairs(block: Block, shared: Shared) -> Pairs:
    text_index = block.text_index if shared.both else None
    return Pairs(block.grad_logits, block.video_index, text_index, shared.boost, 0.5 if shared.both else 1.0)


def _options(words: PackedRows, tile: Tile) -> dict[str, object]:
    tf32 = tuning.product(words.features.dtype) == "tf32"
    options = {"TILE": tile, "D": words.dim, "PRECISION": "tf32" if tf32 else "ieee"}
    return {**options, **tuning.launch_options(tile)}


def _descriptor(tokens: Tensor, tile: Tile) -> TensorDescriptor | None:
    return TensorDescriptor.from_tensor(tokens, [tile.k, tile.m]) if tile.tma else None


def _boost(grad_logits: Tensor, text: Side, video: Side, normalize: bool) -> Tensor:
    """Choose a power of two that scales the largest coefficient close to float16's maximum; 1 for other dtypes.

    Gradients of a mean over many pairs are too small for float16. All blocks share the factor, so that they can be
    added. It is computed on the device, without synchronisation.
    """
    if text.features.dtype != torch.float16:
        return torch.ones((), dtype=torch.float32, device=grad_logits.device)
    (weight, scale), (video_weight, video_scale) = _peaks(text, normalize), _peaks(video, normalize)
    peak = grad_logits.abs().amax() * torch.maximum(weight, video_weight) * 2 * torch.maximum(scale, video_scale)
    exponent = (14 - peak.log2().ceil()).nan_to_num(0.0, 0.0, 0.0).clamp(-100, 100)
    return torch.ldexp(torch.ones_like(peak), exponent.to(torch.int32))


def _peaks(side: Side, normalize: bool) -> tuple[Tensor, Tensor]:
    """Return the largest weight and the largest 1 / |x| of one side's real tokens."""
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
