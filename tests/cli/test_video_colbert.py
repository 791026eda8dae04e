"""The row ``video_colbert`` from the command line: on videos, on features, and features that lack its expansions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import drl_fast
from drl_fast.data.feature_store import FeatureStore
from drl_fast.engine.logs import read_log
from drl_fast.model.head import Head
from tests.engine.runs import make_folder

Command = Callable[..., Any]
pytestmark = pytest.mark.usefixtures("one_thread")
CLIP = [word for option in ("clip=toy", "pretrained=null", "max_words=12", "workers=0") for word in ("--set", option)]
RECIPE = [word for option in ("epochs=2", "batch=4", "precision=fp32") for word in ("--set", option)]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("videos"))


def encode(command: Command, row: str, videos: Path, out: Path) -> Path:
    words = ("--config", row, "--dataset", "folder", "--videos", videos, "--out", out, "--dtype", "fp32")
    result = command("features", *words, *CLIP)
    assert result.exit_code == 0, result.output
    return out


def train(command: Command, out: Path, *words: object) -> list[dict[str, str]]:
    result = command("train", "--config", "video_colbert", "--out", out, *words, *RECIPE)
    assert result.exit_code == 0, result.output
    return read_log(out / "log.csv")


def scores(command: Command, run: Path, *words: object) -> np.ndarray:
    result = command("eval", "--checkpoint", run, *words, "--out", run / "e.json", "--save-scores", run / "s.npy")
    assert result.exit_code == 0, result.output
    assert json.loads((run / "e.json").read_text())["metrics"]["t2v"]["R1"] >= 0
    return np.load(run / "s.npy")


def test_videos_and_features_train_alike(command: Command, videos: Path, tmp_path: Path) -> None:
    on_videos, on_features, stored = tmp_path / "videos", tmp_path / "features", tmp_path / "stored"
    options = ["freeze=clip", "skip_same_video=true"]
    sets = [word for option in options for word in ("--set", option)]
    expected = train(command, on_videos, "--dataset", "folder", "--videos", videos, *CLIP, *sets)
    encode(command, "video_colbert", videos, stored)
    assert FeatureStore(stored).counts("text").tolist() == [12] * 18  # the padding, too
    found = train(command, on_features, "--features", stored)
    assert len(found) == len(expected) == 8
    for ours, theirs in zip(found, expected, strict=True):
        assert float(ours["total"]) == pytest.approx(float(theirs["total"]), rel=1e-5)
    sim = scores(command, on_videos)
    np.testing.assert_allclose(scores(command, on_features), sim, rtol=0, atol=1e-4)
    # Its CLIP is found again, and encodes captions as in training.
    np.testing.assert_allclose(
        scores(command, on_features, "--videos", videos, "--set", "workers=0"), sim, rtol=0, atol=1e-4
    )
    model, head = drl_fast.DRL.from_pretrained(on_videos), Head.from_pretrained(on_features)
    assert model.config == head.config
    assert model.config.query_expansion


def test_features_without_the_padding_are_refused(command: Command, videos: Path, tmp_path: Path) -> None:
    encode(command, "wti", videos, tmp_path / "wti")
    words = ("--features", tmp_path / "wti", "--out", tmp_path / "run")
    result = command("train", "--config", "video_colbert", *words)
    assert result.exit_code == 1
    assert "must agree with the features in" in result.stderr
    assert "which have query_expansion False; got query_expansion True" in result.stderr
    encode(command, "video_colbert", videos, tmp_path / "expanded")
    result = command("train", "--config", "wti", "--features", tmp_path / "expanded", "--out", tmp_path / "run")
    assert result.exit_code == 1
    assert "query_expansion must be False with interaction='wti', got True" in result.stderr
