"""``return_matches``: the matches, ties, and scores computed from them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import drl_fast
from drl_fast import reference
from drl_fast.functional import Matches
from tests.implementations import Implementation
from tests.oracle import NEAR, Problem, choices, make, run

MASKINGS = ["drl", "exclude", "none"]
SHAPES = [(1, 1, 1, 1), (9, 11, 8, 6), (40, 32, 33, 12), (3, 255, 2, 7), (2, 7, 3, 256), (2, 300, 2, 260)]


def matches(impl: Implementation, problem: Problem) -> tuple[Tensor, Matches]:
    args = problem.map(lambda x: x.to(impl.device)).args()
    logits, found = drl_fast.token_interaction(*args, **problem.options, return_matches=True)
    return logits.cpu(), Matches(found.video_index.cpu(), None if found.text_index is None else found.text_index.cpu())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("masks", [(None, None), ("prefix", "prefix"), ("empty", "empty")], ids=str)
def test_matches_are_the_argmax(
    impl: Implementation, shape: tuple[int, int, int, int], masking: str, masks: tuple[str, str]
) -> None:
    problem = make(shape, 16, masks=masks, masking=masking)
    _, found = matches(impl, problem)
    want = choices(problem)
    a, nt, b, nv = shape
    assert found.video_index.shape == (a, b, nt)
    assert found.text_index.shape == (a, b, nv)
    assert found.video_index.dtype == found.text_index.dtype == torch.int64
    near = NEAR[torch.float32]
    agree = (found.video_index == want.video_index) | (want.video_gap < near)
    assert bool(agree.all())
    agree = (found.text_index == want.text_index) | (want.text_gap < near)
    assert bool(agree.all())
    # Near ties must be rare.
    assert float((want.video_gap < near).double().mean()) < 1e-3


@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("shape", [(9, 11, 8, 6), (2, 300, 2, 260)], ids=str)
def test_scores_follow_from_matches(impl: Implementation, masking: str, shape: tuple[int, int, int, int]) -> None:
    """Dot products of the chosen tokens, weighted and summed, are the logits."""
    problem = make(shape, 16, masks=("holes", "empty"), weights=torch.float32, masking=masking)
    logits, found = matches(impl, problem)
    t, v = reference.unit(problem.text.double()), reference.unit(problem.video.double())
    texts, videos = torch.arange(shape[0])[:, None, None], torch.arange(shape[2])[None, :, None]
    m_t = torch.einsum("abid,aid->abi", v[videos, found.video_index.clamp(min=0)], t)
    m_v = torch.einsum("abjd,bjd->abj", t[texts, found.text_index.clamp(min=0)], v)
    by_text = torch.where(found.video_index >= 0, m_t, 0) * problem.text_weight[:, None].double()
    by_video = torch.where(found.text_index >= 0, m_v, 0) * problem.video_weight[None].double()
    torch.testing.assert_close(logits.double(), (by_text.sum(-1) + by_video.sum(-1)) / 2, atol=3e-6, rtol=0)


@pytest.mark.parametrize("masking", ["drl", "exclude"])
def test_minus_one_where_no_real_token_was_chosen(impl: Implementation, masking: str) -> None:
    problem = make((6, 5, 7, 4), masks=("empty", "empty"), masking=masking)
    _, found = matches(impl, problem)
    by_word, by_frame = found.video_index, found.text_index
    assert bool((by_word[0] == -1).all())  # an empty text chooses no frame
    assert bool((by_word[:, 0] == -1).all())  # no word chooses a frame of an empty video
    assert bool((by_frame[0] == -1).all())
    assert bool((by_word.transpose(1, 2)[~problem.text_mask] == -1).all())
    assert bool((by_frame.transpose(0, 1).transpose(1, 2)[~problem.video_mask] == -1).all())
    chosen = by_word.clamp(min=0)
    real = problem.video_mask[None].expand(6, 7, 4).gather(2, chosen)
    assert bool((real | (by_word == -1)).all())


def test_minus_one_where_the_zero_won(impl: Implementation) -> None:
    text = torch.tensor([[[1.0, 0.0]]])
    video = torch.tensor([[[-1.0, 0.0], [1.0, 0.0]]])
    problem = Problem(text, video, video_mask=torch.tensor([[1, 0]]))
    _, found = matches(impl, problem)
    assert found.video_index.tolist() == [[[-1]]]
    assert found.text_index.tolist() == [[[0, -1]]]
    problem.options = {"masking": "exclude"}
    assert matches(impl, problem)[1].video_index.tolist() == [[[0]]]


def test_a_real_zero_beats_the_masked_zero(impl: Implementation) -> None:
    text = torch.tensor([[[1.0, 0.0]]])
    video = torch.tensor([[[5.0, 5.0], [0.0, 1.0]]])
    _, found = matches(impl, Problem(text, video, video_mask=torch.tensor([[0, 1]])))
    assert found.video_index.tolist() == [[[1]]]


@pytest.mark.parametrize("length", [2, 7, 33, 64, 255, 256, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_equal_tokens_the_first_one_wins(impl: Implementation, length: int, dtype: torch.dtype) -> None:
    """Copies of one token tie exactly at every position; the lowest index wins and gets the whole gradient."""
    problem = make((3, length, 2, length), 24, dtype)
    problem.text = problem.text[:, :1].expand(3, length, 24).contiguous()
    problem.video = problem.video[:, :1].expand(2, length, 24).contiguous()
    _, found = matches(impl, problem)
    assert not found.video_index.any()
    assert not found.text_index.any()
    problem.options = {"bidirectional": False}
    grad = run(drl_fast.token_interaction, problem.map(lambda x: x.to(impl.device)), torch.ones(3, 2)).grads["video"]
    assert bool(grad[:, 0].any())
    assert not grad[:, 1:].any()


def test_the_first_real_one_of_equal_tokens_wins(impl: Implementation) -> None:
    problem = make((3, 6, 2, 9), 24)
    problem.video = problem.video[:, :1].expand(2, 9, 24).contiguous()
    problem.video_mask = torch.tensor([[0, 0, 1, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0, 1]])
    _, found = matches(impl, problem)
    first = torch.tensor([2, 8])[None, :, None]
    assert bool(((found.video_index == first) | (found.video_index == -1)).all())
    assert bool((found.video_index == first).any())


@pytest.mark.parametrize("masking", MASKINGS)
def test_the_first_of_several_nans_wins(impl: Implementation, masking: str) -> None:
    """As in torch.max, and whatever else is in the batch: videos of other lengths share a vector in the C++ kernels."""
    if impl.name in ("cuda", "interpreter"):
        pytest.skip("the Triton kernels return NaN for such a score and keep no match")
    problem = make((2, 6, 3, 9), 24, masking=masking)
    problem.video[1, 3], problem.video[1, 7] = torch.nan, torch.nan
    problem.text[1, 2], problem.text[1, 4] = torch.nan, torch.nan
    problem.video_mask = torch.ones(3, 9)
    problem.video_mask[1, 8] = 0
    _, found = matches(impl, problem)
    assert found.video_index[0, 1].tolist() == [3] * 6
    assert found.text_index[1, 0].tolist() == [2] * 9
    alone = Problem(problem.text, problem.video[1:2], video_mask=problem.video_mask[1:2], options=problem.options)
    assert torch.equal(matches(impl, alone)[1].video_index[:, 0], found.video_index[:, 1])


@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("bidirectional", [True, False])
def test_the_reference_has_matches_too(masking: str, bidirectional: bool) -> None:
    problem = make(
        (9, 11, 8, 6), 16, torch.float64, masks=("empty", "empty"), masking=masking, bidirectional=bidirectional
    )
    _, (frame, word) = reference.token_interaction(*problem.args(), **problem.options, return_matches=True)
    want = choices(problem)
    assert torch.equal(frame, want.video_index)
    assert word is None if not bidirectional else torch.equal(word, want.text_index)


def test_zero_tokens_tie_with_everything(impl: Implementation) -> None:
    problem = make((3, 6, 2, 9), 24)
    problem.text[1, 3] = 0
    _, found = matches(impl, problem)
    assert found.video_index[1, :, 3].tolist() == [0, 0]


def test_one_direction_has_no_text_index(impl: Implementation) -> None:
    problem = make((3, 6, 2, 9), bidirectional=False)
    _, found = matches(impl, problem)
    assert found.text_index is None
    assert bool((found.video_index == choices(problem).video_index).all())


@pytest.mark.parametrize("empty", [(0, 3, 4, 5), (4, 3, 0, 5)], ids=str)
def test_matches_of_empty_batches(impl: Implementation, empty: tuple[int, int, int, int]) -> None:
    a, nt, b, nv = empty
    _, found = matches(impl, make(empty))
    assert found.video_index.shape == (a, b, nt)
    assert found.text_index.shape == (a, b, nv)


def test_matches_do_not_change_scores_or_gradients(impl: Implementation) -> None:
    problem = make((5, 9, 6, 4), masks=("holes", "holes")).map(lambda x: x.to(impl.device))
    with_matches, _ = drl_fast.token_interaction(*problem.args(), return_matches=True)
    assert torch.equal(with_matches, drl_fast.token_interaction(*problem.args()))
    text = problem.text.requires_grad_()
    logits, found = drl_fast.token_interaction(*problem.args(), return_matches=True)
    assert logits.requires_grad
    assert not found.video_index.requires_grad
    logits.sum().backward()
    assert bool(text.grad.isfinite().all())
