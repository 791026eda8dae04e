"""Generated clips with captions: "a red cross moves left, then a blue square moves up".

Two shapes stand side by side. One moves away, then the other. Captions come in groups of four with the same words: they
differ in which shape moves where, and which moves first. A model must therefore bind words to each other and locate
moments, not only recognize objects. Single frames show the order (one shape has left and the other has not), so a model
without a temporal module can learn it.
"""

from __future__ import annotations

import csv
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations, product
from pathlib import Path

import av
from PIL import Image, ImageDraw

from ..atomic_write import write_atomically

SIZE = 64
FPS = 8
COLOURS = {
    "red": (225, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 235),
    "yellow": (240, 220, 50),
    "purple": (170, 60, 200),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "cross")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
# Far enough apart that neither shape hides the other.
PLACES = ((18, 22), (46, 42))
LOOKS = tuple(product(combinations(COLOURS, 2), permutations(SHAPES, 2), combinations(DIRECTIONS, 2)))
# Captions with the same words: two ways to assign directions, times two orders.
ARRANGEMENTS = 4
MOST = ARRANGEMENTS * len(LOOKS)


@dataclass(frozen=True)
class Mover:
    """A shape and the direction in which it moves."""

    colour: str
    shape: str
    direction: str
    place: tuple[float, float]
    """Pixels from the top left, at the start."""

    @property
    def phrase(self) -> str:
        return f"a {self.colour} {self.shape} moves {self.direction}"


@dataclass(frozen=True)
class Clip:
    """The content of a clip, which determines every pixel."""

    first: Mover
    second: Mover
    """Starts when the first one has arrived."""
    radius: int
    """Pixels; the same for both shapes."""
    reach: float
    """Pixels that each shape travels."""
    frames: int
    background: int
    """Grey level."""

    @property
    def caption(self) -> str:
        return f"{self.first.phrase}, then {self.second.phrase}"

    def travelled(self, frame: float) -> tuple[float, float]:
        """Return how many pixels the first and the second shape have travelled at a frame."""
        halves = 2 * frame / (self.frames - 1)
        return self.reach * min(halves, 1.0), self.reach * max(halves - 1.0, 0.0)


def make_clips(count: int, seed: int) -> list[Clip]:
    """Make ``count`` clips with different captions; the same seed gives the same clips.

    Clips 0 to 3, 4 to 7 and so on have captions with the same words.

    Raises:
        ValueError: ``count`` is not a multiple of 4, or larger than the number of different captions.
    """
    if count % ARRANGEMENTS or not ARRANGEMENTS <= count <= MOST:
        raise ValueError(
            f"count must be a multiple of {ARRANGEMENTS} in {ARRANGEMENTS}..{MOST}, got {count}; use "
            f"{min(max(count // ARRANGEMENTS, 1) * ARRANGEMENTS, MOST)}"
        )
    rng = random.Random(seed)
    clips = []
    for colours, shapes, directions in rng.sample(LOOKS, count // ARRANGEMENTS):
        for one_goes, other_goes in permutations(directions):
            things = [(colours[0], shapes[0], one_goes), (colours[1], shapes[1], other_goes)]
            clips += [_clip(first, second, rng) for first, second in permutations(things)]
    return clips


def _clip(first: tuple[str, str, str], second: tuple[str, str, str], rng: random.Random) -> Clip:
    """Make a clip of given colours, shapes and directions; the rest is random."""
    places = [(x + rng.uniform(-2, 2), y + rng.uniform(-2, 2)) for x, y in rng.sample(PLACES, 2)]
    return Clip(
        Mover(*first, places[0]),
        Mover(*second, places[1]),
        radius=rng.randint(6, 8),
        reach=rng.uniform(10, 13),
        frames=rng.randint(11, 16),
        background=rng.randint(0, 60),
    )


def draw(clip: Clip) -> Iterator[Image.Image]:
    """Draw the clip's frames, 64 x 64 RGB."""
    for frame in range(clip.frames):
        picture = Image.new("RGB", (SIZE, SIZE), (clip.background,) * 3)
        pen = ImageDraw.Draw(picture)
        for mover, way in zip((clip.first, clip.second), clip.travelled(frame), strict=True):
            _draw_shape(pen, mover, way, clip.radius)
        yield picture


def _draw_shape(pen: ImageDraw.ImageDraw, mover: Mover, way: float, radius: int) -> None:
    (x, y), (dx, dy) = mover.place, DIRECTIONS[mover.direction]
    x, y, colour = x + dx * way, y + dy * way, COLOURS[mover.colour]
    box = (x - radius, y - radius, x + radius, y + radius)
    if mover.shape == "circle":
        pen.ellipse(box, fill=colour)
    elif mover.shape == "square":
        pen.rectangle(box, fill=colour)
    elif mover.shape == "triangle":
        pen.polygon([(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)], fill=colour)
    else:
        arm = radius / 3
        pen.rectangle((x - radius, y - arm, x + radius, y + arm), fill=colour)
        pen.rectangle((x - arm, y - radius, x + arm, y + radius), fill=colour)


def write_clip(clip: Clip, path: Path) -> None:
    """Encode a clip as H.264 in mp4, atomically."""

    def write(name: str) -> None:
        # The name is absolute: in a relative one FFmpeg reads what precedes a colon as a protocol.
        with av.open(os.path.abspath(name), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=FPS, options={"preset": "ultrafast", "crf": "18"})
            stream.width = stream.height = SIZE
            stream.pix_fmt = "yuv420p"
            stream.thread_count = 1
            for picture in draw(clip):
                container.mux(stream.encode(av.VideoFrame.from_image(picture)))
            container.mux(stream.encode())

    write_atomically(path, write)


def write_folder(
    clips: Sequence[Clip], folder: Path, splits: Sequence[str] = (), on_clip: Callable[[], object] = lambda: None
) -> list[Path]:
    """Write clips and then captions.csv, which makes them a data set of the kind ``folder``.

    Args:
        splits: each clip's part of the data set; empty: no ``split`` column.
        on_clip: called after every clip.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"clip{number:05}.mp4" for number in range(len(clips))]
    for clip, path in zip(clips, paths, strict=True):
        write_clip(clip, path)
        on_clip()
    columns = [["video", *(path.name for path in paths)], ["caption", *(clip.caption for clip in clips)]]
    if splits:
        columns.append(["split", *splits])

    def write(name: str) -> None:
        with open(name, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(zip(*columns, strict=True))

    write_atomically(folder / "captions.csv", write)
    return paths
