"""Frames of a video file: one a second (or another rate), at most so many, as uint8 tensors with a mask."""

from __future__ import annotations

import glob
from collections.abc import Iterator
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


@dataclass(frozen=True)
class Sampling:
    """Which frames are taken, and how large they come out.

    Args:
        rate: frames a second; every ``round(fps / rate)``-th frame from the first on is a candidate.
        max_frames: more candidates than this are thinned by ``linspace(0, n - 1, max_frames)`` cut to integers.
        size: pixels; the short side is resized to it (bicubic), then the centre ``size x size`` is cut out.

    Raises:
        ValueError: a value that is not positive.
    """

    rate: float = 1.0
    max_frames: int = 12
    size: int = 224

    def __post_init__(self) -> None:
        for name, value in (("rate", self.rate), ("max_frames", self.max_frames), ("size", self.size)):
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}; DRL uses rate 1, max_frames 12, size 224")


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
    candidates = list(_candidates(Path(path), sampling, threads))
    if not candidates:
        raise ValueError(f"{path} must hold at least one video frame, got none; {REMEDY}")
    chosen = thin(len(candidates), sampling.max_frames)
    frames = torch.zeros((sampling.max_frames, 3, sampling.size, sampling.size), dtype=torch.uint8)
    frames[: len(chosen)] = torch.stack([candidates[i] for i in chosen])
    return frames, torch.arange(sampling.max_frames) < len(chosen)


def thin(count: int, limit: int) -> list[int]:
    """Indices of at most ``limit`` of ``count`` frames, evenly spread with both ends kept."""
    if count <= limit:
        return list(range(count))
    return torch.linspace(0, count - 1, limit, dtype=torch.float64).to(torch.int64).tolist()


def _candidates(path: Path, sampling: Sampling, threads: int) -> Iterator[Tensor]:
    """Every stride-th frame, already cut to size: an hour of full frames would not fit in memory."""
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob(f"{glob.escape(path.name)}.*"))[:1]
        raise ValueError(
            f"{path} must be a video file, found none there; " + (f"is it {near[0]}?" if near else "check the path")
        )
    if path.stat().st_size == 0:
        raise ValueError(f"{path} must hold a video, got an empty file; fetch it again or leave it out")
    # One for all frames, and without threads: starting them costs more than converting a small frame.
    to_rgb = VideoReformatter()
    try:
        # Titles in old encodings are common, and nobody here reads them.
        with av.open(str(path), metadata_errors="replace") as container:
            # A song's cover picture is a video stream of one frame.
            streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            if not streams:
                raise ValueError(f"{path} must hold a video stream, got {len(container.streams)} others; {REMEDY}")
            stream = streams[0]
            stream.thread_type = "AUTO"
            stream.thread_count = threads
            fps = stream.average_rate or stream.guessed_rate
            if not fps:
                raise ValueError(f"{path} must state a frame rate, got none; {REMEDY}")
            stride = max(round(float(fps) / sampling.rate), 1)
            for index, frame in enumerate(_decode(path, container, stream)):
                if index % stride == 0:
                    picture = Image.fromarray(to_rgb.reformat(frame, format="rgb24", threads=1).to_ndarray())
                    # Phones store pictures lying down, and how to turn them in the stream's metadata.
                    yield fit(picture.rotate(frame.rotation, expand=True) if frame.rotation else picture, sampling.size)
    except (av.FFmpegError, OSError) as error:
        reason = error.strerror or type(error).__name__
        raise ValueError(f"{path} must be a readable video, got: {reason}; {REMEDY}") from error


def _decode(path: Path, container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    for packet in container.demux(stream):
        # The decoder drops such a packet without a word: half a download would pass for a short video.
        if packet.is_corrupt:
            raise ValueError(f"{path} must be a whole video, got one that is cut short or damaged; {REMEDY}")
        yield from packet.decode()


def fit(image: Image.Image, size: int) -> Tensor:
    """(3, size, size) uint8: CLIP's own preprocessing up to the scaling of values."""
    if min(image.size) != size:
        image = image_ops.resize(image, [size], interpolation=image_ops.InterpolationMode.BICUBIC)
    return image_ops.pil_to_tensor(image_ops.center_crop(image, [size, size]))
