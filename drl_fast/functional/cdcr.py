"""Channel decorrelation (CDCR): the loss of a batch of pairs, and the cross-correlation loss that it is made of."""

from __future__ import annotations

import math
import numbers
from typing import Any

from torch import Tensor

from .. import _checks
from ..ops import cdcr as op
from ._inputs import check_sides


def cdcr_loss(
    text: Tensor,
    video: Tensor,
    text_weight: Tensor | None = None,
    video_weight: Tensor | None = None,
    text_mask: Tensor | None = None,
    video_mask: Tensor | None = None,
    *,
    alpha_on: float,
    alpha_off: float,
    process_group: Any = None,
) -> Tensor:
    r"""Channel decorrelation of matched tokens: text a belongs to video a.

    Every real word is paired with the frame of its own video that it matches best, every real frame with a word
    alike; all tokens are L2-normalised. With each channel standardised over the batch (unbiased deviation),

    .. math:: C = \tfrac12\Big[\tfrac1B \tilde X^\top \mathrm{diag}(w^t) \tilde X' + \tfrac1B \tilde Y^\top
              \mathrm{diag}(w^v) \tilde Y'\Big], \qquad
              loss = \alpha_{on} \sum_d (C_{dd} - 1)^2 + \alpha_{off} \sum_{d \ne e} C_{de}^2

    X are the words and X' their frames, Y the frames and Y' their words. Without weights each term is divided by its
    number of tokens instead. ``alpha_off=0``, which every published setting uses, never forms the D x D matrix.
    Gradients flow through standardisation, weights and both partners, not through the choice of partners. A channel whose
    standard deviation is <= 1e-12, or within rounding of 0, counts as constant: 0 when standardised, and no gradient.

    Args:
        text: (B, Nt, D) token features, raw; float32, float16, bfloat16 or float64.
        video: (B, Nv, D) frame features of the same dtype and device; row b is text b's video.
        text_weight: (B, Nt) weights, any float dtype, used as given (WTI: the public code's CDCR 3); None, for both
            sides together, is the unweighted form (TI: its CDCR 2).
        video_weight: (B, Nv), likewise.
        text_mask: (B, Nt), non-zero = real token, any dtype, holes allowed; None: all real. Masked tokens are never
            read.
        video_mask: (B, Nv), likewise. A pair with an empty side is left out; B still counts it.
        alpha_on: weight of the diagonal, >= 0 (published: 0.11 to 0.16; the public code's default is 1.0).
        alpha_off: weight of all other entries, >= 0 (published: 0; the public code's default is 0.06).
        process_group: a torch.distributed group whose ranks each hold some of the pairs (their numbers may differ, one
            may have none): every rank returns the whole batch's loss, and gradients are the ranks' number times the
            single process's, so that DistributedDataParallel's mean over ranks equals it.

    Returns:
        A scalar, float32 (float64 for float64 input).

    Raises:
        ValueError: numbers of texts and videos differ, B = 0, fewer than 2 words or frames in paired rows (seen from
            the shapes; from the masks on the CPU only), a negative or NaN alpha, one weight without the other, and
            what :func:`token_interaction` raises.
        TypeError: as :func:`token_interaction`.

    Source: arXiv 2203.07111, section 3.3, "Channel Decorrelation Regularization".
    """
    alphas = (_alpha("alpha_on", alpha_on), _alpha("alpha_off", alpha_off))
    text, video, t_mask, v_mask = check_sides(text, video, text_mask, video_mask)
    if text.shape[0] != video.shape[0]:
        raise ValueError(
            f"video must have B = {text.shape[0]} rows to pair with text, got {video.shape[0]}; row b of each is pair b"
        )
    if (text_weight is None) != (video_weight is None):
        name, other = ("video_weight", "text_weight") if video_weight is None else ("text_weight", "video_weight")
        raise ValueError(f"{name} must be given where {other} is, got None; give both (weighted) or neither")
    if text_weight is not None and video_weight is not None:
        text_weight = _checks.weight("text_weight", text_weight, text, "B, Nt", "text")
        video_weight = _checks.weight("video_weight", video_weight, video, "B, Nv", "video")
    _enough("text", text.shape[0], text.shape[1], "B, Nt")
    _enough("video", video.shape[0], video.shape[1], "B, Nv")
    divisor = None if text_weight is None else float(text.shape[0])
    options = op.Options(*alphas, divisor, True, True)
    return op.loss(text, video, text_weight, video_weight, t_mask, v_mask, options)


