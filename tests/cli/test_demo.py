"""``drl-fast demo``: small runs of both forms, and one-line errors."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from drl_fast.cli import app
from drl_fast.data.moving_shapes import Clip, make_clips, write_clip
from drl_fast.demo import comparison, shapes
from drl_fast.demo.comparison import ROWS
from drl_fast.demo.folder import NO_WEIGHTS
from drl_fast.model.clip import load_clip
from tests.clips import cut, noise, write_audio, write_video

Demo = Callable[..., Any]
UNWRAPPED = ("plot:", "numbers:", "page:", "search:")
TINY = ("--clips", 8, "--held-out", 8)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def demo(command: Demo) -> Demo:
    """Run ``drl-fast demo`` with options."""
    return partial(command, "demo")


def fill(folder: Path, count: int = 3) -> Path:
    """Write a folder of clips with captions."""
    folder.mkdir()
    clips = make_clips(4, seed=0)[:count]
    for number, clip in enumerate(clips):
        write_clip(clip, folder / f"clip{number}.mp4")
    return caption(folder, {f"clip{number}.mp4": clip.caption for number, clip in enumerate(clips)})


def caption(folder: Path, captions: dict[str, str]) -> Path:
    """Add lines to the folder's captions."""
    path = folder / "captions.csv"
    new = not path.exists()
    with path.open("a", newline="") as file:
        csv.writer(file).writerows(([("video", "caption")] if new else []) + list(captions.items()))
    return folder


