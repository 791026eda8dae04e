"""Decode frames of a video file: the picture shown at each second (or another rate), as uint8 tensors with a mask.

Three rules hold for every container:

- Frames are chosen by time. At a constant rate every ``round(fps / rate)``-th frame is a candidate, as in the public
  codes. At a variable rate the picture that a player shows at each ``1 / rate`` second is.
- A file with less than 90 % of the packets or seconds that its header states is refused: the download was cut short.
  MPEG streams, Ogg and GIF state no length, so a cut there goes unnoticed.
- No damaged picture is returned. After a damaged frame, all frames up to the next key frame count as damaged. A video
  is refused if a frame to be returned is among them. Damage elsewhere changes nothing and is ignored.
"""

from __future__ import annotations

import bisect
import contextlib
import glob
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import av
import torch
from av.sidedata.sidedata import SideData
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as image_ops  # type: ignore[import-untyped]

from .. import validation

AGAIN = "fetch it again or leave it out"
REMEDY = "re-encode it (ffmpeg -i IN -c:v libx264 -pix_fmt yuv420p OUT.mp4) or leave it out"
# A file with less than this fraction of its stated length is a download that was cut short.
WHOLE = 0.9
# Seconds that one picture of a slide show or a screen recording may be shown.
LONGEST_GAP = 3600.0
RESIZES = ("shortest", "squash")
INTERPOLATIONS = {
    "bicubic": image_ops.InterpolationMode.BICUBIC,
    "bilinear": image_ops.InterpolationMode.BILINEAR,
}
# Containers whose header states the length. Elsewhere FFmpeg estimates it, and the estimate can be far off.
STATES_LENGTH = {"mov", "mp4", "matroska", "webm", "avi", "flv", "asf"}


@dataclass(frozen=True)
class Sampling:
    """Which frames of a video are used, and their size.

    Args:
        rate: frames per second. At a constant rate every ``round(fps / rate)``-th frame is a candidate, starting with
            the first; at a variable rate the frame shown at each ``1 / rate`` second is.
        max_frames: more candidates are thinned to ``linspace(0, n - 1, max_frames)``, truncated to integers.
        size: height and width of the pictures, pixels.
        seconds: only frames up to this time are candidates; None: all.
        resize: ``"shortest"`` resizes the short side to ``size`` and crops the centre, as CLIP does; ``"squash"``
            resizes both sides, as SigLIP and PE-Core do.
        interpolation: ``"bicubic"`` or ``"bilinear"``.

    Raises:
        ValueError, TypeError: a value that is not positive, or not a number of its kind.
    """

    rate: float = 1.0
    max_frames: int = 12
    size: int = 224
    seconds: float | None = None
    resize: str = "shortest"
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        validation.use_plain_values(self)
        remedy = "DRL uses rate 1, max_frames 12, size 224"
        validation.positive_number("rate", self.rate, remedy)
        validation.positive_int("max_frames", self.max_frames, remedy)
        validation.positive_int("size", self.size, remedy)
        if self.seconds is not None:
            validation.positive_number("seconds", self.seconds, "None takes the whole video")
        validation.option("resize", self.resize, RESIZES)
        validation.option("interpolation", self.interpolation, tuple(INTERPOLATIONS))

    def chosen(self, times: Sequence[float], fps: float) -> list[int]:
        """Return the numbers of the frames to use, in order; a frame that is shown for long may appear more than once.

        Args:
            times: when each frame is shown, in seconds from the first one, ascending.
            fps: the rate that the file states; ignored if ``times`` contradict it.
        """
        candidates = self.candidates(times, fps)[0]
        return [candidates[i] for i in thin(len(candidates), self.max_frames)]

    def candidates(self, times: Sequence[float], fps: float) -> tuple[list[int], float]:
        """Return the numbers of the frames before thinning, and the seconds from one to the next."""
        count = len(times)
        if count < 2:
            return list(range(count)), 1 / self.rate
        gap = times[-1] / (count - 1)
        # Stamps that are all equal or jump by hours (a counter that wrapped around) say nothing: count frames.
        useless = gap == 0 or max(b - a for a, b in pairwise(times)) > LONGEST_GAP
        # Within half a frame of an even spacing, the frame's number says as much as its time.
        if useless or all(abs(time - number * gap) <= 0.5 * gap for number, time in enumerate(times)):
            fps = fps if useless or abs(fps * gap - 1) < 0.01 else 1 / gap
            within = count if self.seconds is None else min(count, int(self.seconds * fps) + 1)
            step = max(round(fps / self.rate), 1)
            return list(range(0, within, step)), step / fps
        end = times[-1] if self.seconds is None else min(times[-1], self.seconds)
        # A microsecond of tolerance: a frame stamped 2.9999999 is the one shown at 3 s.
        shown = [k / self.rate for k in range(int(end * self.rate + 1e-6) + 1)]
        return [bisect.bisect_right(times, time + 1e-6) - 1 for time in shown], 1 / self.rate


