"""The symmetric contrastive loss."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from drl_fast import info_nce, reference


@pytest.mark.parametrize("size", [1, 2, 7, 50])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100])
def test_against_the_reference(size: int, scale: float) -> None:
    logits = torch.randn(size, size)
    ours, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
    loss, truth = info_nce(ours, scale), reference.info_nce(theirs, scale)
    loss.backward()
    truth.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-6 * scale)


def test_by_hand() -> None:
    logits = torch.tensor([[2.0, 0.0], [1.0, 3.0]], dtype=torch.float64)
    rows = math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-2))
    columns = math.log(1 + math.exp(-1)) + math.log(1 + math.exp(-3))
    assert info_nce(logits, 1.0).item() == pytest.approx((rows + columns) / 4)


def test_one_pair_scores_zero() -> None:
    logits = torch.tensor([[0.3]], requires_grad=True)
    loss = info_nce(logits, 100.0)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.item() == 0


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_scale_tensor_gets_a_gradient(shape: tuple[int, ...]) -> None:
    logits = torch.randn(5, 5, dtype=torch.float64)
    scale = torch.full(shape, 2.5, dtype=torch.float64, requires_grad=True)
    info_nce(logits, scale).backward()
    eps = 1e-6
    slope = (info_nce(logits, 2.5 + eps) - info_nce(logits, 2.5 - eps)) / (2 * eps)
    assert scale.grad.shape == shape
    assert scale.grad.item() == pytest.approx(slope.item(), rel=1e-6)


def test_numpy_scales_are_numbers() -> None:
    logits = torch.randn(3, 3)
    assert torch.equal(info_nce(logits, np.float32(7.0)), info_nce(logits, 7.0))


def test_gradcheck() -> None:
    logits = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(info_nce, (logits, scale))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    logits = torch.randn(32, 32).to(dtype)
    loss = info_nce(logits, 100.0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reference.info_nce(logits.double(), 100.0).item(), rel=1e-5)


def test_large_logits_do_not_overflow() -> None:
    assert bool(info_nce(torch.randn(4, 4) * 1e4, 100.0).isfinite())


def test_compiles() -> None:
    torch._dynamo.reset()
    logits = torch.randn(6, 6)
    compiled = torch.compile(info_nce, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, torch.tensor(7.0)), info_nce(logits, 7.0))


@pytest.mark.parametrize(
    ("logits", "scale", "error", "message"),
    [
        (torch.zeros(3, 4), 1.0, ValueError, r"logits must be square.*\(3, 4\)"),
        (torch.zeros(3), 1.0, ValueError, r"logits must be \(A, B\)"),
        (torch.zeros(0, 0), 1.0, ValueError, r"logits must hold at least one pair.*\(0, 0\)"),
        (torch.zeros(2, 2, dtype=torch.int64), 1.0, TypeError, "logits must be floating point.*int64"),
        ([[1.0]], 1.0, TypeError, "logits must be a torch.Tensor"),
        (torch.zeros(2, 2), 0.0, ValueError, "logit_scale must be positive and finite.*0.0"),
        (torch.zeros(2, 2), -3, ValueError, "logit_scale must be positive.*-3"),
        (torch.zeros(2, 2), math.nan, ValueError, "logit_scale must be positive and finite.*nan"),
        (torch.zeros(2, 2), math.inf, ValueError, "logit_scale must be positive and finite.*inf"),
        (torch.zeros(2, 2), torch.zeros(2), ValueError, r"logit_scale must be a scalar.*\(2,\)"),
        (torch.zeros(2, 2), torch.ones((), dtype=torch.cfloat), TypeError, "logit_scale must be real.*complex64"),
        (torch.zeros(2, 2), "100", TypeError, "logit_scale must be a number.*'100'"),
        (torch.zeros(2, 2), True, TypeError, "logit_scale must be a number.*True"),
    ],
)
def test_bad_input(logits: object, scale: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        info_nce(logits, scale)
