"""DP: the dot product of pooled vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import autocast
from ..numerics import uniform_weight, unit, zero_masked
from ..validation import check_sides


def dot_product(
    text: Tensor, video: Tensor, text_mask: Tensor | None = None, video_mask: Tensor | None = None
) -> Tensor:
    """Score every text's end token against every video's mean frame by their cosine.

    The text vector is the last real token (largest index with a non-zero mask), normalised; the video vector is the
    masked mean of the normalised frames, normalised again. A side without a real token scores 0.

    Args:
        text: (A, Nt, D) token features; float32, float16, bfloat16 or float64.
        video: (B, Nv, D), the same dtype and device.
        text_mask: (A, Nt), non-zero = real, holes allowed; None: all real.
        video_mask: (B, Nv), likewise.

    Returns:
        (A, B) logits, float32 (float64 for float64 input), not scaled by temperature.

    Raises:
        ValueError, TypeError: as :func:`token_interaction`.

    Source: Luo et al., "CLIP4Clip", arXiv 2104.08860, section 3.3 (mean pooling); arXiv 2203.07111, table 1, "DP".
    """
    text, video, t_mask, v_mask = check_sides(text, video, text_mask, video_mask)
    with autocast.off(text.device.type):
        end_token, mean_frame = pool(text, video, t_mask, v_mask)
        return end_token @ mean_frame.T


def pool(text: Tensor, video: Tensor, text_mask: Tensor | None, video_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return unit vectors of the end tokens (A, D) and the mean frames (B, D); masks are boolean."""
    frames = zero_masked(video, video_mask)
    mean_frame = (unit(frames) * uniform_weight(video_mask, video)[..., None]).sum(dim=1)
    return unit(last_real_token(text, text_mask)), unit(mean_frame)


def last_real_token(text: Tensor, mask: Tensor | None) -> Tensor:
    """Return each row's real token with the largest index, (A, D); zeros for a row without a real token."""
    if mask is None:
        return text[:, -1]
    position = torch.arange(text.shape[1], device=text.device)
    last = torch.where(mask, position, -1).amax(dim=1)
    chosen = text.gather(1, last.clamp(min=0)[:, None, None].expand(-1, 1, text.shape[2])).squeeze(1)
    return torch.where(last[:, None] >= 0, chosen, 0)
