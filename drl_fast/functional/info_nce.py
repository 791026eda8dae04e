"""InfoNCE of a logit matrix."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import validation
from ..numerics import accumulation_dtype, positive_mask
from .positives import check_positives

DIRECTIONS = ("both", "t2v", "v2t")


def info_nce(
    logits: Tensor,
    logit_scale: float | Tensor,
    *,
    positives: Tensor | None = None,
    direction: str = "both",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Average the cross-entropies of rows (text to video) and columns (video to text).

    A row with several positives gives the mean over them of -log softmax. The softmax's denominator contains all
    columns, the other positives too. Rows and columns without a positive are negatives of the others only.

    Args:
        logits: (A, B), row a, column b: text a against video b, not scaled by temperature.
        logit_scale: the factor of the logits, a positive float or a 0-dim tensor that gets a gradient. Pass
            ``logit_scale.exp()`` (about 100), not CLIP's log-scale parameter.
        positives: (A,) integers, the column of each text's video, -1 for a text without one; or (A, B) bool, which may
            hold several a row and a column. None: the diagonal, for A = B.
        direction: ``"t2v"`` averages over rows, ``"v2t"`` over columns, ``"both"`` takes the mean of the two.
        label_smoothing: the share of the target that is spread evenly over all candidates, in [0, 1); as in
            ``torch.nn.functional.cross_entropy``.

    Returns:
        A scalar, float32 (float64 for float64 input). One pair gives 0.

    Raises:
        ValueError: the logits are not a matrix, or are empty; A and B differ without ``positives``; ``positives`` of
            another shape, out of range (checked on the CPU only) or without any positive; an unknown ``direction``; a
            float ``logit_scale`` that is not positive and finite; ``label_smoothing`` outside [0, 1).
        TypeError: the logits are not floating point, ``positives`` holds neither integers nor bool, or ``logit_scale``
            is neither a number nor a tensor.

    Source: arXiv 2203.07111, section 3.4; Radford et al., arXiv 2103.00020, figure 3; several positives: Khosla et al.,
    "Supervised Contrastive Learning", arXiv 2004.11362, equation 2.
    """
    x = check_logits(logits)
    validation.option("direction", direction, DIRECTIONS)
    smoothing = validation.fraction("label_smoothing", label_smoothing, one=False)
    scaled = x.to(accumulation_dtype(x.dtype)) * check_scale(logit_scale, x.device)
    columns = check_positives(positives, x.shape[0], x.shape[1], x.device, not_square(x))
    sides = [scaled] * (direction != "v2t") + [scaled.T] * (direction != "t2v")
    if positives is None:
        losses = [F.cross_entropy(side, columns, label_smoothing=smoothing) for side in sides]
    else:
        positive = positive_mask(columns, x.shape[1])
        masks = [positive] * (direction != "v2t") + [positive.T] * (direction != "t2v")
        losses = [_cross_entropy(side, mask, smoothing) for side, mask in zip(sides, masks, strict=True)]
    return torch.stack(losses).mean()


def _cross_entropy(x: Tensor, positive: Tensor, smoothing: float) -> Tensor:
    """Average the rows' cross-entropies, over rows with a positive."""
    count = positive.sum(1)
    has = count > 0
    # A row without a positive may hold anything, such as -inf alone, whose softmax and gradient would be NaN.
    x = torch.where(has[:, None], x, 0)
    # Subtract the maximum first: the difference is exact where the positive is the maximum.
    x = x - x.detach().amax(1, keepdim=True)
    target = torch.where(positive, x, 0).sum(1) / count.clamp(min=1)
    if smoothing:
        target = (1 - smoothing) * target + smoothing * x.mean(1)
    return torch.where(has, x.logsumexp(1) - target, 0).sum() / has.sum()


def check_logits(logits: Tensor) -> Tensor:
    """Check a logit matrix that is not empty."""
    x = validation.tensor("logits", logits)
    if x.dim() != 2:
        raise ValueError(f"logits must be (A, B), texts x videos, got shape {tuple(x.shape)}")
    if x.numel() == 0:
        raise ValueError(f"logits must hold at least one pair, got shape {tuple(x.shape)}; skip empty batches")
    if not x.is_floating_point():
        raise TypeError(f"logits must be floating point, got {x.dtype}; convert them with logits.float()")
    return x


def not_square(x: Tensor) -> str:
    """Say that logits without ``positives`` must be square."""
    return (
        f"logits must be square (B, B) with positives on the diagonal, got {tuple(x.shape)}; say with positives= which "
        "video belongs to each text"
    )


def check_scale(logit_scale: float | Tensor, device: torch.device) -> float | Tensor:
    """Check a positive finite number or a one-element tensor; return a factor that broadcasts over logits."""
    if isinstance(logit_scale, Tensor):
        return check_scalar("logit_scale", logit_scale, device)
    remedy = "pass logit_scale.exp() (about 100), as a number or a 0-dim tensor"
    return validation.positive_number("logit_scale", logit_scale, remedy)


def check_bias(logit_bias: float | Tensor, device: torch.device) -> float | Tensor:
    """Check a finite number or a one-element tensor; return a summand that broadcasts over logits."""
    if isinstance(logit_bias, Tensor):
        return check_scalar("logit_bias", logit_bias, device)
    return validation.finite_number("logit_bias", logit_bias, "SigLIP starts at -10")


def check_scalar(name: str, x: Tensor, device: torch.device) -> Tensor:
    """Check a real one-element tensor and return it without dimensions."""
    if x.numel() != 1:
        raise ValueError(f"{name} must be a scalar, got shape {tuple(x.shape)}")
    if x.is_complex():
        raise TypeError(f"{name} must be real, got {x.dtype}")
    # torch can combine tensors of every device with a 0-dim CPU tensor.
    if x.device not in (device, torch.device("cpu")):
        raise ValueError(
            f"{name} must be on the device of the logits, {device}, or the CPU, got {x.device}; "
            f"move it with {name}.to({str(device)!r})"
        )
    return validation.private_copy(x).reshape(())
