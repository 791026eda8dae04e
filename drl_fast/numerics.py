"""Rules that every implementation follows: dtypes of sums, statistics and indices, the norm of zero, and masks."""

from __future__ import annotations

import torch
from torch import Tensor

# A token of at most this norm counts as zero: its unit vector is 0, and so is its gradient.
NORM_EPS = 1e-12


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of similarities, sums and logits: float64 for float64, float32 for all else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def statistics_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of channel statistics: float64, or float32 on devices that have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def index_dtype(length: int) -> torch.dtype:
    """Return the dtype that indexes a row of ``length`` tokens and still has a value for "none chosen"."""
    return torch.uint8 if length <= 255 else torch.int16


def unit(x: Tensor) -> Tensor:
    """L2-normalise the last axis in float32 (float64 for float64); a norm <= 1e-12 maps to 0 with gradient 0."""
    x = x.to(accumulation_dtype(x.dtype))
    is_zero = (x * x).sum(-1, keepdim=True) <= NORM_EPS**2
    # Replace before the norm, not after it: the gradient of norm(0) is NaN even if a later `where` drops it.
    x = x.masked_fill(is_zero, 1.0)
    return (x / x.norm(dim=-1, keepdim=True)).masked_fill(is_zero, 0.0)


def zero_masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """Set masked tokens of x (rows, tokens, D) to 0, whatever stands there, NaN included; mask as below."""
    return x if mask is None else torch.where(mask[..., None], x, 0)


def uniform_weight(mask: Tensor | None, features: Tensor) -> Tensor:
    """Return (rows, tokens) weights of 1 / (real tokens in the row); 0 on masked tokens and in rows without a real one.

    Args:
        mask: (rows, tokens) bool, True = real; None: all real.
        features: (rows, tokens, D), for shape, dtype and device.
    """
    dtype = accumulation_dtype(features.dtype)
    rows, length = features.shape[:2]
    if mask is None:
        return torch.full((rows, length), 1 / length, dtype=dtype, device=features.device)
    return mask.to(dtype) / mask.sum(dim=1, keepdim=True).clamp(min=1)


def positive_mask(positives: Tensor, columns: int) -> Tensor:
    """Return positives, (A,) columns with -1 for none or already (A, B) bool, as bool (A, B)."""
    if positives.dtype == torch.bool:
        return positives
    return positives[:, None] == torch.arange(columns, device=positives.device)
