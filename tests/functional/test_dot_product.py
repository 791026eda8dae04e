"""DP: the end token against the mean frame."""

from __future__ import annotations

import math

import pytest
import torch

from drl_fast import reference
from drl_fast.functional import dot_product
from tests.oracle import ATOL, Problem, error, make, run

MASKS = [(None, None), ("prefix", "prefix"), ("holes", "holes"), ("empty", "empty")]


def dp(function: object, p: Problem, probe: torch.Tensor) -> dict[str, torch.Tensor]:
    def call(text: torch.Tensor, video: torch.Tensor, *rest: torch.Tensor | None) -> torch.Tensor:
        return function(text, video, *rest[2:])

    result = run(call, p, probe)
    return {"logits": result.logits, **result.grads}


@pytest.mark.parametrize("masks", MASKS, ids=str)
@pytest.mark.parametrize("dtype", ATOL, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (5, 9, 6, 4), (0, 2, 3, 4)], ids=str)
def test_against_the_reference(masks: tuple[str, str], dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    p = make(shape, 16, dtype, masks=masks)
    probe = torch.randn(p.pairs, dtype=torch.float64)
    ours, truth = dp(dot_product, p, probe), dp(reference.dot_product, p.double(), probe)
    assert ours["logits"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for name, want in truth.items():
        scale = float(want.abs().max()) if want.numel() else 0.0
        atol = 1e-12 if dtype == torch.float64 else 3e-6
        if name != "logits" and ours[name].dtype != torch.float64:
            atol = max(atol, torch.finfo(dtype).eps)
        assert error(ours[name], want) <= atol * max(scale, 1e-3)


def test_last_real_token_is_the_largest_real_index() -> None:
    text = torch.eye(4)[None]
    video = torch.eye(4)[:, None]
    mask = torch.tensor([[1, 0, 5, 0]])
    assert dot_product(text, video, mask).tolist() == [[0, 0, 1, 0]]
    assert dot_product(text, video).tolist() == [[0, 0, 0, 1]]


def test_frames_are_normalised_before_the_mean() -> None:
    text = torch.tensor([[[1.0, 0.0]]])
    video = torch.tensor([[[100.0, 0.0], [0.0, 1.0], [7.0, 7.0]]])
    got = dot_product(text, video, None, torch.tensor([[1, 1, 0]])).item()
    assert got == pytest.approx(math.sqrt(0.5))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_masked_features_reach_nothing(poison: float) -> None:
    clean, dirty = make((5, 9, 6, 4), masks=("empty", "empty")), make((5, 9, 6, 4), masks=("empty", "empty"))
    dirty.text[~dirty.text_mask] = poison
    dirty.video[~dirty.video_mask] = poison
    want, got = dp(dot_product, clean, torch.ones(5, 6)), dp(dot_product, dirty, torch.ones(5, 6))
    for name, value in want.items():
        assert torch.equal(got[name], value)
    assert not want["logits"][0].any()
    assert not want["logits"][:, 0].any()
    assert not want["text"][0].any()
    assert not want["video"][0].any()


def test_zero_vectors_have_no_gradient() -> None:
    p = make((3, 2, 2, 3))
    p.text[1], p.video[0] = 0, 0
    got = dp(dot_product, p, torch.ones(3, 2))
    assert all(bool(x.isfinite().all()) for x in got.values())
    assert not got["text"][1].any()
    assert not got["video"][0].any()


def test_compiles_and_ignores_autocast() -> None:
    torch._dynamo.reset()
    p = make((5, 9, 6, 4), 16, masks=("holes", "empty"))
    args = (p.text, p.video, p.text_mask, p.video_mask)
    compiled = torch.compile(dot_product, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), dot_product(*args))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = dot_product(*args)
    want = dot_product(p.text.bfloat16(), p.video.bfloat16(), p.text_mask, p.video_mask)
    assert torch.equal(got, want)


def test_a_device_without_autocast() -> None:
    p = make((5, 9, 6, 4), 16).map(lambda x: x.to("meta"))
    assert dot_product(p.text, p.video).shape == (5, 6)


def test_gradcheck() -> None:
    p = make((3, 4, 2, 5), 6, torch.float64, masks=("holes", "prefix"))
    leaves = (p.text.requires_grad_(), p.video.requires_grad_())
    assert torch.autograd.gradcheck(lambda t, v: dot_product(t, v, p.text_mask, p.video_mask), leaves)
