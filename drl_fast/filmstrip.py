"""A picture of matches: a video's frames with the words above the frames that they chose."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import validation
from .atomic_write import write_atomically

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch, Rectangle
    from matplotlib.textpath import TextPath
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"drl_fast.plot_matches needs matplotlib ({error}); install it with pip install matplotlib"
    ) from error

if TYPE_CHECKING:
    import numpy as np

# Lengths are in points (1/72 inch); y grows downwards, as in the picture.
WIDEST = 720.0
MARGIN, GAP = 14.0, 10.0
COLUMN = (84.0, 132.0)
TALLEST = 170.0
FONT, SMALL_FONT = 9.0, 7.0
LINE, CHIP, PADDING = 17.0, 14.0, 3.5
CHIP_GAP = 3.0
LABEL = 13.0
PIXELS_PER_INCH = 150
LIGHT, DARK = (0.87, 0.92, 0.98), (0.05, 0.30, 0.60)
EVEN_SHADE = 0.35
INK, GREY = "#1a1a1a", "#8a8a8a"


@dataclass(frozen=True)
class Word:
    """One word, the frame that it chose (-1: none), and its shade from 0 (light) to 1 (dark)."""

    text: str
    frame: int
    shade: float

    @property
    def width(self) -> float:
        """Width of the word's box."""
        return text_width(self.text) + 2 * PADDING


