"""Retrieval metrics: recall at 1, 5 and 10, median and mean rank, in both directions; intervals and post-processing."""

from __future__ import annotations

import torch
from torch import Tensor

from . import validation

DIRECTIONS = {"t2v": "text to video", "v2t": "video to text"}
TIES = ("stable", "public")
# Random draws of the bootstrap that are in memory at a time.
DRAWS = 2**21


def retrieval_metrics(sim: Tensor, owner: Tensor | None = None, *, ties: str = "stable") -> dict[str, dict[str, float]]:
    """Score a similarity matrix as the field does.

    Ranks start at 1: 1 + the number of candidates with a strictly larger similarity + the number of tied ones that
    stand earlier in the matrix, i.e. a stable sort in descending order. A model that gives every pair one score gets
    chance, not 100 %.

    Args:
        sim: (A, B) similarities, texts in rows, videos in columns; larger is better.
        owner: (A,) integers, the video (column) that each text describes; None: A == B with pairs on the diagonal.
            Video-to-text then takes each video's largest similarity over its own texts and over every other video's,
            and ranks among videos.
        ties: ``"stable"`` gives every query one rank. ``"public"`` counts as the public DRL and CLIP4Clip code does:
            a query whose right answer ties with n - 1 others adds n ranks, one for each place that the n share, and
            recalls are shares of all these ranks. It does so from video to text, and from text to video where every
            video has one caption. Use it to compare with published numbers.

    Returns:
        ``{"t2v": {"R1", "R5", "R10", "MdR", "MnR"}, "v2t": {...}}``; recalls in percent, ranks from 1.

    Raises:
        ValueError: an empty or non-matrix ``sim``, NaN in it, no ``owner`` and A != B, an ``owner`` out of range or
            with a video that no text describes, an unknown ``ties``.
        TypeError: not a floating-point tensor, or an ``owner`` that is not integer.

    Source: arXiv 2203.07111, section 4.1; several captions a video as in the public code's MSVD evaluation; its
    ``compute_metrics`` for ``ties="public"``.
    """
    sim, owner = _check(sim, owner)
    validation.option("ties", ties, TIES)
    by_video, videos = _by_video(sim, owner), torch.arange(sim.shape[1], device=sim.device)
    every_tie = ties == "public"
    return {
        "t2v": _summary(_all_tied_ranks(sim, owner) if every_tie and len(owner) == len(videos) else ranks(sim, owner)),
        "v2t": _summary(_all_tied_ranks(by_video, videos) if every_tie else ranks(by_video, videos)),
    }


def dual_softmax_metrics(
    sim: Tensor, owner: Tensor | None = None, temperature: float = 100.0
) -> dict[str, dict[str, float]]:
    """:func:`retrieval_metrics` after dual softmax: each score times its share among all queries of its candidate.

    Report it apart from plain retrieval: every query's result depends on all other test queries, which a search does
    not have.

    Args:
        sim: (A, B) similarities, not scaled by temperature. If some are negative, the smallest is subtracted from all:
            CAMoE's product assumes scores that are not negative, and a share in 0..1 would raise a negative one.
        owner: as in :func:`retrieval_metrics`.
        temperature: factor of the similarities inside the softmax.

    Raises:
        ValueError, TypeError: as :func:`retrieval_metrics`; a temperature that is not positive and finite.

    Source: Cheng et al., "CAMoE", arXiv 2109.04290, section 3.4 (dual softmax loss, at inference).
    """
    sim, owner = _check(sim, owner)
    _check_finite("sim", sim)
    validation.positive_number("temperature", temperature)
    positive = sim - sim.min().clamp(max=0)
    by_text, by_video = (positive * (temperature * sim).softmax(dim) for dim in (0, 1))
    return {"t2v": _summary(ranks(by_text, owner)), "v2t": _summary(_video_ranks(by_video, owner))}


def query_bank_metrics(
    sim: Tensor, text_bank: Tensor, video_bank: Tensor, owner: Tensor | None = None, beta: float = 20.0
) -> dict[str, dict[str, float]]:
    """:func:`retrieval_metrics` after query-bank normalisation by the dynamic inverted softmax.

    A candidate that draws many queries of a bank is scored down; queries whose best candidate is nobody's best in the
    bank keep their scores. Report it apart from plain retrieval.

    Args:
        sim: (A, B) similarities of test texts and videos.
        text_bank: (Q, B) similarities of a bank of texts (training captions) and the test videos, for text-to-video.
        video_bank: (A, P) similarities of the test texts and a bank of videos, for video-to-text.
        owner: as in :func:`retrieval_metrics`.
        beta: factor of the similarities inside the softmax.

    Raises:
        ValueError, TypeError: as :func:`retrieval_metrics`; banks that do not match; a beta that is not positive.

    Source: Bogolin et al., "Cross Modal Retrieval with Querybank Normalisation", arXiv 2112.12777, section 3.
    """
    sim, owner = _check(sim, owner)
    validation.positive_number("beta", beta)
    text_bank, video_bank = validation.tensor("text_bank", text_bank), validation.tensor("video_bank", video_bank)
    if text_bank.dim() != 2 or text_bank.shape[1] != sim.shape[1] or len(text_bank) == 0:
        raise ValueError(f"text_bank must be (Q, B) with B = {sim.shape[1]} to match sim, got {tuple(text_bank.shape)}")
    if video_bank.dim() != 2 or video_bank.shape[0] != sim.shape[0] or video_bank.shape[1] == 0:
        raise ValueError(
            f"video_bank must be (A, P) with A = {sim.shape[0]} to match sim, got {tuple(video_bank.shape)}"
        )
    for name, scores in (("sim", sim), ("text_bank", text_bank), ("video_bank", video_bank)):
        _check_finite(name, scores)
    by_text = _inverted_softmax(sim, text_bank.to(sim), beta)
    by_video = _inverted_softmax(sim.T, video_bank.T.to(sim), beta).T
    return {"t2v": _summary(ranks(by_text, owner)), "v2t": _summary(_video_ranks(by_video, owner))}


