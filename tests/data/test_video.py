"""Decoding: the frames that are taken, their contents, and errors about files that are not videos."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch import Tensor

from drl_fast.data import video
from drl_fast.data.video import INTERPOLATIONS, RESIZES, Sampling, fit, read_video, thin
from tests.clips import BLUE, GREEN, RED, cut, grey, greys, lay_down, noise, solid, write_audio, write_video

MSRVTT = Path(__file__).resolve().parents[3] / "shared" / "data" / "msrvtt" / "video7500.mp4"


def numbers(frames: Tensor) -> list[int]:
    """Return the number of each frame in :func:`greys`."""
    level = frames.double().mean(dim=(1, 2, 3))
    return ((level - grey(0)) / (grey(1) - grey(0))).round().int().tolist()


@pytest.mark.parametrize(
    ("count", "fps", "rate", "limit", "expected"),
    [
        (5, 8, 8, 12, [0, 1, 2, 3, 4]),
        (20, 8, 1, 12, [0, 8, 16]),
        (20, 8, 4, 12, [0, 2, 4, 6, 8, 10, 12, 14, 16, 18]),
        (9, 8, 3, 12, [0, 3, 6]),  # round(8 / 3) = 3
        (6, 2, 5, 12, [0, 1, 2, 3, 4, 5]),  # a rate above the file's
        (20, 8, 4, 4, [0, 6, 12, 18]),
        (20, 8, 8, 6, [0, 3, 7, 11, 15, 19]),
        (20, 8, 8, 1, [0]),
        (1, 8, 1, 3, [0]),
    ],
)
def test_frames_taken(tmp_path: Path, count: int, fps: int, rate: int, limit: int, expected: list[int]) -> None:
    path = write_video(tmp_path / "a.mp4", greys(count), fps)
    frames, mask = read_video(path, Sampling(rate=rate, max_frames=limit, size=64))
    assert frames.shape == (limit, 3, 64, 64)
    assert frames.dtype == torch.uint8
    assert mask.dtype == torch.bool
    assert mask.tolist() == [i < len(expected) for i in range(limit)]
    assert numbers(frames[mask]) == expected
    assert not frames[~mask].any()


@pytest.mark.parametrize("wrong", [-7, -1, 1, 13])
@pytest.mark.parametrize("limit", [4, 40])
def test_packets_that_are_not_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: int, limit: int) -> None:
    """If the number of packets differs from that of frames, the frames decide."""
    path = write_video(tmp_path / "a.mp4", greys(20))
    sampling = Sampling(rate=4, max_frames=limit, size=64)
    expected = read_video(path, sampling)
    announced = video._packet_times

    def packet_times(*where: Any) -> tuple[list[float], int | None, float]:
        times, origin, fps = announced(*where)
        return [number / fps for number in range(len(times) + wrong)], origin, fps

    monkeypatch.setattr("drl_fast.data.video._packet_times", packet_times)
    assert all(torch.equal(a, b) for a, b in zip(read_video(path, sampling), expected, strict=True))


@pytest.mark.parametrize(
    ("seconds", "limit", "expected"),
    [
        (None, 12, [0, 4, 8, 12, 16]),
        (9, 12, [0, 4, 8, 12, 16]),
        (1, 12, [0, 4, 8]),  # the frame at 1 s is one of them
        (1.49, 12, [0, 4, 8]),
        (1.5, 12, [0, 4, 8, 12]),
        (1.5, 2, [0, 12]),
        (0.1, 12, [0]),
    ],
)
def test_only_the_first_seconds(tmp_path: Path, seconds: float | None, limit: int, expected: list[int]) -> None:
    path = write_video(tmp_path / "a.mp4", greys(20), 8)
    frames, mask = read_video(path, Sampling(rate=2, max_frames=limit, size=64, seconds=seconds))
    assert numbers(frames[mask]) == expected


def test_threads_change_no_frame(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", noise(24))
    first, second = (read_video(path, Sampling(rate=8, size=64), threads=n)[0] for n in (1, 3))
    assert torch.equal(first, second)


def test_only_frames_that_are_taken_are_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All candidates of a long video would not fit in memory."""
    made = []
    monkeypatch.setattr("drl_fast.data.video.fit", lambda image, size: made.append(0) or fit(image, size))
    read_video(write_video(tmp_path / "a.mp4", greys(24)), Sampling(rate=8, max_frames=3, size=64))
    assert len(made) == 3


