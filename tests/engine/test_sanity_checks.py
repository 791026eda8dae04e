"""Warnings: shown when they should be, and only then."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from drl_fast.engine.sanity_checks import (
    WINDOW,
    equal_scores,
    few_captions,
    few_pairs,
    loss_at_chance,
    recall_at_chance,
)

from .runs import configured, make_folder, opened

CHANCE = math.log(128)


def test_few_pairs() -> None:
    assert few_pairs(128, 128) is None
    assert "only 127 training pairs for a batch of 128" in (few_pairs(127, 128) or "")


def test_few_captions() -> None:
    assert few_captions(50) is None
    assert "val has only 49 captions: one of them is 2.0 points" in (few_captions(49) or "")


@pytest.mark.parametrize(
    ("losses", "warns"),
    [
        ([CHANCE] * WINDOW, True),
        ([0.1] * 500 + [CHANCE * 1.009] * WINDOW, True),
        ([CHANCE * (1 + 0.05 * (-1) ** i) for i in range(WINDOW)], True),  # noise around it
        ([CHANCE] * (WINDOW - 1), False),
        ([CHANCE * 1.011] * WINDOW, False),
        ([CHANCE * 0.989] * WINDOW, False),
        ([CHANCE * (1.1 - 0.2 * i / (WINDOW - 1)) for i in range(WINDOW)], False),  # falls through it
        ([math.nan] * WINDOW, False),
    ],
)
def test_loss_at_chance(losses: list[float], warns: bool) -> None:
    found = loss_at_chance(losses, 128)
    assert (found is not None) == warns
    assert found is None or f"log(batch) = 4.85, the loss of guessing, for {WINDOW} steps" in found
    assert loss_at_chance([0.0] * WINDOW, 1) is None, "with batch 1 the loss is always 0"


def test_recall_at_chance() -> None:
    assert recall_at_chance({"t2v": {"R1_low": 0.6, "R1_high": 2.0, "candidates": 200}}) is None
    found = recall_at_chance({"t2v": {"R1_low": 0.5, "R1_high": 2.0, "candidates": 200}})
    assert found is not None
    assert "interval [0.5, 2.0] is not above 0.5 %" in found


@pytest.mark.usefixtures("one_thread")
def test_a_run_that_learns_nothing_warns_once(tmp_path: Path) -> None:
    """Tiny learning rates, fewer pairs than a batch, and few captions in the val part."""
    folder = make_folder(tmp_path / "videos", count=4)
    config = configured(folder, epochs=2 * WINDOW + 20, batch=8, lr=1e-12, clip_lr=0.0, interaction="dp", cdcr=0)
    run, notes = opened(config, tmp_path / "run")
    run.model.clip.logit_scale.data.fill_(-10.0)  # all logits nearly equal
    found = {"t2v": {"R1": 50.0, "R1_low": 40.0, "R1_high": 60.0, "candidates": 4}}
    run._evaluate = lambda epoch, logs: run.progress.evaluations.update({epoch: found})  # type: ignore[method-assign]
    assert run.train()
    beginnings = [text.split(":")[0] for text in notes.warnings]
    assert beginnings == [
        "only 6 training pairs for a batch of 8",
        "val has only 6 captions",
        f"InfoNCE has stood at log(batch) = 1.79, the loss of guessing, for {WINDOW} steps",
    ]


@pytest.mark.usefixtures("one_thread")
def test_a_run_that_does_not_beat_chance_warns(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "videos")
    run, notes = opened(configured(folder, epochs=1, lr=1e-12, clip_lr=0.0), tmp_path / "run")
    run.train()
    assert "does not beat chance" in notes.warnings[-1]
    assert len(notes.warnings) == 2
    finished, again = opened(configured(folder, epochs=1, lr=1e-12, clip_lr=0.0), tmp_path / "run", resume=True)
    finished.train()
    assert again.warnings == notes.warnings, "a continuation warns of it too"


def test_equal_scores() -> None:
    assert equal_scores(torch.zeros(1, 1)) is None
    assert equal_scores(torch.eye(3)) is None
    assert "all scores are equal (0): under masking=drl" in (equal_scores(torch.zeros(3, 3)) or "")
