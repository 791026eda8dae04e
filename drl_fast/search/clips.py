"""Export the spans of hits as video files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
from av.audio.resampler import AudioResampler

from .. import validation
from ..atomic_write import write_atomically
from ..data.video import show
from .retriever import Hit

# Of time stamps in the exported file: milliseconds.
TIME_BASE = Fraction(1, 1000)
# libx264 needs a build of FFmpeg with it; every build has MPEG-4.
CODECS = ("libx264", "mpeg4")
# Characters of a video's name that a clip's name keeps.
KEPT = 60


def check_padding(padding: float) -> None:
    """Raise ValueError unless ``padding`` is a number of seconds of 0 or more."""
    validation.non_negative_number("padding", padding, "seconds before and after a span")


def export(hits: Sequence[Hit], folder: Path, padding: float = 0.0) -> Iterator[Path]:
    """Write each hit's span to ``folder`` as MP4 with sound, encoded again, so that it begins at the exact frame.

    Args:
        padding: seconds to add before and after.

    Yields:
        the path of each clip once it is there.

    Raises:
        ValueError: a video that is not where the index says, or cannot be decoded.
        OSError: a folder that cannot be written.
    """
    check_padding(padding)
    folder.mkdir(parents=True, exist_ok=True)
    for rank, hit in enumerate(hits, start=1):
        if not hit.path.is_file():
            raise ValueError(f"video not found: {hit.path}; if the videos were moved, --root says where they are now")
        start, end = max(hit.start - padding, 0.0), hit.end + padding
        stem = re.sub(r"[^\w.-]+", "_", os.path.splitext(hit.video)[0])[-KEPT:]
        path = folder / f"{rank:03}_{stem}_{start:.1f}-{end:.1f}s.mp4"
        write_atomically(path, lambda name, hit=hit, start=start, end=end: _write(hit.path, name, start, end))  # type: ignore[misc]
        yield path


def _write(source: Path, name: str, start: float, end: float) -> None:
    codec = next(codec for codec in CODECS if codec in av.codecs_available)
    # The name is absolute: in a relative one FFmpeg reads what precedes a colon as a protocol.
    with av.open(os.path.abspath(name), "w", format="mp4") as out:
        video = out.add_stream(codec, rate=30)
        assert isinstance(video, av.VideoStream)
        video.pix_fmt, video.codec_context.time_base = "yuv420p", TIME_BASE
        sound = list(_sound(source, start, end))
        audio = out.add_stream("aac", rate=sound[0].sample_rate, layout=sound[0].layout.name) if sound else None
        last = -1
        for time, picture in show(source, start, end):
            if last < 0:
                # The codec needs even sides.
                video.width, video.height = picture.width // 2 * 2, picture.height // 2 * 2
            frame = av.VideoFrame.from_image(picture.crop((0, 0, video.width, video.height)))
            frame.pts, frame.time_base = max(round((time - start) / TIME_BASE), last + 1), TIME_BASE
            last = frame.pts
            out.mux(video.encode(frame))
        if last < 0:
            raise ValueError(f"{source} must show pictures from {start:.1f} to {end:.1f} s, got none; index it again")
        out.mux(video.encode())
        if audio is not None:
            for frame in sound:
                out.mux(audio.encode(frame))
            out.mux(audio.encode())


def _sound(source: Path, start: float, end: float) -> Iterator[av.AudioFrame]:
    """Yield a span's sound; nothing if the file has none that can be decoded."""
    with av.open(str(source.absolute()), metadata_errors="replace") as container:
        if not container.streams.audio or not container.streams.video:
            return
        stream, video = container.streams.audio[0], container.streams.video[0]
        origin = float((video.start_time or 0) * (video.time_base or 0))
        resampler, samples = AudioResampler("fltp", stream.layout, stream.rate), 0
        try:
            if start > 0:
                container.seek(int((start + origin) * av.time_base))
            for packed in container.decode(stream):
                time = (packed.time or 0.0) - origin
                if time >= end:
                    break
                if time < start:
                    continue
                for frame in resampler.resample(packed):
                    frame.pts, frame.time_base = samples, Fraction(1, frame.sample_rate)
                    samples += frame.samples
                    yield frame
        except av.error.InvalidDataError:
            return
