"""Frames of a video file: one per second (or another rate), up to a maximum, as uint8 tensors with a mask."""

from __future__ import annotations

import contextlib
import glob
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import torch
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as image_ops  # type: ignore[import-untyped]

REMEDY = "re-encode it (ffmpeg -i IN -c:v libx264 -pix_fmt yuv420p OUT.mp4) or leave it out"
# A file with less than this fraction of its stated length is a download that was cut short.
WHOLE = 0.9


@dataclass(frozen=True)
class Sampling:
    """Which frames of a video are used, and their size.

    Args:
        rate: frames per second; every ``round(fps / rate)``-th frame is a candidate, starting with the first.
        max_frames: more candidates are thinned to ``linspace(0, n - 1, max_frames)``, truncated to integers.
        size: pixels; the short side is resized to it (bicubic), then the centre ``size x size`` is cropped.
        seconds: only frames up to this time are candidates; None: all.

    Raises:
        ValueError: a value that is not positive.
    """

    rate: float = 1.0
    max_frames: int = 12
    size: int = 224
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("rate", self.rate), ("max_frames", self.max_frames), ("size", self.size)):
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}; DRL uses rate 1, max_frames 12, size 224")
        if self.seconds is not None and not self.seconds > 0:
            raise ValueError(f"seconds must be positive or None, got {self.seconds}; None takes the whole video")

    def chosen(self, count: int, fps: float) -> list[int]:
        """Return which of a video's ``count`` frames are used."""
        stride = max(round(fps / self.rate), 1)
        return [stride * i for i in thin(-(-self.within(count, fps) // stride), self.max_frames)]

    def within(self, count: int, fps: float) -> int:
        """Return how many of ``count`` frames lie within ``seconds``."""
        return count if self.seconds is None else min(count, int(self.seconds * fps) + 1)


def read_video(path: str | Path, sampling: Sampling, threads: int = 0) -> tuple[Tensor, Tensor]:
    """Decode one video file.

    Args:
        threads: decoder threads; 0 lets the decoder choose. The frames are the same.

    Returns:
        frames (max_frames, 3, size, size) uint8 RGB, zeros after the last real one, and mask (max_frames,) bool.

    Raises:
        ValueError: a file that is missing, cut short, cannot be decoded or holds no frame; path and remedy are named.
    """
    path = Path(path)
    _check_file(path)
    try:
        with _open(path) as (container, stream):
            fps = _frame_rate(path, stream)
            count = _count(path, container, stream)
        # Chosen before decoding, so that only frames that are returned are converted and held.
        chosen = sampling.chosen(count, fps)
        pictures, decoded = _decode(path, chosen, sampling, threads)
        if sampling.chosen(decoded, fps) != chosen:
            # A packet may hold no picture, or two.
            chosen = sampling.chosen(decoded, fps)
            pictures, _ = _decode(path, chosen, sampling, threads)
    except (av.FFmpegError, OSError) as error:
        reason = error.strerror or type(error).__name__
        raise ValueError(f"{path} must be a readable video, got: {reason}; {REMEDY}") from error
    if not pictures:
        raise ValueError(f"{path} must hold at least one video frame, got none; {REMEDY}")
    frames = torch.zeros((sampling.max_frames, 3, sampling.size, sampling.size), dtype=torch.uint8)
    frames[: len(pictures)] = torch.stack(pictures)
    return frames, torch.arange(sampling.max_frames) < len(pictures)


def thin(count: int, limit: int) -> list[int]:
    """Return at most ``limit`` of ``count`` indices, evenly spread, with the first and the last."""
    if count <= limit:
        return list(range(count))
    return torch.linspace(0, count - 1, limit, dtype=torch.float64).to(torch.int64).tolist()


def _check_file(path: Path) -> None:
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob(f"{glob.escape(path.name)}.*"))[:1]
        raise ValueError(
            f"{path} must be a video file, not found" + (f"; is it {near[0]}?" if near else "; check the path")
        )
    if path.stat().st_size == 0:
        raise ValueError(f"{path} must hold a video, got an empty file; fetch it again or leave it out")


@contextlib.contextmanager
def _open(path: Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    # Titles in old encodings are common, and are not used.
    with av.open(str(path), metadata_errors="replace") as container:
        # A cover picture is a video stream of one frame.
        streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if not streams:
            raise ValueError(f"{path} must hold a video stream, got {len(container.streams)} others; {REMEDY}")
        yield container, streams[0]


def _frame_rate(path: Path, stream: av.VideoStream) -> float:
    fps = stream.average_rate or stream.guessed_rate
    if not fps:
        raise ValueError(f"{path} must state a frame rate, got none; {REMEDY}")
    return float(fps)


def _count(path: Path, container: av.container.InputContainer, stream: av.VideoStream) -> int:
    """Count frames by packets, without decoding: 50 times as fast."""
    count, end = 0, 0.0
    for packet in container.demux():
        if packet.stream_index == stream.index:
            # The decoder silently drops a corrupt packet: half a download would look like a short video.
            if packet.is_corrupt:
                raise ValueError(f"{path} must be a whole video, got one that is cut short or damaged; {REMEDY}")
            count += bool(packet.size) and not packet.is_discard
        if packet.pts is not None and packet.time_base:
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
    # Matroska's reader takes the end of a cut file for the end of the video; the header states the length.
    stated = (container.duration or 0) / av.time_base if "matroska" in container.format.name else 0.0
    if count and end < WHOLE * stated:
        raise ValueError(
            f"{path} must be a whole video, got {end:.1f} of {stated:.1f} seconds; fetch it again or leave it out"
        )
    return count


def _decode(path: Path, chosen: Sequence[int], sampling: Sampling, threads: int) -> tuple[list[Tensor], int]:
    """Return the chosen frames, resized and cropped, and the number of all frames (within ``sampling.seconds``)."""
    wanted, pictures, count = set(chosen), [], 0
    # One converter without threads: starting threads costs more than converting a small frame.
    to_rgb = VideoReformatter()
    with _open(path) as (container, stream):
        stream.thread_type, stream.thread_count = "AUTO", threads
        # Decode to the end to count frames, unless ``seconds`` limits what counts.
        limit = sampling.within(sys.maxsize, _frame_rate(path, stream))
        for number, frame in enumerate(itertools.islice(_frames(container, stream), limit)):
            count = number + 1
            if number in wanted:
                picture = Image.fromarray(to_rgb.reformat(frame, format="rgb24", threads=1).to_ndarray())
                # Phones store pictures sideways, with the rotation in the stream's metadata.
                upright = picture.rotate(frame.rotation, expand=True) if frame.rotation else picture
                pictures.append(fit(upright, sampling.size))
    return pictures, count


def _frames(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    for packet in container.demux(stream):
        yield from packet.decode()


def fit(image: Image.Image, size: int) -> Tensor:
    """Resize and crop to (3, size, size) uint8: CLIP's preprocessing without the scaling of values."""
    if min(image.size) != size:
        image = image_ops.resize(image, [size], interpolation=image_ops.InterpolationMode.BICUBIC)
    return image_ops.pil_to_tensor(image_ops.center_crop(image, [size, size]))
