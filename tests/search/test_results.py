"""What is made of hits: exported clips, and a page that needs nothing else."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from drl_fast import Retriever
from drl_fast.data.video import Sampling, show
from drl_fast.search import clips, page
from drl_fast.search.retriever import Hit, Match
from tests.clips import grey, greys, lay_down, write_audio, write_video


def hit(path: Path, start: float, end: float) -> Hit:
    return Hit(path.name, start, end, 0.5, [], path, [start])


def shown(path: Path) -> list[tuple[float, int]]:
    """Each frame's time, and the number of its grey."""
    levels = np.array([grey(number) for number in range(40)])
    return [(time, int(np.abs(levels - np.asarray(picture).mean()).argmin())) for time, picture in show(path, 0, 1000)]


def test_a_clip_begins_and_ends_at_the_exact_frames(tmp_path: Path) -> None:
    """Not at the key frames before: the file has one, its first."""
    source = write_video(tmp_path / "v.mp4", greys(24), rate=8)
    (written,) = clips.export([hit(source, 1, 2)], tmp_path / "out")
    assert written.name == "001_v_1.0-2.0s.mp4"
    found = shown(written)
    assert [number for _, number in found] == list(range(8, 16))
    assert [time for time, _ in found] == pytest.approx([number / 8 for number in range(8)], abs=2e-3)
    (padded,) = clips.export([hit(source, 1, 2)], tmp_path / "padded", 0.5)
    assert [number for _, number in shown(padded)] == list(range(4, 20))
    (whole,) = clips.export([hit(source, 0.5, 3)], tmp_path / "whole", 100)
    assert [number for _, number in shown(whole)] == list(range(24))
    assert not list((tmp_path / "out").glob(".*"))


def test_a_turned_video_stays_upright(tmp_path: Path) -> None:
    picture = np.zeros((32, 64, 3), np.uint8)
    picture[:, :32] = 255
    source = lay_down(write_video(tmp_path / "v.mp4", [picture] * 8, rate=8))
    (written,) = clips.export([hit(source, 0, 1)], tmp_path)
    with av.open(str(written)) as container:
        frame = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert frame.shape == (64, 32, 3)
    assert frame[:24].mean() > 200
    assert frame[40:].mean() < 50


def test_odd_sides_and_sound(tmp_path: Path) -> None:
    sound = write_audio(tmp_path / "sound.mp4")
    silent = write_video(tmp_path / "silent.mp4", [np.zeros((64, 64, 3), np.uint8)] * 8, rate=8)
    source = tmp_path / "both.mp4"
    with av.open(str(silent)) as one, av.open(str(sound)) as other, av.open(str(source), "w") as out:
        streams = [out.add_stream_from_template(one.streams.video[0]), out.add_stream_from_template(other.streams[0])]
        for container, stream in zip((one, other), streams, strict=True):
            for packet in container.demux():
                if packet.dts is not None:
                    packet.stream = stream
                    out.mux(packet)
    (written,) = clips.export([hit(source, 0.25, 0.75)], tmp_path / "out")
    with av.open(str(written)) as container:
        assert len(container.streams.audio) == 1
        seconds = sum(frame.samples for frame in container.decode(audio=0)) / 16000
    assert seconds == pytest.approx(0.5, abs=0.15)
    odd = tmp_path / "odd.mkv"
    with av.open(str(odd), "w") as out:
        stream = out.add_stream("ffv1", rate=4)
        stream.width, stream.height, stream.pix_fmt = 35, 33, "bgr0"
        for _ in range(4):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((33, 35, 3), np.uint8), format="rgb24")))
        out.mux(stream.encode())
    (written,) = clips.export([hit(odd, 0, 1)], tmp_path / "out")
    with av.open(str(written)) as container:
        assert (container.streams.video[0].width, container.streams.video[0].height) == (34, 32)


def test_clips_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"video not found: .*--root says where they are now"):
        list(clips.export([hit(tmp_path / "gone.mp4", 0, 1)], tmp_path / "out"))
    source = write_video(tmp_path / "v.mp4", greys(8), rate=8)
    with pytest.raises(ValueError, match=r"must show pictures from 5\.0 to 6\.0 s"):
        list(clips.export([hit(source, 5, 6)], tmp_path / "out"))
    assert list((tmp_path / "out").iterdir()) == []
    for padding in (-1, float("nan")):
        with pytest.raises(ValueError, match="padding must be finite and >= 0"):
            list(clips.export([], tmp_path, padding))


