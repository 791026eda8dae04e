"""Evaluation on one, two and three processes: the same bits on every rank, and errors reach every rank."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from drl_fast.data.feature_cache import FeatureCache
from drl_fast.data.split import Split
from drl_fast.engine import features
from drl_fast.engine.evaluate import evaluate
from tests.distributed.ranks import error_of, on_ranks
from tests.engine.eval_problem import SAMPLING, WORDS, make_model, make_split, tokenizer

SIZES = (1, 2, 3)
BROKEN = 5
INTERACTIONS = ("wti", "dp", "xti", "mean_maxsim")


class NoRoom(FeatureCache):
    """A cache whose disk is full."""

    def put(self, key: str, features: torch.Tensor) -> None:
        raise OSError(28, "No space left on device")


def scores(split: Split, interaction: str, group: object, **options: Any) -> dict[str, Any]:
    """Evaluate on one rank, with chunks so small that every rank has some and the last is not full."""
    features.TEXTS, features.VIDEOS, features.DECODED = 4, 3, 2
    options_of = {"temporal": None, "query_expansion": True} if interaction == "mean_maxsim" else {}
    model, done = make_model(interaction=interaction, **options_of), []
    found = evaluate(
        model,
        split,
        tokenizer(),
        SAMPLING,
        max_words=WORDS,
        block=3,
        process_group=group,
        on_progress=lambda *call: done.append(call[1:]),
        **options,
    )
    unreadable = [(video.name, video.reason) for video in found.unreadable]
    return {"sim": found.sim, "owner": found.owner, "unreadable": unreadable, "last": done[-1]}


def rank_by_rank(rank: int, size: int, split: Split, folder: Path) -> dict[str, Any]:
    groups = {count: dist.new_group(list(range(count))) for count in SIZES}
    found: dict[str, Any] = {}
    for interaction in INTERACTIONS:
        for count in SIZES:
            if rank < count:
                found[f"{interaction}, {count}"] = scores(split, interaction, groups[count])
    cached = [scores(split, "dp", groups[3], cache=FeatureCache(folder / "cache")) for _ in range(2)]
    found["dp, filling the cache"], found["dp, from the cache"] = cached
    other = dataclasses.replace(split, captions=(*split.captions[:-1], "another"))
    full = NoRoom(folder / "full") if rank == 1 else None
    found["errors"] = {
        "strict": error_of(lambda: scores(split, "dp", groups[3], strict=True)),
        "precision": error_of(lambda: scores(split, "dp", groups[3], precision="bf16" if rank == 2 else "fp32")),
        "captions": error_of(lambda: scores(other if rank else split, "dp", groups[3])),
        "model": error_of(lambda: scores(split, "dp" if rank else "ti", groups[3])),
        "full": error_of(lambda: scores(split, "dp", groups[3], cache=full)),
    }
    return found


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    made = make_split(tmp_path_factory.mktemp("videos"))
    made.videos[BROKEN].write_bytes(b"")
    return made


@pytest.fixture(scope="module")
def found(split: Split, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return the results of three ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    return on_ranks(3, rank_by_rank, folder, split, folder)


@pytest.fixture
def chunks_as_on_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TEXTS", "VIDEOS", "DECODED"):
        monkeypatch.setattr(features, name, getattr(features, name))  # restores it after the test


@pytest.mark.usefixtures("one_thread", "chunks_as_on_ranks")
@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_any_number_of_processes_gives_the_bits_of_one(
    split: Split, found: list[dict[str, Any]], interaction: str
) -> None:
    alone = scores(split, interaction, None)
    keys = [f"{interaction}, {count}" for count in SIZES]
    keys += ["dp, filling the cache", "dp, from the cache"] * (interaction == "dp")
    seen = 0
    for answers in found:
        for key in set(keys) & answers.keys():
            seen += 1
            assert torch.equal(answers[key]["sim"], alone["sim"]), key
            assert torch.equal(answers[key]["owner"], alone["owner"])
            assert answers[key]["unreadable"] == alone["unreadable"]
            assert answers[key]["last"] == alone["last"]
    assert seen == 1 + 2 + 3 + 3 * (len(keys) - len(SIZES))
    assert [name for name, _ in alone["unreadable"]] == [split.names[BROKEN]]


def test_errors_reach_every_rank(found: list[dict[str, Any]], split: Split) -> None:
    errors = [answers["errors"] for answers in found]
    for rank, error in enumerate(errors):
        assert error["strict"].startswith("ValueError: split must hold readable videos alone, as strict asks, got 1")
        assert error["precision"].endswith(
            "precision must be the same on all ranks of the group, got fp32 on ranks 0, 1 and bf16 on rank 2"
        )
        assert "captions must be the same on all ranks of the group, got 19 of checksum" in error["captions"]
        assert "model must be the same on all ranks" in error["model"]
        assert "No space left on device" in error["full"]
        if rank != 1:
            assert error["full"].startswith("RuntimeError: evaluate failed on rank 1: OSError")
