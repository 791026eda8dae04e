"""Bad arguments of the decorrelation losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import drl_fast
from drl_fast import functional

ALPHAS = {"alpha_on": 0.11, "alpha_off": 0.06}


def cdcr(**changes: Any) -> Tensor:
    arguments: dict[str, Any] = {"text": torch.randn(4, 3, 8), "video": torch.randn(4, 5, 8), **ALPHAS}
    return functional.cdcr_loss(**{**arguments, **changes})


def cross(**changes: Any) -> Tensor:
    return functional.cross_correlation_loss(**{"x": torch.randn(6, 8), "y": torch.randn(6, 8), **ALPHAS, **changes})


def two_words() -> Tensor:
    mask = torch.zeros(4, 3)
    mask[1, :2] = 1
    return mask


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"video": torch.randn(3, 5, 8)}, "video must have B = 4 rows to pair with text, got 3"),
        ({"text": torch.randn(4, 8)}, r"text must be \(A, Nt, D\)"),
        ({"video": torch.randn(4, 5, 7)}, "video must have D = 8"),
        ({"text": torch.randn(0, 3, 8), "video": torch.randn(0, 5, 8)}, "text must hold at least 2 tokens"),
        ({"text": torch.randn(1, 1, 8), "video": torch.randn(1, 5, 8)}, "text must hold at least 2 .* = 1 x 1"),
        ({"text": torch.randn(1, 3, 8), "video": torch.randn(1, 1, 8)}, "video must hold at least 2 tokens"),
        ({"text_weight": torch.rand(4, 3)}, "video_weight must be given together with text_weight"),
        ({"video_weight": torch.rand(4, 5)}, "text_weight must be given together with video_weight"),
        ({"text_weight": torch.rand(4, 4), "video_weight": torch.rand(4, 5)}, r"text_weight must be .* \(4, 3\)"),
        ({"text_mask": torch.ones(4, 2)}, r"text_mask must be .*\(4, 3\)"),
        ({"text_mask": torch.zeros(4, 3)}, "text_mask and video_mask must leave at least 2 .* got 0 and 0"),
        (
            {"text_mask": torch.eye(4, 3), "video_mask": torch.eye(4, 5)[[0]].mul(torch.eye(4)[:, :1])},
            "must leave at least 2 .* got 1 and 1",
        ),
        ({"alpha_on": -0.1}, "alpha_on must be finite and >= 0, got -0.1"),
        ({"alpha_off": float("nan")}, "alpha_off must be finite and >= 0, got nan"),
        ({"alpha_off": float("inf")}, "alpha_off must be finite"),
    ],
)
def test_cdcr_values(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cdcr(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": [1, 2]}, "text must be a torch.Tensor"),
        ({"text": torch.zeros(4, 3, 8, dtype=torch.int64)}, "text must be float32"),
        ({"video": torch.randn(4, 5, 8).double()}, "video must have text's dtype"),
        ({"alpha_on": "0.1"}, "alpha_on must be a number"),
        ({"alpha_on": True}, "alpha_on must be a number"),
        ({"alpha_off": None}, "alpha_off must be a number"),
        ({"process_group": "world"}, "process_group must be a torch.distributed.ProcessGroup"),
    ],
)
def test_cdcr_types(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        cdcr(**changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"y": torch.randn(5, 8)}, ValueError, r"y must be \(N, D\) = \(6, 8\) to pair with x"),
        ({"y": torch.randn(6, 7)}, ValueError, "y must have D = 8"),
        ({"x": torch.randn(6, 2, 8)}, ValueError, r"x must be \(N, D\), got shape \(6, 2, 8\)"),
        ({"x": torch.randn(6, 0), "y": torch.randn(6, 0)}, ValueError, "x must be .* at least one channel"),
        ({"alpha_on": 10**400}, ValueError, "alpha_on must be finite and >= 0, got inf"),
        ({"x": torch.randn(1, 8), "y": torch.randn(1, 8)}, ValueError, "x must hold at least 2 tokens"),
        ({"x": torch.randn(0, 8), "y": torch.randn(0, 8)}, ValueError, "x must hold at least 2 tokens"),
        ({"weight": torch.rand(5)}, ValueError, r"weight must be \(N,\) = \(6,\)"),
        ({"weight": torch.ones(6, dtype=torch.int64)}, TypeError, "weight must be floating point"),
        ({"divisor": 0}, ValueError, "divisor must be positive and finite, got 0"),
        ({"divisor": float("nan")}, ValueError, "divisor must be positive and finite"),
        ({"divisor": "6"}, TypeError, "divisor must be a number, got str '6'; leave it out"),
        ({"alpha_on": -1}, ValueError, "alpha_on must be finite and >= 0"),
        ({"x": None}, TypeError, "x must be a torch.Tensor"),
    ],
)
def test_cross_correlation(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cross(**changes)


def test_two_tokens_are_enough() -> None:
    """Also if they are in one pair and all other pairs are empty."""
    frames = torch.zeros(4, 5)
    frames[:, 3:] = 1
    assert cdcr(text_mask=two_words(), video_mask=frames).isfinite()
    assert cross(x=torch.randn(2, 8), y=torch.randn(2, 8)).isfinite()


def test_weights_of_a_layer() -> None:
    """``WTI.weights`` returns the weights that the losses take."""
    layer = drl_fast.WTI(8, arch=1)
    text, video = torch.randn(4, 3, 8), torch.randn(4, 5, 8)
    weights = layer.weights(text, video, two_words())
    torch.testing.assert_close(
        layer(text, video, two_words()), drl_fast.token_interaction(text, video, *weights, two_words())
    )
    cdcr(text=text, video=video, text_weight=weights[0], video_weight=weights[1]).backward()
    assert layer.text_weight_fc.weight.grad.abs().sum() > 0
    assert drl_fast.WTI(8, bidirectional=False).weights(text, video)[1] is None
