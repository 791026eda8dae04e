"""Write small media files for tests with PyAV."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition

RED, GREEN, BLUE = (220, 30, 30), (30, 190, 40), (40, 50, 220)


def solid(colour: Sequence[int], height: int = 64, width: int = 64) -> np.ndarray:
    """Make a picture of one colour."""
    return np.full((height, width, 3), colour, dtype=np.uint8)


def greys(count: int) -> list[np.ndarray]:
    """Make pictures whose colour is their number: frame i is grey(i)."""
    return [solid((grey(i),) * 3) for i in range(count)]


def grey(number: int) -> int:
    return 20 + 8 * number


def noise(count: int) -> list[np.ndarray]:
    """Make pictures that do not compress, so that a truncated file loses some of them."""
    return list(np.random.default_rng(0).integers(0, 255, (count, 64, 64, 3), dtype=np.uint8))


def write_video(
    path: Path, pictures: Sequence[np.ndarray], rate: int = 8, title: str = "", index_first: bool = False
) -> Path:
    """Encode RGB pictures as H.264; ``index_first`` puts the index first, as in files for the web."""
    options = {"movflags": "faststart"} if index_first else {}
    with av.open(str(path), "w", options=options) as container:
        if title:
            container.metadata["title"] = title
        stream = container.add_stream("libx264", rate=rate, options={"preset": "ultrafast", "crf": "12"})
        stream.pix_fmt, stream.thread_count = "yuv420p", 1
        stream.height, stream.width = pictures[0].shape[:2]
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_audio(path: Path, cover: np.ndarray | None = None) -> Path:
    """Write one second of silence as mp4, with or without a cover picture."""
    with av.open(str(path), "w", format="mp4") as container:
        sound = container.add_stream("aac", rate=16000)
        if cover is not None:
            picture = container.add_stream("mjpeg", rate=1)
            picture.height, picture.width = cover.shape[:2]
            picture.pix_fmt, picture.disposition = "yuvj420p", Disposition.attached_pic
            container.mux(picture.encode(av.VideoFrame.from_ndarray(cover, format="rgb24")))
            container.mux(picture.encode())
        for _ in range(16):
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            silence.sample_rate = 16000
            container.mux(sound.encode(silence))
        container.mux(sound.encode())
    return path


def cut(path: Path, share: float) -> Path:
    """Keep only the first ``share`` of a file's bytes, as in an incomplete download."""
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    return path


def lay_down(path: Path) -> Path:
    """Set the rotation in the mp4's track header to 90 degrees clockwise, as phones do."""
    one, minus_one = "00010000", "ffff0000"
    upright = bytes.fromhex(one + "00000000" * 3 + one)
    turned = bytes.fromhex("00000000" + one + "00000000" + minus_one + "00000000")
    whole = path.read_bytes()
    at = whole.index(upright, whole.index(b"tkhd"))
    path.write_bytes(whole[:at] + turned + whole[at + len(turned) :])
    return path