def _inverted_softmax(sim: Tensor, bank: Tensor, beta: float) -> Tensor:
    """Scores (queries, candidates) normalised by the bank's, in logarithms: their order is all that is used."""
    drawn = torch.zeros(sim.shape[1], dtype=torch.bool, device=sim.device)
    drawn[bank.argmax(dim=1)] = True
    normalised = beta * sim - torch.logsumexp(beta * bank, dim=0)
    return torch.where(drawn[sim.argmax(dim=1)][:, None], normalised, sim)


def recall_interval(
    sim: Tensor,
    owner: Tensor | None = None,
    *,
    direction: str = "t2v",
    k: int = 1,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a recall, in percent: how much it depends on which videos were asked about.

    Args:
        sim: (A, B) similarities as for :func:`retrieval_metrics`; ties and several captions count as there.
        owner: as there. Videos are drawn, each with all its captions.
        direction: ``"t2v"`` or ``"v2t"``.
        k: the recall's depth.
        level: share of the resampled recalls that lie inside.
        resamples: draws of B videos with replacement.
        seed: of the draws.

    Raises:
        ValueError, TypeError: as :func:`retrieval_metrics`; an unknown direction, a level outside 0..1.
    """
    sim, owner = _check(sim, owner)
    validation.option("direction", direction, ("t2v", "v2t"))
    k, resamples = validation.positive_int("k", k), validation.positive_int("resamples", resamples)
    validation.fraction("level", level, zero=False, one=False)
    videos = sim.shape[1]
    found = (ranks(sim, owner) if direction == "t2v" else _video_ranks(sim, owner)).cpu() <= k
    whose = owner.cpu() if direction == "t2v" else torch.arange(videos)
    hits = torch.zeros(videos, dtype=torch.float64).index_add_(0, whose, found.double())
    asked = torch.bincount(whose, minlength=videos).double()
    generator, rows, parts = torch.Generator().manual_seed(seed), max(DRAWS // videos, 1), []
    for start in range(0, resamples, rows):
        draws = torch.randint(videos, (min(rows, resamples - start), videos), generator=generator)
        parts.append(100 * hits[draws].sum(dim=1) / asked[draws].sum(dim=1))
    recalls = torch.cat(parts)
    outside = (1 - level) / 2
    low, high = recalls.quantile(torch.tensor([outside, 1 - outside], dtype=torch.float64)).tolist()
    return low, high


def _check(sim: Tensor, owner: Tensor | None) -> tuple[Tensor, Tensor]:
    sim = validation.tensor("sim", sim).detach()
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
    return sim, _check_owner(owner, texts, videos).to(sim.device)


def _check_finite(name: str, scores: Tensor) -> None:
    if not bool(scores.isfinite().all()):
        raise ValueError(
            f"{name} must be finite, got NaN or infinity, for which the softmax has no value; give pairs that are not "
            "scored the lowest finite score"
        )


def _by_video(sim: Tensor, owner: Tensor) -> Tensor:
    """(B, B) similarity of each video (row) and the best caption of every video (column)."""
    texts, videos = sim.shape
    best_text = torch.full((videos, videos), -torch.inf, dtype=sim.dtype, device=sim.device)
    best_text.scatter_reduce_(0, owner[:, None].expand(texts, videos), sim, "amax")
    return best_text.T


def _video_ranks(sim: Tensor, owner: Tensor) -> Tensor:
    """(B,) rank of each video among videos, by the best of its captions and of every other video's."""
    by_video = _by_video(sim, owner)
    return ranks(by_video, torch.arange(len(by_video), device=sim.device))


def _check_owner(owner: Tensor, texts: int, videos: int) -> Tensor:
    owner = validation.tensor("owner", owner)
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


def _all_tied_ranks(sim: Tensor, target: Tensor) -> Tensor:
    """(rows or more,) ranks of all candidates that score as the row's target, as the public code lists them."""
    positive = sim.gather(1, target[:, None])
    first, tied = 1 + (sim > positive).sum(dim=1), (sim == positive).sum(dim=1)
    before = tied.cumsum(dim=0) - tied
    place = torch.arange(int(tied.sum()), device=sim.device) - before.repeat_interleave(tied)
    return first.repeat_interleave(tied) + place


def _summary(ranks: Tensor) -> dict[str, float]:
    ranks = ranks.to(torch.float64)
    recall = {f"R{k}": 100 * float((ranks <= k).to(torch.float64).mean()) for k in (1, 5, 10)}
    return {**recall, "MdR": float(ranks.quantile(0.5)), "MnR": float(ranks.mean())}
