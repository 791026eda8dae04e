"""Videos of phones, screen recorders and broken downloads: variable rates, truncation, damage, rotation."""

from __future__ import annotations

import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from drl_fast.data.video import Sampling, read_video
from tests.clips import BLUE, GREEN, RED, solid, write_video

WHITE = (245, 245, 245)
ONE, UNIT, SIDE = 1 << 16, 1 << 30, 64


def write_at(path: Path, times: list[float], *, codec: str = "libx264") -> Path:
    """Write grey pictures at these times in seconds; the grey level is ten times the time."""
    with av.open(str(path), "w") as container:
        fast = {"deadline": "realtime", "cpu-used": "8"} if codec == "libvpx" else {"preset": "ultrafast"}
        stream = container.add_stream(codec, rate=30, options=fast)
        stream.width = stream.height = SIDE
        stream.pix_fmt, stream.thread_count = "yuv420p", 1
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for time in times:
            frame = av.VideoFrame.from_ndarray(solid((round(10 * time),) * 3), format="rgb24")
            frame.pts, frame.time_base = round(1000 * time), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def seconds_of(path: Path, sampling: Sampling) -> list[float]:
    """Return the times of the pictures that are read from :func:`write_at`'s file."""
    frames, mask = read_video(path, sampling)
    return (frames[mask].double().mean(dim=(1, 2, 3)) / 10).tolist()


SLOW_THEN_FAST = [i / 2 for i in range(20)] + [10 + i / 50 for i in range(500)]


def jitter() -> list[float]:
    """Return 20 seconds of times of a recorder that drops and duplicates frames."""
    gaps = np.random.default_rng(1).choice([0.001, 0.02, 0.03, 0.045], 2000)
    return [0.0, *(float(time) for time in gaps.cumsum() if time < 20)]


@pytest.mark.parametrize(
    ("name", "codec", "times"),
    [
        ("phone.mp4", "libx264", SLOW_THEN_FAST),
        ("phone.mkv", "libx264", SLOW_THEN_FAST),
        ("recorder.webm", "libvpx", jitter()),
    ],
)
def test_a_variable_rate_is_read_by_time(tmp_path: Path, name: str, codec: str, times: list[float]) -> None:
    path = write_at(tmp_path / name, times, codec=codec)
    found = seconds_of(path, Sampling(size=SIDE, max_frames=64))
    shown = [max(time for time in times if time <= second) for second in range(20)]
    assert found == pytest.approx(shown, abs=0.25)
    assert seconds_of(path, Sampling(size=SIDE, max_frames=64, seconds=12)) == pytest.approx(shown[:13], abs=0.25)


def test_a_picture_shown_for_long_is_taken_again(tmp_path: Path) -> None:
    """A slide show is sampled by what is on the screen at each second."""
    path = write_at(tmp_path / "slides.mkv", [0, 5, 6, 6.5, 10])
    assert seconds_of(path, Sampling(size=SIDE, max_frames=64)) == pytest.approx(
        [0, 0, 0, 0, 0, 5, 6, 6.5, 6.5, 6.5, 10], abs=0.25
    )


@pytest.mark.parametrize("fps", [2.5, 7, 24000 / 1001, 25, 30000 / 1001, 30, 59.94, 120])
@pytest.mark.parametrize("rate", [0.5, 1, 3, 200])
@pytest.mark.parametrize("tick", [1e-9, 1e-3])
def test_a_constant_rate_is_read_by_number(fps: float, rate: float, tick: float) -> None:
    """Every round(fps / rate)-th frame is taken, as public code does with decord. Matroska rounds times to 1 ms."""
    for count in (1, 2, 30, 311):
        times = [round(number / fps / tick) * tick for number in range(count)]
        stride = max(round(fps / rate), 1)
        assert Sampling(rate, max_frames=1000).chosen(times, fps) == list(range(0, count, stride))
        limited = Sampling(rate, max_frames=1000, seconds=1.5).chosen(times, fps)
        assert limited == list(range(0, min(count, int(1.5 * fps) + 1), stride))


def test_a_wrong_frame_rate_in_the_file() -> None:
    """Recordings of browsers contain no rate, and FFmpeg guesses 1000."""
    times = [number / 25 for number in range(100)]
    assert Sampling().chosen(times, 1000.0) == [0, 25, 50, 75]


