"""CDCR as the public code trains it, to one accident that it has with padding.

There a padded token's similarity is 0. Where all real ones are negative the 0 wins, and the padded token's feature,
of a picture or word that is not there, becomes the partner. ``functional.cdcr_loss`` leaves padding out. Checkpoints of
the public code load with the accident (``Config.cdcr_padding="competes"``): training goes on as it would have there.

It needs features of padding, so nothing is skipped in the towers, and it is dense: O(B Nt Nv) similarities, (N, D)
partners, one D x D.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..modules import SeqTransf
from ..numerics import unit

if TYPE_CHECKING:
    from .drl import DRL


def frames_with_padding(model: DRL, frames: Tensor, mask: Tensor) -> Tensor:
    """(B, Nv, D): every frame through the towers, those that are masked as well."""
    tokens = model.frame_features(frames.flatten(0, 1)).view(*mask.shape, -1)
    temporal = model.temporal
    if not isinstance(temporal, SeqTransf):
        real = tokens if temporal is None else temporal(tokens, mask)
        # The public code adds to a padded frame nothing, or itself once more: one direction either way.
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
    """The decorrelation loss of tokens that include padding; boolean masks."""
    t, v = unit(text), unit(video)
    s = torch.einsum("bid,bjd->bij", t, v) * text_mask[:, :, None] * video_mask[:, None, :]
    pair = torch.arange(len(text), device=text.device)[:, None]
    terms = []
    for own, real, other, partner, weight in (
        (t, text_mask, v, s.argmax(2), text_weight),
        (v, video_mask, t, s.argmax(1), video_weight),
    ):
        x, y = (standard(z[real]) for z in (own, other[pair, partner]))
        weighted = x if weight is None else x * weight[real][:, None]
        terms.append(weighted.T @ y / (len(x) if weight is None else len(text)))
    c = (terms[0] + terms[1]) / 2
    diagonal = c.diagonal()
    off = c - torch.diag(diagonal)
    return alpha_on * (diagonal - 1).square().sum() + alpha_off * off.square().sum()


def standard(x: Tensor) -> Tensor:
    """Channels of (N, D) minus their mean over their unbiased deviation."""
    return (x - x.mean(0)) / x.std(0)
