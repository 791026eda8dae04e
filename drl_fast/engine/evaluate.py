"""Retrieval over a whole split: features once, scores in blocks, on one process or many with the same bits.

Frames live as long as one video is encoded; what stays is (A, Nt, D) + (B, Nv, D) float32 of tokens and the (A, B)
similarities.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import WTI, token_interaction, validation
from ..data.feature_cache import FeatureCache
from ..data.loading import Unreadable, tokenize
from ..data.split import Split
from ..data.video import Sampling
from ..distributed.group import Group, Terms
from ..metrics import retrieval_metrics
from ..model.drl import DRL
from .features import Side, device_of, frame_features, inner, text_side, video_side, weights_hash
from .precision import PRECISIONS, autocast_for
from .row_sharding import fill

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Unreadable videos that an error names before it only counts.
NAMED = 5


@dataclass(frozen=True)
class Evaluation:
    """A split's similarities and what they amount to. Captions and videos that could not be read are not in it."""

    sim: Tensor
    """(A, B) float32 on the CPU, texts in rows, without temperature."""
    owner: Tensor
    """(A,) the column of each text's video."""
    metrics: dict[str, dict[str, float]]
    """As :func:`drl_fast.metrics.retrieval_metrics` gives them."""
    unreadable: list[Unreadable]
    """Videos of the split that could not be decoded, by name, and why."""


