"""Losses of logit matrices with positives off the diagonal, one direction, label smoothing, and the sigmoid loss."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from drl_fast import info_nce, reference, sigmoid_loss

POSITIVES = {
    "diagonal": None,
    "columns": torch.tensor([2, 0, -1, 2, 6, -1]),
    "int16": torch.tensor([2, 0, -1, 2, 6, -1], dtype=torch.int16),
    "matrix": torch.tensor(
        [[1, 0, 1, 0, 0, 0, 0], [0] * 7, [0, 1, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0, 1], [1] * 7, [0] * 7]
    )
    > 0,
}


def logits_for(case: str) -> Tensor:
    return torch.randn(6, 6 if case == "diagonal" else 7)


def check(ours: Any, truth: Any, logits: Tensor) -> None:
    """Compare a loss and its gradient with the float64 reference."""
    x, y = logits.clone().requires_grad_(), logits.double().requires_grad_()
    loss, want = ours(x), truth(y)
    loss.backward()
    want.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.detach().double(), want.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", POSITIVES)
@pytest.mark.parametrize("direction", ["both", "t2v", "v2t"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_info_nce_against_the_reference(case: str, direction: str, smoothing: float) -> None:
    options = {"positives": POSITIVES[case], "direction": direction, "label_smoothing": smoothing}
    check(lambda x: info_nce(x, 14.0, **options), lambda x: reference.info_nce(x, 14.0, **options), logits_for(case))


@pytest.mark.parametrize("case", POSITIVES)
def test_sigmoid_against_the_reference(case: str) -> None:
    positives = POSITIVES[case]
    check(
        lambda x: sigmoid_loss(x, 10.0, -10.0, positives),
        lambda x: reference.sigmoid_loss(x, 10.0, -10.0, positives),
        logits_for(case),
    )


def test_one_direction_is_cross_entropy() -> None:
    """Also with torch's label smoothing."""
    logits, target = torch.randn(5, 9), torch.tensor([3, 8, 0, 3, 1])
    for smoothing in (0.0, 0.2):
        want = F.cross_entropy(logits * 7, target, label_smoothing=smoothing)
        got = info_nce(logits, 7.0, positives=target, direction="t2v", label_smoothing=smoothing)
        torch.testing.assert_close(got, want)
        got = info_nce(
            logits.T, 7.0, positives=F.one_hot(target, 9).T.bool(), direction="v2t", label_smoothing=smoothing
        )
        torch.testing.assert_close(got, want)


def test_two_positives_by_hand() -> None:
    """The mean of -log softmax over both; each stays in the other's denominator."""
    logits = torch.tensor([[1.0, 2.0, 0.0]], dtype=torch.float64)
    total = math.log(math.exp(1) + math.exp(2) + 1)
    got = info_nce(logits, 1.0, positives=torch.tensor([[True, True, False]]), direction="t2v")
    assert got.item() == pytest.approx(total - 1.5)


def test_sigmoid_by_hand() -> None:
    logits = torch.tensor([[0.5, -0.5]], dtype=torch.float64)
    got = sigmoid_loss(logits, 2.0, 0.25, torch.tensor([0]))
    assert got.item() == pytest.approx(math.log1p(math.exp(-1.25)) + math.log1p(math.exp(-0.75)))


def test_scale_and_bias_get_gradients() -> None:
    logits = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    scale, bias = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (10.0, -10.0))
    assert torch.autograd.gradcheck(sigmoid_loss, (logits, scale, bias))
    positives = torch.tensor([1, -1, 1, 3])
    assert torch.autograd.gradcheck(lambda x, s: info_nce(x, s, positives=positives), (logits, scale))


def test_large_logits_do_not_overflow() -> None:
    for loss in (info_nce(torch.randn(4, 4) * 1e4, 100.0), sigmoid_loss(torch.randn(4, 4) * 1e4, 100.0, -10.0)):
        assert bool(loss.isfinite())


def test_a_row_without_a_positive_may_hold_anything() -> None:
    for filler in (-math.inf, math.nan):
        logits = torch.randn(3, 4)
        logits[2] = filler
        logits.requires_grad_()
        options = {"direction": "t2v", "label_smoothing": 0.1}
        loss = info_nce(logits, 10.0, positives=torch.tensor([0, 1, -1]), **options)
        loss.backward()
        want = info_nce(logits[:2], 10.0, positives=torch.tensor([0, 1]), **options)
        assert loss.item() == pytest.approx(want.item())
        assert bool(logits.grad.isfinite().all())
        assert not logits.grad[2].any()


L = torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, r"logits must be square.* got \(3, 4\); say with positives="),
        ({"positives": torch.tensor([0, 1])}, ValueError, r"positives must be \(A,\) = \(3,\) integers.*shape \(2,\)"),
        ({"positives": torch.zeros(4, 3).bool()}, ValueError, r"\(A, B\) = \(3, 4\) bool, got .*\(4, 3\)"),
        ({"positives": torch.tensor([0, 1, 4])}, ValueError, r"positives must lie in 0\.\.3.*got 0\.\.4"),
        ({"positives": torch.tensor([0, 1, -2])}, ValueError, r"positives must lie in 0\.\.3.*got -2\.\.1"),
        (
            {"positives": torch.tensor([-1, -1, -1])},
            ValueError,
            "positives must hold at least one positive pair, got none",
        ),
        (
            {"positives": torch.zeros(3, 4).bool()},
            ValueError,
            "positives must hold at least one positive pair, got none",
        ),
        ({"positives": torch.zeros(3)}, TypeError, r"positives must be integers.*float32.*positives\.long\(\)"),
        ({"positives": [0, 1, 2]}, TypeError, r"positives must be a torch.Tensor.*as_tensor\(positives\)"),
        (
            {"positives": torch.zeros(3, device="meta").long()},
            ValueError,
            "positives must be on the logits' device cpu",
        ),
    ],
)
def test_bad_positives(options: dict[str, Any], error: type[Exception], message: str) -> None:
    for loss in (lambda **o: info_nce(L, 1.0, **o), lambda **o: sigmoid_loss(L, 1.0, -1.0, **o)):
        with pytest.raises(error, match=message) as caught:
            loss(**options)
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"direction": "text"}, ValueError, "direction must be one of 'both', 't2v', 'v2t', got 'text'"),
        ({"label_smoothing": 1.0}, ValueError, r"label_smoothing must be in \[0, 1\), got 1.0"),
        ({"label_smoothing": -0.1}, ValueError, r"label_smoothing must be in \[0, 1\), got -0.1"),
        ({"label_smoothing": None}, TypeError, "label_smoothing must be a number"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        info_nce(torch.zeros(3, 3), 1.0, **options)


@pytest.mark.parametrize(
    ("bias", "error", "message"),
    [
        (math.nan, ValueError, "logit_bias must be finite, got nan; SigLIP starts at -10"),
        (None, TypeError, "logit_bias must be a number"),
        (torch.zeros(2), ValueError, r"logit_bias must be a scalar, got shape \(2,\)"),
    ],
)
def test_bad_bias(bias: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sigmoid_loss(torch.zeros(3, 3), 10.0, bias)
