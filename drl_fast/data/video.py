"""Frames of a video file: one a second (or another rate), at most so many, as uint8 tensors with a mask."""

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
# Of the length that a file states; less of it is a download that was cut off.
WHOLE = 0.9


@dataclass(frozen=True)
class Sampling:
    """Which frames are taken, and how large they come out.

    Args:
        rate: frames a second; every ``round(fps / rate)``-th frame from the first on is a candidate.
        max_frames: more candidates than this are thinned by ``linspace(0, n - 1, max_frames)`` cut to integers.
        size: pixels; the short side is resized to it (bicubic), then the centre ``size x size`` is cut out.
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
        """Which of a video's ``count`` frames are taken."""
        stride = max(round(fps / self.rate), 1)
        return [stride * i for i in thin(-(-self.within(count, fps) // stride), self.max_frames)]

    def within(self, count: int, fps: float) -> int:
        """How many of ``count`` frames lie within ``seconds``."""
        return count if self.seconds is None else min(count, int(self.seconds * fps) + 1)


def read_video(path: str | Path, sampling: Sampling, threads: int = 0) -> tuple[Tensor, Tensor]:
    """Decode one video file.

    Args:
        threads: of the decoder; 0 leaves their number to it. The frames are the same.

    Returns:
        frames (max_frames, 3, size, size) uint8 RGB, zeros behind the last real one, and mask (max_frames,) bool.

    Raises:
        ValueError: a file that is missing, cut short, cannot be decoded or holds no frame; the path and a remedy are
            named.
    """
    path = Path(path)
    _check_file(path)
    try:
        with _open(path) as (container, stream):
            fps = _frame_rate(path, stream)
            count = _count(path, container, stream)
        # Known beforehand, so that no frame is converted in vain and no more are held than are returned.
        chosen = sampling.chosen(count, fps)
        pictures, decoded = _decode(path, chosen, sampling, threads)
        if sampling.chosen(decoded, fps) != chosen:
            # A stream may hold packets that show nothing, or two pictures in one.
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
    """Indices of at most ``limit`` of ``count`` frames, evenly spread with both ends kept."""
    if count <= limit:
        return list(range(count))
    return torch.linspace(0, count - 1, limit, dtype=torch.float64).to(torch.int64).tolist()


def _check_file(path: Path) -> None:
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob(f"{glob.escape(path.name)}.*"))[:1]
        raise ValueError(
            f"{path} must be a video file, found none there; " + (f"is it {near[0]}?" if near else "check the path")
        )
    if path.stat().st_size == 0:
        raise ValueError(f"{path} must hold a video, got an empty file; fetch it again or leave it out")


@contextlib.contextmanager
def _open(path: Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    # Titles in old encodings are common, and nobody here reads them.
    with av.open(str(path), metadata_errors="replace") as container:
        # A song's cover picture is a video stream of one frame.
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
    """Frames to be expected, by packets: read, not decoded, which takes a fiftieth of the time."""
    count, end = 0, 0.0
    for packet in container.demux():
        if packet.stream_index == stream.index:
            # The decoder drops such a packet without a word: half a download would pass for a short video.
            if packet.is_corrupt:
                raise ValueError(f"{path} must be a whole video, got one that is cut short or damaged; {REMEDY}")
            count += bool(packet.size) and not packet.is_discard
        if packet.pts is not None and packet.time_base:
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
    # Matroska's reader takes the end of a cut file for that of the video, whose length stands at the beginning.
    stated = (container.duration or 0) / av.time_base if "matroska" in container.format.name else 0.0
    if count and end < WHOLE * stated:
        raise ValueError(
            f"{path} must be a whole video, got {end:.1f} of {stated:.1f} seconds; fetch it again or leave it out"
        )
    return count


def _decode(path: Path, chosen: Sequence[int], sampling: Sampling, threads: int) -> tuple[list[Tensor], int]:
    """The frames of these numbers, cut to size, and how many there are in all (within ``sampling.seconds``)."""
    wanted, pictures, count = set(chosen), [], 0
    # One for all frames, and without threads: starting them costs more than converting a small frame.
    to_rgb = VideoReformatter()
    with _open(path) as (container, stream):
        stream.thread_type, stream.thread_count = "AUTO", threads
        # Counted to the end, unless a limit of time makes that of no account.
        limit = sampling.within(sys.maxsize, _frame_rate(path, stream))
        for number, frame in enumerate(itertools.islice(_frames(container, stream), limit)):
            count = number + 1
            if number in wanted:
                picture = Image.fromarray(to_rgb.reformat(frame, format="rgb24", threads=1).to_ndarray())
                # Phones store pictures lying down, and how to turn them in the stream's metadata.
                upright = picture.rotate(frame.rotation, expand=True) if frame.rotation else picture
                pictures.append(fit(upright, sampling.size))
    return pictures, count


def _frames(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    for packet in container.demux(stream):
        yield from packet.decode()


def fit(image: Image.Image, size: int) -> Tensor:
    """(3, size, size) uint8: CLIP's own preprocessing up to the scaling of values."""
    if min(image.size) != size:
        image = image_ops.resize(image, [size], interpolation=image_ops.InterpolationMode.BICUBIC)
    return image_ops.pil_to_tensor(image_ops.center_crop(image, [size, size]))
