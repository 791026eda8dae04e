"""The best videos of every text, without the matrix of all scores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import validation
from ..numerics import accumulation_dtype
from ..validation import Sides
from .prepared import PreparedSides, PreparedVideos
from .token_interaction import check_arguments, interact

# Scores that are held at a time. Blocks of videos are multiples of the number among which prepared videos are sorted by
# length (csrc/prepared.cpp): a smaller part of those is spread over as much of the layout as all of them.
BLOCK_SCORES = 1 << 20
SORTED_VIDEOS = 1024


@torch.no_grad()
def topk(
    text: Tensor,
    video: Tensor | PreparedVideos,
    k: int,
    text_weight: Tensor | None = None,
    video_weight: Tensor | None = None,
    text_mask: Tensor | None = None,
    video_mask: Tensor | None = None,
    *,
    normalize: bool = True,
    masking: str = "drl",
    bidirectional: bool = True,
    pooling: str = "max",
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Find the k best videos of every text, exactly: every pair is scored.

    Texts and videos are scored in blocks, of which only the best are kept: about a million scores are held at a time,
    never all A x B. The result has no gradient.

    >>> scores, indices = drl_fast.topk(text, video, k=3)
    >>> video[indices[0, 0]]  # the best of the first text

    Args:
        text: (A, Nt, D) token features, raw.
        video: (B, Nv, D) frame features of the same dtype and device, or :class:`PreparedVideos`, which is faster when
            the same videos are searched again.
        k: number of videos for each text, 1 to B.

    The other arguments are those of :func:`token_interaction`.

    Returns:
        (A, k) scores, with the bits of :func:`token_interaction`, and (A, k) int64 indices of videos. The best comes
        first; of equal scores the lower index. A NaN counts as -inf.

    Raises:
        ValueError: ``k`` below 1 or beyond B, or as :func:`token_interaction`.
        TypeError: ``k`` is not an integer, or as :func:`token_interaction`.

    Source: exhaustive search; the score is that of arXiv 2203.07111, section 3.2.
    """
    k = validation.positive_int("k", k)
    temperature = validation.pooling(pooling, temperature)
    sides, text_weight, video_weight = check_arguments(
        text,
        video,
        text_weight,
        video_weight,
        text_mask,
        video_mask,
        normalize=normalize,
        masking=masking,
        bidirectional=bidirectional,
    )
    texts, videos = len(sides.text), len(sides.video)
    if k > videos:
        raise ValueError(f"k must be at most the number of videos, {videos}, got {k}; pass k=min(k, len(video))")
    most = max(1, BLOCK_SCORES // SORTED_VIDEOS)
    found = []
    for first in range(0, max(1, texts), most):
        rows = slice(first, first + most)
        some = sides._replace(text=sides.text[rows], text_mask=_rows(sides.text_mask, rows))
        found.append(
            _search(
                some,
                k,
                _rows(text_weight, rows),
                video_weight,
                normalize=normalize,
                masking=masking,
                bidirectional=bidirectional,
                pooling=pooling,
                temperature=temperature,
            )
        )
    scores, indices = zip(*found, strict=True)
    return torch.cat(scores), torch.cat(indices)


def _search(
    sides: Sides | PreparedSides, k: int, text_weight: Tensor | None, video_weight: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Compute :func:`topk` of one block of texts."""
    texts, videos = len(sides.text), len(sides.video)
    scores = sides.text.new_empty((texts, 0), dtype=accumulation_dtype(sides.text.dtype))
    indices = sides.text.new_empty((texts, 0), dtype=torch.int64)
    step = BLOCK_SCORES // max(1, texts) // SORTED_VIDEOS * SORTED_VIDEOS
    for first in range(0, videos, step):
        block = slice(first, first + step)
        found = interact(_videos(sides, block), text_weight, _rows(video_weight, block), **options)
        assert isinstance(found, Tensor)
        columns = _best_columns(found, min(k, found.shape[1]))
        # Those kept so far have lower indices, so a stable sort breaks ties the right way.
        scores = torch.cat([scores, found.gather(1, columns)], 1)
        indices = torch.cat([indices, columns + first], 1)
        order = _rank(scores).argsort(dim=1, descending=True, stable=True)[:, :k]
        scores, indices = scores.gather(1, order), indices.gather(1, order)
    return scores, indices


def _rows(x: Tensor | None, rows: slice) -> Tensor | None:
    return None if x is None else x[rows]


def _videos(sides: Sides | PreparedSides, block: slice) -> Sides | PreparedSides:
    if isinstance(sides, PreparedSides):
        return sides._replace(video=sides.video[block])
    return sides._replace(video=sides.video[block], video_mask=_rows(sides.video_mask, block))


def _rank(scores: Tensor) -> Tensor:
    return scores.nan_to_num(-torch.inf, torch.inf, -torch.inf)


def _best_columns(scores: Tensor, k: int) -> Tensor:
    """Return the columns (A, k) of the best scores (A, B) of every row, ascending; of ties the lower ones."""
    rank = _rank(scores)
    # torch.topk takes any of several equal scores: of those at the threshold, keep the first.
    threshold = rank.topk(k).values[:, -1:]
    above, at = rank > threshold, rank == threshold
    at &= at.cumsum(1, dtype=torch.int32) <= k - above.sum(1, keepdim=True)
    return (above | at).nonzero()[:, 1].view(len(scores), k)
