"""Several processes write one index, and others search it meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from drl_fast import Retriever
from drl_fast.search import retriever as retriever_module
from drl_fast.search.windows import starts

from .videos import make_video

ROOT = Path(__file__).parents[2]
# ``drl-fast`` with the toy CLIP.
COMMAND = "import tests.engine.runs; from drl_fast.cli import main; main()"


def test_searching_while_indexing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader of its own sees more and more whole videos, and never an error."""
    monkeypatch.setattr(retriever_module, "COMMIT_VIDEOS", 1)
    videos, lengths = tmp_path / "videos", {}
    for number in range(12):
        lengths[f"{number}.mp4"] = seconds = 2 + number % 4
        make_video(videos / f"{number}.mp4", seconds, number)
    writer = Retriever.from_run(model, tmp_path / "index", "cpu")
    writer.index([videos / "0.mp4"], root=videos)
    reader = Retriever.open(tmp_path / "index", "cpu")
    seen: list[int] = []
    done = threading.Event()
    errors: list[Exception] = []

    def read() -> None:
        try:
            while True:
                last = done.is_set()
                scored = reader._scores(reader.encode("red"), reader._windows(reader._filled(), None))
                for path in set(scored.paths):
                    assert list(scored.paths).count(path) == len(starts(2 * lengths[path], 4))
                seen.append(len(set(scored.paths)))
                assert reader.search("red", k=3)
                if last:
                    return
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    writer.index([videos])
    done.set()
    thread.join()
    assert errors == []
    assert seen[0] >= 1
    assert seen == sorted(seen)
    assert seen[-1] == 12


def torchrun(*words: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("PYTEST_CURRENT_TEST", None)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = words[0]
    return subprocess.run(
        [*launch, str(script), *map(str, words[1:])], capture_output=True, text=True, env=environment, check=False
    )


def test_two_processes_share_the_work(model: Path, tmp_path: Path, command_file: Callable[[], Path]) -> None:
    videos = tmp_path / "videos"
    for number in range(6):
        make_video(videos / f"{number}.mp4", 2 + number % 3, number)
    (videos / "bad.mp4").write_bytes(b"no video")
    script, index = command_file(), tmp_path / "index"
    done = torchrun(script, "index", videos, "--out", index, "--model", model, "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    assert f"{index}: 6 videos" in done.stderr
    assert "unreadable videos, left out: 1" in done.stderr
    report = json.loads(done.stdout)
    assert sorted(report["added"]) == [f"{number}.mp4" for number in range(6)]
    assert [video["name"] for video in report["unreadable"]] == ["bad.mp4"]
    alone = Retriever.from_run(model, tmp_path / "alone", "cpu")
    alone.index([videos])
    together = Retriever.open(index, "cpu")
    assert together.size() == alone.size()
    assert together.search("red", k=100) == alone.search("red", k=100)


@pytest.fixture
def command_file(tmp_path: Path) -> Callable[[], Path]:
    def write() -> Path:
        path = tmp_path / "command.py"
        path.write_text(COMMAND)
        return path

    return write
