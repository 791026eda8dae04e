"""plot_matches: the picture, the file, and bad input."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.patches import FancyBboxPatch

import drl_fast
from drl_fast.filmstrip import CHIP_GAP, Word, into_lines

WORDS = ["a", "red", "cross", "moves", "left"]
# In points: a frame's words are less than this above it; the caption is higher.
ONE_LINE = 20


def clip(frames: int = 4, height: int = 24, width: int = 32) -> Tensor:
    return torch.randint(0, 256, (frames, 3, height, width), dtype=torch.uint8)


def boxes(figure: Figure) -> list[FancyBboxPatch]:
    """Return the words' boxes: those of the caption, then those above each frame."""
    return [patch for patch in figure.axes[0].patches if isinstance(patch, FancyBboxPatch)]


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def darkness(box: FancyBboxPatch) -> float:
    return 3 - sum(box.get_facecolor()[:3])


def test_words_stand_above_the_frame_that_they_chose() -> None:
    axes = drl_fast.plot_matches(clip(), WORDS, torch.tensor([2, 0, 0, 3, -1])).axes[0]
    assert len(axes.images) == 4
    above = []
    for text in axes.texts:
        x, y = text.get_position()
        for index, picture in enumerate(axes.images):
            left, right, _, top = picture.get_extent()
            if left <= x <= right and 0 < top - y < ONE_LINE:
                above.append((text.get_text(), index))
    assert sorted(above) == [("a", 2), ("cross", 0), ("moves", 3), ("red", 0)]


def test_the_caption_is_printed_in_order_and_unchosen_frames_are_pale() -> None:
    figure = drl_fast.plot_matches(clip(), WORDS, [2, 0, 0, 3, -1])
    assert texts(figure)[: len(WORDS)] == WORDS
    assert [picture.get_alpha() is None for picture in figure.axes[0].images] == [True, False, True, True]
    assert any("chose no frame" in text for text in texts(figure))
    assert not any("weight" in text for text in texts(figure))


def test_weights_shade_words() -> None:
    figure = drl_fast.plot_matches(clip(), WORDS, [0, 1, 2, 3, 0], weights=torch.tensor([0.1, 0.4, 0.2, 0.0, 0.3]))
    shades = [darkness(box) for box in boxes(figure)[: len(WORDS)]]
    assert sorted(range(5), key=shades.__getitem__) == [3, 0, 2, 4, 1]
    assert any("higher weight" in text for text in texts(figure))
    even = boxes(drl_fast.plot_matches(clip(), WORDS, [0, 1, 2, 3, 0]))
    assert len({darkness(box) for box in even}) == 1


def test_all_weights_zero() -> None:
    figure = drl_fast.plot_matches(clip(), WORDS, [0] * 5, weights=[0.0] * 5)
    assert len({darkness(box) for box in boxes(figure)}) == 1


@pytest.mark.parametrize(("height", "width"), [(24, 240), (240, 24), (1, 1), (64, 64)])
@pytest.mark.parametrize("frames", [1, 5, 30])
def test_everything_stays_inside_the_picture(frames: int, height: int, width: int) -> None:
    """For wide and narrow frames, one and many, a caption of several lines, and a word wider than its frame."""
    words = [*(WORDS * 12), "supercalifragilisticexpialidocious" * 4]
    matches = [0] * 20 + [frames - 1] * (len(words) - 20)
    figure = drl_fast.plot_matches(clip(frames, height, width), words, matches)
    axes = figure.axes[0]
    total_width, total_height = figure.get_size_inches() * 72
    assert len(axes.images) == frames
    for picture in axes.images:
        left, right, bottom, top = picture.get_extent()
        assert 0 <= left < right <= total_width
        assert 0 <= top < bottom <= total_height
        assert (right - left) / (bottom - top) == pytest.approx(width / height, rel=1e-6)
    for box in boxes(figure):
        assert 0 <= box.get_x() <= box.get_x() + box.get_width() <= total_width
        assert 0 <= box.get_y() <= total_height


def test_no_two_boxes_overlap() -> None:
    figure = drl_fast.plot_matches(clip(9), WORDS * 6, [index % 9 for index in range(30)])
    corners = [(b.get_x(), b.get_y(), b.get_x() + b.get_width(), b.get_y() + b.get_height()) for b in boxes(figure)]
    assert len(corners) == 60
    for i, (left, top, right, bottom) in enumerate(corners):
        for other in corners[:i]:
            assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top


def test_lines_are_no_wider_than_asked() -> None:
    words = [Word(text, 0, 0.0) for text in ["a", "somewhat", "longer", "W" * 60, "end"]]
    lines = into_lines(words, 80.0)
    assert "".join(word.text for line in lines for word in line) == "".join(word.text for word in words)
    for line in lines:
        assert sum(word.width for word in line) + CHIP_GAP * (len(line) - 1) <= 80.0


