"""SigLIP's loss of a logit matrix."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..numerics import accumulation_dtype, positive_mask
from .info_nce import check_bias, check_logits, check_scale, not_square
from .positives import check_positives


def sigmoid_loss(
    logits: Tensor, logit_scale: float | Tensor, logit_bias: float | Tensor, positives: Tensor | None = None
) -> Tensor:
    r"""Classify every text-video pair on its own: is the video the text's?

    .. math:: loss = \tfrac1A \sum_{ab} -\log \sigma\big(z_{ab} (scale \cdot logits_{ab} + bias)\big)

    with z = 1 at positives and -1 elsewhere.

    Args:
        logits: (A, B), row a, column b: text a against video b, not scaled by temperature.
        logit_scale: the factor of the logits, a positive float or a 0-dim tensor that gets a gradient. SigLIP starts at
            10.
        logit_bias: the bias, a float or a 0-dim tensor that gets a gradient. SigLIP starts at -10, since almost all
            pairs are negatives.
        positives: (A,) integers or (A, B) bool, as in :func:`info_nce`; None: the diagonal, for A = B.

    Returns:
        A scalar, float32 (float64 for float64 input).

    Raises:
        ValueError: as :func:`info_nce`, or a ``logit_bias`` that is not finite.
        TypeError: as :func:`info_nce`.

    Source: Zhai et al., "Sigmoid Loss for Language Image Pre-Training", arXiv 2303.15343, section 3.2.
    """
    x = check_logits(logits)
    scaled = x.to(accumulation_dtype(x.dtype)) * check_scale(logit_scale, x.device) + check_bias(logit_bias, x.device)
    positive = positive_mask(check_positives(positives, x.shape[0], x.shape[1], x.device, not_square(x)), x.shape[1])
    return -F.logsigmoid(torch.where(positive, scaled, -scaled)).sum() / x.shape[0]
