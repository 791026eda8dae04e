"""The best videos of every text: exact, ties by the lower index, in bounded memory."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import drl_fast
from drl_fast import reference
from tests.conftest import use
from tests.implementations import Implementation
from tests.oracle import make

# `drl_fast.functional.topk` is the function.
MODULE = importlib.import_module("drl_fast.functional.topk")


def full_sort(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    return scores.gather(1, order), order


def same(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    assert got[1].dtype == torch.int64
    assert torch.equal(got[1], want[1])
    assert torch.equal(got[0].view(torch.uint8), want[0].contiguous().view(torch.uint8))


@pytest.fixture(params=[1, 7, 1 << 20], ids="blocks of {}".format)
def _block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "BLOCK_SCORES", request.param)
    monkeypatch.setattr(MODULE, "SORTED_VIDEOS", min(request.param, 16))


@pytest.mark.usefixtures("_block")
@pytest.mark.parametrize("k", [1, 9, 30])
@pytest.mark.parametrize("prepared", [False, True])
def test_against_a_full_sort(impl: Implementation, prepared: bool, k: int) -> None:
    p = make((3, 7, 30, 4), 16, masks=("holes", "empty"), weights=torch.float32).map(lambda x: x.to(impl.device))
    p.video[12:20] = p.video[3]  # equal scores, in several blocks
    p.video_mask[12:20], p.video_weight[12:20] = p.video_mask[3], p.video_weight[3]
    want = full_sort(drl_fast.token_interaction(*p.args()), k)
    if prepared:
        videos = drl_fast.prepare(p.video, p.video_weight, p.video_mask)
        same(drl_fast.topk(p.text, videos, k, p.text_weight, None, p.text_mask), want)
    else:
        same(drl_fast.topk(p.text, p.video, k, *p.args()[2:]), want)


@pytest.mark.usefixtures("_block")
@pytest.mark.parametrize(
    "options",
    [
        {"masking": "exclude", "bidirectional": False},
        {"normalize": False, "pooling": "logsumexp", "temperature": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_options(cpu_impl: Implementation, dtype: torch.dtype, options: dict[str, Any]) -> None:
    p = make((3, 7, 30, 4), 16, dtype, masks=("holes", "holes"), **options)
    want = full_sort(drl_fast.token_interaction(*p.args(), **p.options), 10)
    same(drl_fast.topk(p.text, p.video, 10, *p.args()[2:], **p.options), want)


@pytest.mark.usefixtures("_block")
@pytest.mark.parametrize("k", [1, 30, 50])
def test_all_scores_equal(cpu_impl: Implementation, k: int) -> None:
    text, video = torch.randn(3, 2, 8), torch.randn(1, 4, 8).repeat(50, 1, 1)
    scores, indices = drl_fast.topk(text, video, k)
    assert torch.equal(indices, torch.arange(k).expand(3, k))
    assert torch.equal(scores, drl_fast.token_interaction(text, video)[:, :k])


@pytest.mark.usefixtures("_block")
def test_nan_counts_as_the_lowest(cpu_impl: Implementation) -> None:
    p = make((3, 2, 50, 4), 8)
    p.video[::3] = torch.nan
    scores, indices = drl_fast.topk(p.text, p.video, 50)
    bad = torch.arange(0, 50, 3)
    assert torch.equal(indices[:, -len(bad) :], bad.expand(3, -1))
    assert scores[:, -len(bad) :].isnan().all()
    kept = torch.tensor([b for b in range(50) if b % 3])
    want = full_sort(drl_fast.token_interaction(p.text, p.video[kept]), len(kept))
    same((scores[:, : len(kept)], indices[:, : len(kept)]), (want[0], kept[want[1]]))


def test_against_the_reference(impl: Implementation) -> None:
    p = make((5, 7, 90, 4), 16, masks=("holes", "empty"), weights=torch.float32)
    q = p.map(lambda x: x.to(impl.device))
    scores, indices = drl_fast.topk(q.text, q.video, 6, *q.args()[2:])
    want, expected = reference.topk(p.double().text, p.double().video, 6, *p.double().args()[2:])
    assert torch.equal(indices.cpu(), expected)
    assert float((scores.double().cpu() - want).abs().max()) <= 1e-6


def test_slices_count_from_their_own_start(cpu_impl: Implementation) -> None:
    p = make((5, 7, 90, 4), 16)
    prepared = drl_fast.prepare(p.video)[30:80]
    same(drl_fast.topk(p.text, prepared, 5), drl_fast.topk(p.text, p.video[30:80], 5))


def test_no_texts() -> None:
    scores, indices = drl_fast.topk(torch.zeros(0, 2, 8), torch.zeros(5, 4, 8), 3)
    assert scores.shape == indices.shape == (0, 3)


def test_the_result_has_no_gradient() -> None:
    scores, _ = drl_fast.topk(torch.randn(2, 3, 8, requires_grad=True), torch.randn(5, 4, 8), 3)
    assert not scores.requires_grad


def test_no_block_exceeds_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, best_columns = [], MODULE._best_columns

    def recorded(scores: Tensor, k: int) -> Tensor:
        sizes.append(scores.numel())
        return best_columns(scores, k)

    monkeypatch.setattr(MODULE, "_best_columns", recorded)
    drl_fast.topk(torch.randn(300, 1, 2), torch.randn(9000, 1, 2), 5)
    assert max(sizes) <= MODULE.BLOCK_SCORES
    assert len(sizes) == 3
    sizes.clear()
    drl_fast.topk(torch.randn(5000, 1, 2), torch.randn(1500, 1, 2), 5)
    assert max(sizes) <= MODULE.BLOCK_SCORES
    assert sum(sizes) == 5000 * 1500


def test_blocks_of_prepared_videos_share_no_groups_of_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise many texts would be searched for more slowly in prepared videos of different lengths than in others."""
    slices, videos = [], MODULE._videos

    def recorded(sides: Any, block: slice) -> Any:
        slices.append(videos(sides, block))
        return slices[-1]

    monkeypatch.setattr(MODULE, "_videos", recorded)
    mask = torch.arange(4) < torch.randint(1, 5, (4500, 1))
    with use("cpp"):
        prepared = drl_fast.prepare(torch.randn(4500, 4, 2), video_mask=mask)
        drl_fast.topk(torch.randn(700, 1, 2), prepared, 5)
    *_, item, count, _, shape = prepared.lanes[0]
    owner = torch.where(count > 0, item, -1).view(len(shape), -1)
    touched = [int(((owner >= s.video.lanes[1]) & (owner < s.video.lanes[2])).any(1).sum()) for s in slices]
    assert len(touched) > 1
    # A block's last group may hold videos of the next.
    assert sum(touched) < len(shape) + len(touched)


