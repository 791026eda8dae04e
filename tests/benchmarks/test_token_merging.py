"""The study of token merging: weights stay, r = 0 is the plain tower, frames keep their tokens, and its tables."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import harness
import result_tables
import study_token_merging as study
from study_token_merging import Merging, Plan, Search


@pytest.fixture(scope="module")
def visual() -> torch.nn.Module:
    return study.small_clip(patch=16, layers=4, seed=0).visual


@pytest.fixture(scope="module")
def pictures(visual: torch.nn.Module) -> torch.Tensor:
    return study.pictures_for(visual, clips=2, frames=4)


def test_merging_keeps_weights_and_their_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 11, 5, dtype=torch.float64, generator=generator)
    size = torch.randint(1, 4, (3, 11, 1), generator=generator).double()
    for kept in (0, 1, 3):
        merged, total = study.merge(x, size, x, kept, pairs=3)
        assert merged.shape == (3, 8, 5)
        assert total is not None
        torch.testing.assert_close(total.sum(1), size.sum(1))
        torch.testing.assert_close((merged * total).sum(1), (x * size).sum(1))
        torch.testing.assert_close(merged[:, :kept], x[:, :kept])
    # No more than half of what may merge.
    assert study.merge(x, None, x, kept=1, pairs=99)[0].shape == (3, 6, 5)


def test_the_most_similar_tokens_merge() -> None:
    x = torch.eye(6)[None].clone()
    x[0, 4] = x[0, 1]  # the second of the first half, and one of the others
    merged, size = study.merge(x, None, x, kept=0, pairs=1)
    assert size is not None
    (at,) = (size[0, :, 0] == 2).nonzero().flatten().tolist()
    torch.testing.assert_close(merged[0, at], x[0, 1])


def test_joined_frames_keep_their_class_tokens_in_front() -> None:
    x = torch.arange(4 * 3).view(4, 3, 1)
    assert study.join(x, kept=1, count=2)[..., 0].tolist() == [[0, 3, 1, 2, 4, 5], [6, 9, 7, 8, 10, 11]]


def test_without_merging_it_is_the_plain_tower(visual: torch.nn.Module, pictures: torch.Tensor) -> None:
    torch.testing.assert_close(study.encode(visual, pictures, Merging()), visual(pictures), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("merging", [Merging(2), Merging(2, ((2, 2), (3, 2)))])
def test_every_frame_keeps_a_token_and_gets_gradients(
    merging: Merging, visual: torch.nn.Module, pictures: torch.Tensor
) -> None:
    plain = visual(pictures)
    tokens = study.encode(visual, pictures, merging)
    assert tokens.shape == plain.shape
    assert study.distance(tokens, plain).min() > 0
    tokens.square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in visual.parameters() if p.grad is not None)
    assert visual.conv1.weight.grad.any()
    # A clip's tokens do not depend on the other clips.
    torch.testing.assert_close(study.encode(visual, pictures[4:], merging), tokens[4:], atol=1e-5, rtol=1e-5)


def test_a_tower_merges_inside_the_context_alone(visual: torch.nn.Module, pictures: torch.Tensor) -> None:
    plain = visual(pictures)
    with study.merged(visual, Merging(2)):
        torch.testing.assert_close(visual(pictures), study.encode(visual, pictures, Merging(2)))
    torch.testing.assert_close(visual(pictures), plain)


def test_a_run_shows_both_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    across = Merging(2, ((1, 2),))
    search = Search(16, 8, 1, (0,), (Merging(2), across), (across,), patch=16, layers=2)
    tower = study.Tower("small", (None, Merging(2)))
    monkeypatch.setattr(study, "PLANS", {"quick": Plan(1, (tower,), search, frames=4, rounds=2)})
    monkeypatch.setattr(harness, "measure_apart", lambda *_, **__: {"status": "ok", "mb": 1.0})
    monkeypatch.setattr(sys, "argv", ["study_token_merging.py", "--quick", "--threads", "1", "--out", str(tmp_path)])
    study.main()
    (saved,) = tmp_path.glob("*/token_merging_quick.json")
    result, shown = harness.load(saved), capsys.readouterr().out
    assert [row["form"] for row in result["towers"]] == ["plain", "r = 2"]
    trained = ["plain"] * 3 + [across.label] * 2
    assert [row["trained"] for row in result["search"]] == trained
    for table in (result_tables.token_merging(result), result_tables.token_merging_search(result)):
        assert result_tables.text(table) in shown
