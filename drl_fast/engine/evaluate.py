"""Encoding for retrieval."""

from __future__ import annotations

import torch
from torch import Tensor

from ..model.drl import DRL


@torch.no_grad()
def encode_texts(model: DRL, ids: Tensor, batch: int = 64) -> tuple[Tensor, Tensor]:
    """Token ids (A, Nt) -> tokens (A, Nt, D), mask (A, Nt)."""
    model.eval()
    parts = [model.encode_text(rows) for rows in ids.split(batch)]
    return torch.cat([tokens for tokens, _ in parts]), torch.cat([mask for _, mask in parts])


@torch.no_grad()
def encode_videos(model: DRL, frames: Tensor, mask: Tensor, batch: int = 16) -> Tensor:
    """Frames (B, Nv, 3, H, W) uint8, mask (B, Nv) bool -> tokens (B, Nv, D)."""
    model.eval()
    parts = zip(frames.split(batch), mask.split(batch), strict=True)
    return torch.cat([model.encode_video(rows, real) for rows, real in parts])
