"""DRL's losses, from tokens: InfoNCE or the sigmoid loss of any interaction, and CDCR, over one process or a group."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from .. import functional, validation
from ..distributed.gather import gather_rows
from ..distributed.group import Group, agree
from ..functional.dot_product import pool
from ..modules import TI, WTI, MeanMaxSim
from ..modules.wti import interaction_options
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
    interaction: nn.Module,
    batch: Batch,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
    owner: Tensor | None,
    group: ProcessGroup | None,
) -> Tensor:
    """Compute InfoNCE of the batch, or with a ``logit_bias`` the sigmoid loss, a scalar.

    Those of TI and WTI never form the B x B logits; all others do, on every rank. The sigmoid loss of several levels is
    the sum of one per level (Video-ColBERT).
    """
    if isinstance(interaction, WTI | TI):
        return functional.token_contrastive_loss(
            *batch,
            logit_scale=logit_scale,
            owner=owner,
            loss="softmax" if logit_bias is None else "sigmoid",
            logit_bias=logit_bias,
            process_group=group,
            **interaction_options(interaction),
        )
    if group is None:
        levels = _levels(interaction, batch, logit_bias is not None)
    else:
        levels, owner = _gather_levels(interaction, batch, owner, Group(group), logit_bias is not None)
    if owner is not None:
        siblings = (owner[:, None] == owner).fill_diagonal_(False)
        levels = [logits.masked_fill(siblings, NO_NEGATIVE) for logits in levels]
    if logit_bias is None:
        return functional.info_nce(levels[0], logit_scale)
    return torch.stack([functional.sigmoid_loss(logits, logit_scale, logit_bias) for logits in levels]).sum()


def _levels(interaction: nn.Module, batch: Batch, apart: bool) -> list[Tensor]:
    """Return the interaction's logits (A, B); MeanMaxSim's two levels if they are wanted ``apart``, else their sum."""
    if isinstance(interaction, WTI | TI):
        found = functional.token_interaction(*batch, **interaction_options(interaction))
        assert isinstance(found, Tensor)
        return [found]
    sides = batch.text, batch.video, batch.text_mask, batch.video_mask
    return list(interaction.levels(*sides)) if apart and isinstance(interaction, MeanMaxSim) else [interaction(*sides)]


def _gather_levels(
    interaction: nn.Module, batch: Batch, owner: Tensor | None, group: Group, apart: bool
) -> tuple[list[Tensor], Tensor | None]:
    """Return the group's logits (B, B) and owners; every rank scores its own texts against all videos."""
    text, video = batch.text, batch.video
    same: dict[str, object] = {"D": text.shape[2], "Nv": video.shape[1], "dtype": text.dtype}
    same |= {"interaction": type(interaction).__name__, "owner": "None" if owner is None else "ids"}
    with agree(group, "DRL's loss") as agreement:
        agreement.sizes, agreement.same = {"rows": len(text)}, same
    counts = [size["rows"] for size in agreement.sizes_by_rank]
    gathered = {name: gather_rows(getattr(batch, name), group, counts) for name in ("video", "video_mask")}
    levels = [gather_rows(x, group, counts) for x in _levels(interaction, batch._replace(**gathered), apart)]
    return levels, None if owner is None else gather_rows(owner, group, counts)


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


def check_video_of(video_of: Tensor, texts: int, videos: int) -> Tensor:
    """Check the row of a batch's videos that each caption describes; return it as int64.

    Raises:
        ValueError: another shape; on the CPU, a row that does not exist.
        TypeError: a tensor that is not of integers.
    """
    x = validation.tensor("video_of", video_of)
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"video_of must be integers, rows of video, got {x.dtype}")
    if tuple(x.shape) != (texts,):
        raise ValueError(f"video_of must be (A,) = ({texts},) to match text, got {tuple(x.shape)}")
    if x.device.type == "cpu" and x.numel() and not 0 <= int(x.min()) <= int(x.max()) < videos:
        raise ValueError(f"video_of must lie in 0..{videos - 1}, video's rows, got {int(x.min())}..{int(x.max())}")
    return x.to(torch.int64)


def repeat_videos(batch: Batch, video_of: Tensor) -> Batch:
    """Return the batch with each caption's video in its row."""
    weight = None if batch.video_weight is None else batch.video_weight[video_of]
    return batch._replace(video=batch.video[video_of], video_weight=weight, video_mask=batch.video_mask[video_of])


def shared_videos_loss(
    interaction: nn.Module,
    batch: Batch,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
    video_of: Tensor,
    owner: Tensor | None,
    group: ProcessGroup | None,
) -> Tensor:
    """Compute the loss of captions (A) that share videos (B) from the (A, B) logits, a scalar.

    It is the loss of :func:`contrastive_loss` on repeated videos with ``owner=video_of``. From text to video every
    other video counts as often as it has captions in the batch. From video to text each caption is its video's answer
    once, and the video's other captions are left out.

    Over a group the videos are repeated: the ranks exchange pairs. ``owner`` (A,) are ids of the captions' videos;
    None: no video is on two ranks.
    """
    if group is not None:
        if owner is None:
            owner = video_of + _first_video(len(batch.video), Group(group), video_of.device)
        return contrastive_loss(interaction, repeat_videos(batch, video_of), logit_scale, logit_bias, owner, group)
    if len(batch.text) == 0:
        raise ValueError("text must hold at least one caption, got none; a batch without pairs has no loss")
    levels = _levels(interaction, batch, logit_bias is not None)
    captions = torch.bincount(video_of, minlength=len(batch.video)).to(levels[0].dtype)
    own = torch.nn.functional.one_hot(video_of, len(batch.video)).bool()
    if logit_bias is not None:
        counts = torch.where(own, 1, captions)  # of another video's pairs: one for each of its captions
        scaled = [torch.where(own, -1, 1) * (logits * logit_scale + logit_bias) for logits in levels]
        return torch.stack([(counts * torch.nn.functional.softplus(x)).sum() for x in scaled]).sum() / len(batch.text)
    logits = levels[0] * logit_scale
    positive = logits.gather(1, video_of[:, None]).squeeze(1)
    # A video without a caption in the batch has log(0) = -inf: it is nobody's negative.
    text_to_video = torch.logsumexp(logits + captions.log().masked_fill(own, 0), dim=1)
    others = torch.logsumexp(logits.masked_fill(own, NO_NEGATIVE), dim=0)[video_of]
    video_to_text = torch.logaddexp(positive, others)
    return ((text_to_video + video_to_text) / 2 - positive).mean()


def _first_video(videos: int, group: Group, device: torch.device) -> int:
    """Return how many videos the ranks before this one hold, so that ids differ over ranks."""
    with agree(group, "DRL's loss") as agreement:
        agreement.sizes = {"videos": videos}
    return sum(size["videos"] for size in agreement.sizes_by_rank[: group.rank])
