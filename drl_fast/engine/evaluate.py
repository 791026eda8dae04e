"""Encoding for retrieval, and how sure a recall is."""

from __future__ import annotations

import torch
from torch import Tensor

from ..model.two_tower import TwoTower


@torch.no_grad()
def encode_texts(model: TwoTower, ids: Tensor, batch: int = 64) -> tuple[Tensor, Tensor]:
    """Token ids (A, Nt) -> tokens (A, Nt, D), mask (A, Nt)."""
    model.eval()
    parts = [model.encode_text(rows) for rows in ids.split(batch)]
    return torch.cat([tokens for tokens, _ in parts]), torch.cat([mask for _, mask in parts])


@torch.no_grad()
def encode_videos(model: TwoTower, frames: Tensor, mask: Tensor, batch: int = 16) -> Tensor:
    """Frames (B, Nv, 3, H, W) uint8, mask (B, Nv) bool -> tokens (B, Nv, D)."""
    model.eval()
    parts = zip(frames.split(batch), mask.split(batch), strict=True)
    return torch.cat([model.encode_video(rows, real) for rows, real in parts])


def recall_interval(sim: Tensor, level: float = 0.95, resamples: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of R@1, in percent: how much it depends on which queries were asked.

    Args:
        sim: (N, N), queries in rows, the right answer on the diagonal; of tied scores the first counts, as in
            :func:`drl_fast.metrics.retrieval_metrics`.
        level: share of the resampled recalls that lie inside.
        resamples: draws of N queries with replacement.
        seed: of the draws.

    Raises:
        ValueError: ``sim`` empty or not square.
    """
    if sim.dim() != 2 or sim.shape[0] != sim.shape[1] or sim.numel() == 0:
        raise ValueError(f"sim must be a non-empty square matrix, got shape {tuple(sim.shape)}")
    count = len(sim)
    hit = (sim.argmax(dim=1).cpu() == torch.arange(count)).double()
    draws = torch.randint(count, (resamples, count), generator=torch.Generator().manual_seed(seed))
    recalls = 100 * hit[draws].mean(dim=1)
    outside = (1 - level) / 2
    low, high = recalls.quantile(torch.tensor([outside, 1 - outside], dtype=torch.float64)).tolist()
    return low, high
