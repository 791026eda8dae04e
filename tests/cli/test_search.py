"""``drl-fast index`` and ``drl-fast search``: from videos to hits, and one-line errors."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lancedb")

from drl_fast import Retriever
from drl_fast.search import table as tables
from tests.search.videos import CLIP, WINDOWS, make_folder, save_model

Command = Callable[..., Any]
pytestmark = pytest.mark.usefixtures("one_thread")
CPU = ("--device", "cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("my videos"))


@pytest.fixture(scope="module")
def index(model: Path, videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "index"
    Retriever.from_run(model, path, "cpu").index([videos], {"short.mp4": {"year": 1999}})
    return path


def fails(result: Any, message: str) -> None:
    assert result.exit_code == 1, result.output
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith("unreadable, ")]
    assert line.startswith("error: ")
    assert message in line


def test_from_videos_to_a_moment(command: Command, model: Path, videos: Path, tmp_path: Path) -> None:
    folder, index = Path(shutil.copytree(videos, tmp_path / "videos")), tmp_path / "my index"
    (folder / "bad one.mp4").write_bytes(b"no video")
    (folder / "t.csv").write_text("video,year\nlong,2020\n")
    result = command("index", folder, "--out", index, "--model", model, "--columns", folder / "t.csv", *CPU)
    assert result.exit_code == 0, result.output
    assert "windows of 4 frames, 2 s, every 1 s; on cpu" in result.flat
    assert result.stderr.count("unreadable, left out: bad one.mp4") == 1
    assert "unreadable videos, left out: 1" in result.flat
    assert "3 added, 0 updated, 0 found below another root, 0 unchanged" in result.flat
    assert f'{index}: 3 videos, 8 windows; drl-fast search {index} "a sentence" searches them' in result.flat
    # The index knows its model.
    result = command("index", folder, "--out", index, "--json", *CPU)
    report = json.loads(result.stdout)
    assert sorted(report["unchanged"]) == sorted(WINDOWS)
    assert [video["name"] for video in report["unreadable"]] == ["bad one.mp4"]
    result = command("search", index, "a red thing", "--json", "-k", 100, *CPU)
    hits = json.loads(result.stdout)
    assert {"video", "start", "end", "score"} <= set(hits[0])
    assert [hit["score"] for hit in hits] == sorted((hit["score"] for hit in hits), reverse=True)
    assert {hit["video"] for hit in hits} == set(WINDOWS)
    result = command("search", index, "a red thing", "--per-video", 1, "--json", "-k", 100, *CPU)
    assert [hit["video"] for hit in json.loads(result.stdout)] == list(dict.fromkeys(hit["video"] for hit in hits))
    result = command("search", index, "a red thing", "--where", "year = 2020", "--json", *CPU)
    assert {hit["video"] for hit in json.loads(result.stdout)} == {"long.mp4"}
    out = tmp_path / "out"
    result = command("search", index, "a red thing", "--explain", "--html", out, "--clips", out, "-k", 2, *CPU)
    assert result.exit_code == 0, result.output
    assert "every window was scored exactly" in result.flat
    assert "red 0:0" in result.flat
    assert len(list(out.glob("*.mp4"))) == 2
    assert (out / "index.html").is_file()
    result = command("index", "--out", index, "--remove", folder / "a b", "--prune", "--json")
    assert json.loads(result.stdout) == {"removed": ["a b/日本.mp4"]}
    (folder / "long.mp4").unlink()
    assert "removed 1 videos" in command("index", "--out", index, "--prune").flat


def test_clip_without_a_run(command: Command, videos: Path, tmp_path: Path) -> None:
    index = tmp_path / "index"
    result = command("index", videos, "--out", index, "--clip", CLIP, "--pretrained", "none", *CPU)
    assert result.exit_code == 0, result.output
    assert "CLIP without a run: TI ranks and explains" in result.flat
    assert "warning: CLIP's weights are random: hits will mean nothing" in result.flat
    assert len(json.loads(command("search", index, "red", "--json", *CPU).stdout)) == 3


def test_a_moved_folder_and_model(command: Command, videos: Path, tmp_path: Path) -> None:
    folder, model = Path(shutil.copytree(videos, tmp_path / "videos")), save_model(tmp_path / "run")
    index = tmp_path / "index"
    assert command("index", folder, "--out", index, "--model", model, *CPU).exit_code == 0
    folder.rename(tmp_path / "moved")
    model.rename(tmp_path / "moved run")
    fails(command("search", index, "red", *CPU), "name the model with --model")
    words = ("search", index, "red", "--model", tmp_path / "moved run", "-k", 1, *CPU)
    fails(command(*words, "--clips", tmp_path / "c"), "--root says where they are now")
    result = command(*words, "--html", tmp_path / "h")
    assert result.exit_code == 0
    assert re.search(r"cannot play 1 of 1 hits: .* not found; .* --root says where they are now", result.stderr)
    result = command(*words, "--clips", tmp_path / "c", "--root", tmp_path / "moved", "--padding", 1)
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "c").glob("*.mp4"))) == 1
    result = command("index", tmp_path / "moved", "--out", index, "--model", tmp_path / "moved run", *CPU)
    assert "3 found below another root" in result.flat


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["", "-k", 3], "the query must be a sentence, got an empty one"),
        (["a" * 10_000], "at most 1000 characters, got 10000"),
        (["x", "-k", 0], "k must be a positive integer, got 0"),
        (["x", "-k", -2], "k must be a positive integer, got -2"),
        (["x", "--where", "nosuch = 1"], "No field named nosuch"),
        (["x", "--where", "year ="], "where must be an SQL expression of the columns path, start, end, year"),
        (["x", "--padding", -1], "padding must be finite and >= 0"),
        (["x", "--device", "abacus"], "device must be one such as cpu"),
        (["x", "--model", "nowhere"], "not found: nowhere"),
        (["x", "--root", "/nowhere", "--clips", "{tmp}"], "video not found: /nowhere/"),
    ],
)
def test_bad_searches(command: Command, index: Path, tmp_path: Path, words: list[str], message: str) -> None:
    words = [tmp_path / "c" if word == "{tmp}" else word for word in words]  # type: ignore[misc]
    result = command("search", index, *words)
    fails(result, message)
    assert not list(tmp_path.rglob("*.mp4"))


def test_dates_are_columns(command: Command, model: Path, videos: Path, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("video,day,shot at\nlong,2021-05-01,2021-05-01 10:00:00\n")
    index = tmp_path / "index"
    words = ("index", videos, "--out", index, "--model", model, "--columns", tmp_path / "t.csv", *CPU)
    assert command(*words).exit_code == 0
    where = "day > date '2021-04-30' AND `shot at` < timestamp '2021-05-01 11:00:00'"
    result = command("search", index, "red", "--where", where, "--json", "-k", 1, *CPU)
    (hit,) = json.loads(result.stdout)
    assert hit["columns"] == {"day": "2021-05-01", "shot at": "2021-05-01 10:00:00"}


def test_a_command_keeps_no_windows(command: Command, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no next query, so its memory does not grow with the index."""
    kept, search = [], Retriever.search

    def spy(self: Retriever, *args: Any, **options: Any) -> Any:
        hits = search(self, *args, **options)
        kept.append(self._kept)
        return hits

    monkeypatch.setattr(Retriever, "search", spy)
    assert command("search", index, "red", "--json", *CPU).exit_code == 0
    assert kept
    assert not any(windows.windows for windows in kept if windows is not None)