def test_k_may_be_a_numpy_integer() -> None:
    scores, _ = drl_fast.topk(torch.ones(2, 3, 8), torch.ones(4, 5, 8), np.int64(3))
    assert scores.shape == (2, 3)


@pytest.mark.parametrize(
    ("k", "changes", "kind", "message"),
    [
        (0, {}, ValueError, "k must be a positive integer, got 0"),
        (-1, {}, ValueError, "k must be a positive integer, got -1"),
        (True, {}, TypeError, "k must be a positive integer, got bool True"),
        (2.0, {}, TypeError, "k must be a positive integer, got float"),
        (5, {}, ValueError, "k must be at most the number of videos, 4, got 5"),
        (1, {"video": torch.zeros(0, 5, 8)}, ValueError, "k must be at most the number of videos, 0, got 1"),
        (1, {"video_mask": torch.ones(4, 6)}, ValueError, r"video_mask must be \(B, Nv\)"),
        (1, {"masking": "public"}, ValueError, "masking must be one of"),
        (1, {"temperature": 2.0}, ValueError, "temperature must be 1 with pooling='max'"),
        (1, {"video": None}, TypeError, "video must be a torch.Tensor"),
    ],
)
def test_errors(k: Any, changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        drl_fast.topk(**{"text": torch.zeros(2, 3, 8), "video": torch.zeros(4, 5, 8), "k": k, **changes})