def evaluate(
    model: DRL,
    split: Split,
    tokenizer: Callable[..., Tensor],
    sampling: Sampling,
    *,
    max_words: int,
    workers: int = 0,
    cache: FeatureCache | None = None,
    block: int = 64,
    precision: str = "fp32",
    strict: bool = False,
    process_group: ProcessGroup | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Evaluation:
    """Score every caption of a split against every video of it.

    Args:
        model: a DRL itself, not a wrapper around one, on any device; it comes back in the mode in which it was.
        tokenizer: the CLIP's own.
        sampling: frames of a video; its size is the CLIP's.
        max_words: tokens a caption is cut to, at most the CLIP's context.
        workers: processes that decode, for each rank; 0: this one does.
        cache: frame features of before, by file, sampling and image tower; new ones are added.
        block: captions scored at a time. TI's and WTI's scores have the same bits whatever it is.
        precision: ``"bf16"`` runs everything under autocast, ``"fp32"`` nothing.
        strict: fail where a video cannot be read, instead of leaving it and its captions out.
        process_group: share the work with all of its ranks, which get the result that one process would, bit for bit.
        on_progress: called with ``"videos"``, ``"texts"`` or ``"scores"``, how many are done, and of how many.

    Raises:
        ValueError: a split without captions, or with videos that none describes; no readable video, or with ``strict``
            any unreadable one; an option out of range, or frames and words that the model does not take; ranks that
            differ in what they evaluate.
        RuntimeError: another rank failed; its error is named.
    """
    ranks = None if process_group is None else Group(process_group)
    context = autocast_for(precision, device_of(model).type)
    tell = on_progress or (lambda stage, done, total: None)
    words = min(max_words, model.clip.positional_embedding.shape[0])

    def terms() -> Terms:
        _check(split, block, precision)
        with context():
            _rehearse(model, tokenize(tokenizer, split.captions[:1], words), sampling)
        if ranks is None:
            return Terms({}, {})
        ranks.require("evaluation's rows", torch.empty(0))
        options = {"sampling": sampling, "max_words": max_words, "block": block, "precision": precision}
        return Terms({}, {**_checksums(model, split), **options, "strict": strict})

    with _scoring(model):
        terms() if ranks is None else ranks.agree("evaluate", terms)
        features, counts, reasons = frame_features(
            model,
            split.videos,
            sampling,
            workers=workers,
            cache=cache,
            autocast=context,
            group=ranks,
            on_progress=partial(tell, "videos"),
        )
        unreadable = [Unreadable(split.names[i], reason) for i, reason in reasons.items()]
        _check_readable(split, unreadable, strict)
        texts, columns, owner = _kept(split, reasons)
        if reasons:
            features, counts = features[columns], counts[columns]
        video = video_side(model, features, counts, context, ranks)
        text = text_side(model, tokenize(tokenizer, texts, words), context, ranks, partial(tell, "texts"))
        sim = torch.zeros(len(owner), len(columns))
        with context():
            fill([sim], block, _scorer(model, text, video), ranks, partial(tell, "scores"))
    return Evaluation(sim, owner, retrieval_metrics(sim, owner), unreadable)


def _check(split: Split, block: int, precision: str) -> None:
    validation.positive_int("block", block)
    validation.option("precision", precision, PRECISIONS)
    if not split.captions:
        raise ValueError(f"split must hold at least one caption, got none of {split.dataset}, {split.part}")
    silent = sorted(set(range(len(split.videos))) - set(split.owner))
    if silent:
        raise ValueError(
            f"split must have a caption for every video, got none for {split.names[silent[0]]} ({len(silent)} in all); "
            "leave them out"
        )


def _rehearse(model: DRL, ids: Tensor, sampling: Sampling) -> None:
    """Score one caption and one black frame: what cannot work fails now, not when all videos are decoded."""
    device, frames = device_of(model), sampling.max_frames
    mask = torch.arange(frames, device=device)[None] == 0
    text, text_mask = model.encode_text(ids.to(device))
    pictures = torch.zeros(1, frames, 3, sampling.size, sampling.size, dtype=torch.uint8, device=device)
    model.similarity(text, model.encode_video(pictures, mask), text_mask, mask)


def _checksums(model: DRL, split: Split) -> dict[str, object]:
    """What says of a rank that it evaluates the same model on the same split."""
    pairs = list(zip(split.captions, split.owner, strict=True))
    sums = {
        name: f"{len(x)} of checksum {zlib.crc32(repr(x).encode()):08x}"
        for name, x in (("captions", pairs), ("videos", split.names))
    }
    return {**sums, "model": weights_hash(model.state_dict(), repr(model.describe_config()))}


def _check_readable(split: Split, unreadable: Sequence[Unreadable], strict: bool) -> None:
    if not unreadable or not (strict or len(unreadable) == len(split.videos)):
        return
    named = "; ".join(f"{video.name}: {video.reason}" for video in unreadable[:NAMED])
    more = f"; and {len(unreadable) - NAMED} more" if len(unreadable) > NAMED else ""
    want = "readable videos alone, as strict asks" if strict else "at least one readable video"
    raise ValueError(f"split must hold {want}, got {len(unreadable)} unreadable of {len(split.videos)}: {named}{more}")


def _kept(split: Split, reasons: dict[int, str]) -> tuple[list[str], Tensor, Tensor]:
    """Captions of readable videos, those videos' numbers (B,), and each caption's place among them (A,)."""
    columns = [i for i in range(len(split.videos)) if i not in reasons]
    place = {number: column for column, number in enumerate(columns)}
    pairs = [(text, place[i]) for text, i in zip(split.captions, split.owner, strict=True) if i in place]
    return [text for text, _ in pairs], torch.tensor(columns), torch.tensor([column for _, column in pairs])


def _scorer(model: DRL, text: Side, video: Side) -> Callable[[slice], list[Tensor]]:
    """Text rows against all videos, which go to the device once."""
    device, layer = device_of(model), model.interaction
    videos, video_mask = inner(model, video.tokens), video.mask.to(device)
    video_weight = None if video.weight is None else video.weight.to(device)

    def score(rows: slice) -> list[Tensor]:
        texts, text_mask = inner(model, text.tokens[rows]), text.mask[rows].to(device)
        if not isinstance(layer, WTI) or text.weight is None:
            return [model.similarity(texts, videos, text_mask, video_mask)]
        # With the weights of before: the layer's heads would see other rows in another block, and round otherwise.
        scores = token_interaction(
            texts,
            videos,
            text.weight[rows].to(device),
            video_weight,
            text_mask,
            video_mask,
            normalize=layer.normalize,
            masking=layer.masking,
            bidirectional=layer.bidirectional,
        )
        assert isinstance(scores, Tensor)
        return [scores]

    return score


@contextlib.contextmanager
def _scoring(model: DRL) -> Iterator[None]:
    """Without dropout and gradients; afterwards every module is back in its own mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def encode_texts(model: DRL, ids: Tensor, batch: int = 64) -> tuple[Tensor, Tensor]:
    """Token ids (A, Nt) -> tokens (A, Nt, D), mask (A, Nt)."""
    model.eval()
    parts = [model.encode_text(rows) for rows in ids.split(batch)]
    return torch.cat([tokens for tokens, _ in parts]), torch.cat([mask for _, mask in parts])


@torch.no_grad()
def encode_videos(model: DRL, frames: Tensor, mask: Tensor, batch: int = 16) -> Tensor:
    """Frames (B, Nv, 3, H, W) uint8, mask (B, Nv) bool -> tokens (B, Nv, D)."""
    model.eval()
    parts = zip(frames.split(batch), mask.split(batch), strict=True)
    return torch.cat([model.encode_video(rows, real) for rows, real in parts])