def test_show_from_any_second(tmp_path: Path) -> None:
    """Seeking gives the pictures that decoding from the beginning gives."""
    source = write_video(tmp_path / "v.mp4", greys(30), rate=10)
    for start in (0, 0.05, 0.3, 1.25, 2.9):
        times = [time for time, _ in show(source, start, start + 0.5)]
        expected = [number / 10 for number in range(30) if start <= number / 10 < start + 0.5]
        assert times == pytest.approx(expected, abs=1e-3)
    assert Sampling().rate == 1


class Collect(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_page_needs_no_other_file_but_the_videos(indexed: Retriever, tmp_path: Path) -> None:
    hits = indexed.search("a red thing", k=3, thumbnails=True)
    path = page.write(tmp_path / "page", "a red thing", hits, "m")
    assert path == tmp_path / "page" / "index.html"
    text = path.read_text("utf-8")
    tags = Collect(text).tags
    images = [attributes["src"] or "" for tag, attributes in tags if tag == "img"]
    assert len(images) == sum(len(hit.times) for hit in hits)
    for source in images:
        kind, _, data = source.partition(",")
        assert kind == "data:image/jpeg;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (32, 32)
    assert {tag for tag, _ in tags} & {"script", "link", "iframe", "object"} == set()
    assert re.findall(r"(?:https?:)?//|@import|url\(", re.sub(r"base64,[^\"]*|href=\"file:[^\"]*", "", text)) == []
    assert all("alt" in attributes for tag, attributes in tags if tag == "img")
    for hit in hits:
        assert f"{page.clock(hit.start)} &ndash; {page.clock(hit.end)}" in text
        assert str(hit.path) in text


def test_words_stand_above_their_frames() -> None:
    matches = [Match("dog", 1, 1.0, 0.6), Match("runs", 1, 1.0, 0.2), Match("the", -1, None, 0.2)]
    found = Hit("v.mp4", 0, 3, 0.5, matches, Path("/v.mp4"), [0, 1, 2], {}, [b"a", b"b", b"c"])
    text = page.render("the dog runs", [found], "m")
    figures = re.findall(r"<figure.*?</figure>", text)
    assert [figure.startswith('<figure class="chosen">') for figure in figures] == [False, True, False]
    assert re.findall(r">(\w+)</span>", figures[1]) == ["dog", "runs"]
    assert "--shade:1.00" in figures[1]
    assert "--shade:0.33" in figures[1]
    assert re.findall(r"chose no frame:</p>.*?>(\w+)</span>", text) == ["the"]
    assert page.LEGEND in text
    without = page.render("x", [Hit("v", 0, 1, 0.5, [], Path("/v"), [0.0], {}, [b"a"])], "m")
    assert page.LEGEND not in without
    assert '<figure class="chosen">' in without


def test_a_time_plays_its_part_of_the_video() -> None:
    found = Hit("v", 0.25, 12, 0.5, [], Path("/a #1 %20/b?c&\"d'.mp4"), [0.0], {}, [b"a"])
    tags = Collect(page.render("x", [found], "m")).tags
    links = [attributes["href"] for tag, attributes in tags if tag == "a"]
    assert links == ["file:///a%20%231%20%2520/b%3Fc%26%22d%27.mp4#t=0.250,12.000"]


def test_names_and_queries_are_text() -> None:
    evil = "<script>alert('x')</script>\x1b[2J"
    match = [Match(evil, 0, 0.0, 1.0)]
    text = page.render(evil, [Hit(evil, 0, 1, 0.5, match, Path("/" + evil), [0.0], {}, [b"a"])], evil)
    assert "<script" not in text
    assert "\x1b" not in text
    assert text.count("&lt;script&gt;") == 6


@pytest.mark.parametrize(
    ("seconds", "written"),
    [(0, "0:00"), (1.5, "0:01.5"), (59.96, "1:00"), (61, "1:01"), (3599.99, "1:00:00"), (36061.2, "10:01:01.2")],
)
def test_clock(seconds: float, written: str) -> None:
    assert page.clock(seconds) == written
