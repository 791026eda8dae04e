"""The best videos of every text, without the matrix of all scores."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import validation
from ..numerics import accumulation_dtype
from ..validation import Sides
from .prepared import PreparedSides, PreparedVideos
from .token_interaction import check_arguments, interact

# Scores that are held at a time, and the fewest videos of a block, which keep the kernels busy.
BLOCK_SCORES = 1 << 20
FEWEST_VIDEOS = 256


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

    Videos are scored in blocks, of which only the best are kept: about a million scores are held at a time, or A x 256
    where that is more, and never all A x B. The result has no gradient.

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
    validation.positive_int("k", k)
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
    scores = sides.text.new_empty((texts, 0), dtype=accumulation_dtype(sides.text.dtype))
    indices = sides.text.new_empty((texts, 0), dtype=torch.int64)
    step = max(FEWEST_VIDEOS, BLOCK_SCORES // max(1, texts))
    for first in range(0, videos, step):
        block = slice(first, first + step)
        found = interact(
            _videos(sides, block),
            text_weight,
            None if video_weight is None else video_weight[block],
            normalize=normalize,
            masking=masking,
            bidirectional=bidirectional,
            pooling=pooling,
            temperature=temperature,
        )
        assert isinstance(found, Tensor)
        columns = _best_columns(found, min(k, found.shape[1]))
        # Those kept so far have lower indices, so a stable sort breaks ties the right way.
        scores = torch.cat([scores, found.gather(1, columns)], 1)
        indices = torch.cat([indices, columns + first], 1)
        order = _rank(scores).argsort(dim=1, descending=True, stable=True)[:, :k]
        scores, indices = scores.gather(1, order), indices.gather(1, order)
    return scores, indices


def _videos(sides: Sides | PreparedSides, block: slice) -> Sides | PreparedSides:
    if isinstance(sides, PreparedSides):
        return sides._replace(video=sides.video[block])
    mask = sides.video_mask
    return sides._replace(video=sides.video[block], video_mask=None if mask is None else mask[block])


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
