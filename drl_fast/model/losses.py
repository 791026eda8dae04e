"""DRL's two losses, from tokens: InfoNCE of any interaction and CDCR, over one process or a group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import functional, info_nce
from ..distributed.gather import gather_rows
from ..distributed.group import Group, Terms
from ..functional.dot_product import pool
from ..modules import TI, WTI
from . import padding

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .drl import Config

# The logit of a pair that is no negative. Finite: an infinite one would make the temperature's gradient NaN.
NO_NEGATIVE = -1e4


class Tokens(NamedTuple):
    """Both sides of a batch of pairs; token weights are None but for WTI."""

    text: Tensor
    """(B, Nt, D)"""
    video: Tensor
    """(B, Nv, D)"""
    text_weight: Tensor | None
    video_weight: Tensor | None
    text_mask: Tensor
    video_mask: Tensor


def contrast(
    interaction: nn.Module, tokens: Tokens, logit_scale: Tensor, owner: Tensor | None, group: ProcessGroup | None
) -> Tensor:
    """InfoNCE of the batch, a scalar. TI and WTI never form the batch's logits; the others do, on every rank."""
    if isinstance(interaction, WTI | TI):
        return functional.token_contrastive_loss(*tokens, logit_scale=logit_scale, owner=owner, process_group=group)
    if group is None:
        logits = interaction(tokens.text, tokens.video, tokens.text_mask, tokens.video_mask)
    else:
        logits, owner = _logits_of_all(interaction, tokens, owner, Group(group))
    if owner is not None:
        siblings = (owner[:, None] == owner).fill_diagonal_(False)
        logits = logits.masked_fill(siblings, NO_NEGATIVE)
    return info_nce(logits, logit_scale)


def _logits_of_all(
    interaction: nn.Module, tokens: Tokens, owner: Tensor | None, group: Group
) -> tuple[Tensor, Tensor | None]:
    """The whole batch's logits (B, B) and ids: every rank scores its own texts against all videos."""
    text, video = tokens.text, tokens.video
    same: dict[str, object] = {"D": text.shape[2], "Nv": video.shape[1], "dtype": text.dtype}
    same |= {"interaction": type(interaction).__name__, "owner": "None" if owner is None else "ids"}
    sizes = group.agree("DRL's loss", lambda: Terms({"rows": len(text)}, same))
    counts = [size["rows"] for size in sizes]
    videos, real = gather_rows(video, group, counts), gather_rows(tokens.video_mask, group, counts)
    logits = gather_rows(interaction(text, videos, tokens.text_mask, real), group, counts)
    return logits, None if owner is None else gather_rows(owner, group, counts)


def decorrelation(
    config: Config, tokens: Tokens, padded: tuple[Tensor, Tensor] | None, group: ProcessGroup | None
) -> Tensor:
    """CDCR, by the public code's number in ``config.cdcr``; 0 where there is none."""
    alphas: dict[str, Any] = {"alpha_on": config.cdcr_alpha_on, "alpha_off": config.cdcr_alpha_off}
    masks = (tokens.text_mask, tokens.video_mask)
    if config.cdcr == 0:
        return tokens.text.new_zeros((), dtype=torch.float32)
    if config.cdcr == 1:
        pooled = pool(tokens.text, tokens.video, *masks)
        return functional.cross_correlation_loss(*pooled, **alphas, process_group=group)
    weights = (tokens.text_weight, tokens.video_weight) if config.cdcr == 3 else (None, None)
    if padded is None:
        return functional.cdcr_loss(tokens.text, tokens.video, *weights, *masks, **alphas, process_group=group)
    if group is not None:
        raise ValueError("cdcr_padding must be 'never' over a process group, got 'competes'")
    return padding.cdcr_loss(*padded, *weights, *masks, **alphas)
