"""Properties of all interactions, built by name."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import drl_fast
from drl_fast.modules import INTERACTIONS, SeqLSTM, SeqTransf, build_interaction
from tests.modules.plain import scramble
from tests.oracle import Problem, make

DIM = 16
# With a side without real tokens these return some finite score; the others return 0.
NETWORKS = ("mlp", "xti")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=INTERACTIONS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def layer(name: str) -> nn.Module:
    options = {"chunk": 7} if name in NETWORKS else {}
    return scramble(build_interaction(name, DIM, **options)).eval()


def gradients(layer: nn.Module, p: Problem) -> dict[str, Tensor]:
    layer.zero_grad()
    text, video = p.text.clone().requires_grad_(), p.video.clone().requires_grad_()
    logits = layer(text, video, p.text_mask, p.video_mask)
    logits.square().sum().backward()
    return {
        "logits": logits.detach(),
        "text": text.grad,
        "video": video.grad,
        **{k: v.grad.clone() for k, v in layer.named_parameters()},
    }


def test_names() -> None:
    assert list(INTERACTIONS) == ["dp", "hi", "mlp", "xti", "ti", "wti", "mean_maxsim"]
    for name, layer in INTERACTIONS.items():
        public = "MeanMaxSim" if name == "mean_maxsim" else name.upper()
        assert type(build_interaction(name, 8)) is layer is getattr(drl_fast, public)
    assert build_interaction("wti", 8, arch=1).text_weight_fc.weight.shape == (1, 8)
    assert build_interaction("ti", 8, masking="none").masking == "none"
    assert build_interaction("xti", 16, layers=1).dim == 16


@pytest.mark.parametrize("layer", [*INTERACTIONS.values(), SeqLSTM, SeqTransf])
def test_numpy_sizes(layer: Any) -> None:
    """They would reach torch's own layers, of which some refuse them."""
    sizes = {"dim": np.int64(64), "max_positions": np.int64(8), "hidden_dim": np.int64(8), "layers": np.int64(1)}
    known = inspect.signature(layer).parameters
    made = layer(**{name: size for name, size in sizes.items() if name in known})
    held = [value for module in made.modules() for value in vars(module).values()]
    assert not [value for value in held if isinstance(value, np.generic)]


def test_unknown_names_and_options() -> None:
    names = "'dp', 'hi', 'mlp', 'xti', 'ti', 'wti', 'mean_maxsim'"
    with pytest.raises(ValueError, match=f"interaction must be one of {names}, got 'WTI'"):
        build_interaction("WTI", 8)
    with pytest.raises(TypeError, match="arch must be an option of DP, which has: none; leave it out"):
        build_interaction("dp", 8, arch=2)
    with pytest.raises(TypeError, match="layers must be an option of MLP, which has: chunk; leave it out"):
        build_interaction("mlp", 8, layers=2)
    with pytest.raises(TypeError, match="dim must be a positive integer"):
        build_interaction("dp", "512")


def test_every_parameter_gets_a_gradient(layer: nn.Module) -> None:
    found = gradients(layer, make((5, 9, 6, 4), DIM, masks=("holes", "holes")))
    assert all(bool(x.isfinite().all()) for x in found.values())
    # The last bias adds the same number to all scores of a row, which softmax cancels.
    still = [k for k, v in found.items() if not v.abs().max() > 1e-6 and not k.endswith("weight_fc.2.bias")]
    assert still == []


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_masked_features_reach_nothing(layer: nn.Module, poison: float) -> None:
    clean = make((5, 9, 6, 4), DIM, masks=("empty", "empty"))
    dirty = make((5, 9, 6, 4), DIM, masks=("empty", "empty"))
    dirty.text[~dirty.text_mask] = poison
    dirty.video[~dirty.video_mask] = poison
    want, got = gradients(layer, clean), gradients(layer, dirty)
    for key in want:
        assert torch.equal(got[key], want[key]), key
    assert not got["text"][~clean.text_mask].any()
    assert not got["video"][~clean.video_mask].any()


def test_a_side_without_a_real_token_is_finite(layer: nn.Module, name: str) -> None:
    p = make((5, 9, 6, 4), DIM, masks=("empty", "empty"))
    found = gradients(layer, p)
    assert all(bool(x.isfinite().all()) for x in found.values())
    if name not in NETWORKS:
        assert not found["logits"][0].any()
        assert not found["logits"][:, 0].any()


