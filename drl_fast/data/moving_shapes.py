"""Generated clips with captions: "a red cross moves left near a blue square".

A moving shape starts in the middle of the picture and leaves towards one side, while another stands in a corner. So
the direction can be seen from *where* the shape is in the late frames: a model that looks at every frame alone, with no
order among them, can learn it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

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
CORNERS = ((14, 14), (50, 14), (14, 50), (50, 50))


@dataclass(frozen=True)
class Clip:
    """What one clip shows; everything drawn follows from it."""

    mover: tuple[str, str]
    """Colour and shape."""
    direction: str
    neighbour: tuple[str, str]
    corner: tuple[int, int]
    radius: int
    """Pixels, of both shapes."""
    reach: float
    """Pixels that the mover travels."""
    frames: int
    background: int
    """Grey level."""

    @property
    def caption(self) -> str:
        return f"a {' '.join(self.mover)} moves {self.direction} near a {' '.join(self.neighbour)}"

    def centre(self, frame: int) -> tuple[float, float]:
        """The mover's centre at a frame, in pixels from the top left."""
        dx, dy = DIRECTIONS[self.direction]
        travelled = self.reach * frame / (self.frames - 1)
        return SIZE / 2 + dx * travelled, SIZE / 2 + dy * travelled


def make_clips(count: int, seed: int) -> list[Clip]:
    """``count`` clips, every caption once; the same seed gives the same clips.

    Raises:
        ValueError: a ``count`` outside 1 .. the number of captions there are.
    """
    kinds = list(product(COLOURS, SHAPES))
    contents = [(m, d, n) for m, d, n in product(kinds, DIRECTIONS, kinds) if m != n]
    if not 1 <= count <= len(contents):
        raise ValueError(
            f"count must lie in 1..{len(contents)}, the different captions there are, got {count}; make fewer"
        )
    rng = random.Random(seed)
    return [
        Clip(
            mover,
            direction,
            neighbour,
            corner=rng.choice(CORNERS),
            radius=rng.randint(8, 11),
            reach=rng.uniform(18, 22),
            frames=rng.randint(9, 16),
            background=rng.randint(0, 60),
        )
        for mover, direction, neighbour in rng.sample(contents, count)
    ]


def draw(clip: Clip) -> Iterator[Image.Image]:
    """The clip's frames, 64 x 64 RGB."""
    for frame in range(clip.frames):
        picture = Image.new("RGB", (SIZE, SIZE), (clip.background,) * 3)
        pen = ImageDraw.Draw(picture)
        _draw_shape(pen, clip.neighbour, clip.corner, clip.radius)
        _draw_shape(pen, clip.mover, clip.centre(frame), clip.radius)
        yield picture


def _draw_shape(pen: ImageDraw.ImageDraw, kind: tuple[str, str], centre: tuple[float, float], radius: int) -> None:
    colour, shape = COLOURS[kind[0]], kind[1]
    x, y = centre
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "square":
        pen.rectangle(box, fill=colour)
    elif shape == "triangle":
        pen.polygon([(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)], fill=colour)
    else:
        arm = radius / 3
        pen.rectangle((x - radius, y - arm, x + radius, y + arm), fill=colour)
        pen.rectangle((x - arm, y - radius, x + arm, y + radius), fill=colour)


def write_clip(clip: Clip, path: Path) -> None:
    """Encode a clip as H.264 in mp4; a file at ``path`` is always a whole one."""
    aside = path.with_suffix(".part.mp4")
    try:
        with av.open(str(aside), "w") as container:
            stream = container.add_stream("libx264", rate=FPS, options={"preset": "ultrafast", "crf": "18"})
            stream.width = stream.height = SIZE
            stream.pix_fmt = "yuv420p"
            stream.thread_count = 1
            for picture in draw(clip):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(picture), format="rgb24")))
            container.mux(stream.encode())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
