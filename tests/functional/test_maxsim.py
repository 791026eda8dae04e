"""ColBERT's late interaction: the token interaction in one direction, with other defaults."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import drl_fast
from drl_fast import reference
from tests.implementations import Implementation
from tests.oracle import ATOL, Problem, error, make

MASKS = [(None, None), ("prefix", "prefix"), ("holes", "empty"), ("empty", "holes")]


def colbert(query: Tensor, document: Tensor, q_mask: Tensor | None, d_mask: Tensor | None) -> Tensor:
    """Score with a plain loop."""
    scores = torch.zeros(len(query), len(document), dtype=query.dtype)
    for a, q in enumerate(query):
        for b, d in enumerate(document):
            q_real = q if q_mask is None else q[q_mask[a]]
            d_real = d if d_mask is None else d[d_mask[b]]
            if len(q_real) and len(d_real):
                scores[a, b] = (q_real @ d_real.T).amax(1).sum()
    return scores


@pytest.mark.parametrize("masks", MASKS, ids=str)
@pytest.mark.parametrize("dtype", ATOL, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_against_the_loop(impl: Implementation, masks: tuple[str, str], dtype: torch.dtype, normalize: bool) -> None:
    p = make((7, 5, 6, 20), 32, dtype, masks=masks)
    args = [None if x is None else x.to(impl.device) for x in (p.text, p.video, p.text_mask, p.video_mask)]
    got = drl_fast.maxsim(*args, normalize=normalize)
    d = p.double()
    prepare = reference.unit if normalize else lambda x: x
    want = colbert(prepare(d.text), prepare(d.video), p.text_mask, p.video_mask)
    assert error(got, want) <= max(1e-5, 3 * ATOL[dtype] if dtype.itemsize == 2 else 0) * float(want.abs().max())


def test_an_empty_document_or_query_scores_zero(impl: Implementation) -> None:
    p = make((4, 5, 3, 6), masks=("empty", "empty")).map(lambda x: x.to(impl.device))
    p.text.requires_grad_()
    scores = drl_fast.maxsim(p.text, p.video, p.text_mask, p.video_mask)
    scores.sum().backward()
    assert not scores[0].any()
    assert not scores[:, 0].any()
    assert not p.text.grad[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("weight", [torch.float16, torch.float32], ids=str)
def test_weights_and_gradients(impl: Implementation, dtype: torch.dtype, weight: torch.dtype) -> None:
    p = make((7, 5, 6, 9), 16, dtype, masks=("holes", "prefix"), weights=weight)
    probe = torch.randn(7, 6, dtype=torch.float64)

    def differentiate(function: Callable[..., Tensor], q: Problem) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (q.text, q.video, q.text_weight)]
        scores = function(*leaves[:2], q.text_mask, q.video_mask, query_weight=leaves[2])
        return [scores.detach(), *torch.autograd.grad(scores, leaves, probe.to(scores))]

    ours = differentiate(drl_fast.maxsim, p.map(lambda x: x.to(impl.device)))
    assert ours[3].dtype == weight
    for got, truth in zip(ours, differentiate(reference.maxsim, p.double()), strict=True):
        tolerance = max(1e-5, float(torch.finfo(got.dtype).eps))
        assert error(got, truth) <= tolerance * float(truth.abs().max())


def test_equals_one_direction_of_the_interaction(impl: Implementation) -> None:
    p = make((7, 5, 6, 9), masks=("holes", "prefix")).map(lambda x: x.to(impl.device))
    ones = torch.ones(7, 5, device=impl.device)
    want = drl_fast.token_interaction(
        p.text,
        p.video,
        ones,
        None,
        p.text_mask,
        p.video_mask,
        normalize=False,
        masking="exclude",
        bidirectional=False,
    )
    assert torch.equal(drl_fast.maxsim(p.text, p.video, p.text_mask, p.video_mask), want)


def test_errors_name_query_and_document() -> None:
    q, d = torch.randn(2, 3, 8), torch.randn(4, 5, 8)
    with pytest.raises(ValueError, match="document must have D = 8 channels to match query, got 9"):
        drl_fast.maxsim(q, torch.randn(4, 5, 9))
    with pytest.raises(ValueError, match=r"query_mask must be \(A, Nt\) = \(2, 3\) to match query, got \(2, 4\)"):
        drl_fast.maxsim(q, d, torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"document_mask must be .* to match document"):
        drl_fast.maxsim(q, d, None, torch.ones(4, 4))
    with pytest.raises(ValueError, match=r"query_weight must be \(A, Nt\) = \(2, 3\) to match query"):
        drl_fast.maxsim(q, d, query_weight=torch.ones(3, 2))
    with pytest.raises(TypeError, match=r"query must be a torch\.Tensor, got list"):
        drl_fast.maxsim([[0.0]], d)
