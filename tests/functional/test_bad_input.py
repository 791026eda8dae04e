"""Bad arguments raise a ValueError or TypeError that names the argument, the value, and what to do."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch

import drl_fast
from drl_fast import validation
from drl_fast.functional import dot_product
from tests.implementations import Implementation

T, V = torch.zeros(2, 3, 8), torch.zeros(4, 5, 8)
META = torch.device("meta")


def interact(**changes: Any) -> object:
    return drl_fast.token_interaction(**{"text": T, "video": V, **changes})


# By what is wrong: the changed arguments, the error type, and a pattern of its message.
INTERACTION: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "text of rank 2": ({"text": T[0]}, ValueError, r"text must be \(A, Nt, D\), got shape \(3, 8\).*unsqueeze"),
    "video of rank 4": ({"video": V[None]}, ValueError, r"video must be \(B, Nv, D\), got shape \(1, 4, 5, 8\)"),
    "text of rank 0": ({"text": torch.zeros(())}, ValueError, r"text must be \(A, Nt, D\), got shape \(\)"),
    "text a list": ({"text": [[[0.0]]]}, TypeError, r"text must be a torch.Tensor, got list.*torch.as_tensor\(text\)"),
    "video None": ({"video": None}, TypeError, "video must be a torch.Tensor, got NoneType None"),
    "numpy text": ({"text": T.numpy()}, TypeError, "text must be a torch.Tensor, got ndarray"),
    "D differs": ({"video": V[..., :7]}, ValueError, "video must have D = 8 channels to match text, got 7.*project"),
    "D of 0": ({"text": T[..., :0], "video": V[..., :0]}, ValueError, r"text must be .*channel, got shape \(2, 3, 0\)"),
    "Nt of 0": ({"text": T[:, :0]}, ValueError, r"text must be .*at least one token.*\(2, 0, 8\)"),
    "Nv of 0": ({"video": V[:, :0]}, ValueError, r"video must be .*at least one token.*\(4, 0, 8\)"),
    "integer features": ({"text": T.long()}, TypeError, r"text must be float32.*got torch.int64.*text\.float\(\)"),
    "boolean features": ({"video": V.bool()}, TypeError, r"video must be float32.*torch.bool.*video\.float\(\)"),
    "complex features": ({"text": T.cfloat()}, TypeError, "text must be float32.*torch.complex64"),
    "dtypes differ": (
        {"video": V.half()},
        TypeError,
        r"video must have text's dtype torch.float32, got torch.float16.*video\.to\(text\.dtype\)",
    ),
    "devices differ": ({"video": V.to(META)}, ValueError, r"video must be on text's device cpu, got meta.*video\.to"),
    "text_mask on another device": (
        {"text_mask": torch.ones(2, 3, device=META)},
        ValueError,
        r"text_mask must be on text's device cpu, got meta.*text_mask\.to",
    ),
    "video_weight on another device": (
        {"video_weight": torch.ones(4, 5, device=META)},
        ValueError,
        "video_weight must be on video's device cpu, got meta",
    ),
    "text_mask of another length": (
        {"text_mask": torch.ones(2, 4)},
        ValueError,
        r"text_mask must be \(A, Nt\) = \(2, 3\) to match text, got \(2, 4\)",
    ),
    "video_mask of another batch": (
        {"video_mask": torch.ones(3, 5)},
        ValueError,
        r"video_mask must be \(B, Nv\) = \(4, 5\) to match video, got \(3, 5\)",
    ),
    "video_mask of rank 3": ({"video_mask": torch.ones(4, 5, 1)}, ValueError, r"video_mask must be.*got \(4, 5, 1\)"),
    "masks swapped": ({"text_mask": torch.ones(4, 5)}, ValueError, r"text_mask must be.*\(2, 3\).*got \(4, 5\)"),
    "mask a list": ({"text_mask": [[1, 1, 0]] * 2}, TypeError, "text_mask must be a torch.Tensor, got list"),
    "an additive mask": (
        {"text_mask": torch.tensor([[0.0, 0.0, -torch.inf]] * 2)},
        ValueError,
        "text_mask must not be negative, got -inf, which looks like an additive mask .* text_mask == 0",
    ),
    "a finite additive mask": (
        {"text_mask": torch.tensor([[0.0, 0.0, -10000.0], [0.0, 0.0, 0.0]])},
        ValueError,
        "text_mask must not be negative, got -10000, which looks like an additive mask",
    ),
    "an additive mask of integers": (
        {"video_mask": torch.tensor([[0, 0, 0, 0, -1]] * 4)},
        ValueError,
        "video_mask must not be negative, got -1, which looks like an additive mask",
    ),
    "text a long list": ({"text": [0.5] * 999}, TypeError, "text must be a torch.Tensor, got list of 999"),
    "text a list of tensors": ({"text": list(T)}, TypeError, r"got list of 2; convert it with torch.stack\(text\)"),
    "NaN in a mask": (
        {"video_mask": torch.full((4, 5), torch.nan)},
        ValueError,
        "video_mask must be zero .* or non-zero .*got NaN.*token lengths",
    ),
    "sparse text": ({"text": T.to_sparse()}, TypeError, r"text must be a dense tensor, got torch.sparse_coo.*to_dense"),
    "sparse mask": ({"text_mask": torch.ones(2, 3).to_sparse()}, TypeError, "text_mask must be a dense tensor"),
    "nested video": (
        {"video": torch.nested.nested_tensor([V[0], V[1, :2]], layout=torch.jagged)},
        TypeError,
        "video must be a dense tensor, got a nested tensor.*pad it",
    ),
    "NaN in a complex mask": (
        {"text_mask": torch.full((2, 3), torch.nan, dtype=torch.cfloat)},
        ValueError,
        "text_mask must be zero .*got NaN",
    ),
    "weight of another shape": (
        {"text_weight": torch.ones(2, 3, 1)},
        ValueError,
        r"text_weight must be \(A, Nt\) = \(2, 3\) to match text, got \(2, 3, 1\)",
    ),
    "integer weight": (
        {"text_weight": torch.ones(2, 3).int()},
        TypeError,
        "text_weight must be floating.*int32.*float",
    ),
    "weight a number": ({"video_weight": 1.0}, TypeError, "video_weight must be a torch.Tensor, got float 1.0"),
    "video_weight one way": (
        {"video_weight": torch.ones(4, 5), "bidirectional": False},
        ValueError,
        r"video_weight must be None when bidirectional=False.*shape \(4, 5\)",
    ),
    "unknown masking": (
        {"masking": "softmax"},
        ValueError,
        "masking must be one of 'drl', 'exclude', 'none', got 'softmax'",
    ),
    "masking None": ({"masking": None}, ValueError, "masking must be one of.*got None"),
}


@pytest.mark.parametrize("case", INTERACTION)
def test_token_interaction(impl: Implementation, case: str) -> None:
    if impl.device != "cpu":
        pytest.skip("the checks are in Python and do not depend on the device")
    changes, error, message = INTERACTION[case]
    with pytest.raises(error, match=message) as caught:
        interact(**changes)
    assert type(caught.value) in (ValueError, TypeError)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("case", [c for c, (changes, *_) in INTERACTION.items() if "masking" not in changes])
@pytest.mark.parametrize("layer", [drl_fast.TI(), drl_fast.WTI(8), drl_fast.DP()], ids=lambda x: type(x).__name__)
def test_layers(case: str, layer: torch.nn.Module) -> None:
    changes, error, message = INTERACTION[case]
    if not set(changes) <= {"text", "video", "text_mask", "video_mask"}:
        pytest.skip("layers do not have this argument")
    with pytest.raises(error, match=message):
        layer(**{"text": T, "video": V, **changes})


@pytest.mark.parametrize("case", ["text of rank 2", "D differs", "dtypes differ", "masks swapped", "NaN in a mask"])
def test_dot_product(case: str) -> None:
    changes, error, message = INTERACTION[case]
    with pytest.raises(error, match=message):
        dot_product(**{"text": T, "video": V, **changes})


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: drl_fast.WTI(arch=0), ValueError, "arch must be a positive integer, got 0"),
        (lambda: drl_fast.WTI(arch=4), ValueError, "arch must be one of 1, 2, 3, got 4"),
        (lambda: drl_fast.WTI(arch="2"), TypeError, "arch must be a positive integer, got str '2'"),
        (lambda: drl_fast.WTI(arch=2.0), TypeError, "arch must be a positive integer, got float 2.0"),
        (lambda: drl_fast.WTI(0), ValueError, "dim must be a positive integer, got 0"),
        (lambda: drl_fast.WTI(-4), ValueError, "dim must be a positive integer, got -4"),
        (lambda: drl_fast.WTI(64.0), TypeError, "dim must be a positive integer, got float 64.0"),
        (lambda: drl_fast.WTI(hidden_dim=0), ValueError, "hidden_dim must be a positive integer, got 0"),
        (lambda: drl_fast.WTI(hidden_dim="x"), TypeError, "hidden_dim must be a positive integer, got str 'x'"),
        (lambda: drl_fast.WTI(masking="mean"), ValueError, "masking must be one of 'drl'.*got 'mean'"),
        (lambda: drl_fast.WTI(weight_input="unit"), ValueError, "weight_input must be one of 'raw', .*got 'unit'"),
        (lambda: drl_fast.TI(masking="mean"), ValueError, "masking must be one of 'drl'.*got 'mean'"),
    ],
)
def test_constructors(build: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize("name", ["normalize", "bidirectional", "return_matches"])
@pytest.mark.parametrize("value", [None, "no", 1])
def test_flags(name: str, value: object) -> None:
    message = f"{name} must be True or False, got {type(value).__name__}"
    with pytest.raises(TypeError, match=message):
        interact(**{name: value})
    if name != "return_matches":
        for layer in (drl_fast.TI, drl_fast.WTI):
            with pytest.raises(TypeError, match=message):
                layer(**{name: value})


def test_an_option_that_is_an_array() -> None:
    with pytest.raises(ValueError, match="masking must be one of 'drl'"):
        interact(masking=numpy.array(["drl", "none"]))


def test_tokens_wider_than_the_layer() -> None:
    with pytest.raises(TypeError, match=r"no wider than the layer's torch.float32, got torch.float64.*layer\.to\("):
        drl_fast.WTI(8)(T.double(), V.double())
    with pytest.raises(TypeError, match=r"no wider than the layer's torch.bfloat16, got torch.float16"):
        drl_fast.WTI(8).bfloat16()(T.half(), V.half())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert drl_fast.WTI(8).bfloat16()(T, V).dtype == torch.float32


def test_another_width_than_the_layer_was_built_for() -> None:
    with pytest.raises(ValueError, match=r"text and video must have D = 512 .*got 8; build it with WTI\(dim=8\)"):
        drl_fast.WTI()(T, V)


def test_too_many_tokens_per_row() -> None:
    with pytest.raises(ValueError, match="text must have at most 32767 tokens a row, got 32768; split"):
        interact(text=torch.zeros(1, 32768, 8))


def test_the_calls_without_the_change_pass() -> None:
    """The cases above fail because of their change only."""
    interact(text_mask=torch.ones(2, 3), video_mask=torch.zeros(4, 5), text_weight=torch.ones(2, 3).half())
    interact(text=T.to(META), video=V.to(META))


@pytest.mark.parametrize("call", [drl_fast.token_interaction, drl_fast.maxsim])
def test_torch_func_grad_raises(call: Any) -> None:
    with pytest.raises(
        NotImplementedError, match=r"drl_fast: the token interaction does not work under torch\.func\.grad"
    ):
        torch.func.grad(lambda text: call(text, V).sum())(T)


@pytest.mark.parametrize("video", [V, drl_fast.prepare(V)], ids=["tokens", "prepared"])
def test_torch_func_grad_raises_for_weights_and_prepared_videos(video: Any) -> None:
    with pytest.raises(NotImplementedError, match=r"does not work under torch\.func\.grad"):
        torch.func.grad(lambda weight: drl_fast.token_interaction(T, video, weight).sum())(torch.ones(2, 3))
    with pytest.raises(NotImplementedError, match=r"does not work under torch\.func\.grad"):
        torch.func.grad(lambda text: drl_fast.token_interaction(text, video).sum())(T)


def test_the_warning_names_the_callers_line() -> None:
    validation._warn_no_real_token.cache_clear()
    with pytest.warns(UserWarning, match="video_mask holds no real token at all") as caught:
        drl_fast.prepare(V, video_mask=torch.zeros(4, 5))
    assert caught[0].filename == __file__


def test_a_mask_without_a_real_token_warns_once() -> None:
    validation._warn_no_real_token.cache_clear()
    with pytest.warns(UserWarning, match="text_mask holds no real token at all, so all scores are 0"):
        assert not interact(text_mask=torch.zeros(2, 3)).any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        interact(text_mask=torch.zeros(2, 3, dtype=torch.bool))
        interact(text_mask=torch.tensor([[0, 0, 0], [0, 0, 1]]))
