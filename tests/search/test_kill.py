"""kill -9 at any moment of indexing leaves whole videos, and the next call continues."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from drl_fast import Retriever
from drl_fast.search import retriever as retriever_module
from drl_fast.search.retriever import open_index
from drl_fast.search.windows import starts
from tests.processes import forkserver

from .videos import make_video

KILLS, VIDEOS = 20, 10


def _index(model: Path, index: Path, videos: Path, started: Path) -> None:
    """Index with a commit for every video or two."""
    from drl_fast import Retriever
    from drl_fast.search import retriever as retriever_module

    from . import videos as _  # registers the toy CLIP  # noqa: F401

    torch.set_num_threads(1)
    retriever_module.COMMIT_VIDEOS = 2
    retriever = Retriever.from_run(model, index, "cpu")
    started.touch()
    retriever.index([videos])


def check_whole(index: Path, lengths: dict[str, set[int]]) -> dict[str, int]:
    """Check that every video in the index has all windows of one of its versions; return how many."""
    rows = open_index(index).table.search().select(["path", "start", "hash"]).to_arrow().to_pylist()
    found: dict[str, int] = {}
    for path in {row["path"] for row in rows}:
        own = sorted(row["start"] for row in rows if row["path"] == path)
        assert len({row["hash"] for row in rows if row["path"] == path}) == 1
        seconds = next((s for s in lengths[path] if [first / 2 for first in starts(2 * s, 4)] == own), None)
        assert seconds is not None, f"{path} has windows at {own}"
        found[path] = seconds
    return found


def test_every_kill_leaves_whole_videos(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retriever_module, "COMMIT_VIDEOS", 2)
    moments = random.Random(17)
    videos, index = tmp_path / "videos", tmp_path / "index"
    made = {seconds: make_video(tmp_path / "made" / f"{seconds}.mp4", seconds, seconds) for seconds in range(2, 8)}
    now: dict[str, int] = {}
    lengths: dict[str, set[int]] = {}

    def put(name: str, seconds: int) -> None:
        (videos / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(made[seconds], videos / name)
        now[name] = seconds
        lengths.setdefault(name, set()).add(seconds)

    for number in range(VIDEOS):
        put(f"{number}.mp4", moments.randint(2, 7))
    context = forkserver()
    known: list[int] = []
    for kill in range(KILLS):
        started = tmp_path / f"started{kill}"
        process = context.Process(target=_index, args=(model, index, videos, started))
        process.start()
        while not started.exists() and process.is_alive():
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.25))
        process.kill()
        process.join()
        if not (index / "windows.lance").exists():
            known.append(0)
            continue
        found = check_whole(index, lengths)
        known.append(len(found))
        if known[-1]:
            assert Retriever.open(index, "cpu").search("x", k=3)
        # The next one has something to add and something to update.
        put(f"new{kill}.mp4", moments.randint(2, 7))
        put(f"{moments.randrange(VIDEOS)}.mp4", moments.randint(2, 7))
        put(f"{moments.randrange(VIDEOS)}.mp4", moments.randint(2, 7))
    assert len(set(known)) > 4, f"the kills all came at {known} videos"
    Retriever.from_run(model, index, "cpu").index([videos])
    assert check_whole(index, lengths) == now
    fresh = Retriever.from_run(model, tmp_path / "fresh", "cpu")
    fresh.index([videos])
    ours, theirs = (
        open_index(folder).table.search().select(["path", "start", "end", "tokens", "vector"]).to_arrow()
        for folder in (index, tmp_path / "fresh")
    )
    ours, theirs = (rows.sort_by([("path", "ascending"), ("start", "ascending")]) for rows in (ours, theirs))
    for name in ("path", "start", "end"):
        assert ours.column(name).to_pylist() == theirs.column(name).to_pylist()
    for name in ("tokens", "vector"):
        assert np.array_equal(*(rows.column(name).combine_chunks().flatten().to_numpy() for rows in (ours, theirs)))
