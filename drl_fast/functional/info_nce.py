"""The symmetric contrastive loss of a square logit matrix."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import validation
from ..numerics import accumulation_dtype


def info_nce(logits: Tensor, logit_scale: float | Tensor) -> Tensor:
    """Average the text-to-video and video-to-text cross-entropies, with the positives on the diagonal.

    Args:
        logits: (B, B), row a, column b: text a against video b, not scaled by temperature.
        logit_scale: the factor of the logits, a positive float or a 0-dim tensor that gets a gradient. Pass
            ``logit_scale.exp()`` (about 100), not CLIP's log-scale parameter.

    Returns:
        A scalar, float32 (float64 for float64 input). B = 1 gives 0.

    Raises:
        ValueError: the logits are not square, B = 0, or a float ``logit_scale`` is not positive and finite.
        TypeError: the logits are not a floating-point tensor, or ``logit_scale`` is neither a number nor a tensor.

    Source: arXiv 2203.07111, section 3.4; Radford et al., arXiv 2103.00020, figure 3.
    """
    x = validation.tensor("logits", logits)
    if x.dim() != 2 or x.shape[0] != x.shape[1]:
        raise ValueError(
            f"logits must be square (B, B) with positives on the diagonal, got {tuple(x.shape)}; "
            "score as many texts as videos"
        )
    if x.shape[0] == 0:
        raise ValueError("logits must hold at least one pair, got shape (0, 0); skip empty batches")
    if not x.is_floating_point():
        raise TypeError(f"logits must be floating point, got {x.dtype}; convert them with logits.float()")
    scaled = x.to(accumulation_dtype(x.dtype)) * check_scale(logit_scale, x.device)
    target = torch.arange(scaled.shape[0], device=scaled.device)
    return (F.cross_entropy(scaled, target) + F.cross_entropy(scaled.T, target)) / 2


def check_scale(logit_scale: float | Tensor, device: torch.device) -> float | Tensor:
    """Check a positive finite number or a one-element tensor; return a factor that broadcasts over logits."""
    if isinstance(logit_scale, Tensor):
        if logit_scale.numel() != 1:
            raise ValueError(f"logit_scale must be a scalar, got shape {tuple(logit_scale.shape)}")
        if logit_scale.is_complex():
            raise TypeError(f"logit_scale must be real, got {logit_scale.dtype}")
        # torch can multiply tensors of every device by a 0-dim CPU tensor.
        if logit_scale.device not in (device, torch.device("cpu")):
            raise ValueError(
                f"logit_scale must be on the device of what it scales, {device}, or the CPU, got {logit_scale.device}; "
                f"move it with logit_scale.to({str(device)!r})"
            )
        return validation.private_copy(logit_scale).reshape(())
    remedy = "pass logit_scale.exp() (about 100), as a number or a 0-dim tensor"
    return validation.positive_number("logit_scale", logit_scale, remedy)
