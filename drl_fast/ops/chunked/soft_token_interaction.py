"""The token interaction with soft pooling, in blocks of a fixed shape; see :mod:`.token_interaction`.

Sums over a token's candidates run in token order, for the reason given there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import autocast
from ...numerics import accumulation_dtype
from .token_interaction import Gradients, Side, blocks, pad_rows, prepare, similarities, weighted_sum


class Pooled(NamedTuple):
    """The pooled values of one direction, and what their derivative needs; S is (C, Nt, V, Nv)."""

    value: Tensor  # S without the pooled axis
    slope: Tensor  # d value / d S, of S's shape; 0 for tokens that do not take part


def pool(
    s: Tensor, dim: int, takes_part: Tensor, zeros: Tensor, logsumexp: bool, temperature: float, counts: Tensor
) -> Pooled:
    """Pool S over ``dim``.

    ``takes_part`` marks the candidates; ``zeros`` is the number of further candidates, all of similarity 0. ``counts``
    marks the tokens whose values are wanted; others, and those without a candidate, get 0.
    """
    s = s.masked_fill(~takes_part, 0)
    top = s.masked_fill(~takes_part, -torch.inf).amax(dim)
    top = torch.where(zeros > 0, top.clamp(min=0), top)
    counts = counts & (takes_part.any(dim) | (zeros > 0))
    top = torch.where(counts, top, 0)
    shifted = (s - top.unsqueeze(dim)) / temperature
    exponential = torch.where(takes_part & counts.unsqueeze(dim), shifted.exp(), 0)
    # Without zeros `top` may be far below 0, and its exponential infinite.
    total = torch.where(zeros > 0, zeros * (-top / temperature).exp(), 0)
    weighted = torch.zeros_like(total)
    for e, x in zip(exponential.unbind(dim), s.unbind(dim), strict=True):
        total = total + e
        weighted = weighted + e * x
    total = torch.where(counts, total, 1)
    value = top + temperature * total.log() if logsumexp else weighted / total
    probability = exponential / total.unsqueeze(dim)
    slope = probability if logsumexp else probability * (1 + (s - value.unsqueeze(dim)) / temperature)
    return Pooled(torch.where(counts, value, 0), torch.where(takes_part & counts.unsqueeze(dim), slope, 0))


def pool_words(
    s: Tensor, text: Side, video: Side, sa: slice, sb: slice, zero_competes: bool, logsumexp: bool, temperature: float
) -> Pooled:
    """Pool one block's similarities over frames: values (C, Nt, V)."""
    t_real, v_real = text.real[sa], video.real[sb]
    zeros = ((~v_real).sum(1) * zero_competes).to(s.dtype)
    by_word = pool(s, 3, v_real[None, None], zeros[None, None], logsumexp, temperature, t_real[:, :, None])
    # A pair with an empty side scores 0, masked zeros or not.
    return by_word._replace(value=torch.where(v_real.any(1), by_word.value, 0))


def pool_frames(
    s: Tensor, text: Side, video: Side, sa: slice, sb: slice, zero_competes: bool, logsumexp: bool, temperature: float
) -> Pooled:
    """Pool one block's similarities over words: values (C, V, Nv)."""
    t_real, v_real = text.real[sa], video.real[sb]
    zeros = ((~t_real).sum(1) * zero_competes).to(s.dtype)
    real = t_real[:, :, None, None], v_real[None]
    by_frame = pool(s, 1, real[0], zeros[:, None, None], logsumexp, temperature, real[1])
    return by_frame._replace(value=torch.where(t_real.any(1)[:, None, None], by_frame.value, 0))


def forward(
    text: Tensor,
    video: Tensor,
    text_weight: Tensor,
    video_weight: Tensor | None,
    text_mask: Tensor | None,
    video_mask: Tensor | None,
    normalize: bool,
    zero_competes: bool,
    logsumexp: bool,
    temperature: float,
) -> Tensor:
    """Compute logits (A, B)."""
    a, b = len(text), len(video)
    logits = text.new_empty((a, b), dtype=accumulation_dtype(text.dtype))
    with autocast.off(text.device.type):
        t, v = prepare(text, text_mask, normalize), prepare(video, video_mask, normalize)
        wt = pad_rows(text_weight, t)
        wv = None if video_weight is None else pad_rows(video_weight, v)
        for sa, sb in blocks(t, v, a, b):
            s = similarities(t, v, sa, sb)
            options = (t, v, sa, sb, zero_competes, logsumexp, temperature)
            by_word = pool_words(s, *options)
            total = weighted_sum(by_word.value, wt[sa][:, :, None])
            if wv is not None:
                by_frame = pool_frames(s, *options)
                total = (total + weighted_sum(by_frame.value.transpose(1, 2), wv[sb].T[None, :, :])) / 2
            na, nb = logits[sa, sb].shape
            logits[sa, sb] = total[:na, :nb]
    return logits


def backward(
    grad_logits: Tensor,
    text: Tensor,
    video: Tensor,
    text_weight: Tensor,
    video_weight: Tensor | None,
    text_mask: Tensor | None,
    video_mask: Tensor | None,
    normalize: bool,
    zero_competes: bool,
    logsumexp: bool,
    temperature: float,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of both features and both weights; one that ``output_mask`` leaves out is empty."""
    with autocast.off(text.device.type):
        t, v = prepare(text, text_mask, normalize), prepare(video, video_mask, normalize)
        wt = pad_rows(text_weight, t)
        wv = None if video_weight is None else pad_rows(video_weight, v)
        sums = Gradients(t, v, output_mask)
        for sa, sb in blocks(t, v, len(text), len(video)):
            s = similarities(t, v, sa, sb)
            options = (t, v, sa, sb, zero_competes, logsumexp, temperature)
            by_word = pool_words(s, *options)
            g = grad_logits[sa, sb].to(s.dtype)
            na, nb = g.shape
            # The score of a pair with an empty side is constant, but the upstream gradient may be NaN.
            g = torch.where(t.real[sa][:na].any(1)[:, None] & v.real[sb][:nb].any(1), g, 0)
            g = (g if wv is None else g / 2)[:, None, :, None]
            coefficient = by_word.slope[:na, :, :nb] * wt[sa][:na, :, None, None]
            # A masked token's value is 0, but the upstream gradient may be NaN.
            real = t.real[sa][:na, :, None]
            sums.text_weight[sa][:na] += torch.where(real, by_word.value[:na, :, :nb] * g[..., 0], 0).sum(2)
            if wv is not None:
                by_frame = pool_frames(s, *options)
                coefficient = coefficient + by_frame.slope[:na, :, :nb] * wv[sb][:nb]
                sums.video_weight[sb][:nb] += torch.where(v.real[sb][:nb], by_frame.value[:na, :nb] * g[:, 0], 0).sum(0)
            sums.add(sa, sb, coefficient * g)
        return sums.of(text, video, both=wv is not None)
