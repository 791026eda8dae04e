"""CDCR and the cross-correlation loss: values and gradients of every implementation against the float64 reference.

The error rule is that of tests/oracle.py: at most twice the error of plain PyTorch in the same dtype, plus an atol.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from drl_fast import functional, reference
from tests.implementations import Implementation
from tests.oracle import ATOL, assert_close, make_mask, make_weight

FORMS = {"diagonal": {"alpha_on": 0.11, "alpha_off": 0.0}, "full": {"alpha_on": 0.11, "alpha_off": 0.06}}
MASKS = {
    "none": (None, None),
    "prefix": ("prefix", "prefix"),
    "holes": ("holes", "holes"),
    "empty rows": ("empty", "holes"),
    "video only": (None, "empty"),
}
LEAVES = ("text", "video", "text_weight", "video_weight")


@dataclass
class Pairs:
    """The arguments of one call of ``cdcr_loss`` or, with two matrices, of ``cross_correlation_loss``."""

    text: Tensor
    video: Tensor
    text_weight: Tensor | None = None
    video_weight: Tensor | None = None
    text_mask: Tensor | None = None
    video_mask: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return "cdcr_loss" if self.text.dim() == 3 else "cross_correlation_loss"

    def call(self, module: Any) -> Tensor:
        args = [self.text, self.video, self.text_weight]
        if self.text.dim() == 3:
            args += [self.video_weight, self.text_mask, self.video_mask]
        return getattr(module, self.name)(*args, **self.options)

    def map(self, change: Callable[[Tensor], Tensor]) -> Pairs:
        names = (*LEAVES, "text_mask", "video_mask")
        return replace(self, **{n: None if (x := getattr(self, n)) is None else change(x) for n in names})

    def grads(self, module: Any) -> tuple[Tensor, dict[str, Tensor]]:
        leaves = {n: x.detach().requires_grad_() for n in LEAVES if (x := getattr(self, n)) is not None}
        loss = replace(self, **leaves).call(module)
        return loss.detach(), dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def pairs(
    shape: tuple[int, int, int],
    dim: int = 17,
    dtype: torch.dtype = torch.float32,
    masks: str = "none",
    weights: torch.dtype | None = torch.float32,
    **options: Any,
) -> Pairs:
    """Draw a random problem of shape (B, Nt, Nv)."""
    b, nt, nv = shape
    kinds = MASKS[masks]
    return Pairs(
        torch.randn(b, nt, dim, dtype=torch.float64).to(dtype),
        torch.randn(b, nv, dim, dtype=torch.float64).to(dtype),
        make_weight(weights, b, nt),
        make_weight(weights, b, nv),
        make_mask(kinds[0], b, nt),
        make_mask(kinds[1], b, nv),
        options or FORMS["full"],
    )


def rows(count: int, dim: int, dtype: torch.dtype = torch.float32, weighted: bool = True, **options: Any) -> Pairs:
    """Draw a random problem of two (N, D) matrices."""
    x, y = (torch.randn(count, dim, dtype=torch.float64).to(dtype) for _ in range(2))
    return Pairs(x, y, torch.rand(count) if weighted else None, options=options or FORMS["full"])


def judge(problem: Pairs, device: str, floor: float = 0.0) -> dict[str, Tensor]:
    """Compare with the reference. A true gradient below ``floor`` counts as rounding."""
    loss, grads = problem.map(lambda x: x.to(device)).grads(functional)
    truth, true_grads = problem.map(lambda x: x.double() if x.is_floating_point() else x).grads(reference)
    rival, rival_grads = problem.grads(reference)
    dtype = problem.text.dtype
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.shape == ()
    assert_close("loss", loss, rival, truth, ATOL[dtype], 1e-3)
    for name, grad in grads.items():
        given = getattr(problem, name)
        assert grad.dtype == given.dtype
        assert grad.shape == given.shape
        # The gradient through mean and deviation cancels most of the direct one, once per token that chose a partner.
        atol = max(10 * ATOL[dtype], 2 * torch.finfo(grad.dtype).eps)
        assert_close(f"grad of {name}", grad, rival_grads[name], true_grads[name], atol, floor)
    return grads


SHAPES = [(4, 1, 1), (6, 5, 4), (7, 4, 9), (33, 9, 5), (16, 32, 12), (9, 1, 6), (9, 6, 1), (2, 300, 3), (2, 3, 300)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weights", [None, torch.float32], ids=["plain", "weighted"])
def test_shapes(impl: Implementation, shape: tuple[int, int, int], form: str, weights: torch.dtype | None) -> None:
    judge(pairs(shape, weights=weights, **FORMS[form]), impl.device)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("shape", [(12, 9, 5), (12, 4, 7)], ids=str)
def test_masks(impl: Implementation, shape: tuple[int, int, int], masks: str, form: str) -> None:
    judge(pairs(shape, 24, masks=masks, **FORMS[form]), impl.device)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dim", [3, 16, 17, 64, 512, 1030])
def test_widths(impl: Implementation, dim: int, form: str) -> None:
    judge(pairs((10, 8, 5), dim, masks="holes", **FORMS[form]), impl.device)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weights", [None, torch.float16, torch.float32], ids=str)
def test_dtypes(impl: Implementation, dtype: torch.dtype, form: str, weights: torch.dtype | None) -> None:
    judge(pairs((12, 9, 6), 40, dtype, "holes", weights, **FORMS[form]), impl.device)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [2, 3, 65, 300])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_rows(impl: Implementation, count: int, form: str, weighted: bool) -> None:
    # Any two rows standardise to +-0.7, so the true gradient is 0, as a sum of parts that are not.
    judge(rows(count, 33, weighted=weighted, **FORMS[form]), impl.device, floor=10.0 if count == 2 else 0.0)


@pytest.mark.parametrize("form", FORMS)
def test_rows_in_blocks(impl: Implementation, form: str) -> None:
    """More rows than one block of the full form's products holds."""
    judge(rows(1500, 256, **FORMS[form]), impl.device)
    judge(pairs((90, 6, 5), 768, masks="holes", **FORMS[form]), impl.device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rows_in_half_precision(impl: Implementation, dtype: torch.dtype) -> None:
    judge(rows(50, 24, dtype, divisor=20.0, **FORMS["full"]), impl.device)


def test_divisor(impl: Implementation) -> None:
    judge(rows(20, 8, divisor=7, **FORMS["full"]), impl.device)
    x = rows(20, 8).map(lambda x: x.to(impl.device))
    default, given = (replace(x, options={**x.options, **extra}).call(functional) for extra in ({}, {"divisor": 20}))
    torch.testing.assert_close(default, given)


@pytest.mark.parametrize("form", FORMS)
def test_a_constant_channel_is_left_out(impl: Implementation, form: str) -> None:
    """The loss is finite, and the channel gets no gradient."""
    problem = rows(40, 9, **FORMS[form])
    problem.text[:, 3] = 1.7
    problem.video[:, 5] = -0.3
    grads = judge(problem, impl.device)
    assert (grads["text"][:, 3] == 0).all()
    assert (grads["video"][:, 5] == 0).all()
    assert grads["text"].isfinite().all()


@pytest.mark.parametrize("spread", [1e-4, 1e-6])
@pytest.mark.parametrize("form", FORMS)
def test_a_nearly_constant_channel_is_accurate(impl: Implementation, form: str, spread: float) -> None:
    """The error of a float32 mean would be as large as the deviation."""
    problem = rows(200, 12, weighted=False, **FORMS[form])
    problem.text[:, 2] = 1 + spread * torch.randn(200)
    loss, grads = problem.map(lambda x: x.to(impl.device)).grads(functional)
    truth, true_grads = problem.map(lambda x: x.double()).grads(reference)
    torch.testing.assert_close(loss.double().cpu(), truth, rtol=1e-5, atol=0)
    for name, grad in grads.items():
        scale = true_grads[name].abs().amax(0)
        assert ((grad.cpu() - true_grads[name]).abs().amax(0) <= 1e-4 * scale).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_masked_tokens_are_never_read(impl: Implementation, form: str, bad: float) -> None:
    clean = pairs((9, 7, 5), 16, masks="empty rows", **FORMS[form])
    dirty = clean.map(torch.clone)
    for features, mask in ((dirty.text, clean.text_mask), (dirty.video, clean.video_mask)):
        features[~mask] = bad
    # The first pair has no word, so its frames are not read.
    dirty.video[0] = bad
    want, got = (x.map(lambda x: x.to(impl.device)).grads(functional) for x in (clean, dirty))
    assert torch.equal(want[0], got[0])
    for name, grad in got[1].items():
        assert torch.equal(want[1][name], grad)
    for grad, mask in ((got[1]["text"], clean.text_mask), (got[1]["video"], clean.video_mask)):
        assert (grad[~mask] == 0).all()


def test_a_real_nan_is_not_hidden(impl: Implementation) -> None:
    problem = pairs((5, 4, 3), 8)
    problem.text[2, 1, 3] = float("nan")
    assert problem.map(lambda x: x.to(impl.device)).call(functional).isnan()


@pytest.mark.parametrize("form", FORMS)
def test_zero_tokens(impl: Implementation, form: str) -> None:
    """They stay 0 when normalised, and have no gradient."""
    problem = pairs((9, 4, 5), 16, **FORMS[form])
    problem.text[1, 2] = 0
    problem.video[3, 0] = 0
    grads = judge(problem, impl.device)
    assert (grads["text"][1, 2] == 0).all()
    assert (grads["video"][3, 0] == 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_strides(impl: Implementation, form: str) -> None:
    problem = pairs((9, 6, 4), 20, masks="holes", **FORMS[form]).map(lambda x: x.to(impl.device))
    for change in (
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.repeat(2, *[1] * (x.dim() - 1))[::2],
    ):
        want = problem.map(change).map(torch.Tensor.contiguous).grads(functional)
        got = problem.map(change).grads(functional)
        assert torch.equal(want[0], got[0])
        assert all(torch.equal(want[1][name], grad) for name, grad in got[1].items())


@pytest.mark.parametrize("form", FORMS)
def test_equal_bits(cpu_impl: Implementation, form: str) -> None:
    """From run to run; in the diagonal form also for any number of threads. The full form uses torch.mm."""
    problem = pairs((40, 12, 8), 64, masks="holes", **FORMS[form])
    found = []
    for threads in (2, 2, 1, 3, 8):
        torch.set_num_threads(threads)
        found.append(problem.grads(functional))
    for loss, grads in found[1 : len(found) if form == "diagonal" else 2]:
        assert torch.equal(loss, found[0][0])
        assert all(torch.equal(grads[name], grad) for name, grad in found[0][1].items())


def test_gradient_of_one_input_only(impl: Implementation) -> None:
    problem = pairs((6, 4, 3), 8).map(lambda x: x.to(impl.device))
    _, everything = problem.grads(functional)
    for name in LEAVES:
        leaf = getattr(problem, name).detach().requires_grad_()
        (grad,) = torch.autograd.grad(replace(problem, **{name: leaf}).call(functional), leaf)
        assert torch.equal(grad, everything[name])


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(cpu_impl: Implementation, form: str) -> None:
    problem = pairs((5, 3, 4), 6, torch.float64, "holes", torch.float64, **FORMS[form])

    def loss(*leaves: Tensor) -> Tensor:
        return replace(problem, **dict(zip(LEAVES, leaves, strict=True))).call(functional)

    assert torch.autograd.gradcheck(loss, [getattr(problem, n).requires_grad_() for n in LEAVES], fast_mode=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("wanted", [LEAVES, *((name,) for name in LEAVES)], ids=" ".join)
def test_second_derivatives_raise(impl: Implementation, form: str, wanted: tuple[str, ...]) -> None:
    """On every path: a dropped term would make the second derivative of a sum with another loss wrong."""
    problem = pairs((5, 3, 4), 6, **FORMS[form]).map(lambda x: x.to(impl.device))
    leaves = [getattr(problem, name).requires_grad_() for name in wanted]
    loss = problem.call(functional)
    grads = torch.autograd.grad(loss, leaves, create_graph=True)
    with pytest.raises(NotImplementedError, match="CDCR has no second derivative"):
        (loss + sum(grad.square().sum() for grad in grads)).backward()


def test_functorch(impl: Implementation) -> None:
    problem = pairs((5, 3, 4), 6).map(lambda x: x.to(impl.device))
    got = torch.func.grad(lambda text: replace(problem, text=text).call(functional))(problem.text)
    assert torch.equal(got, problem.grads(functional)[1]["text"])


def test_tangents_raise(impl: Implementation) -> None:
    problem = pairs((5, 3, 4), 6).map(lambda x: x.to(impl.device))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(problem.text, torch.ones_like(problem.text))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            replace(problem, text=dual).call(functional)


def test_small_off_diagonal_entries_are_accurate(impl: Implementation) -> None:
    """After training C is nearly the identity. The sum of all squares minus the diagonal's would lose their digits."""
    signs = torch.ones(1, 1)
    while len(signs) < 128:
        signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])
    x = signs[:, 1:65] + 1e-4 * torch.randn(128, 64)
    problem = Pairs(x, x + 1e-4 * torch.randn(128, 64), options={"alpha_on": 0.0, "alpha_off": 1.0})
    truth = problem.map(torch.Tensor.double).call(reference)
    assert problem.map(lambda x: x.to(impl.device)).call(functional).item() == pytest.approx(truth.item(), rel=1e-3)


def test_overflowing_squares_are_right_or_nan(impl: Implementation) -> None:
    """The channel must not count as constant."""
    problem = rows(20, 4)
    problem.text[:, 1] *= 1e30
    loss = problem.map(lambda x: x.to(impl.device)).call(functional).item()
    assert loss != loss or loss == pytest.approx(problem.map(torch.Tensor.double).call(reference).item(), rel=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_compile(impl: Implementation, form: str) -> None:
    problem = pairs((6, 5, 4), 16, masks="holes", **FORMS[form]).map(lambda x: x.to(impl.device))
    torch._dynamo.reset()

    def loss(text: Tensor, video: Tensor) -> Tensor:
        return replace(problem, text=text, video=video).call(functional)

    leaves = [problem.text.clone().requires_grad_(), problem.video.clone().requires_grad_()]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for got, want in zip(
        torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(loss(*leaves), leaves), strict=True
    ):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("full", [False, True], ids=["diagonal", "full"])
def test_opcheck(cpu_impl: Implementation, full: bool) -> None:
    op = torch.ops.drl_fast
    p = pairs((4, 3, 5), 6, masks="holes")
    sides = (p.text, p.video, p.text_mask, p.video_mask, True, True)
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(op.cdcr_statistics, sides, test_utils=utils)
    video_index, text_index, mean, _ = op.cdcr_statistics(*sides)
    tokens = (p.text, p.video, p.text_weight, p.video_weight, video_index, text_index)
    channels = torch.stack([mean, torch.ones_like(mean)])
    torch.library.opcheck(op.cdcr_correlation, (*tokens, channels, True, full), test_utils=utils)
    pull = torch.randn(6, 6) if full else torch.randn(6)
    torch.library.opcheck(op.cdcr_gradient, (*tokens, torch.cat([channels, channels]), pull, True), test_utils=utils)


def test_autocast(impl: Implementation) -> None:
    """Features are cast as in the token interaction; statistics and sums stay in float32 or better."""
    problem = pairs((6, 5, 4), 16).map(lambda x: x.to(impl.device))
    with torch.autocast(impl.device, torch.bfloat16):
        got, grads = problem.grads(functional)
    want = replace(problem, text=problem.text.bfloat16(), video=problem.video.bfloat16()).call(functional)
    assert got.dtype == torch.float32
    assert torch.equal(got, want)
    assert grads["text"].dtype == torch.float32