def test_long_queries_are_cut_with_a_note(command: Command, index: Path) -> None:
    result = command("search", index, "red " * 50, "--json", *CPU)
    assert "the query is cut to 12 tokens" in result.stderr
    assert json.loads(result.stdout)


def test_nothing_fits_where(command: Command, index: Path) -> None:
    assert command("search", index, "x", "--where", "year > 3000", "--json", *CPU).stdout == "[]\n"
    result = command("search", index, "x", "--where", "year > 3000", *CPU)
    assert "no windows fit --where" in result.flat


def test_recall_of_the_candidates(command: Command, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "EXACT", 3)
    result = command("search", index, "x", "--explain", *CPU)
    assert "of a sample's 10 best windows by exact score, the vector search keeps 100 %" in result.flat


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{videos}"], "a new index needs a model"),
        ([], "PATHS must name videos or folders"),
        (["{videos}", "--clip", CLIP], "pretrained must name the weights"),
        (["{videos}", "--pretrained", "openai"], "pretrained goes with --clip"),
        (["{videos}", "--clip", CLIP, "--pretrained", "none", "--model", "m"], "exclude each other"),
        (["{videos}", "--clip", "ViT-B-33", "--pretrained", "none"], "nearest: "),
        (["{videos}", "--model", "nowhere"], "not found: nowhere"),
        (["gone", "--clip", CLIP, "--pretrained", "none"], "must be files or folders, not found"),
        (["{videos}", "--clip", CLIP, "--pretrained", "none", "--root", "{videos}/a b"], "must lie below the root"),
        (["{videos}", "--clip", CLIP, "--pretrained", "none", "--columns", "gone.csv"], "columns must be a CSV file"),
        (["--remove", "x"], "index not found"),
        (["--prune"], "index not found"),
    ],
)
def test_bad_indexing(command: Command, videos: Path, tmp_path: Path, words: list[str], message: str) -> None:
    words = [word.replace("{videos}", str(videos)) for word in words]
    fails(command("index", *words, "--out", tmp_path / "new"), message)
    assert not (tmp_path / "new").exists()


def test_only_unreadable_videos(command: Command, model: Path, tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "bad.mp4").write_bytes(b"no video")
    result = command("index", tmp_path / "v", "--out", tmp_path / "new", "--model", model, *CPU)
    fails(result, "none of the 1 videos could be read")
    assert not (tmp_path / "new").exists()


def test_without_lancedb(index: Path) -> None:
    code = "import sys; sys.modules['lancedb'] = None; from drl_fast.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "search", index, "x"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr == "error: lancedb is missing; this needs: pip install 'drl-fast[search]'\n"
    code = "import sys; sys.modules['lancedb'] = None; import drl_fast; drl_fast.Retriever"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert 'searching needs lancedb; install it with pip install "drl-fast[search]"' in done.stderr