def cross_correlation_loss(
    x: Tensor,
    y: Tensor,
    weight: Tensor | None = None,
    *,
    alpha_on: float,
    alpha_off: float,
    divisor: float | None = None,
    process_group: Any = None,
) -> Tensor:
    r"""Barlow Twins' loss between paired rows: channels of x and y are to agree with themselves and with no other.

    .. math:: C = \tfrac1{divisor} \tilde x^\top \mathrm{diag}(w) \tilde y, \qquad
              loss = \alpha_{on} \sum_d (C_{dd} - 1)^2 + \alpha_{off} \sum_{d \ne e} C_{de}^2

    with channels standardised over the rows, as in :func:`cdcr_loss`. Rows are used as they are: with pooled,
    normalised vectors of texts and videos this is CDCR 1, for DP.

    Args:
        x: (N, D) features; float32, float16, bfloat16 or float64.
        y: (N, D), the same dtype and device.
        weight: (N,) weights, any float dtype; None: 1.
        alpha_on: weight of the diagonal, >= 0.
        alpha_off: weight of all other entries, >= 0; 0 never forms the D x D matrix.
        divisor: what C is divided by, > 0; None: N (over all ranks).
        process_group: as in :func:`cdcr_loss`.

    Returns:
        A scalar, float32 (float64 for float64 input).

    Raises:
        ValueError: shapes that do not match, N < 2, a negative or NaN alpha, a divisor that is not positive and finite.
        TypeError: not a tensor, or a dtype that is not served.

    Source: Zbontar et al., "Barlow Twins", arXiv 2103.03230, section 2.1; arXiv 2203.07111, section 3.3.
    """
    alphas = (_alpha("alpha_on", alpha_on), _alpha("alpha_off", alpha_off))
    x, y = _rows("x", x), _rows("y", y)
    if x.shape[0] != y.shape[0]:
        raise ValueError(f"y must be (N, D) = {tuple(x.shape)} to pair with x, got {tuple(y.shape)}; row n pairs row n")
    x, y, _, _ = check_sides(x[:, None], y[:, None], None, None, ("x", "y"))
    if weight is not None:
        given = _checks.tensor("weight", weight)
        if tuple(given.shape) != (x.shape[0],):
            raise ValueError(f"weight must be (N,) = ({x.shape[0]},) to match x, got {tuple(given.shape)}")
        weight = _checks.weight("weight", given[:, None], x, "N", "x")
    if divisor is not None:
        if isinstance(divisor, bool) or not isinstance(divisor, numbers.Real):
            raise TypeError(f"divisor must be a positive number or None, got {_checks.describe(divisor)}")
        if not 0 < float(divisor) < math.inf:
            raise ValueError(f"divisor must be positive and finite, got {divisor}; leave it out to divide by N")
        divisor = float(divisor)
    _enough("x", x.shape[0], 1, "N")
    return op.loss(x, y, weight, None, None, None, op.Options(*alphas, divisor, False, False))


def _rows(name: str, value: object) -> Tensor:
    """Check one matrix of rows: rank 2 and a dtype we serve."""
    x = _checks.tensor(name, value)
    if x.dim() != 2:
        raise ValueError(f"{name} must be (N, D), got shape {tuple(x.shape)}; flatten tokens to rows")
    return x


def _alpha(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {_checks.describe(value)}")
    if not 0 <= float(value) < math.inf:
        raise ValueError(f"{name} must be finite and >= 0, got {value}; 0 leaves its term out")
    return float(value)


def _enough(name: str, rows: int, tokens: int, letters: str) -> None:
    """A standard deviation needs two tokens."""
    if rows * tokens < 2:
        raise ValueError(
            f"{name} must hold at least 2 tokens to standardise channels over, got ({letters}) = "
            f"{(rows,) if letters == 'N' else (rows, tokens)}; use a larger batch"
        )