class Sampled(NamedTuple):
    """A video's frames at a fixed rate."""

    frames: Tensor
    """(n, 3, size, size) uint8 RGB"""
    interval: float
    """Seconds from one frame to the next; the first is shown at 0."""
    duration: float
    """Seconds; frames after ``sampling.seconds`` may not count."""


def read_video(path: str | Path, sampling: Sampling, threads: int = 0) -> tuple[Tensor, Tensor]:
    """Decode one video file.

    Args:
        threads: decoder threads; 0 lets the decoder choose. The frames are the same.

    Returns:
        frames (max_frames, 3, size, size) uint8 RGB, zeros after the last real one, and mask (max_frames,) bool.

    Raises:
        ValueError: a file that is missing, cut short or damaged, cannot be decoded or holds no frame; path and remedy
            are named.
    """
    found = sample_video(path, sampling, threads).frames
    frames = torch.zeros((sampling.max_frames, 3, sampling.size, sampling.size), dtype=torch.uint8)
    frames[: len(found)] = found
    return frames, torch.arange(sampling.max_frames) < len(found)


def sample_video(path: str | Path, sampling: Sampling, threads: int = 0) -> Sampled:
    """Decode one video file as :func:`read_video` does; return its real frames, and when they are shown.

    The interval is that of the frames before thinning. Errors are those of :func:`read_video`.
    """
    path = Path(path)
    _check_file(path)
    try:
        with _open(path) as (container, stream):
            times, origin, fps = _packet_times(path, container, stream)
        # Choose before decoding, so that only frames that are returned are converted and held.
        chosen = sampling.chosen(times, fps)
        decoded = _decode(path, chosen, sampling, origin, fps, threads)
        if decoded.lost or any(decoded.damaged):
            numbers = _undamaged(path, decoded, times, chosen)
        else:
            # A packet may hold no picture, or two. Then the decoded frames decide.
            numbers = chosen if decoded.agrees(times) else sampling.chosen(decoded.times, fps)
        if numbers != chosen:
            decoded = _decode(path, numbers, sampling, origin, fps, threads)
    except (av.FFmpegError, OSError) as error:
        reason = error.strerror or type(error).__name__
        raise ValueError(f"{path} must be a readable video, got: {reason}; {REMEDY}") from error
    if not decoded.pictures:
        raise ValueError(f"{path} must hold at least one video frame, got none; {REMEDY}")
    frames = torch.stack([decoded.pictures[number] for number in numbers])
    return Sampled(frames, sampling.candidates(decoded.times, fps)[1], decoded.times[-1] + 1 / fps)


def show(path: str | Path, start: float, end: float) -> Iterator[tuple[float, Image.Image]]:
    """Yield the pictures that a player shows from ``start`` to ``end``, each with its time; seconds from the first one.

    Raises:
        ValueError: a file that is missing, or cannot be decoded; path and remedy are named.
    """
    path = Path(path)
    _check_file(path)
    to_rgb = VideoReformatter()
    try:
        with _open(path) as (container, stream):
            stream.thread_type = "AUTO"
            origin = float((stream.start_time or 0) * (stream.time_base or 0))
            if start > 0:
                # To the key frame before it.
                container.seek(int((start + origin) * av.time_base))
            for frame in container.decode(stream):
                time = (frame.time or 0.0) - origin
                if time >= end:
                    break
                if time >= start - 1e-3:
                    picture = Image.fromarray(to_rgb.reformat(frame, format="rgb24", threads=1).to_ndarray())
                    yield max(time, start), _as_shown(picture, frame, stream)
    except (av.FFmpegError, OSError) as error:
        reason = error.strerror or type(error).__name__
        raise ValueError(f"{path} must be a readable video, got: {reason}; {REMEDY}") from error