def test_dollars_and_line_breaks_are_plain_characters(tmp_path: Path) -> None:
    figure = drl_fast.plot_matches(clip(), ["$\\frac$", "two\nlines"], [0, 1], path=tmp_path / "x.png")
    assert texts(figure)[:2] == ["$\\frac$", "two lines"]


def test_the_file_is_the_figure(tmp_path: Path) -> None:
    path = tmp_path / "matches.png"
    frames = torch.zeros((1, 3, 16, 16), dtype=torch.uint8)
    frames[:, 1] = 200
    figure = drl_fast.plot_matches(frames, ["green"], [0], path=path)
    pixels = imread(path)
    assert pixels.shape[1] / pixels.shape[0] == pytest.approx(
        figure.get_size_inches()[0] / figure.get_size_inches()[1], rel=0.02
    )
    green = (abs(pixels[..., :3] - [0, 200 / 255, 0]) < 0.01).all(-1)
    assert green.mean() > 0.05
    assert [file.name for file in tmp_path.iterdir()] == ["matches.png"]


def test_a_file_is_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "matches.png"
    path.write_bytes(b"before")

    def fail(self: Figure, name: str, **options: Any) -> None:
        Path(name).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        drl_fast.plot_matches(clip(), WORDS, [0] * 5, path=path)
    assert path.read_bytes() == b"before"
    assert len(list(tmp_path.iterdir())) == 1


def test_matches_of_a_layer_fit() -> None:
    layer = drl_fast.WTI(dim=8)
    text, video, mask = torch.randn(2, 5, 8), torch.randn(3, 4, 8), torch.tensor([[1] * 5, [1] * 3 + [0] * 2])
    with torch.no_grad():
        _, matches = layer(text, video, mask, return_matches=True)
        weights, _ = layer.weights(text, video, mask)
    figure = drl_fast.plot_matches(clip(), WORDS, matches.video_index[1, 2], weights[1])
    assert len(boxes(figure)) == 5 + int((matches.video_index[1, 2] >= 0).sum())


BAD = {
    "frames as floats": (TypeError, "frames must be uint8", {"frames": clip().float()}),
    "frames as a list": (TypeError, "frames must be a torch.Tensor", {"frames": [1, 2]}),
    "one frame": (ValueError, r"frames must be \(N, 3, H, W\)", {"frames": clip()[0]}),
    "channels last": (ValueError, r"got shape \(4, 24, 32, 3\)", {"frames": clip().permute(0, 2, 3, 1)}),
    "no frame": (ValueError, "at least one RGB frame", {"frames": clip()[:0]}),
    "a sentence": (TypeError, "split the caption first", {"words": "a red cross"}),
    "words of ids": (TypeError, "words must be a list of strings", {"words": [1, 2, 3, 4, 5]}),
    "no word": (ValueError, "words must hold at least one word", {"words": [], "matches": []}),
    "too few matches": (ValueError, r"matches must be \(words,\) = \(5,\)", {"matches": [0, 1]}),
    "matches of all videos": (ValueError, r"got shape \(3, 5\)", {"matches": torch.zeros(3, 5, dtype=torch.int64)}),
    "matches as floats": (TypeError, "matches must be integers", {"matches": [0.0] * 5}),
    "matches as a mask": (TypeError, "matches must be integers", {"matches": [True] * 5}),
    "matches of words": (TypeError, "matches must be a tensor or a list", {"matches": ["a"] * 5}),
    "index too large": (ValueError, r"matches must lie in -1\.\.3 for 4 frames, got 4", {"matches": [0, 1, 2, 3, 4]}),
    "index below -1": (ValueError, "got -2", {"matches": [0, 1, 2, 3, -2]}),
    "too many weights": (ValueError, r"weights must be \(words,\) = \(5,\)", {"weights": [0.1] * 6}),
    "negative weight": (ValueError, "weights must be finite and not negative", {"weights": [0.1] * 4 + [-0.1]}),
    "NaN weight": (ValueError, "weights must be finite", {"weights": [0.1] * 4 + [float("nan")]}),
    "another format": (ValueError, r"path must end in \.png", {"path": "matches.jpg"}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error, message, changed = BAD[case]
    monkeypatch.chdir(tmp_path)
    good: dict[str, Any] = {"frames": clip(), "words": WORDS, "matches": [0, 1, 2, 3, -1], "path": "matches.png"}
    with pytest.raises(error, match=message):
        drl_fast.plot_matches(**{**good, **changed})
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_error_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "import drl_fast\n"
        "try:\n    drl_fast.plot_matches\nexcept ModuleNotFoundError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "install it with pip install matplotlib" in done.stdout