def test_frames_with_equal_timestamps_are_taken_by_number() -> None:
    assert Sampling().chosen([0.0] * 60, 25.0) == [0, 25, 50]


def test_timestamps_that_jump_by_hours_are_ignored() -> None:
    """A 33-bit counter jumps by 26 hours when it wraps around."""
    times = [*(number / 25 for number in range(50)), *(95_443 + number / 25 for number in range(50, 100))]
    assert Sampling().chosen(times, 25.0) == [0, 25, 50, 75]
    assert Sampling().chosen([0.0, 1e9], 25.0) == [0]


# A codec for each container.
CONTAINERS = {
    "a.mp4": "libx264",
    "a.mov": "libx264",
    "a.3gp": "mpeg4",
    "a.avi": "mpeg4",
    "a.flv": "libx264",
    "a.mkv": "libx264",
    "a.wmv": "wmv2",
}


def write_noise(path: Path, codec: str, *, count: int = 40, key_frames: int = 10) -> Path:
    """Write ``count`` noise pictures at 5 per second, with the index in front, so that a truncated file still opens."""
    options = {"movflags": "faststart"} if path.suffix in {".mp4", ".mov", ".3gp"} else {}
    generator = np.random.default_rng(0)
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=5, options={"g": str(key_frames), "sc_threshold": "1000000000"})
        stream.width = stream.height = SIDE
        stream.pix_fmt, stream.thread_count, stream.codec_context.max_b_frames = "yuv420p", 1, 0
        for _ in range(count):
            picture = generator.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("name", CONTAINERS)
def test_an_incomplete_download_is_an_error(tmp_path: Path, name: str) -> None:
    path = write_noise(tmp_path / name, CONTAINERS[name])
    whole = path.read_bytes()
    assert read_video(path, Sampling(size=32))[1].sum() == 8
    for twentieth in range(3, 18):
        path.write_bytes(whole[: len(whole) * twentieth // 20])
        with pytest.raises(ValueError, match=r"must be (a whole video, got|a readable video, got)") as caught:
            read_video(path, Sampling(size=32))
        assert "fetch it again or leave it out" in str(caught.value) or "re-encode it" in str(caught.value)


def test_the_error_has_the_read_and_the_stated_frames(tmp_path: Path) -> None:
    path = write_noise(tmp_path / "a.mp4", "libx264")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"a\.mp4 must be a whole video, got \d+ of 40 frames; fetch it again"):
        read_video(path, Sampling())


@pytest.mark.parametrize("name", ["a.avi", "a.mp4", "a.mkv"])
def test_damage_is_named_or_harmless(tmp_path: Path, name: str) -> None:
    """1 KB of zeros in the third of four groups of pictures: an error only if its frames are used."""
    path = write_noise(tmp_path / name, CONTAINERS[name])
    whole, early = path.read_bytes(), Sampling(size=32, seconds=2)
    expected = read_video(path, early)
    at = len(whole) * 6 // 10
    path.write_bytes(whole[:at] + bytes(1024) + whole[at + 1024 :])
    with pytest.raises(
        ValueError, match=r"must be undamaged where frames are taken, got \d+ damaged or missing of \d+"
    ):
        read_video(path, Sampling(size=32, rate=5, max_frames=40))
    # Frames of the first two groups are unchanged.
    assert all(torch.equal(a, b) for a, b in zip(read_video(path, early), expected, strict=True))


@pytest.mark.parametrize("group", [0, 1, 3])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_a_lost_group_of_pictures_is_named(tmp_path: Path, name: str, group: int) -> None:
    """A group of zeros, as in an incomplete download: the decoder returns no frame of it and no error."""
    path = write_noise(tmp_path / name, "libx264")
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    for at, size in packets[10 * group : 10 * group + 10]:
        data[at + 16 : at + size] = bytes(size - 16)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"must be (undamaged where frames are taken, got|a readable video)"):
        read_video(path, Sampling(size=32))
    if group:
        assert read_video(path, Sampling(size=32, seconds=1))[1].sum() == 2


