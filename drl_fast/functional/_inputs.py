"""What every interaction does to its arguments before the arithmetic: autocast, then checks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks


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
    text = autocast(_checks.tokens(t, text, "A, Nt, D"))
    video = autocast(_checks.tokens(v, video, "B, Nv, D"))
    _checks.same_features(text, video, t, v)
    return Sides(
        text,
        video,
        _checks.mask(f"{t}_mask", text_mask, text, "A, Nt", t),
        _checks.mask(f"{v}_mask", video_mask, video, "B, Nv", v),
    )


def has_autocast(device: str) -> bool:
    """Say whether torch has an autocast for this device type at all; without one, asking if it is on raises."""
    # torch.compile of torch 2.11 cannot trace the question; of what it compiles for, only meta has none.
    return device != "meta" if torch.compiler.is_compiling() else torch.amp.is_autocast_available(device)


def autocast(x: Tensor) -> Tensor:
    """Cast to the active autocast dtype, by torch's own rule: float64 and inactive devices are left alone."""
    device = x.device.type
    if x.dtype == torch.float64 or not has_autocast(device):
        return x
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def uniform_weight(mask: Tensor | None, features: Tensor) -> Tensor:
    """(rows, tokens) weights of 1 / (real tokens in the row); 0 on masked tokens and in rows without a real one."""
    dtype = _checks.accumulation_dtype(features.dtype)
    rows, length = features.shape[:2]
    if mask is None:
        return torch.full((rows, length), 1 / length, dtype=dtype, device=features.device)
    return mask.to(dtype) / mask.sum(dim=1, keepdim=True).clamp(min=1)
