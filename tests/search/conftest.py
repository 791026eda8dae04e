"""Fixtures of the tests of search."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from drl_fast import Retriever

from .videos import make_folder, save_model


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """The models are too small for more."""


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved toy model with WTI and a temporal module."""
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def made_videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("made"))


@pytest.fixture
def videos(made_videos: Path, tmp_path: Path) -> Path:
    """A copy of the three videos, with the same times."""
    return Path(shutil.copytree(made_videos, tmp_path / "videos"))


@pytest.fixture
def retriever(model: Path, tmp_path: Path) -> Retriever:
    """A retriever with a new index."""
    return Retriever.from_run(model, tmp_path / "index", "cpu")


@pytest.fixture(scope="session")
def indexed(model: Path, made_videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Retriever:
    """A retriever whose index holds the three videos; tests only read it."""
    found = Retriever.from_run(model, tmp_path_factory.mktemp("indexed") / "index", "cpu")
    found.index(made_videos, {"short.mp4": {"year": 1999}, "日本": {"year": 2010}})
    return found
