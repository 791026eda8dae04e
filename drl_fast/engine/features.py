"""What evaluation computes once: tokens of all texts and videos, and WTI's weights of them.

Bits depend on model, split and machine, not on the cache's content or the number of processes: the image tower runs one
video at a time, everything behind it runs on fixed chunks of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .. import WTI, autocast
from ..data.feature_cache import FeatureCache
from ..data.loading import Unreadable, video_loader
from ..data.video import Sampling
from ..distributed.group import Group, agree
from ..model.drl import DRL
from ..model.head import Head
from ..model.weight_files import weights_hash
from ..modules.wti import softmax_weights
from .precision import Autocast
from .row_sharding import gather_dict, own_chunks, shard_rows

# Rows of one pass; other numbers give other last bits.
TEXTS, VIDEOS = 128, 32
# Videos that a process decodes and encodes, one by one, before the processes exchange them.
DECODED = 4
# Videos looked up in the cache at once, before those it lacks are decoded.
WINDOW = 256

OnProgress = Callable[[int, int], None]


class Encoded(NamedTuple):
    """All texts or all videos as the interaction reads them, on the CPU."""

    tokens: Tensor
    """(rows, tokens, D) float32"""
    mask: Tensor
    """(rows, tokens) bool"""
    weight: Tensor | None
    """(rows, tokens) float32, WTI's; None where the interaction has none for this side"""


def encode_rows(
    model: Head,
    side: str,
    encode: Callable[[slice], tuple[Tensor, Tensor]],
    tokens: Tensor,
    autocast: Autocast,
    group: Group | None = None,
    on_progress: OnProgress | None = None,
) -> Encoded:
    """Encode one side, a chunk of rows at a time.

    Args:
        side: ``"text"`` or ``"video"``.
        encode: returns tokens (rows, tokens, D) and mask (rows, tokens) of some rows, on the model's device.
        tokens: (rows, tokens, D) float32 on the CPU, which the tokens are written to.
    """
    head = getattr(model.interaction, f"{side}_weight_fc", None) if isinstance(model.interaction, WTI) else None
    mask = torch.zeros(tokens.shape[:2], dtype=torch.bool)
    weight = None if head is None else torch.zeros(tokens.shape[:2])
    buffers = [tokens, mask] if weight is None else [tokens, mask, weight]
    for rows in shard_rows(buffers, TEXTS if side == "text" else VIDEOS, group, on_progress):
        with agree(group, "evaluate"), autocast():
            if rows.start == rows.stop:
                continue
            found, real = encode(rows)
            tokens[rows], mask[rows] = found, real
            if head is not None and weight is not None:
                normalized = model.interaction.weight_input == "normalized"
                weight[rows] = softmax_weights(head, found, real, normalized=normalized)
    return Encoded(tokens, mask, weight)


def frame_features(
    model: DRL,
    videos: Sequence[Path],
    sampling: Sampling,
    *,
    decoded: Sequence[Tensor] | None = None,
    workers: int,
    cache: FeatureCache | None,
    autocast: Autocast,
    group: Group | None,
    on_progress: OnProgress,
) -> tuple[Tensor, Tensor, dict[int, str]]:
    """Run the image tower on every video that the cache does not hold.

    Args:
        decoded: each video's real frames (n, 3, size, size), where they are in memory; nothing is decoded or cached.

    Returns:
        features (B, Nv, D) float32, zeros after the real ones; (B,) how many are real; and why videos could not be
        read, by their number.
    """
    features = torch.zeros(len(videos), sampling.max_frames, model.dim)
    counts = torch.zeros(len(videos), dtype=torch.int64)
    own = [i for rows in own_chunks(len(videos), DECODED, group) for i in range(rows.start, rows.stop)]
    if decoded is None:
        stream = _stream(model, [videos[i] for i in own], sampling, workers, cache, autocast)
    else:
        stream = encode_frames(model, (decoded[i] for i in own), autocast)
    reasons: dict[int, str] = {}
    try:
        for rows in shard_rows([features, counts], DECODED, group, on_progress):
            with agree(group, "evaluate"):
                for i in range(rows.start, rows.stop):
                    found = next(stream)
                    if isinstance(found, Unreadable):
                        reasons[i] = found.reason
                    else:
                        features[i, : len(found)], counts[i] = found, len(found)
    finally:
        stream.close()  # ends the processes that decode
    return features, counts, gather_dict(reasons, group)


Features = Generator[Tensor | Unreadable, None, None]


def encode_frames(model: DRL, videos: Iterable[Tensor | Unreadable], autocast: Autocast) -> Features:
    """Yield the frame features (n, D) of each video's frames, in order."""
    for frames in videos:
        if isinstance(frames, Unreadable):
            yield frames
            continue
        with autocast():
            features = model.frame_features(frames.to(device_of(model))).cpu()
        del frames  # before the next video is decoded
        yield features


def _stream(
    model: DRL, videos: list[Path], sampling: Sampling, workers: int, cache: FeatureCache | None, autocast: Autocast
) -> Features:
    """Yield each file's frame features (n, D), in order."""
    if cache is None:
        yield from encode_frames(model, video_loader(videos, sampling, workers=workers) if videos else (), autocast)
        return
    with autocast():
        encoder = fingerprint(model)
    for first in range(0, len(videos), WINDOW):
        window = videos[first : first + WINDOW]
        keys = [_key(cache, video, sampling, encoder) for video in window]
        known = [None if key is None else _known(cache, key, model, sampling) for key in keys]
        unknown = [video for video, found in zip(window, known, strict=True) if found is None]
        new = encode_frames(model, video_loader(unknown, sampling, workers=workers) if unknown else (), autocast)
        try:
            for key, found in zip(keys, known, strict=True):
                features = next(new) if found is None else found
                if found is None and key is not None and not isinstance(features, Unreadable):
                    cache.put(key, features)
                yield features
        finally:
            new.close()


def _known(cache: FeatureCache, key: str, model: DRL, sampling: Sampling) -> Tensor | None:
    """Return an entry's features, or None if there is none of this model's form."""
    found = cache.get(key)
    if found is None or found.dim() != 2 or found.shape[1] != model.dim or not found.is_floating_point():
        return None
    return found if 1 <= len(found) <= sampling.max_frames else None


def _key(cache: FeatureCache, video: Path, sampling: Sampling, encoder: str) -> str | None:
    try:
        return cache.key(video, sampling, encoder)
    except ValueError:  # a missing file; the decoder reports it
        return None


def fingerprint(model: DRL) -> str:
    """Hash what frame features depend on beside the frames: the image tower's weights and build, dtypes in use.

    Call it under the autocast that the tower runs under. torch's version and the number of threads, which may change
    last bits, are left out.
    """
    device = device_of(model).type
    active = torch.get_autocast_dtype(device) if autocast.is_on(device) else None
    build = (repr(model.clip.visual), device, active, torch.get_float32_matmul_precision())
    return weights_hash({}, repr((model.encoder_hash("video"), *build)))


def for_model(model: Head, x: Tensor) -> Tensor:
    """Tokens on the model's device and in its dtype."""
    return x.to(device_of(model), _weights(model).dtype)


def device_of(model: Head) -> torch.device:
    """The device of the model's parameters."""
    return _weights(model).device


def _weights(model: Head) -> Tensor:
    return model.stored_scale