def test_shapes_end_to_end(demo: Demo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a narrow terminal."""
    monkeypatch.setenv("COLUMNS", "80")
    result = demo(*TINY, "--steps", 2, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    for text in (
        "interaction by",
        "16 H.264 clips of 64 x 64 pixels",
        "8 clips are held out",
        "CLIP towers of 2 + 2 layers, random weights",
        "for 2 steps of 8 pairs: one recipe",
        "Search among 8 held-out clips",
        "R@1 R@5 R@10 MdR MnR v2t R@1",
        "chance 12.5 62.5 100.0 4.5 4.5 12.5",
        "95 % bootstrap interval",
        "Highest R@1, text to video:",
        "WTI against DP:",
        "WTI + CDCR against WTI:",
        "On frozen towers: R@1, text to video, mean of 3 seeds",
        "On frozen towers WTI against DP:",
        "this table does not compare frozen towers with",
        "The first held-out clip,",
        "Which frame each word chose",
        "(start)",
        "(end)",
        "Which word each frame chose",
        "pixels moved, first and second",
        "Search: 8 held-out clips indexed in",
        "searched by the first one's caption in",
        "The demo took",
    ):
        assert text in result.flat, f"{text!r} is missing in:\n{result.stdout}"
    table = result.stdout[result.stdout.index("v2t R@1") :]
    for name in ROWS:  # recall with its interval, four figures, recall with its interval
        number = r"\d+\.\d"
        row = rf"^ *{re.escape(name)} +{number} \[\d+, \d+\]( +{number}){{4}} +{number} \[\d+, \d+\] *$"
        assert re.search(row, table, re.MULTILINE), f"no row of {name} in:\n{table}"
    assert re.search(r"│ 0 +│ 0 (left|right|up|down), 0 (left|right|up|down) ", result.stdout)
    assert "…" not in table
    # Paths and progress lines are not wrapped.
    assert max(len(line) for line in table.splitlines() if not line.startswith(UNWRAPPED)) <= 80
    names = ["comparison.json", "loss.png", "matches.png", "recall.png", "search"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    numbers = json.loads((tmp_path / "out/comparison.json").read_text())
    assert [row["name"] for row in numbers["rows"]] == list(ROWS)
    for row in numbers["rows"]:
        assert re.search(rf"^ *{re.escape(row['name'])} +{row['metrics']['t2v']['R1']:.1f} ", table, re.MULTILINE)
    assert all(sentence in result.flat for sentence in numbers["findings"] + numbers["frozen"]["findings"])
    assert all(row["seconds"] >= 0 for row in numbers["rows"])
    assert list(numbers["frozen"]["R1"]) == ["DP", "TI", "WTI"]
    assert all(len(values) == 3 for key in ("R1", "seconds") for values in numbers["frozen"][key].values())
    for name in ("loss.png", "matches.png", "recall.png"):
        assert f"plot: {tmp_path / 'out' / name}" in result.stdout
        with Image.open(tmp_path / "out" / name) as picture:
            assert min(picture.size) > 500
            assert len(picture.convert("RGB").getcolors(2**20)) > 50


def test_it_ends_in_a_search(demo: Demo, command: Demo, tmp_path: Path) -> None:
    """Its command works, the model on disk gives the scores of the page, and a second demo replaces the first one's."""
    out = tmp_path / "out"
    for seed in (0, 1):
        printed = demo(*TINY, "--steps", 1, "--seed", seed, "--out", out).stdout
        (line,) = [line for line in printed.splitlines() if line.startswith("search: drl-fast ")]
        words = shlex.split(line.removeprefix("search: drl-fast "))
        result = command(*words, "--json", "-k", 100, "--device", "cpu")
        assert result.exit_code == 0, result.output
        hits = json.loads(result.stdout)
        assert len(hits) == 8
        assert all(Path(hit["path"]).is_file() for hit in hits)
        assert hits[0]["columns"]["caption"] in printed
        page = (out / "search" / "index.html").read_text()
        assert f"page: {out / 'search' / 'index.html'}" in printed
        assert [f"score {hit['score']:.3f}" for hit in hits] == re.findall(r"score -?\d\.\d{3}", page)


def test_without_lancedb_it_ends_before_the_search(demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lancedb", "drl_fast.search.lance", "drl_fast.search.retriever", "drl_fast.search.page"):
        monkeypatch.setitem(sys.modules, name, None)
    result = demo(*TINY, "--steps", 1, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "searching the clips needs LanceDB: pip install 'drl-fast[search]'" in result.flat
    assert "The demo took" in result.flat


def test_clips_that_were_kept_can_be_searched(demo: Demo, tmp_path: Path, tiny_clip: str) -> None:
    folder = tmp_path / "a" / "kept [1]"
    result = demo(*TINY, "--steps", 1, "--keep", folder, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert f"kept in {folder}" in result.flat
    assert sorted(path.name for path in folder.iterdir()) == ["captions.csv", *(f"clip{i:05}.mp4" for i in range(16))]
    result = demo("--videos", folder, "--clip", tiny_clip)
    assert result.exit_code == 0, result.output
    for text in (
        f"loading {tiny_clip}, random weights",
        "1 frame a second of video, at most 12",
        NO_WEIGHTS,
        "16 captions against 16 videos",
        "text to video, TI",
        "video to text, DP",
        "Top match per caption (DP)",
        "of 16",
    ):
        assert text in result.flat, f"{text!r} is missing in:\n{result.stdout}"
    assert "skipped" not in result.stdout
    assert "are cut there" not in result.stdout
    cut_short = demo("--videos", folder, "--clip", tiny_clip, "--max-words", 5)
    assert "16 of 16 captions are longer than 5 tokens and are cut there; max_words up to " in cut_short.flat
    # A second run into the same folder would mix the clips of both.
    again = demo(*TINY, "--steps", 1, "--keep", folder, "--out", tmp_path)
    assert again.exit_code == 1
    assert f"keep must be a new or an empty folder, got {folder}; name another or empty it" in again.stderr


def test_unreadable_videos_are_named_and_skipped(demo: Demo, tmp_path: Path, tiny_clip: str) -> None:
    """The other videos are scored, with weights from a file."""
    folder = fill(tmp_path / "videos")
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("no video")
    write_audio(folder / "sound.mp4")
    cut(write_video(folder / "cut.mp4", noise(20), index_first=True), 0.4)
    write_video(folder / "[red] two [abc].mp4", noise(3))
    write_video(folder / "quiet.mp4", noise(3))
    broken = ("empty.mp4", "text.mp4", "sound.mp4", "cut.mp4", "missing.mp4", "[/x].mp4")
    caption(folder, dict.fromkeys(broken, "nothing"))
    caption(folder, {"[red] two [abc].mp4": "snow [noise] on a screen [/noise]"})
    weights = tmp_path / "w.safetensors"
    save_file(load_clip(tiny_clip)[0].state_dict(), weights)

    result = demo("--videos", folder, "--clip", tiny_clip, "--pretrained", weights)
    assert result.exit_code == 0, result.output
    skipped = [line for line in result.stdout.splitlines() if line.startswith("skipped")]
    assert len(skipped) == len(broken)
    # What has no file comes first.
    for name, line in zip((*broken[4:], *broken[:4]), skipped, strict=True):
        assert line.startswith(f"skipped: {folder / name} must ")
        assert any(how in line for how in ("; re-encode it", "; check the path", "; fetch it again"))
    assert "no caption names: quiet.mp4" in result.flat
    assert "4 captions against 4 videos" in result.flat
    assert "snow [noise] on a screen [/noise]" in result.flat
    assert "[red] two [abc].mp4" in result.flat
    assert f"weights {weights}" in result.flat
    assert "Random weights" not in result.flat


def test_escape_sequences_are_not_obeyed(demo: Demo, tmp_path: Path, tiny_clip: str) -> None:
    """Of captions, of file names, and in errors."""
    folder = fill(tmp_path / "videos")
    write_video(folder / "bold\x1b[1m.mp4", noise(3))
    (folder / "bad\x1b]0;title\x07.mp4").write_bytes(b"no video")
    caption(folder, {"bold\x1b[1m.mp4": "clear \x1b[2J \u202e screen", "bad\x1b]0;title\x07.mp4": "a"})
    result = demo("--videos", folder, "--clip", tiny_clip)
    assert result.exit_code == 0, result.output
    assert "\x1b[2J" not in result.output
    assert "\x1b[1m" not in result.output
    assert "\x1b]0" not in result.output
    assert r"clear \x1b[2J \u202e screen" in result.flat
    assert r"bold\x1b[1m.mp4" in result.flat
    assert "skipped: " in result.stdout
    failed = demo("--videos", tmp_path / "no\x1b[2J")
    assert r"no\x1b[2J" in failed.stderr
    assert "\x1b[2J" not in failed.stderr


@pytest.mark.parametrize("name", ["../secret.mp4", "/etc/secret.mp4", "OUTSIDE", "a/../../secret.mp4"])
def test_names_do_not_lead_out_of_the_folder(demo: Demo, tmp_path: Path, tiny_clip: str, name: str) -> None:
    folder = fill(tmp_path / "videos")
    write_video(tmp_path / "secret.mp4", noise(3))
    caption(folder, {name.replace("OUTSIDE", str(tmp_path / "secret.mp4")): "a"})
    result = demo("--videos", folder, "--clip", tiny_clip)
    assert result.exit_code == 0, result.output
    assert "secret.mp4 must be a video file in the folder, not found" in result.flat


@pytest.mark.skipif(os.name == "nt", reason="no named pipes")
def test_a_pipe_among_the_videos(demo: Demo, tmp_path: Path, tiny_clip: str) -> None:
    folder = fill(tmp_path / "videos")
    os.mkfifo(folder / "pipe.mp4")
    caption(folder, {"pipe.mp4": "a"})
    result = demo("--videos", folder, "--clip", tiny_clip)
    assert result.exit_code == 0, result.output
    assert "pipe.mp4 must be a video file, got a folder, pipe or device" in result.flat


def test_one_file_under_two_names_is_one_video(demo: Demo, tmp_path: Path, tiny_clip: str) -> None:
    folder = fill(tmp_path / "videos")
    before = demo("--videos", folder, "--clip", tiny_clip).flat
    count = int(re.search(r"captions against (\d+) videos", before)[1])  # type: ignore[index]
    write_video(folder / "x.mp4", noise(3))
    caption(folder, {"x.mp4": "one", "x": "two", "./x.mp4": "three", str(folder / "x.mp4"): "four"})
    assert f"captions against {count + 1} videos" in demo("--videos", folder, "--clip", tiny_clip).flat


def test_no_video_is_readable(demo: Demo, tmp_path: Path, tiny_clip: str) -> None:
    (tmp_path / "empty.mp4").write_bytes(b"")
    result = demo("--videos", caption(tmp_path, {"empty.mp4": "a", "gone.mp4": "b"}), "--clip", tiny_clip)
    assert result.exit_code == 1
    assert "error: split must hold at least one readable video, got 1 unreadable of 1: empty.mp4: " in result.stderr
    assert f"skipped: {tmp_path / 'gone.mp4'} must be a video file in the folder, not found; check" in result.stdout


def test_similarities_are_those_of_the_model(
    demo: Demo, tmp_path: Path, tiny_clip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are captions, columns videos in the order of their first caption; one video has two captions."""
    from rich.console import Console

    from drl_fast.data.video import Sampling, read_video
    from drl_fast.demo.folder import run_folder

    folder = fill(tmp_path / "videos")
    caption(folder, {"clip1.mp4": "again"})
    torch.manual_seed(5)
    clip, tokenizer = load_clip(tiny_clip)
    monkeypatch.setattr("drl_fast.demo.folder.load_clip", lambda *_: (clip, tokenizer))
    sims = run_folder(folder, tiny_clip, None, Console(quiet=True))
    assert sims["TI"].shape == sims["DP"].shape == (4, 3)
    frames, mask = read_video(folder / "clip2.mp4", Sampling(size=32))
    with torch.no_grad():
        pictures = torch.stack([(f / 255 - MEAN) / STD for f in frames[mask]])
        video = torch.nn.functional.normalize(clip.encode_image(pictures), dim=-1).mean(dim=0)
        text = clip.encode_text(tokenizer(["again"]))[0]
    expected = torch.nn.functional.cosine_similarity(text, video, dim=0)
    assert sims["DP"][3, 2].item() == pytest.approx(expected.item(), abs=1e-5)


MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--pretrained", "openai"],
            "error: pretrained goes with videos, got pretrained='openai' alone; add --videos DIR",
        ),
        (
            ["--videos", "nowhere"],
            "error: captions folder not found: nowhere; it is --annotations, or else --videos",
        ),
        (["--videos", "."], "error: . must hold one of captions.csv and captions.jsonl, got neither"),
        (
            ["--videos", "ok", "--clip", "ViT-B/32"],
            "error: clip must be a model name that open_clip knows, got 'ViT-B/32'",
        ),
        (["--videos", "ok", "--pretrained", "opnai"], "a tag of ViT-B-32, got 'opnai'; nearest: openai"),
        (
            ["--videos", "ok", "--pretrained", "w.pt"],
            "error: pretrained must be a tag or a weight file, file not found: w.pt",
        ),
        (["--clip", "ViT-B-32"], "error: clip goes with videos, got clip='ViT-B-32' alone; add --videos DIR"),
        (
            ["--videos", "ok", "--held-out", "8"],
            "error: held-out goes without videos, got held-out='8' beside them; drop one of them",
        ),
        (["--videos", "ok", "--keep", "k"], "error: keep goes without videos, got keep='k' beside them; drop one"),
        (["--videos", "ok", "--out", "demo_out"], "error: out goes without videos, got out='demo_out' beside them"),
        (["--clips", "4000", "--held-out", "400"], "held-out together must be at most 4320, the different captions"),
        (
            ["--clips", "6"],
            "error: clips must be a multiple of 4, the arrangements of one caption's words, and at least",
        ),
        (["--clips", "0"], "at least 4, got 0; take 4"),
        (["--held-out", "4"], "at least 8, got 4; take 8"),
        (["--out", "a_file"], "error: out must be a folder, got the file a_file; name another"),
        (["--out", "a_file/below"], "check that the path can be read and written"),
        (["--keep", "a_file"], "error: keep must be a new or an empty folder, got a_file; name another"),
        (["--keep", "a_file/below"], "check that the path can be read and written"),
        (["--videos", "ok", "--pretrained", "[/b].pt"], "file not found: [/b].pt"),
    ],
)
def test_mistakes(
    demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    """Status 1, and one line on stderr that says what to do."""

    def unreachable(*_: object) -> None:
        raise AssertionError("the demo started in spite of a mistake")

    monkeypatch.setattr(shapes.moving_shapes, "write_clip", unreachable)
    monkeypatch.chdir(tmp_path)
    Path("a_file").touch()
    Path("ok").mkdir()
    caption(Path("ok"), {"a.mp4": "a"})
    result = demo(*options)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_missing_extra(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("No module named 'av'", name="av")

    monkeypatch.setattr(shapes, "run_shapes", missing)
    result = demo()
    assert result.exit_code == 1
    assert "error: av is missing; this needs: pip install 'drl-fast[train]'" in result.stderr


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (
            OSError(28, "No space left on device"),
            1,
            "check that the path can be read and written and that the disk has",
        ),
        (KeyboardInterrupt(), 130, "error: stopped by Ctrl-C; no file is left half written\n"),
    ],
)
def test_a_failure_while_writing_clips(
    demo: Demo,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    existing: bool,
    error: BaseException,
    status: int,
    message: str,
) -> None:
    """The partly written folder is removed, so that the next run can use its name."""
    written = []

    def third_fails(clip: Clip, path: Path) -> None:
        if len(written) == 2:
            raise error
        written.append(path)
        write_clip(clip, path)

    kept = tmp_path / "kept"
    if existing:
        kept.mkdir()
    monkeypatch.setattr(shapes.moving_shapes, "write_clip", third_fails)
    result = demo(*TINY, "--keep", kept, "--out", tmp_path / "out")
    assert result.exit_code == status
    assert message in result.stderr
    assert len(written) == 2
    assert kept.exists() == existing
    assert not existing or not list(kept.iterdir())
    assert not list((tmp_path / "out").iterdir())


def test_ctrl_c_while_training(demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison, "train", stopped)
    result = demo(*TINY, "--keep", tmp_path / "kept", "--out", tmp_path / "out")
    assert result.exit_code == 130
    assert result.stderr == "error: stopped by Ctrl-C; no file is left half written\n"
    assert not list((tmp_path / "out").iterdir())
    assert len(list((tmp_path / "kept").glob("*.mp4"))) == 16
    assert (tmp_path / "kept" / "captions.csv").exists()


@pytest.mark.parametrize("command", [[], ["demo"], ["doctor"]])
def test_help(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "240")
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.stdout
    if command == ["demo"]:
        for option in (
            "--videos",
            "--pretrained",
            "--clip",
            "--keep",
            "--clips",
            "--held-out",
            "--steps",
            "--seed",
            "--out",
        ):
            assert option in result.stdout
