"""Generated clips: the same from one seed, no caption twice, and pictures that show what their caption says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from drl_fast.data import moving_shapes
from drl_fast.data.moving_shapes import COLOURS, FPS, SHAPES, SIZE, draw, make_clips, write_clip
from drl_fast.data.video import Sampling, read_video

# Columns run to the right and rows down.
STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
CAPTIONS = 24 * 23 * 4  # mover and neighbour are two of 6 x 4 kinds; 4 directions


def middle_of(colour: str, picture: np.ndarray) -> tuple[float, float]:
    """Mean x and y of the pixels of one colour; None of them is an error."""
    rows, columns = np.nonzero((picture == COLOURS[colour]).all(axis=-1))
    assert len(rows), f"no pixel is {colour}"
    return float(columns.mean()), float(rows.mean())


def test_seed_decides() -> None:
    assert make_clips(50, seed=3) == make_clips(50, seed=3)
    assert make_clips(50, seed=3) != make_clips(50, seed=4)


def test_every_caption_once() -> None:
    captions = [clip.caption for clip in make_clips(CAPTIONS, seed=0)]
    assert len(set(captions)) == CAPTIONS


@pytest.mark.parametrize("count", [0, -1, CAPTIONS + 1])
def test_count_out_of_range(count: int) -> None:
    with pytest.raises(ValueError, match=rf"count must lie in 1\.\.{CAPTIONS}.*got {count}; make fewer"):
        make_clips(count, seed=0)


def test_caption_tells_the_truth() -> None:
    """From the pixels alone: what is in the middle at first, where it goes, and what stands still in a corner."""
    for clip in make_clips(200, seed=1):
        words = clip.caption.split()
        mover, shape, direction, neighbour = words[1], words[2], words[4], words[7]
        assert shape in SHAPES
        assert words[8] in SHAPES
        pictures = [np.asarray(picture) for picture in draw(clip)]
        assert len(pictures) == clip.frames
        middle = SIZE // 2
        assert tuple(pictures[0][middle, middle]) == COLOURS[mover]
        x, y = clip.corner
        assert all(tuple(picture[y, x]) == COLOURS[neighbour] for picture in pictures[:2])
        if mover == neighbour:
            continue
        (x0, y0), (x1, y1) = middle_of(mover, pictures[0]), middle_of(mover, pictures[-1])
        dx, dy = STEPS[direction]
        forwards, sideways = (x1 - x0) * dx + (y1 - y0) * dy, abs((x1 - x0) * dy) + abs((y1 - y0) * dx)
        # A mover may be cut off at the border, so its visible middle lags a little behind.
        assert forwards > 12, clip
        assert sideways < 2, clip


def test_shapes_look_different() -> None:
    """One clip of each shape, alike in all else: no two first frames show the same."""
    base = make_clips(1, seed=0)[0]
    looks = set()
    for shape in SHAPES:
        clip = moving_shapes.Clip(**{**vars(base), "mover": ("red", shape), "neighbour": ("blue", "circle")})
        looks.add(np.asarray(next(draw(clip))).tobytes())
    assert len(looks) == len(SHAPES)


def test_file_shows_the_drawing(tmp_path: Path) -> None:
    clip = make_clips(1, seed=5)[0]
    path = tmp_path / "clip.mp4"
    write_clip(clip, path)
    frames, mask = read_video(path, Sampling(rate=FPS, max_frames=20, size=SIZE))
    assert mask.sum() == clip.frames
    drawn = np.stack([np.asarray(picture) for picture in draw(clip)]).transpose(0, 3, 1, 2)
    # Colour is stored at half the resolution, so edges differ; the rest must not.
    assert np.median(np.abs(frames[mask].numpy().astype(int) - drawn)) <= 3
    assert list(tmp_path.iterdir()) == [path]


def test_no_half_file_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoding that breaks off leaves neither a part nor harm to what was there."""
    first, second = make_clips(2, seed=0)
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
