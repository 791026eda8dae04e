"""What evaluation computes once: tokens of all texts and videos, and WTI's weights of them.

Bits depend on model, split and machine, not on what the cache held or on how many processes shared the work: the image
tower runs a video at a time, everything behind it on chunks of rows that their numbers alone decide.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import WTI, autocast
from ..data.feature_cache import FeatureCache
from ..data.loading import Unreadable, video_loader
from ..data.video import Sampling
from ..distributed.group import Group
from ..model.drl import DRL
from ..modules.wti import softmax_weights
from .precision import Autocast
from .row_sharding import fill, of_all, turns

# Rows that one pass takes; other numbers give other last bits.
TEXTS, VIDEOS = 128, 32
# Videos that a process decodes and encodes, one by one, before it hands them to the others.
DECODED = 4
# Videos whose files are looked up in the cache at once, before the rest of them is decoded.
WINDOW = 256

Progress = Callable[[int, int], None]


class Side(NamedTuple):
    """One side of the similarity, on the CPU."""

    tokens: Tensor
    """(rows, tokens, D) float32"""
    mask: Tensor
    """(rows, tokens) bool"""
    weight: Tensor | None
    """(rows, tokens) float32, WTI's; None where the interaction has none for this side"""


def text_side(model: DRL, ids: Tensor, autocast: Autocast, group: Group | None, on_progress: Progress) -> Side:
    """Token ids (A, Nt), Nt <= the context -> tokens of all texts."""

    def encode(rows: slice) -> tuple[Tensor, Tensor]:
        return model.encode_text(ids[rows].to(device_of(model)))

    tokens = torch.zeros(*ids.shape, model.dim)
    return _filled(model, "text_weight_fc", tokens, TEXTS, encode, autocast, group, on_progress)


def video_side(model: DRL, features: Tensor, counts: Tensor, autocast: Autocast, group: Group | None) -> Side:
    """Frame features (B, Nv, D), real up to ``counts`` (B,) -> tokens, which take their place."""
    positions = torch.arange(features.shape[1])

    def encode(rows: slice) -> tuple[Tensor, Tensor]:
        mask = (positions < counts[rows, None]).to(device_of(model))
        # What is not real comes out of a temporal module as it went in: 0.
        tokens = inner(model, features[rows])
        return tokens if model.temporal is None else model.temporal(tokens, mask), mask

    return _filled(model, "video_weight_fc", features, VIDEOS, encode, autocast, group, None)


def _filled(
    model: DRL,
    head_name: str,
    tokens: Tensor,
    chunk: int,
    encode: Callable[[slice], tuple[Tensor, Tensor]],
    autocast: Autocast,
    group: Group | None,
    on_progress: Progress | None,
) -> Side:
    """A side of what ``encode`` makes of each chunk of rows, written into ``tokens``."""
    layer = model.interaction
    head: nn.Module | None = getattr(layer, head_name, None) if isinstance(layer, WTI) else None
    # Bytes: gloo sends no bool.
    mask = torch.zeros(tokens.shape[:2], dtype=torch.uint8)
    weight = None if head is None else torch.zeros(tokens.shape[:2])

    def compute(rows: slice) -> list[Tensor]:
        with autocast():
            parts = list(encode(rows))
            if isinstance(layer, WTI) and head is not None:
                parts.append(softmax_weights(head, *parts, normalized=layer.weight_input == "normalized"))
        return parts

    fill([x for x in (tokens, mask, weight) if x is not None], chunk, compute, group, on_progress)
    return Side(tokens, mask != 0, weight)