@pytest.mark.parametrize("rows", [(0, 6), (5, 0), (0, 0)])
def test_empty_batches(layer: nn.Module, rows: tuple[int, int]) -> None:
    found = gradients(layer, make((rows[0], 9, rows[1], 4), DIM, masks=("holes", "holes")))
    assert found["logits"].shape == rows
    assert found["logits"].dtype == torch.float32
    assert not any(bool(x.any()) for x in found.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("parameters", ["float32", "half"])
def test_half_precision(name: str, dtype: torch.dtype, parameters: str) -> None:
    layer = build_interaction(name, DIM).eval()
    p = make((5, 9, 6, 4), DIM, dtype, masks=("prefix", "holes"))
    want = gradients(layer, p.map(lambda x: x.float() if x.is_floating_point() else x))
    got = gradients(layer.to(dtype) if parameters == "half" else layer, p)
    assert got["logits"].dtype == torch.float32
    assert got["text"].dtype == dtype
    for key, truth in want.items():
        # Softmax cancels the last bias: its true gradient is 0, so only rounding errors are left.
        floor = 1e-1 if key.endswith("weight_fc.2.bias") else 1e-3
        assert (got[key].float() - truth).abs().max() <= 3e-2 * max(float(truth.abs().max()), floor), key


def test_under_autocast(name: str) -> None:
    layer = build_interaction(name, DIM).eval()
    p = make((5, 9, 6, 4), DIM, masks=("prefix", "holes"))
    want = layer(p.text, p.video, p.text_mask, p.video_mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = gradients(layer, p)
    assert got["logits"].dtype == torch.float32
    torch.testing.assert_close(got["logits"], want, atol=1e-2, rtol=0)
    assert all(bool(x.isfinite().all()) and x.dtype == torch.float32 for x in got.values())


@pytest.mark.parametrize("name", NETWORKS)
def test_the_backward_pass_computes_under_the_autocast_of_the_call(name: str) -> None:
    layer = build_interaction(name, DIM).eval()
    p = make((5, 9, 6, 4), DIM, masks=("prefix", "holes"))
    found = []
    for layer.chunk in (7, None):
        layer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = layer(p.text, p.video, p.text_mask, p.video_mask)
        logits.square().sum().backward()  # outside
        found.append({k: v.grad.clone() for k, v in layer.named_parameters()})
    for key, whole in found[1].items():
        assert (found[0][key] - whole).abs().max() <= 4e-3 * max(float(whole.abs().max()), 1e-3), key


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_of_many_blocks_are_summed_in_float32(name: str) -> None:
    """In bfloat16 a sum of ones stops at 256."""
    layer = build_interaction(name, DIM, chunk=2).bfloat16().eval()
    layer(torch.randn(40, 3, DIM).bfloat16(), torch.randn(40, 2, DIM).bfloat16()).sum().backward()
    assert layer.similarity_dense.bias.grad.tolist() == [1600]


def test_strides_and_mask_dtypes_do_not_matter(layer: nn.Module) -> None:
    p = make((5, 9, 6, 4), DIM, masks=("prefix", "holes"))
    want = layer(p.text, p.video, p.text_mask, p.video_mask)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (p.text, p.video)]
    assert torch.equal(layer(*strided, p.text_mask.int() * 3, p.video_mask.half()), want)


def test_the_same_bits_run_after_run(layer: nn.Module) -> None:
    p = make((5, 9, 6, 4), DIM, masks=("prefix", "holes"))
    want, got = gradients(layer, p), gradients(layer, p)
    assert all(torch.equal(got[key], want[key]) for key in want)


def test_bad_input(layer: nn.Module, name: str) -> None:
    text, video = torch.randn(2, 3, DIM), torch.randn(2, 4, DIM)
    with pytest.raises(ValueError, match=r"video_mask must be \(B, Nv\) = \(2, 4\) to match video, got \(2, 3\)"):
        layer(text, video, None, torch.ones(2, 3))
    if any(True for _ in layer.parameters()):
        layer_name = type(layer).__name__
        with pytest.raises(
            ValueError, match=rf"must have D = 16 channels, .* got 8; build it with {layer_name}\(dim=8"
        ):
            layer(text[..., :8], video[..., :8])
        with pytest.raises(TypeError, match=r"must be no wider than the layer's torch.float32, got torch.float64"):
            layer(text.double(), video.double())