def test_thin_keeps_both_ends_and_order() -> None:
    for count in (1, 2, 7, 12, 13, 100, 3601):
        for limit in (1, 2, 5, 12):
            kept = thin(count, limit)
            assert len(kept) == min(count, limit)
            assert kept == sorted(set(kept))
            assert kept[0] == 0
            assert limit == 1 or kept[-1] == count - 1
    assert thin(10, 4) == [0, 3, 6, 9]


@pytest.mark.parametrize("colour", [RED, GREEN, BLUE, (245, 245, 245)])
def test_colours(tmp_path: Path, colour: tuple[int, int, int]) -> None:
    """Channels are in RGB order with full range; 4:2:0 and the codec cause small errors."""
    frames, mask = read_video(write_video(tmp_path / "a.mp4", [solid(colour)] * 3), Sampling(rate=8, size=32))
    mean = frames[mask].double().mean(dim=(0, 2, 3))
    assert (mean - torch.tensor(colour)).abs().max() < 6


@pytest.mark.parametrize("shape", [(48, 96), (96, 48)])
def test_centre_crop(tmp_path: Path, shape: tuple[int, int]) -> None:
    """The central square is kept: blue, without the red ends."""
    picture = solid(RED, *shape)
    picture[tuple(slice(side // 2 - 24, side // 2 + 24) for side in shape)] = BLUE
    frames, _ = read_video(write_video(tmp_path / "a.mp4", [picture] * 2), Sampling(rate=8, max_frames=1, size=48))
    inside = frames[0, :, 3:-3, 3:-3].double()
    assert (inside - torch.tensor(BLUE)[:, None, None]).abs().mean() < 8


def test_fit_shrinks_the_short_side() -> None:
    """Both halves are in the result, so the whole height is kept."""
    picture = solid(RED, 100, 300)
    picture[50:] = BLUE
    small = fit(Image.fromarray(picture), Sampling(size=20))
    assert small.shape == (3, 20, 20)
    for rows, colour in ((slice(0, 8), RED), (slice(12, 20), BLUE)):
        assert (small[:, rows].double() - torch.tensor(colour)[:, None, None]).abs().max() < 3


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("sides", [(100, 300), (300, 100), (32, 40), (20, 32), (32, 32)])
def test_fit_is_open_clips_preprocessing(resize: str, interpolation: str, sides: tuple[int, int]) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*sides, 3), dtype=np.uint8))
    theirs = open_clip.image_transform(
        32, is_train=False, mean=(0, 0, 0), std=(1, 1, 1), resize_mode=resize, interpolation=interpolation
    )(picture)
    ours = fit(picture, Sampling(size=32, resize=resize, interpolation=interpolation))
    assert torch.equal(ours, (theirs * 255).round().to(torch.uint8))


def test_fit_of_the_right_size_changes_no_pixel() -> None:
    picture = noise(1)[0]
    assert np.array_equal(fit(Image.fromarray(picture), Sampling(size=64)).permute(1, 2, 0).numpy(), picture)


def test_rotation_is_undone(tmp_path: Path) -> None:
    """A phone stores a portrait clip rotated. After a clockwise turn its left side is on top."""
    stored = solid(RED, 64, 64)
    stored[:, :32] = BLUE
    path = lay_down(write_video(tmp_path / "a.mp4", [stored] * 2))
    frames, _ = read_video(path, Sampling(rate=8, max_frames=1, size=64))
    for rows, colour in ((slice(2, 28), BLUE), (slice(36, 62), RED)):
        assert (frames[0, :, rows].double() - torch.tensor(colour)[:, None, None]).abs().mean() < 8


