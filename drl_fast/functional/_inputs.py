"""What every interaction does to its arguments before the arithmetic: autocast, then checks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import autocast, validation


class Sides(NamedTuple):
    """Checked features and boolean masks of both sides."""

    text: Tensor
    video: Tensor
    text_mask: Tensor | None
    video_mask: Tensor | None


def check_sides(
    text: Tensor,
    video: Tensor,
    text_mask: Tensor | None,
    video_mask: Tensor | None,
    names: tuple[str, str] = ("text", "video"),
) -> Sides:
    """Check two sides of an interaction (ValueError, TypeError) and bring them to one dtype under autocast."""
    t, v = names
    text = autocast.cast(validation.tokens(t, text, "A, Nt, D"))
    video = autocast.cast(validation.tokens(v, video, "B, Nv, D"))
    validation.same_features(text, video, t, v)
    return Sides(
        text,
        video,
        validation.mask(f"{t}_mask", text_mask, text, "A, Nt", t),
        validation.mask(f"{v}_mask", video_mask, video, "B, Nv", v),
    )


def uniform_weight(mask: Tensor | None, features: Tensor) -> Tensor:
    """(rows, tokens) weights of 1 / (real tokens in the row); 0 on masked tokens and in rows without a real one."""
    dtype = validation.accumulation_dtype(features.dtype)
    rows, length = features.shape[:2]
    if mask is None:
        return torch.full((rows, length), 1 / length, dtype=dtype, device=features.device)
    return mask.to(dtype) / mask.sum(dim=1, keepdim=True).clamp(min=1)
