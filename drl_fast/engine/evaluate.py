"""Retrieval over a whole split: features once, scores in blocks, on one process or many with the same bits.

Frames live while one video is encoded. What stays is (A, Nt, D) + (B, Nv, D) float32 of tokens and the (A, B)
similarities.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .. import WTI, MeanMaxSim, token_interaction, validation
from ..data.feature_cache import FeatureCache
from ..data.feature_store import FeatureStore, Part
from ..data.loading import Unreadable, tokenize
from ..data.split import Split
from ..data.video import Sampling
from ..distributed.group import Group, agree
from ..metrics import recall_interval, retrieval_metrics
from ..model.drl import DRL
from ..model.head import Head
from ..model.weight_files import weights_hash
from ..modules.wti import interaction_options
from .features import VIDEOS, Encoded, OnProgress, device_of, encode_rows, for_model, frame_features
from .precision import PRECISIONS, Autocast, autocast_for
from .row_sharding import shard_rows

# Unreadable videos that an error names; it counts the others.
NAMED = 5


@dataclass(frozen=True)
class Evaluation:
    """A split's similarities and metrics, without unreadable videos and their captions."""

    sim: Tensor
    """(A, B) float32 on the CPU, texts in rows, without temperature."""
    owner: Tensor
    """(A,) the column of each text's video."""
    metrics: dict[str, dict[str, float]]
    """See :func:`drl_fast.metrics.retrieval_metrics`."""
    unreadable: list[Unreadable]
    """Videos that could not be decoded: name and reason."""
    captions: list[str]
    """Captions, one per row of ``sim``."""
    names: list[str]
    """Video ids, one per column."""

    def with_intervals(self) -> dict[str, dict[str, float]]:
        """Return the metrics with R@1's 95 % interval (``R1_low``, ``R1_high``) and the number of ``candidates``."""
        found = {}
        for direction, values in self.metrics.items():
            low, high = recall_interval(self.sim, self.owner, direction=direction)
            found[direction] = {**values, "R1_low": low, "R1_high": high, "candidates": self.sim.shape[1]}
        return found