def plot_matches(
    frames: Tensor,
    words: Sequence[str],
    matches: Tensor | Sequence[int],
    weights: Tensor | Sequence[float] | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw a filmstrip with the words above the frames that they chose.

    The whole caption stands on top. Frames that no word chose are pale. Words that chose no frame are grey.

    Args:
        frames: (N, 3, H, W) uint8, RGB. One video.
        words: the caption's words or tokens, as they should be printed.
        matches: (words,) integers: for each word the index of its frame, or -1 for none. For text a and video b of
            ``logits, matches = layer(..., return_matches=True)`` these are ``matches.video_index[a, b]``.
        weights: (words,) non-negative numbers. The largest gives the darkest word. None: all words look alike.
        path: where to write the picture, as PNG. A file at ``path`` is always a whole one. None: write nothing.

    Returns:
        The matplotlib figure. It is not registered with pyplot and opens no window.

    Raises:
        TypeError: ``frames`` is not uint8, ``words`` are not strings, or ``matches`` are not integers.
        ValueError: wrong shapes or counts, a frame index outside -1..N-1, a weight that is negative or not finite, a
            ``path`` that does not end in .png.
        ModuleNotFoundError: matplotlib is not installed (raised on the first use of ``drl_fast.plot_matches``).
    """
    pictures = _check_frames(frames)
    caption = _check_words(words, matches, weights, len(pictures))
    target = None if path is None else _check_path(path)
    figure = _Layout(pictures, caption, weights is not None).draw()
    if target is not None:
        write_atomically(target, lambda name: figure.savefig(name, format="png", dpi=PIXELS_PER_INCH))
    return figure


def _check_frames(frames: object) -> np.ndarray:
    """Return the frames as (N, H, W, 3) pixels."""
    x = validation.tensor("frames", frames)
    if x.dtype != torch.uint8:
        raise TypeError(f"frames must be uint8 pixels in 0..255, got {x.dtype}; convert them before normalisation")
    if x.dim() != 4 or x.shape[1] != 3 or 0 in x.shape:
        raise ValueError(
            f"frames must be (N, 3, H, W), at least one RGB frame of one video, got shape {tuple(x.shape)}"
        )
    return x.detach().cpu().permute(0, 2, 3, 1).contiguous().numpy()


def _check_words(words: object, matches: object, weights: object, frames: int) -> list[Word]:
    if isinstance(words, str) or not isinstance(words, Sequence) or not all(isinstance(word, str) for word in words):
        raise TypeError(f"words must be a list of strings, got {validation.describe(words)}; split the caption first")
    if not words:
        raise ValueError("words must hold at least one word, got an empty list")
    chosen = _one_per_word("matches", matches, len(words))
    if chosen.is_floating_point() or chosen.is_complex() or chosen.dtype == torch.bool:
        raise TypeError(f"matches must be integers, frame indices, got {chosen.dtype}; pass matches.video_index[a, b]")
    outside = [index for index in chosen.tolist() if not -1 <= index < frames]
    if outside:
        raise ValueError(
            f"matches must lie in -1..{frames - 1} for {frames} frames, got {outside[0]}; -1 stands for no frame"
        )
    if weights is None:
        shades = [EVEN_SHADE] * len(words)
    else:
        given = _one_per_word("weights", weights, len(words)).double()
        if not bool((given.isfinite() & (given >= 0)).all()):
            raise ValueError(f"weights must be finite and not negative, got {given.tolist()}")
        shades = (given / given.max().clamp(min=torch.finfo(given.dtype).tiny)).tolist()
    # A line break inside a word would leave its box.
    printed = [" ".join(word.split()) for word in words]
    return [Word(*row) for row in zip(printed, chosen.tolist(), shades, strict=True)]


def _one_per_word(name: str, value: object, words: int) -> Tensor:
    try:
        x = torch.as_tensor(value).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a tensor or a list of numbers, got {validation.describe(value)}") from error
    if x.shape != (words,):
        raise ValueError(f"{name} must be (words,) = ({words},), one for each word, got shape {tuple(x.shape)}")
    return x


def _check_path(path: str | os.PathLike[str]) -> Path:
    target = Path(path)
    if target.suffix.lower() != ".png":
        raise ValueError(f"path must end in .png, the format that is written, got {target}")
    return target


# Words come again, in lines and above frames, and matplotlib measures every curve of every letter.
@lru_cache(maxsize=4096)
def text_width(text: str) -> float:
    """Width of a text at the font size of words."""
    # "$" would start a formula here. The words themselves are drawn without formulas.
    return max(TextPath((0, 0), text.replace("$", "S") or " ", size=FONT).get_extents().width, 2.0)


def into_lines(words: Sequence[Word], width: float) -> list[list[Word]]:
    """Break words into lines of at most ``width``. A word that is wider than a line is cut into pieces."""
    lines: list[list[Word]] = []
    used = math.inf
    for word in words:
        for piece in _pieces(word, width):
            if used + CHIP_GAP + piece.width > width:
                lines.append([])
                used = -CHIP_GAP
            lines[-1].append(piece)
            used += CHIP_GAP + piece.width
    return lines


def _pieces(word: Word, width: float) -> list[Word]:
    if word.width <= width or len(word.text) == 1:
        return [word]
    kept = max((n for n in range(1, len(word.text)) if _start(word, n).width <= width), default=1)
    return [_start(word, kept), *_pieces(Word(word.text[kept:], word.frame, word.shade), width)]


def _start(word: Word, letters: int) -> Word:
    return Word(word.text[:letters], word.frame, word.shade)


class _Layout:
    """Positions: the caption on top, then rows of frames, each with its words above and its number below."""

    def __init__(self, pictures: np.ndarray, caption: Sequence[Word], weighted: bool) -> None:
        self.pictures, self.caption, self.weighted = pictures, caption, weighted
        count, height, width = pictures.shape[:3]
        fit = int((WIDEST - 2 * MARGIN + GAP) // (COLUMN[0] + GAP))
        # Rows of equal length: 8 frames in two rows are 4 and 4.
        self.rows = math.ceil(count / fit)
        self.columns = math.ceil(count / self.rows)
        self.column = min(COLUMN[1], (WIDEST - 2 * MARGIN + GAP) / self.columns - GAP)
        self.size = self._fit(width, height)
        strip = self.columns * (self.column + GAP) - GAP
        self.width = max(strip, 3 * COLUMN[1]) + 2 * MARGIN
        self.left = (self.width - strip) / 2
        self.lines = into_lines(caption, self.width - 2 * MARGIN)
        chosen = [[word for word in caption if word.frame == index] for index in range(count)]
        self.above = [into_lines(words, self.column) for words in chosen]

    def _fit(self, width: int, height: int) -> tuple[float, float]:
        """Width and height of a drawn frame: as wide as its column, unless that makes it too tall."""
        scale = min(self.column / width, TALLEST / height)
        return max(width * scale, 1.0), max(height * scale, 1.0)

    def draw(self) -> Figure:
        heights = [
            LINE * max((len(lines) for lines in self.above[row : row + self.columns]), default=0)
            for row in range(0, len(self.above), self.columns)
        ]
        legend = self._legend()
        total = (
            2 * MARGIN
            + LINE * len(self.lines)
            + sum(GAP + height + self.size[1] + LABEL for height in heights)
            + (LABEL if legend else 0)
        )
        figure = Figure(figsize=(self.width / 72, total / 72), facecolor="white")
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, self.width), ylim=(total, 0))
        axes.axis("off")
        top = MARGIN
        self._draw_lines(axes, self.lines, MARGIN, top, centre=None)
        top += LINE * len(self.lines)
        for row, height in enumerate(heights):
            top += GAP + height
            for index in range(row * self.columns, min((row + 1) * self.columns, len(self.above))):
                self._draw_frame(axes, index, self.left + (index % self.columns) * (self.column + GAP), top)
            top += self.size[1] + LABEL
        if legend:
            axes.text(MARGIN, top + LABEL, legend, fontsize=SMALL_FONT, color=GREY, va="center", parse_math=False)
        # imshow sets limits of its own.
        axes.set(xlim=(0, self.width), ylim=(total, 0), aspect="auto")
        return figure

    def _legend(self) -> str:
        parts = ["dark words: higher weight"] * self.weighted
        parts += ["grey words: chose no frame"] * any(word.frame < 0 for word in self.caption)
        parts += ["pale frames: chosen by no word"] * (not all(self.above))
        return "     ".join(parts)

    def _draw_frame(self, axes: Axes, index: int, left: float, top: float) -> None:
        """One frame with its words above, which end where it begins, and its number below."""
        width, height = self.size
        x = left + (self.column - width) / 2
        lines = self.above[index]
        self._draw_lines(axes, lines, left, top - LINE * len(lines), centre=left + self.column / 2)
        axes.imshow(
            self.pictures[index],
            extent=(x, x + width, top + height, top),
            aspect="auto",
            interpolation="nearest",
            alpha=None if lines else 0.4,
        )
        edge = DARK if lines else "#c8c8c8"
        axes.add_patch(Rectangle((x, top), width, height, fill=False, edgecolor=edge, linewidth=1.2 if lines else 0.6))
        axes.text(
            left + self.column / 2,
            top + height + LABEL / 2,
            f"frame {index}",
            fontsize=SMALL_FONT,
            color=INK if lines else GREY,
            ha="center",
            va="center",
        )

    def _draw_lines(
        self, axes: Axes, lines: Sequence[Sequence[Word]], left: float, top: float, centre: float | None
    ) -> None:
        """Lines of words from ``top`` down: each around ``centre``, or from ``left`` on where it is None."""
        for number, line in enumerate(lines):
            used = sum(word.width for word in line) + CHIP_GAP * (len(line) - 1)
            x = left if centre is None else centre - used / 2
            for word in line:
                _draw_word(axes, word, x, top + number * LINE)
                x += word.width + CHIP_GAP


def _draw_word(axes: Axes, word: Word, left: float, top: float) -> None:
    if word.frame < 0:
        face, ink = (0.95, 0.95, 0.95), GREY
    else:
        red, green, blue = (light + word.shade * (dark - light) for light, dark in zip(LIGHT, DARK, strict=True))
        face, ink = (red, green, blue), "white" if word.shade > 0.5 else INK
    box = FancyBboxPatch(
        (left, top), word.width, CHIP, boxstyle="round,pad=0,rounding_size=3", facecolor=face, edgecolor="none"
    )
    axes.add_patch(box)
    axes.text(
        left + word.width / 2,
        top + CHIP / 2 + 0.5,
        word.text,
        fontsize=FONT,
        color=ink,
        ha="center",
        va="center_baseline",
        parse_math=False,
    )