def frame_features(
    model: DRL,
    videos: Sequence[Path],
    sampling: Sampling,
    *,
    workers: int,
    cache: FeatureCache | None,
    autocast: Autocast,
    group: Group | None,
    on_progress: Progress,
) -> tuple[Tensor, Tensor, dict[int, str]]:
    """Run the image tower on every video that the cache does not know.

    Returns:
        features (B, Nv, D) float32, zeros behind the real ones; (B,) how many are real; and, by their number, why
        videos could not be read, which have none.
    """
    features = torch.zeros(len(videos), sampling.max_frames, model.dim)
    counts = torch.zeros(len(videos), dtype=torch.int64)
    mine = [videos[i] for rows in turns(len(videos), DECODED, group) for i in range(rows.start, rows.stop)]
    stream = _stream(model, mine, sampling, workers, cache, autocast)
    reasons: dict[int, str] = {}

    def encode(rows: slice) -> list[Tensor]:
        parts = [features[rows].clone(), counts[rows].clone()]
        for i in range(rows.stop - rows.start):
            found = next(stream)
            if isinstance(found, Unreadable):
                reasons[rows.start + i] = found.reason
            else:
                parts[0][i, : len(found)], parts[1][i] = found, len(found)
        return parts

    try:
        fill([features, counts], DECODED, encode, group, on_progress)
    finally:
        stream.close()  # and with it the processes that decode
    return features, counts, of_all(reasons, group)


def _stream(
    model: DRL, videos: list[Path], sampling: Sampling, workers: int, cache: FeatureCache | None, autocast: Autocast
) -> Generator[Tensor | Unreadable, None, None]:
    """Each video's frame features (n, D), in order."""
    encoder = ""
    if cache is not None:
        with autocast():
            encoder = fingerprint(model)
    # Without a cache the processes that decode start once.
    window = len(videos) if cache is None else WINDOW
    for first in range(0, len(videos), max(window, 1)):
        yield from _features(model, videos[first : first + window], sampling, workers, cache, encoder, autocast)


def _features(
    model: DRL,
    videos: list[Path],
    sampling: Sampling,
    workers: int,
    cache: FeatureCache | None,
    encoder: str,
    autocast: Autocast,
) -> Generator[Tensor | Unreadable, None, None]:
    keys: list[str | None] = [None] * len(videos)
    known: list[Tensor | None] = [None] * len(videos)
    if cache is not None:
        keys = [_key(cache, video, sampling, encoder) for video in videos]
        known = [None if key is None else cache.get(key) for key in keys]
    unknown = [video for video, found in zip(videos, known, strict=True) if found is None]
    decoded = iter(video_loader(unknown, sampling, workers=workers) if unknown else ())
    for key, found in zip(keys, known, strict=True):
        if found is not None:
            yield found
            continue
        frames = next(decoded)
        if isinstance(frames, Unreadable):
            yield frames
            continue
        with autocast():
            features = model.frame_features(frames.to(device_of(model))).cpu()
        if cache is not None and key is not None:
            cache.put(key, features)
        yield features


def _key(cache: FeatureCache, video: Path, sampling: Sampling, encoder: str) -> str | None:
    try:
        return cache.key(video, sampling, encoder)
    except ValueError:  # a file that is gone, of which the decoder is to say so
        return None


def fingerprint(model: DRL) -> str:
    """A hash of what frame features depend on beside the frames: the image tower's weights and build, dtypes in use.

    To be asked under the autocast under which the tower runs. torch's version and the number of threads, which may
    change last bits, are left out.
    """
    device, visual = device_of(model).type, model.clip.visual
    heads = [(name, module.num_heads) for name, module in visual.named_modules() if hasattr(module, "num_heads")]
    active = torch.get_autocast_dtype(device) if autocast.is_on(device) else None
    build = (repr(visual), heads, visual.image_size, device, active, torch.get_float32_matmul_precision())
    parts = {**visual.state_dict(), "mean": model.mean, "std": model.std}
    return weights_hash(parts, repr(build))


def weights_hash(state: Mapping[str, Tensor], build: str = "") -> str:
    """A hash of tensors' names, types, shapes and bytes."""
    digest = hashlib.blake2b(build.encode(), digest_size=20)
    for name, x in state.items():
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def inner(model: DRL, x: Tensor) -> Tensor:
    """Tokens on the model's device and in its dtype."""
    return x.to(device_of(model), model.clip.text_projection.dtype)


def device_of(model: DRL) -> torch.device:
    """The device that the model's parameters are on."""
    return model.clip.text_projection.device
