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
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import tuning
from .packing import GRAIN, LONGEST_CLASS, TAIL, Packed, Side, pack_frames, pack_words, unpack, unpack_weight
from .token_interaction import WEIGHTS, Outputs, sweep
from .tuning import Tile

CHUNK = tl.constexpr(GRAIN)


@triton.jit
def interaction_backward_text(
    video, video_scale, video_weight, video_position, most_frames, text_weight, text_position, chunk_row, start,
    video_index, text_index, grad_logits, grad, boost,
    texts, videos, text_tokens, video_tokens, video_rows, factor,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BOTH: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
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
    text, text_scale, text_weight, text_position, chunk_row, start, video_weight, video_position, video_length,
    video_index, text_index, grad_logits, grad, boost,
    texts, videos, text_tokens, video_tokens, video_rows, factor,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BOTH: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """BM channels of the gradients of one frame of BN videos."""
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


def backward(
    grad_logits: Tensor, text: Side, video: Side, video_index: Tensor, text_index: Tensor, normalize: bool,
    need_text: bool, need_video: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of both features (their dtype) and both weights (float32); empty where not needed."""
    both = video.weight is not None
    if len(text.features) == 0 or len(video.features) == 0:
        by_text, by_video = _empty_sum(text, need_text, True), _empty_sum(video, need_video, both)
        return by_text[0], by_video[0], by_text[1], by_video[1]
    grad_logits = grad_logits.to(torch.float32).contiguous()
    arch, precision = tuning.architecture(text.features.device), tuning.product(text.features.dtype)
    by_text, by_video = (tuning.backward_tile(arch, side, precision, text.features.shape[2]) for side in tuning.SIDES)
    block = max(by_text.k, by_video.n)
    words = pack_words(text, tuning.STEP, normalize, grain=GRAIN, classes=False, copies=False)
    frames = pack_frames(video, tuning.STEP, block, normalize, copies=False)
    boost = _boost(grad_logits, words, frames)
    shared = (video_index, text_index, grad_logits)
    (grad_text, grad_text_weight), (grad_video, grad_video_weight) = (
        _empty_sum(x, False, False) for x in (text, video)
    )
    if need_text:
        grad = _text(words, frames, shared, boost, text, video, by_text, precision, both)
        grad_text = unpack(grad, text, words, 1 / boost, normalize, frames=False)
    if need_video:
        grad = _video(words, frames, shared, boost, text, video, by_video, precision, both)
        grad_video = unpack(grad, video, frames, 1 / boost, normalize, frames=True)
    del words, frames  # packed anew by the last pass, which wants other slots
    of_text, of_video = weight_gradients(grad_logits, text, video, video_index, text_index, normalize)
    return (
        grad_text,
        grad_video,
        of_text if need_text else grad_text_weight,
        of_video if need_video and both else grad_video_weight,
    )


def _empty_sum(side: Side, need: bool, weighted: bool) -> tuple[Tensor, Tensor]:
    """Gradients of one side's features and weights where the other has no rows; no elements where not needed."""
    shape, device = side.features.shape, side.features.device
    return (
        torch.zeros(shape if need else (0,), dtype=side.features.dtype, device=device),
        torch.zeros(shape[:2] if need and weighted else (0,), dtype=torch.float32, device=device),
    )


def weight_gradients(
    grad_logits: Tensor, text: Side, video: Side, video_index: Tensor, text_index: Tensor, normalize: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of both sides' weights, (A, Nt) and (B, Nv), float32; one direction has no use for the second.

    The maxima are found again, at the price of one product: kept from the forward they would take two to four times the
    matches' memory. Where the matches name nobody the maximum was the masked 0. No atomics: partial sums, then one sum
    in a fixed order.
    """
    b, nt = video.features.shape[0], text.features.shape[1]
    nv, both = video.features.shape[1], video.weight is not None
    out = Outputs(grad_logits, (b, 1), video_index, (nt * b, b, 1), text_index)
    if nt <= LONGEST_CLASS or not both:
        p = sweep(text, video, out, WEIGHTS, both, normalize, False, 0.5 if both else 1.0)
        by_text = unpack_weight(p.by_word, text, p.words, frames=False)
        return by_text, unpack_weight(p.by_frame.flatten(1), video, p.frames, frames=True) if both else by_text[:0]
    p = sweep(text, video, out, WEIGHTS, False, normalize, False, 0.5)
    by_text = unpack_weight(p.by_word, text, p.words, frames=False)
    out = Outputs(grad_logits, (1, b), text_index, (1, b, nv * b), text_index)
    p = sweep(video, text, out, WEIGHTS, False, normalize, False, 0.5)
    return by_text, unpack_weight(p.by_word, video, p.words, frames=False)


def _text(
    words: Packed, frames: Packed, shared: tuple[Tensor, ...], boost: Tensor, text: Side, video: Side, tile: Tile,
    precision: str, both: bool,
) -> Tensor:  # fmt: skip
    a, nt, _ = text.features.shape
    b, nv, _ = video.features.shape
    grad = torch.empty(words.tokens.shape, dtype=torch.float32, device=boost.device)
    # The tail only serves reads beyond the last word; no gradient belongs there.
    tiles = triton.cdiv(len(grad) - TAIL, tile.n)
    interaction_backward_text[(tiles * triton.cdiv(words.dim, tile.m),)](
        _operand(frames.tokens, tile), frames.scale, frames.weight, frames.position, frames.length.amax(),
        words.weight, words.position, words.chunk_row, words.start, *shared, grad, boost,
        a, b, nt, nv, frames.rows_allocated, 0.5 if both else 1.0,
        D=words.dim, BM=tile.m, BN=tile.n, BK=tile.k, BOTH=both,
        PRECISION="tf32" if precision == "tf32" else "ieee", TMA=tile.tma, **tuning.launch_options(tile),
    )  # fmt: skip
    return grad


def _video(
    words: Packed, frames: Packed, shared: tuple[Tensor, ...], boost: Tensor, text: Side, video: Side, tile: Tile,
    precision: str, both: bool,
) -> Tensor:  # fmt: skip
    a, nt, _ = text.features.shape
    b, nv, _ = video.features.shape
    grad = torch.empty(frames.tokens.shape, dtype=torch.float32, device=boost.device)
    blocks, parts = triton.cdiv(b, tile.n), triton.cdiv(words.dim, tile.m)
    interaction_backward_video[(nv * blocks * parts,)](
        _operand(words.tokens, tile), words.scale, words.weight, words.position, words.chunk_row, words.start,
        frames.weight, frames.position, frames.length, *shared, grad, boost,
        a, b, nt, nv, frames.rows_allocated, 0.5 if both else 1.0,
        D=words.dim, BM=tile.m, BN=tile.n, BK=tile.k, BOTH=both,
        PRECISION="tf32" if precision == "tf32" else "ieee", TMA=tile.tma, **tuning.launch_options(tile),
    )  # fmt: skip
    return grad


def _operand(tokens: Tensor, tile: Tile) -> object:
    return TensorDescriptor.from_tensor(tokens, [tile.k, tile.m]) if tile.tma else tokens


def _boost(grad_logits: Tensor, words: Packed, frames: Packed) -> Tensor:
    """A power of two that brings the largest coefficient near float16's upper end; 1 for other dtypes.

    Gradients of a mean over many pairs lie below what float16 can hold. Found on the device: no synchronisation.
    """
    if words.tokens.dtype != torch.float16:
        return torch.ones((), dtype=torch.float32, device=grad_logits.device)
    weight = torch.maximum(*(x.weight.nan_to_num(0.0, 0.0, 0.0).abs().amax() for x in (words, frames)))
    scale = torch.maximum(words.scale.amax(), frames.scale.amax())
    peak = grad_logits.abs().amax() * weight * 2 * scale
    exponent = (14 - peak.log2().ceil()).nan_to_num(0.0, 0.0, 0.0).clamp(-100, 100)
    return torch.ldexp(torch.ones_like(peak), exponent.to(torch.int32))
