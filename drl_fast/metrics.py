"""Retrieval metrics: recall at 1, 5 and 10, median and mean rank, in both directions."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks


def retrieval_metrics(sim: Tensor, owner: Tensor | None = None) -> dict[str, dict[str, float]]:
    """Score a similarity matrix as the field does.

    Ranks start at 1: 1 + the number of candidates with a strictly larger similarity + the number of tied ones that
    stand earlier in the matrix, i.e. a stable sort in descending order. (A model that scores everything alike gets
    chance, not 100 %.)

    Args:
        sim: (A, B) similarities, texts in rows, videos in columns; larger is better.
        owner: (A,) integers, the video (column) that each text describes; None: A == B with pairs on the diagonal.
            Video-to-text then takes each video's largest similarity over its own texts and over every other video's,
            and ranks among videos.

    Returns:
        ``{"t2v": {"R1", "R5", "R10", "MdR", "MnR"}, "v2t": {...}}``; recalls in percent, ranks from 1.

    Raises:
        ValueError: an empty or non-matrix ``sim``, NaN in it, no ``owner`` and A != B, an ``owner`` out of range or
            with a video that no text describes.
        TypeError: not a floating-point tensor, or an ``owner`` that is not integer.

    Source: arXiv 2203.07111, section 4.1; several captions a video as in the public code's MSVD evaluation.
    """
    sim = _checks.tensor("sim", sim).detach()
    if sim.dim() != 2 or sim.numel() == 0:
        raise ValueError(f"sim must be a non-empty (A, B) matrix, got shape {tuple(sim.shape)}")
    if not sim.is_floating_point():
        raise TypeError(f"sim must be floating point, got {sim.dtype}; convert it with sim.float()")
    if bool(sim.isnan().any()):
        raise ValueError("sim must not hold NaN; look for a diverged model or a masked score")
    texts, videos = sim.shape
    if owner is None:
        if texts != videos:
            raise ValueError(f"sim must be square without owner, got {texts} texts x {videos} videos; pass owner (A,)")
        owner = torch.arange(texts, device=sim.device)
    owner = _check_owner(owner, texts, videos).to(sim.device)
    best_text = torch.full((videos, videos), -torch.inf, dtype=sim.dtype, device=sim.device)
    best_text.scatter_reduce_(0, owner[:, None].expand(texts, videos), sim, "amax")
    diagonal = torch.arange(videos, device=sim.device)
    return {"t2v": _summary(ranks(sim, owner)), "v2t": _summary(ranks(best_text.T, diagonal))}


def _check_owner(owner: Tensor, texts: int, videos: int) -> Tensor:
    owner = _checks.tensor("owner", owner)
    if owner.is_floating_point() or owner.is_complex() or owner.dtype == torch.bool:
        raise TypeError(f"owner must be integer video indices, got {owner.dtype}")
    if tuple(owner.shape) != (texts,):
        raise ValueError(f"owner must be (A,) = ({texts},) to match sim, got {tuple(owner.shape)}")
    owner = owner.to(torch.int64)
    if int(owner.min()) < 0 or int(owner.max()) >= videos:
        raise ValueError(
            f"owner must lie in 0..{videos - 1}, sim's columns, got {int(owner.min())}..{int(owner.max())}"
        )
    described = torch.bincount(owner, minlength=videos)
    if bool((described == 0).any()):
        missing = int((described == 0).nonzero()[0])
        raise ValueError(f"owner must name every video at least once, got none for video {missing}; drop its column")
    return owner


def ranks(sim: Tensor, target: Tensor) -> Tensor:
    """(rows,) rank of each row's target column, from 1, ties as in :func:`retrieval_metrics`."""
    positive = sim.gather(1, target[:, None])
    earlier = torch.arange(sim.shape[1], device=sim.device)[None] < target[:, None]
    return 1 + ((sim > positive) | ((sim == positive) & earlier)).sum(dim=1)


def _summary(ranks: Tensor) -> dict[str, float]:
    ranks = ranks.to(torch.float64)
    recall = {f"R{k}": 100 * float((ranks <= k).to(torch.float64).mean()) for k in (1, 5, 10)}
    return {**recall, "MdR": float(ranks.quantile(0.5)), "MnR": float(ranks.mean())}
