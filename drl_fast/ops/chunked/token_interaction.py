"""The token interaction in blocks of a fixed shape.

A block is C captions x V videos; its similarities (C, Nt, V, Nv) are the only large temporary. A pair's score must not
depend on the rest of the batch. So every block has the same shape (the last one is padded), and weighted sums run in
token order: a matrix product of varying shape, or ``torch.sum``, would round differently.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ... import autocast
from ...numerics import NORM_EPS, accumulation_dtype, index_dtype

# Tokens along one edge of a block. On a CPU a block should stay in cache, and small batches are common.
BLOCK_TOKENS = {"cpu": 288}
BLOCK_TOKENS_ELSEWHERE = 2304
# Matrix products round differently in a partly filled last tile, and a token's score would depend on its place in the
# block. So rows are padded to a multiple of 48, which is a multiple of the usual tile edges.
TILE = 48


class Side(NamedTuple):
    """One side's tokens, ready for products, padded to whole blocks of rows."""

    tokens: Tensor  # (rows, N, D) float32 or float64; masked and padding tokens are 0
    inverse_norm: Tensor | None  # (rows, N, 1); None without normalisation
    real: Tensor  # (rows, N) bool
    has_masked: Tensor  # (rows,) bool
    block: int  # rows per block


def prepare(features: Tensor, mask: Tensor | None, normalize: bool) -> Side:
    """Normalise one side's features (rows, N, D) and pad their rows to whole blocks."""
    rows, length, _ = features.shape
    edge = BLOCK_TOKENS.get(features.device.type, BLOCK_TOKENS_ELSEWHERE)
    block = max(1, edge // length)
    pad = -rows % block
    real = torch.ones(rows, length, dtype=torch.bool, device=features.device) if mask is None else mask
    tokens, inverse = unit(features, mask, normalize)
    has_masked = ~real.all(dim=1)
    if pad:
        tokens = torch.nn.functional.pad(tokens, (0, 0, 0, 0, 0, pad))
        real = torch.nn.functional.pad(real, (0, 0, 0, pad))
        has_masked = torch.nn.functional.pad(has_masked, (0, pad))
    return Side(tokens, inverse, real, has_masked, block)


def unit(features: Tensor, real: Tensor | None, normalize: bool) -> tuple[Tensor, Tensor | None]:
    """Return tokens in the dtype of sums, masked ones 0, and 1 / norm: 0 for a zero token, None if not normalised."""
    tokens = features.to(accumulation_dtype(features.dtype))
    if real is not None:
        tokens = torch.where(real[..., None], tokens, 0)
    if not normalize:
        return tokens, None
    norm = tokens.norm(dim=-1, keepdim=True)
    inverse = torch.where(norm <= NORM_EPS, 0, 1 / norm)
    return torch.where(norm <= NORM_EPS, 0, tokens * inverse), inverse


def through_norm(grad: Tensor, tokens: Tensor, inverse: Tensor | None, real: Tensor) -> Tensor:
    """Turn the gradient of :func:`unit`'s tokens into that of the raw features."""
    if inverse is not None:
        grad = torch.where(inverse == 0, 0, (grad - tokens * (tokens * grad).sum(-1, keepdim=True)) * inverse)
    return torch.where(real[..., None], grad, 0)


def blocks(text: Side, video: Side, a: int, b: int) -> Iterator[tuple[slice, slice]]:
    """Yield the rows of text and of video of each block that covers a x b pairs."""
    for a0 in range(0, a, text.block):
        for b0 in range(0, b, video.block):
            yield slice(a0, a0 + text.block), slice(b0, b0 + video.block)


def similarities(text: Side, video: Side, sa: slice, sb: slice) -> Tensor:
    """Compute one block's similarities (C, Nt, V, Nv)."""
    t, v = text.tokens[sa], video.tokens[sb]
    product = whole_tiles(t.flatten(0, 1)) @ whole_tiles(v.flatten(0, 1)).T
    product = product[: t.shape[0] * t.shape[1], : v.shape[0] * v.shape[1]]
    return product.unflatten(1, v.shape[:2]).unflatten(0, t.shape[:2])


def whole_tiles(tokens: Tensor) -> Tensor:
    """Pad (tokens, D) with zeros to a multiple of ``TILE``."""
    missing = -len(tokens) % TILE
    return torch.nn.functional.pad(tokens, (0, 0, 0, missing)) if missing else tokens


def best(similarity: Tensor, dim: int, competes: Tensor, zero: Tensor, counts: Tensor, none: int) -> tuple[Tensor, ...]:
    """Return the maximum over ``dim`` and its lowest index.

    ``competes`` marks the candidates; ``zero`` adds a candidate of value 0 without an index. ``counts`` marks the
    tokens that choose. If a token chooses nothing, its value is 0 and its index is ``none``.
    """
    similarity = similarity.masked_fill(~competes, -torch.inf)
    value = similarity.amax(dim)
    shape = [1] * similarity.dim()
    shape[dim] = -1
    position = torch.arange(similarity.shape[dim], device=similarity.device).view(shape)
    # argmax may return any of several equal maxima. NaN needs a test of its own: it does not equal itself.
    hit = (similarity == value.unsqueeze(dim)) | similarity.isnan()
    index = torch.where(hit & competes, position, none).amin(dim)
    index = torch.where((index == none) | ~counts | (zero & (value < 0)), none, index)
    return torch.where(index == none, 0, value), index


def best_frames(s: Tensor, text: Side, video: Side, sa: slice, sb: slice, zero_competes: bool) -> tuple[Tensor, ...]:
    """Return every word's maximum over frames and its index, (C, Nt, V) each; LARGEST means that none was chosen."""
    zero = zero_competes & video.has_masked[sb][None, None]
    return best(s, 3, video.real[sb][None, None], zero, text.real[sa][:, :, None], LARGEST)


def best_words(s: Tensor, text: Side, video: Side, sa: slice, sb: slice, zero_competes: bool) -> tuple[Tensor, ...]:
    """Return every frame's maximum over words and its index, (C, Nv, V) each; LARGEST means that none was chosen."""
    zero = zero_competes & text.has_masked[sa][:, None, None]
    value, index = best(s, 1, text.real[sa][:, :, None, None], zero, video.real[sb][None], LARGEST)
    return value.transpose(1, 2), index.transpose(1, 2)


def weighted_sum(value: Tensor, weight: Tensor) -> Tensor:
    """Sum value (C, N, V) times weight over dim 1, one token after the other."""
    total = torch.zeros_like(value[:, 0])
    for n in range(value.shape[1]):
        total = total + weight[:, n] * value[:, n]
    return total


def forward(
    text: Tensor,
    video: Tensor,
    text_weight: Tensor,
    video_weight: Tensor | None,
    text_mask: Tensor | None,
    video_mask: Tensor | None,
    normalize: bool,
    zero_competes: bool,
    keep_matches: bool,
    keep_maxima: bool = False,
) -> tuple[Tensor, ...]:
    """Compute logits (A, B) and, if kept, matches (A, Nt, B) and (A, Nv, B); maxima and packed form are empty."""
    a, nt, _ = text.shape
    b, nv, _ = video.shape
    both = video_weight is not None
    dtype = accumulation_dtype(text.dtype)
    logits = text.new_empty((a, b), dtype=dtype)
    video_index = text.new_empty((a, nt, b) if keep_matches else (0,), dtype=index_dtype(nv))
    text_index = text.new_empty((a, nv, b) if keep_matches and both else (0,), dtype=index_dtype(nt))
    none_v, none_t = _none(video_index), _none(text_index)
    with autocast.off(text.device.type):
        t, v = prepare(text, text_mask, normalize), prepare(video, video_mask, normalize)
        wt = pad_rows(text_weight, t)
        wv = None if video_weight is None else pad_rows(video_weight, v)
        for sa, sb in blocks(t, v, a, b):
            s = similarities(t, v, sa, sb)
            value, index = best_frames(s, t, v, sa, sb, zero_competes)
            total = weighted_sum(value, wt[sa][:, :, None])
            na, nb = logits[sa, sb].shape
            if keep_matches:
                video_index[sa, :, sb] = index.masked_fill(index == LARGEST, none_v)[:na, :, :nb].to(video_index.dtype)
            if wv is not None:
                value, index = best_words(s, t, v, sa, sb, zero_competes)
                total = (total + weighted_sum(value, wv[sb].T[None, :, :])) / 2
                if keep_matches:
                    index = index.masked_fill(index == LARGEST, none_t)[:na, :, :nb]
                    text_index[sa, :, sb] = index.to(text_index.dtype)
            logits[sa, sb] = total[:na, :nb]
    return logits, video_index, text_index, text.new_empty(0, dtype=torch.float32), text.new_empty(0)


def backward(
    grad_logits: Tensor,
    text: Tensor,
    video: Tensor,
    text_weight: Tensor,
    video_weight: Tensor | None,
    text_mask: Tensor | None,
    video_mask: Tensor | None,
    video_index: Tensor,
    text_index: Tensor,
    maxima: Tensor,
    packed: Tensor,
    normalize: bool,
    zero_competes: bool,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of both features and both weights; one that ``output_mask`` leaves out is empty."""
    a, nt, _ = text.shape
    b, nv, _ = video.shape
    _, _, of_text_weight, of_video_weight = output_mask
    # If the forward pass kept no matches, each block finds its own again.
    kept = video_index.numel() > 0
    words = torch.arange(nt, device=text.device)[None, :, None, None]
    frames = torch.arange(nv, device=text.device)
    with autocast.off(text.device.type):
        t, v = prepare(text, text_mask, normalize), prepare(video, video_mask, normalize)
        sums = Gradients(t, v, output_mask)
        for sa, sb in blocks(t, v, a, b):
            g = grad_logits[sa, sb].to(t.tokens.dtype)[:, None, :, None]
            if video_weight is not None:
                g = g / 2
            na, nb = g.shape[0], g.shape[2]
            s = similarities(t, v, sa, sb) if of_text_weight or of_video_weight or not kept else text.new_empty(0)
            # d loss / d S is sparse: one entry per word and video, and one per frame and text.
            chosen = video_index[sa, :, sb] if kept else best_frames(s, t, v, sa, sb, zero_competes)[1][:na, :, :nb]
            # The order of the sums below depends on the layout: make it the same for kept and recomputed matches.
            hit = chosen.contiguous()[..., None] == frames
            if of_text_weight:
                sums.text_weight[sa][:na] += torch.where(hit, s[:na, :, :nb] * g, 0).sum((2, 3))
            coefficient = torch.where(hit, g * text_weight[sa][:, :, None, None], 0)
            if video_weight is not None:
                chosen = text_index[sa, :, sb] if kept else best_words(s, t, v, sa, sb, zero_competes)[1][:na, :, :nb]
                hit = chosen.contiguous().transpose(1, 2)[:, None] == words
                if of_video_weight:
                    sums.video_weight[sb][:nb] += torch.where(hit, s[:na, :, :nb] * g, 0).sum((0, 1))
                coefficient = coefficient + torch.where(hit, g * video_weight[sb][None, None], 0)
            sums.add(sa, sb, coefficient)
        return sums.of(text, video, both=video_weight is not None)


class Gradients:
    """Gradients of both sides' tokens and weights, summed block by block."""

    def __init__(self, text: Side, video: Side, output_mask: list[bool]) -> None:
        self._text, self._video, self._wanted = text, video, output_mask
        self._of_text, self._of_video = torch.zeros_like(text.tokens), torch.zeros_like(video.tokens)
        self.text_weight = torch.zeros_like(text.tokens[..., 0])
        self.video_weight = torch.zeros_like(video.tokens[..., 0])

    def add(self, sa: slice, sb: slice, coefficient: Tensor) -> None:
        """Add what follows from one block's d loss / d S (texts, Nt, videos, Nv), without the block's padding."""
        na, nt, nb, nv = coefficient.shape
        flat = coefficient.reshape(na * nt, nb * nv)
        if self._wanted[0]:
            self._of_text[sa][:na] += (flat @ self._video.tokens[sb][:nb].flatten(0, 1)).view(na, nt, -1)
        if self._wanted[1]:
            self._of_video[sb][:nb] += (flat.T @ self._text.tokens[sa][:na].flatten(0, 1)).view(nb, nv, -1)

    def of(self, text: Tensor, video: Tensor, *, both: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the gradients of both features and both weights; one that is not wanted is empty."""
        of_text, of_video, of_text_weight, of_video_weight = self._wanted
        return (
            _unnormalize(self._of_text, self._text, text) if of_text else text.new_empty(0),
            _unnormalize(self._of_video, self._video, video) if of_video else video.new_empty(0),
            self.text_weight[: len(text)].clone() if of_text_weight else self.text_weight.new_empty(0),
            self.video_weight[: len(video)].clone() if of_video_weight and both else self.text_weight.new_empty(0),
        )


def _unnormalize(grad: Tensor, side: Side, features: Tensor) -> Tensor:
    """Turn gradients of unit tokens into those of the features, without the last block's padding, in their dtype."""
    rows = len(features)
    grad = through_norm(grad[:rows], side.tokens[:rows], side.inverse_norm, side.real[:rows])
    return grad.to(features.dtype).contiguous()


def pad_rows(weight: Tensor, side: Side) -> Tensor:
    """Pad token weights to the side's whole blocks; a masked token's becomes 0, whatever it was."""
    padded = torch.nn.functional.pad(weight, (0, 0, 0, len(side.tokens) - len(weight)))
    return torch.where(side.real, padded, 0)


# The index of "none chosen" while indices are computed; the operator's own value is _none().
LARGEST = 1 << 30


def _none(index: Tensor) -> int:
    return 255 if index.dtype == torch.uint8 else -1
