"""Autograd: gradcheck, opcheck, parts of the gradient, and unsupported derivatives."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import drl_fast
from tests.implementations import Implementation
from tests.oracle import LEAVES, Problem, make, run

forward_op = torch.ops.drl_fast.token_interaction.default
backward_op = torch.ops.drl_fast.token_interaction_backward.default

CASES = {
    "both ways": {"masks": ("holes", "prefix")},
    "one way": {"masks": ("holes", "prefix"), "bidirectional": False},
    "exclude": {"masks": ("empty", "empty"), "masking": "exclude"},
    "none": {"masks": ("prefix", None), "masking": "none"},
    "raw": {"normalize": False},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("weights", [None, torch.float64], ids=["uniform", "given"])
def test_gradcheck(impl: Implementation, case: str, weights: torch.dtype | None) -> None:
    p = make((3, 4, 2, 5), 6, torch.float64, weights=weights, seed=3, **CASES[case]).map(lambda x: x.to(impl.device))
    leaves = [getattr(p, n).requires_grad_() for n in LEAVES if getattr(p, n) is not None]
    assert torch.autograd.gradcheck(lambda *_: drl_fast.token_interaction(*p.args(), **p.options), leaves)


def op_args(p: Problem, *, normalize: bool, zero_competes: bool, keep: bool, grad: bool) -> tuple[Any, ...]:
    """Return arguments of the operator itself, with weights and boolean masks."""
    floats = [x if x is None else x.clone().requires_grad_(grad) for x in p.args()[:4]]
    return (*floats, p.text_mask, p.video_mask, normalize, zero_competes, keep)


OPCHECK = [
    {"dtype": torch.float32, "masks": ("prefix", "holes")},
    {"dtype": torch.float32, "masks": (None, "empty"), "bidirectional": False},
    {"dtype": torch.bfloat16, "masks": (None, None)},
    {"dtype": torch.float64, "masks": ("holes", None)},
]


@pytest.mark.parametrize("case", range(len(OPCHECK)))
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shape", [(5, 4, 3, 6), (2, 3, 2, 256), (0, 3, 2, 4)], ids=str)
def test_opcheck_forward(impl: Implementation, case: int, normalize: bool, shape: tuple[int, int, int, int]) -> None:
    options = dict(OPCHECK[case])
    weights = torch.float64 if options["dtype"] == torch.float64 else torch.float32
    p = make(shape, 8, weights=weights, **options).map(lambda x: x.to(impl.device))
    for keep, grad in [(True, True), (True, False), (False, False)]:
        args = op_args(p, normalize=normalize, zero_competes=True, keep=keep, grad=grad)
        torch.library.opcheck(forward_op, args)


@pytest.mark.parametrize("case", range(len(OPCHECK)))
@pytest.mark.parametrize("output_mask", ["1111", "1010", "0101", "1100", "0010"])
def test_opcheck_backward(impl: Implementation, case: int, output_mask: str) -> None:
    options = dict(OPCHECK[case])
    weights = torch.float64 if options["dtype"] == torch.float64 else torch.float32
    p = make((5, 4, 3, 6), 8, weights=weights, **options).map(lambda x: x.to(impl.device))
    args = op_args(p, normalize=True, zero_competes=True, keep=True, grad=False)
    logits, *kept = forward_op(*args)
    wanted = [c == "1" for c in output_mask]
    torch.library.opcheck(backward_op, (torch.randn_like(logits), *args[:6], *kept, True, True, wanted))


@pytest.mark.parametrize("bidirectional", [True, False])
def test_gradient_of_some_inputs_only(impl: Implementation, bidirectional: bool) -> None:
    p = make((5, 9, 6, 4), masks=("holes", "holes"), weights=torch.float32, bidirectional=bidirectional)
    p = p.map(lambda x: x.to(impl.device))
    whole = run(drl_fast.token_interaction, p, torch.ones(p.pairs)).grads
    names = [n for n in LEAVES if getattr(p, n) is not None]
    for chosen in [[n] for n in names] + [names[:2], names[2:], names[1:3], names[::2]]:
        leaves = {n: getattr(p, n).clone().requires_grad_(n in chosen) for n in names}
        q = Problem(**{**vars(p), **leaves})
        drl_fast.token_interaction(*q.args(), **q.options).sum().backward()
        for name in names:
            grad = leaves[name].grad
            assert (grad is None) == (name not in chosen)
            assert grad is None or torch.equal(grad, whole[name])


def test_the_same_tensor_on_both_sides(impl: Implementation) -> None:
    x = torch.randn(5, 4, 8, device=impl.device, requires_grad=True)
    drl_fast.token_interaction(x, x).sum().backward()
    p = Problem(x.detach(), x.detach().clone())
    parts = run(drl_fast.token_interaction, p, torch.ones(5, 5)).grads
    torch.testing.assert_close(x.grad, parts["text"] + parts["video"])


def test_second_derivative_raises(impl: Implementation) -> None:
    text = torch.randn(3, 4, 8, device=impl.device, requires_grad=True)
    logits = drl_fast.token_interaction(text, torch.randn(2, 5, 8, device=impl.device))
    (grad,) = torch.autograd.grad(logits.sum(), text, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"no second derivative.*reference"):
        grad.square().sum().backward()


@pytest.mark.parametrize("which", ["text", "video", "text_weight", "video_weight"])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_forward_mode_raises(impl: Implementation, which: str, requires_grad: bool) -> None:
    """A tangent must not be dropped without an error, with or without a gradient."""
    p = make((3, 4, 2, 5), weights=torch.float32).map(lambda x: x.to(impl.device))
    primal = getattr(p, which).requires_grad_(requires_grad)

    def score(x: Tensor) -> Tensor:
        setattr(p, which, x)
        return drl_fast.token_interaction(*p.args())

    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.func.jvp(score, (primal,), (torch.ones_like(primal),))
    with pytest.raises((NotImplementedError, RuntimeError)), torch.autograd.forward_ad.dual_level():
        score(torch.autograd.forward_ad.make_dual(primal, torch.ones_like(primal)))


def test_forward_mode_of_other_inputs_works(impl: Implementation) -> None:
    p = make((3, 4, 2, 5)).map(lambda x: x.to(impl.device))
    scale = torch.ones((), device=impl.device)
    _, tangent = torch.func.jvp(lambda s: drl_fast.token_interaction(*p.args()) * s, (scale,), (scale,))
    assert torch.equal(tangent, drl_fast.token_interaction(*p.args()))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(impl: Implementation, reentrant: bool) -> None:
    p = make((5, 9, 6, 4), masks=("holes", "holes")).map(lambda x: x.to(impl.device))
    want = run(drl_fast.token_interaction, p, torch.ones(p.pairs))
    p.text.requires_grad_()
    p.video.requires_grad_()
    logits = checkpoint(drl_fast.token_interaction, *p.args(), use_reentrant=reentrant)
    logits.sum().backward()
    assert torch.equal(logits, want.logits)
    assert torch.equal(p.text.grad, want.grads["text"])
    assert torch.equal(p.video.grad, want.grads["video"])


def test_inputs_are_left_as_they_were(impl: Implementation) -> None:
    p = make((5, 9, 6, 4), masks=("holes", "empty"), weights=torch.float32).map(lambda x: x.to(impl.device))
    before = copy.deepcopy(p)
    run(drl_fast.token_interaction, p, torch.ones(p.pairs))
    assert all(torch.equal(x, y) for x, y in zip(p.args(), before.args(), strict=True))


class MatchesKept(TorchDispatchMode):
    """Record how many matches each call of the operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is forward_op:
            self.kept.append(out[1].numel() + out[2].numel())
        return out


@pytest.mark.parametrize("bidirectional", [True, False])
def test_inference_keeps_no_matches(impl: Implementation, bidirectional: bool) -> None:
    p = make((5, 9, 6, 4), bidirectional=bidirectional).map(lambda x: x.to(impl.device))
    with MatchesKept() as mode:
        drl_fast.token_interaction(*p.args(), **p.options)  # nothing requires a gradient
        p.text.requires_grad_()
        with torch.no_grad():
            drl_fast.token_interaction(*p.args(), **p.options)
        with torch.inference_mode():
            drl_fast.token_interaction(*p.args(), **p.options)
            drl_fast.maxsim(p.text, p.video)
        assert mode.kept == [0, 0, 0, 0]
        drl_fast.token_interaction(*p.args(), **p.options)
    assert mode.kept[4:] == [5 * 6 * (9 + 4 * bidirectional)]
