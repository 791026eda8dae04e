"""What users replace, in plain PyTorch: the token interaction and its losses as public retrieval code writes them.

All A x B x Nt x Nv similarities exist at once, masks multiply them, and each maximum is a pass of its own. The channel
decorrelation comes in three forms: with the N x D x D tensor of the public code, with one matrix product, and its
diagonal alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from drl_fast import reference

# (similarities, dim) -> their pooling over dim
Pool = Callable[[Tensor, int], Tensor]


def maximum(similarity: Tensor, dim: int) -> Tensor:
    return similarity.max(dim).values


def softmax_pool(temperature: float) -> Pool:
    """The mean weighted by a softmax of the similarities themselves, as X-CLIP writes it."""
    return lambda similarity, dim: ((similarity / temperature).softmax(dim) * similarity).sum(dim)


def logsumexp_pool(temperature: float) -> Pool:
    return lambda similarity, dim: temperature * (similarity / temperature).logsumexp(dim)


def masked_similarity(text: Tensor, video: Tensor, text_mask: Tensor, video_mask: Tensor) -> Tensor:
    """All similarities (A, B, Nt, Nv), multiplied by both masks."""
    words, frames = F.normalize(text, dim=-1), F.normalize(video, dim=-1)
    similarity = torch.einsum("atd,bvd->abtv", words, frames)
    similarity = similarity * text_mask[:, None, :, None]
    return similarity * video_mask[None, :, None, :]


def token_interaction(
    text: Tensor,
    video: Tensor,
    text_weight: Tensor,
    video_weight: Tensor,
    text_mask: Tensor,
    video_mask: Tensor,
    *,
    pool: Pool = maximum,
) -> Tensor:
    """Both directions, logits (A, B), for text (A, Nt, D) and video (B, Nv, D)."""
    similarity = masked_similarity(text, video, text_mask, video_mask)
    best_frame = pool(similarity, 3)
    best_word = pool(similarity, 2)
    by_text = torch.einsum("abt,at->ab", best_frame, text_weight)
    by_video = torch.einsum("abv,bv->ab", best_word, video_weight)
    return (by_text + by_video) / 2


def token_maxsim(text: Tensor, video: Tensor, text_mask: Tensor, video_mask: Tensor, *, pool: Pool = maximum) -> Tensor:
    """Every word's own pooling over each video's frames, (A, B, Nt)."""
    return pool(masked_similarity(text, video, text_mask, video_mask), 3)


def premasked(
    text: Tensor,
    video: Tensor,
    text_weight: Tensor,
    video_weight: Tensor,
    text_mask: Tensor,
    video_mask: Tensor,
    *,
    largest: Pool = maximum,
) -> Tensor:
    """The same logits, written well: masked tokens are zeroed before the product instead of in its result.

    ``largest`` is ``maximum``, whose backward writes one entry for each maximum, or ``torch.amax``, whose
    backward compares all similarities with their maximum.
    """
    words = F.normalize(text, dim=-1) * text_mask[:, :, None]
    frames = F.normalize(video, dim=-1) * video_mask[:, :, None]
    similarity = torch.einsum("atd,bvd->abtv", words, frames)
    by_text = torch.einsum("abt,at->ab", largest(similarity, 3), text_weight)
    by_video = torch.einsum("abv,bv->ab", largest(similarity, 2), video_weight)
    return (by_text + by_video) / 2


def maxsim(query: Tensor, document: Tensor, query_mask: Tensor) -> Tensor:
    """One direction, tokens already normalised: the sum over real query tokens of the best document token."""
    similarity = torch.einsum("atd,bvd->abtv", query, document)
    return torch.einsum("abt,at->ab", similarity.max(dim=3).values, query_mask)


def mean_maxsim(query: Tensor, document: Tensor, query_mask: Tensor, document_mask: Tensor) -> Tensor:
    """One direction: the mean over real query tokens of the best real document token (Video-ColBERT)."""
    words, frames = F.normalize(query, dim=-1), F.normalize(document, dim=-1)
    similarity = torch.einsum("atd,bvd->abtv", words, frames)
    similarity = similarity.masked_fill(document_mask[None, :, None, :] == 0, -torch.inf)
    best = torch.einsum("abt,at->ab", similarity.max(dim=3).values, query_mask)
    return best / query_mask.sum(1, keepdim=True)


# --- channel decorrelation --------------------------------------------------------------------------------------------
# (rows x, rows y, weights, divisor) -> cross-correlation, (D, D) or its diagonal (D,)
Correlate = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def standardize(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / x.std(0)


def by_outer(x: Tensor, y: Tensor, weight: Tensor, divisor: int) -> Tensor:
    """One D x D matrix a row, weighted, then their sum: N x D x D numbers exist at once."""
    outer = standardize(x)[:, :, None] * standardize(y)[:, None, :]
    return (outer * weight[:, None, None]).sum(0) / divisor


def by_product(x: Tensor, y: Tensor, weight: Tensor, divisor: int) -> Tensor:
    return (standardize(x) * weight[:, None]).T @ standardize(y) / divisor


def by_channel(x: Tensor, y: Tensor, weight: Tensor, divisor: int) -> Tensor:
    """The diagonal alone."""
    return (standardize(x) * weight[:, None] * standardize(y)).sum(0) / divisor


def decorrelation(correlation: Tensor, alpha_on: float, alpha_off: float) -> Tensor:
    if correlation.dim() == 1:
        return alpha_on * (correlation - 1).square().sum()
    return reference.decorrelation(correlation, alpha_on, alpha_off)


def pair_correlation(tokens: tuple[Tensor, ...], correlate: Correlate) -> Tensor:
    """CDCR's C of B pairs, from each token and its best match in its own pair: the mean of both sides' correlations."""
    text, video, text_weight, video_weight, text_mask, video_mask = tokens
    words, frames = F.normalize(text, dim=-1), F.normalize(video, dim=-1)
    similarity = words @ frames.transpose(1, 2)
    similarity = similarity.masked_fill((text_mask[:, :, None] * video_mask[:, None, :]) == 0, -torch.inf)
    best_frame, best_word = similarity.argmax(2), similarity.argmax(1)
    halves = []
    for own, other, best, weight, mask in (
        (words, frames, best_frame, text_weight, text_mask),
        (frames, words, best_word, video_weight, video_mask),
    ):
        partner = other.gather(1, best[:, :, None].expand(-1, -1, own.shape[2]))
        real = mask != 0
        halves.append(correlate(own[real], partner[real], weight[real], len(text)))
    return (halves[0] + halves[1]) / 2
