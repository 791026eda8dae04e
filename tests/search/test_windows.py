"""Windows: where they start, what they hold, and what an index stores of them."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import pytest
import torch
from PIL import Image

from drl_fast import Retriever
from drl_fast.data.loading import Unreadable
from drl_fast.data.video import Sampling, read_video
from drl_fast.numerics import unit
from drl_fast.search.model import sampling_of
from drl_fast.search.windows import Encoded, File, encode_files, starts, stride
from tests.clips import write_video

from .videos import WINDOWS, make_video


@pytest.mark.parametrize(
    ("frames", "expected"),
    [(1, [0]), (12, [0]), (13, [0, 1]), (18, [0, 6]), (19, [0, 6, 7]), (24, [0, 6, 12]), (30, [0, 6, 12, 18])],
)
def test_starts(frames: int, expected: list[int]) -> None:
    assert starts(frames, 12) == expected


@pytest.mark.parametrize("max_frames", [1, 2, 3, 8])
def test_windows_cover_every_frame_and_overlap_by_half(max_frames: int) -> None:
    for frames in range(1, 30):
        found = starts(frames, max_frames)
        covered = {frame for first in found for frame in range(first, min(first + max_frames, frames))}
        assert covered == set(range(frames))
        assert all(0 < b - a <= stride(max_frames) for a, b in itertools.pairwise(found))


def encode(retriever: Retriever, folder: Path, *names: str, workers: int = 0, batch: int = 3) -> list[Encoded]:
    files = [File(name, str(folder)) for name in names]
    sampling = sampling_of(retriever.about, retriever.model)
    options = {"batch": batch, "workers": workers}
    found = list(encode_files(retriever.model, files, sampling, retriever.about.max_frames, **options))
    assert [file.name for file, _ in found] == list(names)
    return [video for _, video in found]  # type: ignore[misc]


def test_a_window_has_the_tokens_that_evaluation_would_score(indexed: Retriever, made_videos: Path) -> None:
    """The frames of one window, through the towers and the temporal module."""
    (video,) = encode(indexed, made_videos, "long.mp4")
    frames, mask = read_video(made_videos / "long.mp4", Sampling(rate=2, max_frames=12, size=32))
    assert mask.all()
    assert video.spans == [(0, 2), (1, 3), (2, 4), (3, 5), (4, 6)]
    model = indexed.model
    with torch.no_grad():
        for number, first in enumerate(range(0, 10, 2)):
            tokens = model.encode_video(frames[None, first : first + 4])
            torch.testing.assert_close(video.tokens[number].float(), tokens[0], atol=2e-3, rtol=2e-3)
            pooled = unit(unit(tokens[0]).mean(dim=0))
            torch.testing.assert_close(video.vectors[number], pooled, atol=1e-5, rtol=1e-5)
            weights = model.interaction.weights(tokens, tokens)[1]  # type: ignore[union-attr]
            torch.testing.assert_close(video.weights[number], weights[0], atol=1e-5, rtol=1e-5)  # type: ignore[index]
    assert video.counts.tolist() == [4] * 5
    assert [len(pictures) for pictures in video.thumbnails] == [4] * 5
    assert Image.open(io.BytesIO(video.thumbnails[0][0])).size == (32, 32)


def test_a_short_video_is_one_padded_window(indexed: Retriever, made_videos: Path) -> None:
    (video,) = encode(indexed, made_videos, "short.mp4")
    assert video.spans == [(0, 1.5)]
    assert video.counts.tolist() == [3]
    assert not video.tokens[0, 3].any()
    assert video.tokens[0, :3].any(dim=-1).all()


def test_batches_and_workers_change_nothing(indexed: Retriever, made_videos: Path) -> None:
    names = list(WINDOWS)
    expected = encode(indexed, made_videos, *names, batch=64)
    for video, other in zip(encode(indexed, made_videos, *names, workers=3, batch=1), expected, strict=True):
        torch.testing.assert_close(video.tokens, other.tokens, atol=2e-3, rtol=2e-3)
        assert video.spans == other.spans
        assert video.state == other.state


def test_spans_of_a_rate_that_is_no_multiple(indexed: Retriever, tmp_path: Path) -> None:
    """At 5 frames a second every second one is taken: 0.4 s apart instead of 0.5."""
    pictures = list(torch.randint(0, 255, (25, 64, 64, 3), dtype=torch.uint8).numpy())
    write_video(tmp_path / "v.mp4", pictures, rate=5)
    (video,) = encode(indexed, tmp_path, "v.mp4")
    assert video.interval == pytest.approx(0.4)
    assert video.spans[0] == pytest.approx((0, 1.6))
    assert video.spans[-1] == pytest.approx((3.6, 5.0))


def test_what_cannot_be_read_is_named(indexed: Retriever, tmp_path: Path) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    (tmp_path / "empty.mp4").touch()
    make_video(tmp_path / "good.mp4", 1)
    found = encode(indexed, tmp_path, "bad.mp4", "good.mp4", "empty.mp4", "gone.mp4")
    assert [type(video) for video in found] == [Unreadable, Encoded, Unreadable, Unreadable]
    assert "must be a readable video" in found[0].reason  # type: ignore[attr-defined]
    assert "got an empty file" in found[2].reason  # type: ignore[attr-defined]
    assert "No such file" in found[3].reason  # type: ignore[attr-defined]


def test_tokens_that_float16_cannot_hold_are_refused(retriever: Retriever, made_videos: Path) -> None:
    with torch.no_grad():
        retriever.model.clip.visual.proj.mul_(1e6)
        retriever.model.temporal = None
        (video,) = encode(retriever, made_videos, "short.mp4")
    assert isinstance(video, Unreadable)
    assert "float16 cannot hold" in video.reason