def corners() -> np.ndarray:
    """Make a picture of four colours, whose rotations and reflections all differ."""
    picture = solid(RED, SIDE, SIDE)
    picture[: SIDE // 2, SIDE // 2 :] = GREEN
    picture[SIDE // 2 :, : SIDE // 2] = BLUE
    picture[SIDE // 2 :, SIDE // 2 :] = WHITE
    return picture


MATRICES: dict[str, tuple[tuple[int, ...], Callable[[np.ndarray], np.ndarray]]] = {
    "as stored": ((ONE, 0, 0, 0, ONE, 0, 0, 0, UNIT), lambda p: p),
    "left to right": ((-ONE, 0, 0, 0, ONE, 0, SIDE << 16, 0, UNIT), lambda p: p[:, ::-1]),
    "top to bottom": ((ONE, 0, 0, 0, -ONE, 0, 0, SIDE << 16, UNIT), lambda p: p[::-1]),
    "transposed": ((0, ONE, 0, ONE, 0, 0, 0, 0, UNIT), lambda p: p.transpose(1, 0, 2)),
    "clockwise": ((0, ONE, 0, -ONE, 0, 0, SIDE << 16, 0, UNIT), lambda p: np.rot90(p, -1)),
    "counterclockwise": ((0, -ONE, 0, ONE, 0, 0, 0, SIDE << 16, UNIT), lambda p: np.rot90(p)),
    "upside down": ((-ONE, 0, 0, 0, -ONE, 0, SIDE << 16, SIDE << 16, UNIT), lambda p: np.rot90(p, 2)),
    "other diagonal": (
        (0, -ONE, 0, -ONE, 0, 0, SIDE << 16, SIDE << 16, UNIT),
        lambda p: np.rot90(p, 2).transpose(1, 0, 2),
    ),
}


@pytest.mark.parametrize("name", MATRICES)
def test_pictures_are_rotated_and_mirrored_as_in_a_player(tmp_path: Path, name: str) -> None:
    matrix, shown = MATRICES[name]
    path = write_video(tmp_path / "a.mp4", [corners()] * 3)
    data = path.read_bytes()
    at = data.index(b"tkhd") + 4 + 4 + 20 + 8 + 8
    path.write_bytes(data[:at] + struct.pack(">9i", *matrix) + data[at + 36 :])
    frame = read_video(path, Sampling(size=SIDE, max_frames=1))[0][0].permute(1, 2, 0).numpy().astype(int)
    assert np.abs(frame - shown(corners()).astype(int)).mean() < 6


@pytest.mark.parametrize(("aspect", "wide"), [(Fraction(2), True), (Fraction(1, 2), False), (Fraction(16, 11), True)])
def test_pixels_that_are_not_square(tmp_path: Path, aspect: Fraction, wide: bool) -> None:
    """A circle is stored as an ellipse and is round after reading."""
    path, y, x = tmp_path / "a.mkv", *np.mgrid[:96, :96] - 47.5
    circle = solid(WHITE, 96, 96)
    circle[(x * float(aspect)) ** 2 + y**2 < 30**2 * (1 if wide else float(aspect) ** 2)] = (0, 0, 0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"preset": "ultrafast", "crf": "5"})
        stream.width, stream.height, stream.pix_fmt, stream.thread_count = 96, 96, "yuv420p", 1
        stream.codec_context.sample_aspect_ratio = aspect
        for _ in range(2):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(circle, format="rgb24")))
        container.mux(stream.encode())
    dark = read_video(path, Sampling(size=96, max_frames=1))[0][0].double().mean(dim=0) < 128
    height, width = dark.any(dim=1).sum(), dark.any(dim=0).sum()
    assert abs(int(height) - int(width)) <= 2
    assert abs(int(height) - 60) <= 4


@pytest.mark.parametrize(("height", "width"), [(97, 63), (63, 97), (65, 65)])
def test_odd_sizes(tmp_path: Path, height: int, width: int) -> None:
    """The codec rounds an odd chroma size up, which must not leave a green edge or a shift."""
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for _ in range(2):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(solid(BLUE, height, width), format="rgb24")))
        container.mux(stream.encode())
    frame = read_video(tmp_path / "a.mkv", Sampling(size=63, max_frames=1))[0][0].double()
    assert (frame - torch.tensor(BLUE)[:, None, None]).abs().max() < 8
