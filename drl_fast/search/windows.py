"""Cut a video into windows, and encode them as rows of the index."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from .. import WTI
from ..data.loading import Unreadable
from ..data.video import Sampled, Sampling, sample_video
from ..engine.features import device_of, for_model
from ..model.drl import DRL
from ..modules.wti import softmax_weights
from ..numerics import unit

# Pixels of a thumbnail's sides, and the quality of its JPEG: about 2.5 KB.
THUMBNAIL, QUALITY = 96, 60
# Bytes of a file that are hashed at a time.
READ = 2**20
# Windows that the temporal module takes at a time.
CHUNK = 256
LARGEST_FP16 = 65504.0


class File(NamedTuple):
    """A video file to be indexed."""

    name: str
    """Its path relative to the root, with slashes."""
    root: str


@dataclass(frozen=True)
class State:
    """What tells whether a file changed."""

    size: int
    modified: int
    """Nanoseconds."""
    digest: str
    """Hash of the file's bytes."""


@dataclass(frozen=True)
class Encoded:
    """The windows of one video, on the CPU."""

    file: File
    state: State
    spans: list[tuple[float, float]]
    """Start and end of each window, seconds."""
    interval: float
    """Seconds from one frame to the next."""
    tokens: Tensor
    """(windows, Nv, D) float16, zeros after the real ones"""
    counts: Tensor
    """(windows,) int16: real tokens"""
    weights: Tensor | None
    """(windows, Nv) float32: WTI's token weights"""
    vectors: Tensor
    """(windows, D) float32: mean of the normalised tokens, normalised"""
    thumbnails: list[list[bytes]]
    """A JPEG for each real token."""


def stride(max_frames: int) -> int:
    """Return the frames from one window to the next: half a window."""
    return max(max_frames // 2, 1)


def starts(frames: int, max_frames: int) -> list[int]:
    """Return the first frame of each window. The last window ends with the video, so that it is as long as the others.

    A video that is shorter than a window is one window.
    """
    last = frames - max_frames
    if last <= 0:
        return [0]
    return [*range(0, last, stride(max_frames)), last]


def file_state(path: Path) -> State:
    """Hash a file's content."""
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        digest = hashlib.blake2b(digest_size=20)
        while part := file.read(READ):
            digest.update(part)
        return State(status.st_size, status.st_mtime_ns, digest.hexdigest())


class _Decoded(NamedTuple):
    state: State
    sampled: Sampled
    thumbnails: list[bytes]


def encode_files(
    model: DRL, files: Sequence[File], sampling: Sampling, max_frames: int, *, batch: int, workers: int
) -> Generator[tuple[File, Encoded | Unreadable], None, None]:
    """Decode and encode videos, in order; one that cannot be read gives an :class:`Unreadable`.

    Args:
        sampling: all frames at its rate are taken.
        max_frames: tokens of a window.
        batch: frames that the image tower takes at a time.
        workers: threads that decode, each with a whole video: 0.15 MB per frame of 224 x 224 pixels.
    """
    model.eval()
    waiting: list[tuple[File, Future[_Decoded | Unreadable]]] = []
    with ThreadPoolExecutor(max(workers, 1), thread_name_prefix="decode") as pool:
        try:
            for file in files:
                waiting.append((file, pool.submit(_decode, file, sampling)))
                if len(waiting) > workers:
                    yield _encode(model, *waiting.pop(0), max_frames, batch)
            while waiting:
                yield _encode(model, *waiting.pop(0), max_frames, batch)
        finally:
            for _, future in waiting:
                future.cancel()


def _decode(file: File, sampling: Sampling) -> _Decoded | Unreadable:
    path = Path(file.root, file.name)
    try:
        file.name.encode()  # Arrow holds UTF-8
        state = file_state(path)
        sampled = sample_video(path, sampling, threads=1)
    except UnicodeEncodeError:
        return Unreadable(file.name, f"{path} must have a name in UTF-8; rename it")
    except ValueError as error:
        return Unreadable(file.name, str(error))
    except OSError as error:
        return Unreadable(file.name, f"{path} must be a readable file, got: {error.strerror}; check its permissions")
    return _Decoded(state, sampled, [_jpeg(frame) for frame in sampled.frames])


def _jpeg(frame: Tensor) -> bytes:
    picture = Image.fromarray(frame.permute(1, 2, 0).numpy())
    # A smaller picture keeps its size.
    picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC)
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=QUALITY)
    return data.getvalue()


@torch.no_grad()
def _encode(
    model: DRL, file: File, future: Future[_Decoded | Unreadable], max_frames: int, batch: int
) -> tuple[File, Encoded | Unreadable]:
    decoded = future.result()
    if isinstance(decoded, Unreadable):
        return file, decoded
    sampled = decoded.sampled
    device = device_of(model)
    features = torch.cat([model.frame_features(part.to(device)).cpu() for part in sampled.frames.split(batch)])
    firsts = torch.tensor(starts(len(features), max_frames))
    parts = [_windows(model, features, part, max_frames) for part in firsts.split(CHUNK)]
    tokens, counts, vectors = (torch.cat(rows) for rows in zip(*(part[:3] for part in parts), strict=True))
    if not bool((tokens.abs() <= LARGEST_FP16).all()):
        return file, Unreadable(
            file.name, f"{file.name} gives tokens that float16 cannot hold (NaN, or above 65504); check the model"
        )
    weights = [part[3] for part in parts if part[3] is not None]
    ends = (firsts + counts).tolist()
    spans = [
        (first * sampled.interval, sampled.duration if end == len(features) else end * sampled.interval)
        for first, end in zip(firsts.tolist(), ends, strict=True)
    ]
    thumbnails = [decoded.thumbnails[first:end] for first, end in zip(firsts.tolist(), ends, strict=True)]
    return file, Encoded(
        file,
        decoded.state,
        spans,
        sampled.interval,
        tokens.half(),
        counts.to(torch.int16),
        torch.cat(weights) if weights else None,
        vectors,
        thumbnails,
    )


def _windows(
    model: DRL, features: Tensor, firsts: Tensor, max_frames: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return tokens (windows, Nv, D), how many are real, pooled vectors, and WTI's weights, all on the CPU."""
    positions = firsts[:, None] + torch.arange(max_frames)
    mask = positions < len(features)
    frames = for_model(model, features[positions.clamp(max=len(features) - 1)])
    tokens, real = model.video_tokens(frames, mask.to(frames.device))
    tokens = tokens.float()
    weights = None
    if isinstance(model.interaction, WTI) and model.interaction.video_weight_fc is not None:
        normalized = model.interaction.weight_input == "normalized"
        weights = softmax_weights(model.interaction.video_weight_fc, tokens, real, normalized=normalized).float().cpu()
    pooled = unit((unit(tokens) * real[..., None]).sum(dim=1))
    return tokens.cpu(), mask.sum(dim=1), pooled.cpu(), weights
