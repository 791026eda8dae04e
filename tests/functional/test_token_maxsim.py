"""Every token's own maximum or soft maximum, against the reference and against the interaction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import drl_fast
from drl_fast import reference
from tests.implementations import Implementation
from tests.oracle import Problem, error, make

SHAPE = (7, 5, 6, 9)
MASKS = [(None, None), ("prefix", "holes"), ("empty", "empty")]
POOLINGS: list[dict[str, Any]] = [
    {},
    {"pooling": "softmax", "temperature": 0.1},
    {"pooling": "logsumexp", "temperature": 0.3},
]


def differentiate(function: Callable[..., Tensor], p: Problem, probe: Tensor, options: dict[str, Any]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (p.text, p.video)]
    values = function(*leaves, p.text_mask, p.video_mask, **options)
    return [values.detach(), *torch.autograd.grad(values, leaves, probe.to(values))]


@pytest.mark.parametrize("pooling", POOLINGS, ids=lambda p: p.get("pooling", "max"))
@pytest.mark.parametrize("masking", ["drl", "exclude", "none"])
@pytest.mark.parametrize("masks", MASKS, ids=str)
def test_against_the_reference(
    impl: Implementation, masks: tuple[str, str], masking: str, pooling: dict[str, Any]
) -> None:
    for dtype in (torch.float32, torch.float64):
        p = make(SHAPE, 16, dtype, masks=masks).map(lambda x: x.to(impl.device))
        probe = torch.randn(7, 6, 5, dtype=torch.float64)
        for normalize in (True, False):
            options = {"masking": masking, "normalize": normalize, **pooling}
            ours = differentiate(drl_fast.token_maxsim, p, probe, options)
            assert ours[0].shape == (7, 6, 5)
            assert ours[0].dtype == dtype
            for got, truth in zip(ours, differentiate(reference.token_maxsim, p.double(), probe, options), strict=True):
                tolerance = 1e-5 if dtype == torch.float32 else 1e-12
                assert error(got, truth) <= tolerance * float(truth.abs().max())


@pytest.mark.parametrize("pooling", POOLINGS, ids=lambda p: p.get("pooling", "max"))
@pytest.mark.parametrize("masking", ["drl", "exclude"])
def test_its_weighted_sums_are_the_interaction(impl: Implementation, masking: str, pooling: dict[str, Any]) -> None:
    p = make(SHAPE, 16, masks=("holes", "empty"), weights=torch.float32).map(lambda x: x.to(impl.device))
    options = {"masking": masking, **pooling}
    by_word = drl_fast.token_maxsim(p.text, p.video, p.text_mask, p.video_mask, **options)
    by_frame = drl_fast.token_maxsim(p.video, p.text, p.video_mask, p.text_mask, **options)
    one_way = torch.einsum("abi,ai->ab", by_word, p.text_weight)
    both = (one_way + torch.einsum("baj,bj->ab", by_frame, p.video_weight)) / 2
    inputs = p.text, p.video, p.text_weight, p.video_weight, p.text_mask, p.video_mask
    torch.testing.assert_close(both, drl_fast.token_interaction(*inputs, **options), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pooling", ["softmax", "logsumexp"])
def test_a_low_temperature_gives_the_maximum(pooling: str) -> None:
    p = make(SHAPE, 16, torch.float64)
    soft = drl_fast.token_maxsim(p.text, p.video, pooling=pooling, temperature=1e-4)
    torch.testing.assert_close(soft, drl_fast.token_maxsim(p.text, p.video), atol=1e-3, rtol=0)


def test_padding_is_never_read(impl: Implementation) -> None:
    p = make(SHAPE, 16, masks=("holes", "holes")).map(lambda x: x.to(impl.device))
    for pooling in POOLINGS:
        want = drl_fast.token_maxsim(p.text, p.video, p.text_mask, p.video_mask, **pooling)
        text = p.text.masked_fill(~p.text_mask[..., None], torch.nan)
        video = p.video.masked_fill(~p.video_mask[..., None], torch.nan)
        assert torch.equal(drl_fast.token_maxsim(text, video, p.text_mask, p.video_mask, **pooling), want)
        assert not want[~p.text_mask[:, None, :].expand_as(want)].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "mean"}, "pooling must be .*'max', 'softmax'.*got 'mean'"),
        ({"pooling": "softmax", "temperature": 0.0}, "temperature must be .*positive.*got 0.0"),
        ({"temperature": 0.5}, "temperature must be 1 with pooling='max'"),
        ({"masking": "mean"}, "masking must be"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        drl_fast.token_maxsim(torch.randn(2, 3, 8), torch.randn(4, 5, 8), **options)