def evaluate(
    model: DRL,
    split: Split,
    tokenizer: Callable[..., Tensor],
    sampling: Sampling,
    *,
    max_words: int,
    decoded: Sequence[Tensor] | None = None,
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
        model: a DRL itself, not a wrapper around one, on any device; it comes back in the mode it was in.
        tokenizer: the CLIP's own.
        sampling: frames of a video; its size is the CLIP's.
        max_words: tokens a caption is cut to, at most the CLIP's context.
        decoded: each video's real frames (n, 3, size, size) uint8, where they are in memory; None: decode the files.
        workers: processes that decode, for each rank; 0: this one does.
        cache: frame features by file, sampling and image tower; new ones are added.
        block: captions scored at a time. It changes no bit of TI's and WTI's scores.
        precision: ``"bf16"`` runs everything under autocast, ``"fp32"`` nothing.
        strict: raise where a video cannot be read, instead of leaving it and its captions out.
        process_group: share the work among its ranks; all get the bits of one process.
        on_progress: called with ``"videos"``, ``"texts"`` or ``"scores"``, how many are done, and of how many.

    Raises:
        ValueError: a split without captions, or with videos that none describes; no readable video, or with ``strict``
            any unreadable one; an option out of range, or frames and words that the model does not take; ranks that
            differ in what they evaluate.
        RuntimeError: another rank failed; its error is named.
    """
    group = None if process_group is None else Group(process_group)
    context = autocast_for(precision, device_of(model).type)
    report = on_progress or _ignore
    words = model.words(max_words)

    with _scoring(model):
        with agree(group, "evaluate") as agreement:
            _check(split, block, precision)
            with context():
                _rehearse(model, tokenize(tokenizer, split.captions[:1], words), sampling)
            if group is not None:
                group.require("evaluation's rows", torch.empty(0))
                options = {"sampling": sampling, "max_words": max_words, "block": block, "precision": precision}
                agreement.same = {**_checksums(model, split), **options, "strict": strict}
        features, counts, reasons = frame_features(
            model,
            split.videos,
            sampling,
            decoded=decoded,
            workers=workers,
            cache=cache,
            autocast=context,
            group=group,
            on_progress=partial(report, "videos"),
        )
        unreadable = [Unreadable(split.names[i], reason) for i, reason in reasons.items()]
        _check_readable(split, unreadable, strict)
        captions, columns, owner = _readable(split, reasons)
        if reasons:
            features, counts = features[columns], counts[columns]
        ids = tokenize(tokenizer, captions, words)
        sides = _Sides(
            text=lambda rows: model.encode_text(ids[rows].to(device_of(model))),
            video=lambda rows: model.video_tokens(
                for_model(model, features[rows]),
                (torch.arange(features.shape[1]) < counts[rows, None]).to(device_of(model)),
            ),
            text_tokens=torch.zeros(*ids.shape, model.dim),
            # A chunk's tokens replace its features.
            video_tokens=features,
        )
        sim = _similarities(model, sides, block, context, group, report, "texts")
    names = [split.names[i] for i in columns.tolist()]
    return Evaluation(sim, owner, retrieval_metrics(sim, owner), unreadable, captions, names)


def evaluate_features(
    model: Head,
    store: FeatureStore,
    part: Part,
    *,
    block: int = 64,
    precision: str = "fp32",
    process_group: ProcessGroup | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Evaluation:
    """Score every caption of a part against every video of it, from stored tokens.

    Args:
        model: a Head, or a DRL with the CLIP that encoded the tokens.
        part: of ``store``.
        block, precision, process_group, on_progress: as of :func:`evaluate`.

    Raises:
        ValueError: tokens of another width, more of them than the model has positions, or damaged ones; an option out
            of range; ranks that differ in what they evaluate.
        RuntimeError: another rank failed; its error is named.
    """
    group = None if process_group is None else Group(process_group)
    context = autocast_for(precision, device_of(model).type)
    split = part.split

    def read(side: str, items: np.ndarray) -> tuple[Tensor, Tensor]:
        tokens, mask = store.read(side, items)
        return for_model(model, tokens), mask.to(device_of(model))

    with _scoring(model):
        with agree(group, "evaluate") as agreement:
            _check(split, block, precision)
            if group is not None:
                group.require("evaluation's rows", torch.empty(0))
                agreement.same = {**_checksums(model, split), "block": block, "precision": precision}
        sides = _Sides(
            text=lambda rows: model.text_tokens(*read("text", part.texts[rows])),
            video=lambda rows: model.video_tokens(*read("video", part.videos[rows])),
            text_tokens=torch.zeros(len(part.texts), store.length("text"), model.dim),
            video_tokens=torch.zeros(len(part.videos), store.length("video"), model.dim),
        )
        sim = _similarities(model, sides, block, context, group, on_progress or _ignore, "tokens")
    owner = torch.tensor(split.owner)
    names, captions = list(split.names), list(split.captions)
    return Evaluation(sim, owner, retrieval_metrics(sim, owner), part.unreadable, captions, names)


def _ignore(stage: str, done: int, total: int) -> None:
    """Report no progress."""


class _Sides(NamedTuple):
    """How both sides' tokens are encoded, see :func:`encode_rows`, and the buffers that they are written to."""

    text: Callable[[slice], tuple[Tensor, Tensor]]
    video: Callable[[slice], tuple[Tensor, Tensor]]
    text_tokens: Tensor
    video_tokens: Tensor


def _similarities(
    model: Head,
    sides: _Sides,
    block: int,
    context: Autocast,
    group: Group | None,
    report: Callable[..., None],
    stage: str,
) -> Tensor:
    """Encode both sides and score them (A, B)."""
    videos = encode_rows(model, "video", sides.video, sides.video_tokens, context, group)
    texts = encode_rows(model, "text", sides.text, sides.text_tokens, context, group, partial(report, stage))
    with context():
        return _score(model, texts, videos, block, group, partial(report, "scores"))


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
    """Score one caption and one black frame, so that what cannot work fails before all videos are decoded."""
    device, frames = device_of(model), sampling.max_frames
    mask = torch.arange(frames, device=device)[None] == 0
    text, text_mask = model.encode_text(ids.to(device))
    pictures = torch.zeros(1, frames, 3, sampling.size, sampling.size, dtype=torch.uint8, device=device)
    model.similarity(text, model.encode_video(pictures, mask), text_mask, mask)


def _checksums(model: Head, split: Split) -> dict[str, object]:
    """What must be equal on all ranks: captions, videos and the model's weights."""
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


def _readable(split: Split, reasons: dict[int, str]) -> tuple[list[str], Tensor, Tensor]:
    """Captions of readable videos, those videos' numbers (B,), and each caption's column among them (A,)."""
    numbers = [i for i in range(len(split.videos)) if i not in reasons]
    column = {number: place for place, number in enumerate(numbers)}
    pairs = [(text, column[i]) for text, i in zip(split.captions, split.owner, strict=True) if i in column]
    return [text for text, _ in pairs], torch.tensor(numbers), torch.tensor([place for _, place in pairs])


def _score(
    model: Head, texts: Encoded, videos: Encoded, block: int, group: Group | None, on_progress: OnProgress
) -> Tensor:
    """(A, B) similarities: blocks of texts against all videos, which go to the device once."""
    device, layer = device_of(model), model.interaction
    video, video_mask = for_model(model, videos.tokens), videos.mask.to(device)
    video_weight = None if videos.weight is None else videos.weight.to(device)
    shared = {"in_context": _in_context(layer, video, video_mask)} if isinstance(layer, MeanMaxSim) else {}
    sim = torch.zeros(len(texts.tokens), len(video))
    for rows in shard_rows([sim], block, group, on_progress):
        with agree(group, "evaluate"):
            if rows.start == rows.stop:
                continue
            text, text_mask = for_model(model, texts.tokens[rows]), texts.mask[rows].to(device)
            if not isinstance(layer, WTI) or texts.weight is None:
                sim[rows] = layer(text, video, text_mask, video_mask, **shared)
                continue
            # Weights computed before: in another block the layer's heads would see other rows and round differently.
            scores = token_interaction(
                text,
                video,
                texts.weight[rows].to(device),
                video_weight,
                text_mask,
                video_mask,
                **interaction_options(layer),
            )
            assert isinstance(scores, Tensor)
            sim[rows] = scores
    return sim


def _in_context(layer: MeanMaxSim, video: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mix all videos' frames over time once, a chunk of videos at a time, instead of with every block of texts."""
    tokens, real = zip(*map(layer.in_context, video.split(VIDEOS), mask.split(VIDEOS)), strict=True)
    return torch.cat(tokens), torch.cat(real)


@contextlib.contextmanager
def _scoring(model: Head) -> Iterator[None]:
    """Turn dropout and gradients off; afterwards return every module to its own mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