def thin(count: int, limit: int) -> list[int]:
    """Return at most ``limit`` of ``count`` indices, evenly spread, with the first and the last."""
    if count <= limit:
        return list(range(count))
    return torch.linspace(0, count - 1, limit, dtype=torch.float64).to(torch.int64).tolist()


def _check_file(path: Path) -> None:
    if not path.is_file():
        if path.exists():
            raise ValueError(f"{path} must be a video file, got a folder, pipe or device; name a regular file")
        near = sorted(p.name for p in path.parent.glob(f"{glob.escape(path.name)}.*"))[:1]
        raise ValueError(f"{path} must be a video file, not found; {f'is it {near[0]}?' if near else 'check the path'}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} must hold a video, got an empty file; {AGAIN}")


@contextlib.contextmanager
def _open(path: Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    # In a relative path FFmpeg reads what precedes a colon as a protocol. Titles in old encodings are common, and are
    # not used.
    with av.open(str(path.absolute()), metadata_errors="replace") as container:
        # A cover picture is a video stream of one frame.
        streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if not streams:
            raise ValueError(f"{path} must hold a video stream, got {len(container.streams)} others; {REMEDY}")
        yield container, streams[0]


def _packet_times(
    path: Path, container: av.container.InputContainer, stream: av.VideoStream
) -> tuple[list[float], int | None, float]:
    """Read packets, which takes a fiftieth of the time of decoding.

    Returns:
        when each frame will be shown, in seconds from the first; the first one's time stamp, None without usable
        stamps; the stated frame rate.

    Raises:
        ValueError: no frame rate, or less than the header states.
    """
    ticks: list[int | None] = []
    packets, end = 0, 0.0
    for packet in container.demux():
        if packet.stream_index == stream.index and (packet.size or packet.pts is not None):
            packets += 1
            if packet.size and not packet.is_discard:
                ticks.append(packet.dts if packet.pts is None else packet.pts)
        if packet.pts is not None and packet.time_base:
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
    _check_whole(path, container, stream, packets, end)
    fps = stream.average_rate or stream.guessed_rate
    if not fps:
        raise ValueError(f"{path} must state a frame rate, got none; {REMEDY}")
    # Packets come in the order of decoding, frames in that of their times.
    known = sorted(tick for tick in ticks if tick is not None)
    times = _seconds(known, stream) if len(known) == len(ticks) else None
    if times is None:
        return [number / float(fps) for number in range(len(ticks))], None, float(fps)
    return times, known[0] if known else None, float(fps)


def _check_whole(
    path: Path, container: av.container.InputContainer, stream: av.VideoStream, packets: int, end: float
) -> None:
    """Compare what was read with what the header states."""
    if not packets or not STATES_LENGTH & set(container.format.name.split(",")):
        return
    stated = (container.duration or 0) / av.time_base
    if packets < WHOLE * stream.frames:
        raise ValueError(f"{path} must be a whole video, got {packets} of {stream.frames} frames; {AGAIN}")
    # FFmpeg reports no length for an ASF file whose size differs from the stated one.
    if not stated and "asf" in container.format.name:
        raise ValueError(f"{path} must be a whole video, got another size than its header states; {REMEDY}")
    if not stream.frames and end < WHOLE * stated:
        raise ValueError(f"{path} must be a whole video, got {end:.1f} of {stated:.1f} seconds; {AGAIN}")


def _seconds(ticks: Sequence[int | None], stream: av.VideoStream, origin: int | None = None) -> list[float] | None:
    """Convert time stamps to seconds from ``origin``, or else from the first; None if they are not usable."""
    known = [tick for tick in ticks if tick is not None]
    # A raw stream has no stamps. Those of H.264 in AVI do not ascend, although the frames are in order.
    if len(known) < len(ticks) or known != sorted(known) or stream.time_base is None:
        return None
    return [float((tick - (known[0] if origin is None else origin)) * stream.time_base) for tick in known]


@dataclass
class _Decoded:
    """The result of decoding a file once."""

    pictures: dict[int, Tensor] = field(default_factory=dict)
    """The wanted frames by number."""
    times: list[float] = field(default_factory=list)
    """When each frame is shown, in seconds from the first."""
    damaged: list[bool] = field(default_factory=list)
    """Whether the decoder could not restore a frame, or one that it may be predicted from."""
    lost: bool = False
    """Whether a packet could not be decoded, so that frames may be missing."""
    complete: bool = True
    """Whether the file was decoded to its end."""

    def agrees(self, times: Sequence[float]) -> bool:
        """Tell whether frames came at the times that their packets announced."""
        if len(self.times) > len(times) or (self.complete and len(self.times) < len(times)):
            return False
        return all(abs(a - b) < 1e-3 for a, b in zip(self.times, times, strict=False))


def _decode(
    path: Path, numbers: Sequence[int], sampling: Sampling, origin: int | None, fps: float, threads: int
) -> _Decoded:
    """Decode a file, up to ``sampling.seconds`` if set; resize and crop the frames of these numbers."""
    found, ticks = _Decoded(), list[int | None]()
    wanted, last = set(numbers), max(numbers, default=-1)
    # One converter without threads: starting threads costs more than converting a small frame.
    to_rgb = VideoReformatter()
    with _open(path) as (container, stream):
        stream.thread_type, stream.thread_count = "AUTO", threads
        for frame, damaged in _frames(container, stream):
            if frame is None:
                found.lost = True
                continue
            number = len(ticks)
            ticks.append(frame.pts)
            found.damaged.append(damaged)
            if number in wanted:
                picture = Image.fromarray(to_rgb.reformat(frame, format="rgb24", threads=1).to_ndarray())
                found.pictures[number] = fit(_as_shown(picture, frame, stream), sampling)
            if number == last and sampling.seconds is not None:
                found.complete = False
                break
        # Where the first frame may be lost, only the packets tell when the video began.
        times = _seconds(ticks, stream, origin if found.lost else None)
    if times is None and found.lost:
        found.damaged = [True] * len(ticks)  # without stamps nothing says which frames are missing
    found.times = [number / fps for number in range(len(ticks))] if times is None else times
    return found


def _frames(
    container: av.container.InputContainer, stream: av.VideoStream
) -> Iterator[tuple[av.VideoFrame | None, bool]]:
    """Yield frames in the order shown, each with whether it, or a frame since the last key frame, is damaged.

    None stands for a packet that could not be decoded.
    """
    damaged = False
    for packet in container.demux(stream):
        damaged |= packet.is_corrupt
        try:
            frames = packet.decode()
        except av.error.InvalidDataError:
            damaged, frames = True, []
            yield None, True
        for frame in frames:
            damaged = frame.is_corrupt or (damaged and not frame.key_frame)
            yield frame, damaged


def _undamaged(path: Path, decoded: _Decoded, times: Sequence[float], chosen: Sequence[int]) -> list[int]:
    """Return the numbers, among the decoded frames, of the chosen packets' frames; ValueError if one is damaged."""
    sound = [number for number, damaged in enumerate(decoded.damaged) if not damaged]
    at = {round(decoded.times[number], 3): number for number in sound}
    present = [at[time] for number in chosen if (time := round(times[number], 3)) in at]
    if len(present) < len(chosen):
        raise ValueError(
            f"{path} must be undamaged where frames are taken, got {len(times) - len(sound)} damaged or missing of "
            f"{len(times)} frames, {len(chosen) - len(present)} of the {len(chosen)} to be taken among them; {AGAIN}"
        )
    return present


def _as_shown(picture: Image.Image, frame: av.VideoFrame, stream: av.VideoStream) -> Image.Image:
    """Stretch, turn and mirror a stored picture as a player does."""
    aspect = stream.sample_aspect_ratio
    if aspect and aspect != 1:
        picture = picture.resize((max(round(picture.width * aspect), 1), picture.height), Image.Resampling.BICUBIC)
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if not isinstance(matrix, SideData):
        return picture
    # ISO 14496-12: a stored pixel (p, q) is shown at (a p + c q, b p + d q); numbers are 16.16 fixed point.
    a, b, _, c, d = struct.unpack("=5i", bytes(matrix)[:20])
    if max(abs(a), abs(d)) < max(abs(b), abs(c)):
        picture, a, d = picture.transpose(Image.Transpose.TRANSPOSE), c, b
    if a < 0:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if d < 0:
        picture = picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    return picture


def fit(image: Image.Image, sampling: Sampling) -> Tensor:
    """Resize and crop to (3, size, size) uint8: open_clip's preprocessing without the scaling of values."""
    size, squash = sampling.size, sampling.resize == "squash"
    if min(image.size) != size or (squash and max(image.size) != size):
        sides = [size, size] if squash else [size]
        image = image_ops.resize(image, sides, interpolation=INTERPOLATIONS[sampling.interpolation])
    return image_ops.pil_to_tensor(image_ops.center_crop(image, [size, size]))
