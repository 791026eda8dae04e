"""CDCR with the public code's padding bug, for checkpoints that were trained with it.

In the public code a padded token's similarity is 0. If all real similarities are negative, the 0 wins, and the feature
of a picture or word that does not exist becomes the partner. ``functional.cdcr_loss`` leaves padding out; checkpoints
of the public code load with ``Config.cdcr_padding="competes"``, so that training continues as it would have there.

The rule needs the features of padding, so the towers encode it, and the loss is dense: O(B Nt Nv) similarities, (N, D)
partners and one D x D matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..modules import SeqTransf
from ..numerics import unit


def add_temporal(tokens: Tensor, temporal: nn.Module | None, mask: Tensor) -> Tensor:
    """Apply the temporal module to frame tokens (B, Nv, D), and keep what it gives for masked frames."""
    if not isinstance(temporal, SeqTransf):
        real = tokens if temporal is None else temporal(tokens, mask)
        # The public code leaves a padded frame alone or doubles it: the direction is the same.
        return torch.where(mask[..., None], real, tokens)
    positions = temporal.frame_position_embeddings.weight[: tokens.shape[1]]
    return tokens + temporal.transformer(tokens + positions, mask | ~mask.any(1, keepdim=True))


def cdcr_loss(
    text: Tensor,
    video: Tensor,
    text_weight: Tensor | None,
    video_weight: Tensor | None,
    text_mask: Tensor,
    video_mask: Tensor,
    *,
    alpha_on: float,
    alpha_off: float,
) -> Tensor:
    """Compute the decorrelation loss of tokens that include padding; boolean masks."""
    t, v = unit(text), unit(video)
    s = torch.einsum("bid,bjd->bij", t, v) * text_mask[:, :, None] * video_mask[:, None, :]
    pair = torch.arange(len(text), device=text.device)[:, None]
    terms = []
    for own, real, other, partner, weight in (
        (t, text_mask, v, s.argmax(2), text_weight),
        (v, video_mask, t, s.argmax(1), video_weight),
    ):
        x, y = _standardize(own[real]), _standardize(other[pair, partner][real])
        weighted = x if weight is None else x * weight[real][:, None]
        terms.append(weighted.T @ y / (len(x) if weight is None else len(text)))
    c = (terms[0] + terms[1]) / 2
    diagonal = c.diagonal()
    off = c - torch.diag(diagonal)
    return alpha_on * (diagonal - 1).square().sum() + alpha_off * off.square().sum()


def _standardize(x: Tensor) -> Tensor:
    """Subtract each channel's mean over the rows of (N, D) and divide by its unbiased deviation."""
    return (x - x.mean(0)) / x.std(0)
