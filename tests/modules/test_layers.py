"""Properties of all layers: one call, copies, pickles, functional_call, no state except parameters."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

import drl_fast
from tests.oracle import make

BUILD: dict[str, Callable[[], nn.Module]] = {
    "WTI": lambda: drl_fast.WTI(16),
    "WTI one way": lambda: drl_fast.WTI(16, 3, hidden_dim=8, masking="exclude", bidirectional=False),
    "TI": lambda: drl_fast.TI(masking="none", normalize=False),
    "DP": drl_fast.DP,
    "HI": lambda: drl_fast.HI(16),
    "MLP": lambda: drl_fast.MLP(16, chunk=7),
    "XTI": lambda: drl_fast.XTI(16, layers=2, chunk=7).eval(),
}
P = make((5, 9, 6, 4), 16, masks=("holes", "empty"))
ARGS = (P.text, P.video, P.text_mask, P.video_mask)


@pytest.fixture(params=BUILD)
def layer(request: pytest.FixtureRequest) -> nn.Module:
    return BUILD[request.param]()


def test_masks_are_optional_and_go_by_name(layer: nn.Module) -> None:
    full = torch.ones(5, 9), torch.ones(6, 4)
    assert torch.equal(layer(P.text, P.video), layer(P.text, P.video, *full))
    named = layer(text=P.text, video=P.video, text_mask=P.text_mask, video_mask=P.video_mask)
    assert torch.equal(named, layer(*ARGS))
    assert named.shape == (5, 6)
    assert named.dtype == torch.float32


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), copy.copy])
def test_copies(layer: nn.Module, copied: Callable[[nn.Module], nn.Module]) -> None:
    other = copied(layer)
    assert torch.equal(other(*ARGS), layer(*ARGS))
    assert repr(other) == repr(layer)


def test_deepcopy_shares_nothing() -> None:
    layer = drl_fast.WTI(16)
    other = copy.deepcopy(layer)
    before = layer(*ARGS)
    for p in other.parameters():
        p.data.normal_()
    assert torch.equal(layer(*ARGS), before)
    assert not torch.equal(other(*ARGS), before)


def test_functional_call(layer: nn.Module) -> None:
    state = {k: torch.randn_like(v) for k, v in layer.state_dict().items()}
    want = copy.deepcopy(layer)
    want.load_state_dict(state)
    assert torch.equal(torch.func.functional_call(layer, state, ARGS), want(*ARGS))


def test_functional_call_passes_gradients() -> None:
    layer = drl_fast.WTI(16)
    params = {k: v.detach().clone().requires_grad_() for k, v in layer.named_parameters()}
    torch.func.functional_call(layer, params, ARGS).square().sum().backward()
    layer(*ARGS).square().sum().backward()
    for name, p in layer.named_parameters():
        assert torch.equal(params[name].grad, p.grad)


def test_no_state_but_parameters(layer: nn.Module) -> None:
    assert list(layer.buffers()) == []
    before = set(vars(layer))
    layer(*ARGS).sum()
    assert set(vars(layer)) == before


def test_double_input(layer: nn.Module) -> None:
    layer = layer.double()
    got = layer(P.text.double(), P.video.double(), P.text_mask, P.video_mask)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got.float(), layer.float()(*ARGS), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    "options", [{}, {"masking": "exclude"}, {"normalize": False}, {"bidirectional": False}], ids=str
)
def test_ti_is_the_functional_without_weights(options: dict[str, object]) -> None:
    want = drl_fast.token_interaction(P.text, P.video, None, None, P.text_mask, P.video_mask, **options)
    layer = drl_fast.TI(**options)
    assert torch.equal(layer(*ARGS), want)
    logits, found = layer(*ARGS, return_matches=True)
    assert torch.equal(logits, want)
    assert found.video_index.shape == (5, 6, 9)
    assert (found.text_index is None) == ("bidirectional" in options)


def test_dp_is_the_functional() -> None:
    assert torch.equal(drl_fast.DP()(*ARGS), drl_fast.functional.dot_product(*ARGS))


def test_repr_names_the_options() -> None:
    assert "masking='exclude'" in repr(drl_fast.TI(masking="exclude"))
    shown = repr(drl_fast.WTI(16, masking="none", weight_input="normalized"))
    assert "dim=16" in shown
    assert "weight_input='normalized'" in shown
