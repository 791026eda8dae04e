"""The same index on S3, or what speaks its protocol; set DRL_FAST_TEST_S3=s3://bucket and AWS_* to run it.

With moto: ``moto_server -p 5555``, create a bucket, AWS_ENDPOINT=http://127.0.0.1:5555, AWS_ALLOW_HTTP=true.
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from drl_fast import Retriever
from drl_fast.engine.processes import Processes
from drl_fast.search import retriever as retriever_module
from tests.distributed.ranks import on_ranks

from .videos import WINDOWS, make_video

BUCKET = os.environ.get("DRL_FAST_TEST_S3")


@pytest.fixture(params=["folder", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return str(tmp_path / "index")
    if BUCKET is None:
        pytest.skip("DRL_FAST_TEST_S3 names no bucket")
    return f"{BUCKET}/{uuid.uuid4().hex}"


def test_add_update_remove(uri: str, model: Path, videos: Path) -> None:
    retriever = Retriever.from_run(model, uri, "cpu")
    assert sorted(retriever.index([videos]).added) == sorted(WINDOWS)
    make_video(videos / "long.mp4", 3, 9)
    assert retriever.index([videos]).updated == ["long.mp4"]
    other = Retriever.open(uri, "cpu")
    assert other.size() == (3, 5)
    assert other.search("red", k=3) == retriever.search("red", k=3)
    other.remove(["short.mp4"])
    assert retriever.size() == (2, 4)
    with pytest.raises(ValueError, match="index not found"):
        Retriever.open(f"{uri}-nothing", "cpu")


def _index(rank: int, size: int, model: str, uri: str, videos: str) -> torch.Tensor:
    from . import videos as _  # registers the toy CLIP  # noqa: F401

    retriever_module.COMMIT_VIDEOS = 1
    processes = Processes(rank, size, torch.device("cpu"), dist.group.WORLD)
    report = Retriever.from_run(model, uri, "cpu", processes=processes).index([videos])
    return torch.tensor([len(report.added), len(report.updated)])


def test_many_commits_of_two_processes(uri: str, model: Path, tmp_path: Path) -> None:
    """Appends and replacements, a commit for each video: all of them arrive."""
    for number in range(12):
        make_video(tmp_path / "v" / f"{number:02}.mp4", 2, number)
    Retriever.from_run(model, uri, "cpu").index([tmp_path / "v" / f"{number:02}.mp4" for number in range(0, 12, 3)])
    for number in range(0, 12, 3):
        make_video(tmp_path / "v" / f"{number:02}.mp4", 4, number + 50)
    (tmp_path / "ranks").mkdir()
    counts = sum(on_ranks(2, _index, tmp_path / "ranks", str(model), uri, str(tmp_path / "v")))
    assert counts.tolist() == [8, 4]  # type: ignore[union-attr]
    found = Retriever.open(uri, "cpu")
    assert found.size() == (12, 8 + 4 * 3)
