"""Generated clips: reproducible, with unique captions, and pictures that match their caption."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from drl_fast.data import moving_shapes
from drl_fast.data.moving_shapes import (
    ARRANGEMENTS,
    COLOURS,
    FPS,
    SHAPES,
    SIZE,
    Clip,
    Mover,
    draw,
    make_clips,
    write_clip,
)
from drl_fast.data.video import Sampling, read_video

# Columns run to the right and rows down.
STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
CAPTIONS = 15 * 12 * 6 * 4  # pairs of 6 colours; ordered pairs of 4 shapes; pairs of 4 directions; arrangements


def middle_of(colour: str, picture: np.ndarray) -> np.ndarray:
    """Return mean x and y of the pixels of one colour, of which there must be some."""
    rows, columns = np.nonzero((picture == COLOURS[colour]).all(axis=-1))
    assert len(rows), f"no pixel is {colour}"
    return np.array([columns.mean(), rows.mean()])


def moved(colour: str, direction: str, pictures: list[np.ndarray]) -> tuple[float, float]:
    """Return how far a colour moves between two pictures, in pixels: in a direction, and sideways."""
    before, after = (middle_of(colour, picture) for picture in pictures)
    (x, y), (dx, dy) = after - before, STEPS[direction]
    return x * dx + y * dy, abs(x * dy) + abs(y * dx)


def test_seed_decides() -> None:
    assert make_clips(48, seed=3) == make_clips(48, seed=3)
    assert make_clips(48, seed=3) != make_clips(48, seed=4)


def test_captions_are_unique_and_fours_share_their_words() -> None:
    clips = make_clips(CAPTIONS, seed=0)
    assert len({clip.caption for clip in clips}) == CAPTIONS
    fours = [clips[i : i + ARRANGEMENTS] for i in range(0, CAPTIONS, ARRANGEMENTS)]
    words = [[Counter(clip.caption.replace(",", " ,").split()) for clip in four] for four in fours]
    assert all(bag == four[0] for four in words for bag in four)
    # Another four may assign the same shapes to other colours.
    things = [frozenset((m.colour, m.shape) for m in (four[0].first, four[0].second)) for four in fours]
    ways = [frozenset(m.direction for m in (four[0].first, four[0].second)) for four in fours]
    assert len(set(zip(things, ways, strict=True))) == len(fours)


@pytest.mark.parametrize("count", [0, -4, 1, 6, CAPTIONS + 4])
def test_count_out_of_range(count: int) -> None:
    with pytest.raises(ValueError, match=rf"count must be a multiple of 4 in 4\.\.{CAPTIONS}.*got {count}; use \d+"):
        make_clips(count, seed=0)


def test_pictures_match_the_caption() -> None:
    """Pixels show which shape moves first, in which direction, and that the other one waits."""
    for clip in make_clips(200, seed=1):
        words = clip.caption.replace(",", "").split()
        (one, one_goes), (other, other_goes) = (words[1], words[4]), (words[7], words[10])
        assert words[5] == "then"
        assert {words[2], words[8]} <= set(SHAPES)
        pictures = [np.asarray(picture) for picture in draw(clip)]
        assert len(pictures) == clip.frames
        first, half, last = pictures[0], pictures[(clip.frames - 1) // 2], pictures[-1]
        # The border may hide a part of a shape, and then its visible centre moves less.
        forwards, sideways = moved(one, one_goes, [first, half])
        assert forwards > 6.5, clip
        assert sideways < 1, clip
        assert moved(other, other_goes, [first, half]) == (0, 0), clip
        forwards, sideways = moved(other, other_goes, [half, last])
        assert forwards > 6.5, clip
        assert sideways < 1, clip


def test_neither_shape_is_hidden() -> None:
    for clip in make_clips(200, seed=2):
        for picture in map(np.asarray, draw(clip)):
            for mover in (clip.first, clip.second):
                seen = (picture == COLOURS[mover.colour]).all(axis=-1).sum()
                assert seen > 0.5 * clip.radius**2, clip


def test_shapes_look_different() -> None:
    """Clips that only differ in the shape have different first frames."""
    base = make_clips(4, seed=0)[0]
    looks = set()
    for shape in SHAPES:
        clip = Clip(**{**vars(base), "first": Mover(**{**vars(base.first), "shape": shape})})
        looks.add(np.asarray(next(draw(clip))).tobytes())
    assert len(looks) == len(SHAPES)


def test_file_shows_the_drawing(tmp_path: Path) -> None:
    clip = make_clips(4, seed=5)[0]
    path = tmp_path / "clip.mp4"
    write_clip(clip, path)
    frames, mask = read_video(path, Sampling(rate=FPS, max_frames=20, size=SIZE))
    assert mask.sum() == clip.frames
    drawn = np.stack([np.asarray(picture) for picture in draw(clip)]).transpose(0, 3, 1, 2)
    # Colour is stored at half the resolution, so only edges may differ.
    assert np.median(np.abs(frames[mask].numpy().astype(int) - drawn)) <= 3
    assert list(tmp_path.iterdir()) == [path]


def test_a_relative_path_may_hold_a_colon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FFmpeg would read the part before it as a protocol."""
    monkeypatch.chdir(tmp_path)
    path = Path("colours:shapes", "clip.mp4")
    path.parent.mkdir()
    write_clip(make_clips(4, seed=5)[0], path)
    assert read_video(path, Sampling(size=SIZE))[1].any()


def test_no_half_file_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted encoding leaves no partial file and keeps an existing one."""
    first, second = make_clips(4, seed=0)[:2]
    path = tmp_path / "clip.mp4"
    write_clip(first, path)
    before = path.read_bytes()

    def breaks_off(clip: moving_shapes.Clip) -> object:
        yield from list(draw(clip))[:4]
        raise KeyboardInterrupt

    monkeypatch.setattr(moving_shapes, "draw", breaks_off)
    with pytest.raises(KeyboardInterrupt):
        write_clip(second, path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before
    with pytest.raises(KeyboardInterrupt):
        write_clip(second, tmp_path / "other.mp4")
    assert list(tmp_path.iterdir()) == [path]