def test_title_in_an_old_encoding(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", greys(3), title="XYZZY")
    whole = path.read_bytes()
    assert b"XYZZY" in whole
    path.write_bytes(whole.replace(b"XYZZY", b"\xe9t\xe9\xff\xfe"))
    _, mask = read_video(path, Sampling(rate=8))
    assert mask.sum() == 3


def empty(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("this is no video\n" * 100)


def audio(path: Path) -> None:
    write_audio(path)


def song(path: Path) -> None:
    write_audio(path, cover=solid(RED))


def truncated(path: Path) -> None:
    cut(write_video(path, noise(24)), 0.5)


def truncated_after_the_index(path: Path) -> None:
    cut(write_video(path, noise(24), index_first=True), 0.5)


def truncated_matroska(path: Path) -> None:
    """Matroska needs no index, so FFmpeg reads to the end of the file without an error."""
    aside = write_video(path.with_suffix(".mkv"), noise(24))
    cut(aside, 0.5).rename(path)


def unknown_codec(path: Path) -> None:
    whole = write_video(path, greys(3)).read_bytes()
    at = whole.rindex(b"avc1")
    path.write_bytes(whole[:at] + b"zzzz" + whole[at + 4 :])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (empty, "must hold a video, got an empty file"),
        (text, "must be a readable video"),
        (audio, "must hold a video stream"),
        (song, "must hold a video stream"),
        (truncated, "must be a readable video"),
        (truncated_after_the_index, "must be a whole video"),
        (truncated_matroska, "must be a whole video, got 1."),
        (unknown_codec, "must be a readable video"),
    ],
)
def test_no_video(tmp_path: Path, make: Callable[[Path], None], reason: str) -> None:
    """The error is one line: the path, what is wrong, and what to do."""
    path = tmp_path / "clip [1].mp4"
    make(path)
    with pytest.raises(ValueError) as caught:
        read_video(path, Sampling())
    message = str(caught.value)
    assert message.startswith(f"{path} {reason}")
    assert "re-encode it (ffmpeg" in message or "fetch it again" in message
    assert "\n" not in message


def test_a_name_without_its_suffix(tmp_path: Path) -> None:
    """MSR-VTT's tables contain such names."""
    (tmp_path / "video7.mp4").write_bytes(b"something")
    with pytest.raises(ValueError, match=r"video7 must be a video file, not found; is it video7\.mp4\?"):
        read_video(tmp_path / "video7", Sampling())


@pytest.mark.parametrize(
    ("name", "words"),
    [("missing.mp4", "not found; check the path"), ("folder.mp4", "got a folder, pipe or device; name a regular file")],
)
def test_no_file(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(ValueError, match=f"{name} must be a video file, {words}"):
        read_video(str(tmp_path / name), Sampling())


def test_stream_without_a_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", greys(3))
    monkeypatch.setattr("drl_fast.data.video._frames", lambda *_: iter(()))
    with pytest.raises(ValueError, match=r"a\.mp4 must hold at least one video frame, got none; re-encode"):
        read_video(path, Sampling())


@pytest.mark.parametrize("name", ["rate", "max_frames", "size"])
@pytest.mark.parametrize("value", [0, -1])
def test_bad_sampling(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be (a )?positive .*, got {value}.*; DRL uses"):
        Sampling(**{name: value})


@pytest.mark.parametrize("value", [0, -1.5])
def test_bad_seconds(value: float) -> None:
    with pytest.raises(ValueError, match=f"seconds must be positive and finite, got {float(value)}; None takes"):
        Sampling(seconds=value)


@pytest.mark.skipif(not MSRVTT.is_file(), reason="no MSR-VTT clip here")
def test_a_real_clip() -> None:
    """MSR-VTT's video7500 has 50 frames at 3 per second: every third is taken, and these 17 are thinned to 12."""
    frames, mask = read_video(MSRVTT, Sampling())
    assert frames.shape == (12, 3, 224, 224)
    assert mask.all()
    assert frames.double().std() > 20
    assert all(not torch.equal(a, b) for a, b in pairwise(frames))
    everything, real = read_video(MSRVTT, Sampling(max_frames=40))
    assert real.sum() == 17
    assert torch.equal(frames, everything[thin(17, 12)])
