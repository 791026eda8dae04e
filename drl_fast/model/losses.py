"""DRL's two losses, from tokens: InfoNCE of any interaction and CDCR, over one process or a group."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from .. import functional
from ..distributed.gather import gather_rows
from ..distributed.group import Group, agree
from ..functional.dot_product import pool
from ..modules import TI, WTI
from . import padding
from .config import Config

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# The logit of two captions' pairs that share a video. Finite: infinity would make the temperature's gradient NaN.
NO_NEGATIVE = -1e4


class Batch(NamedTuple):
    """The tokens of a batch of pairs, row by row; the weights are None except with WTI."""

    text: Tensor
    """(B, Nt, D)"""
    video: Tensor
    """(B, Nv, D)"""
    text_weight: Tensor | None
    video_weight: Tensor | None
    text_mask: Tensor
    video_mask: Tensor


def contrastive_loss(
    interaction: nn.Module, batch: Batch, logit_scale: Tensor, owner: Tensor | None, group: ProcessGroup | None
) -> Tensor:
    """Compute InfoNCE of the batch, a scalar. TI and WTI never form the B x B logits; the others do, on every rank."""
    if isinstance(interaction, WTI | TI):
        return functional.token_contrastive_loss(
            *batch,
            logit_scale=logit_scale,
            masking=interaction.masking,
            normalize=interaction.normalize,
            owner=owner,
            process_group=group,
        )
    if group is None:
        logits = interaction(batch.text, batch.video, batch.text_mask, batch.video_mask)
    else:
        logits, owner = _gather_logits(interaction, batch, owner, Group(group))
    if owner is not None:
        siblings = (owner[:, None] == owner).fill_diagonal_(False)
        logits = logits.masked_fill(siblings, NO_NEGATIVE)
    return functional.info_nce(logits, logit_scale)


def _gather_logits(
    interaction: nn.Module, batch: Batch, owner: Tensor | None, group: Group
) -> tuple[Tensor, Tensor | None]:
    """Return the group's logits (B, B) and owners; every rank scores its own texts against all videos."""
    text, video = batch.text, batch.video
    same: dict[str, object] = {"D": text.shape[2], "Nv": video.shape[1], "dtype": text.dtype}
    same |= {"interaction": type(interaction).__name__, "owner": "None" if owner is None else "ids"}
    with agree(group, "DRL's loss") as agreement:
        agreement.sizes, agreement.same = {"rows": len(text)}, same
    counts = [size["rows"] for size in agreement.sizes_by_rank]
    videos, real = gather_rows(video, group, counts), gather_rows(batch.video_mask, group, counts)
    logits = gather_rows(interaction(text, videos, batch.text_mask, real), group, counts)
    return logits, None if owner is None else gather_rows(owner, group, counts)


def decorrelation_loss(
    config: Config, batch: Batch, padded: tuple[Tensor, Tensor] | None, group: ProcessGroup | None
) -> Tensor:
    """Compute CDCR by the public code's number in ``config.cdcr``, a scalar; 0 is 0."""
    alpha_on, alpha_off = config.cdcr_alpha_on, config.cdcr_alpha_off
    if config.cdcr == 0:
        return batch.text.new_zeros((), dtype=torch.float32)
    if config.cdcr == 1:
        pooled = pool(batch.text, batch.video, batch.text_mask, batch.video_mask)
        return functional.cross_correlation_loss(*pooled, alpha_on=alpha_on, alpha_off=alpha_off, process_group=group)
    if config.cdcr == 2:
        batch = batch._replace(text_weight=None, video_weight=None)
    if padded is None:
        return functional.cdcr_loss(*batch, alpha_on=alpha_on, alpha_off=alpha_off, process_group=group)
    if group is not None:
        raise ValueError("cdcr_padding must be 'never' over a process group, got 'competes'")
    batch = batch._replace(text=padded[0], video=padded[1])
    return padding.cdcr_loss(*batch, alpha_on=alpha_on, alpha_off=alpha_off)
