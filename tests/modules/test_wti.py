"""WTI: weight heads, state-dict keys and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import drl_fast
from drl_fast import reference
from tests.implementations import Implementation
from tests.oracle import make

KEYS = {1: ["weight", "bias"], 2: ["0.weight", "0.bias", "2.weight", "2.bias"]}
KEYS[3] = [*KEYS[2], "4.weight", "4.bias"]


@pytest.mark.parametrize("arch", [1, 2, 3])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_state_dict_keys_are_the_public_codes(arch: int, bidirectional: bool) -> None:
    layer = drl_fast.WTI(16, arch, bidirectional=bidirectional)
    sides = ("text_weight_fc", "video_weight_fc") if bidirectional else ("text_weight_fc",)
    assert list(layer.state_dict()) == [f"{side}.{key}" for side in sides for key in KEYS[arch]]


def upstream(arch: int) -> nn.Module:
    """Build a head as the public code does."""
    layers: list[nn.Module] = []
    for _ in range(arch - 1):
        layers += [nn.Linear(16, 16), nn.ReLU(inplace=True)]
    layers.append(nn.Linear(16, 1))
    return layers[0] if arch == 1 else nn.Sequential(*layers)


@pytest.mark.parametrize("arch", [1, 2, 3])
def test_a_checkpoint_loads_strictly(arch: int) -> None:
    host = nn.ModuleDict({"text_weight_fc": upstream(arch), "video_weight_fc": upstream(arch)})
    layer = drl_fast.WTI(16, arch)
    layer.load_state_dict(host.state_dict(), strict=True)
    p = make((5, 9, 6, 4), 16, masks=("prefix", "holes"))
    weights = [
        host[f"{side}_weight_fc"](x).squeeze(-1).masked_fill(~m, -1e30).softmax(-1)
        for side, x, m in (("text", p.text, p.text_mask), ("video", p.video, p.video_mask))
    ]
    want = reference.token_interaction(p.text, p.video, *weights, p.text_mask, p.video_mask)
    torch.testing.assert_close(layer(p.text, p.video, p.text_mask, p.video_mask), want, atol=1e-6, rtol=1e-5)


def test_hidden_width() -> None:
    layer = drl_fast.WTI(16, 3, hidden_dim=5)
    shapes = [tuple(p.shape) for n, p in layer.text_weight_fc.named_parameters() if n.endswith("weight")]
    assert shapes == [(5, 16), (5, 5), (1, 5)]


@pytest.mark.parametrize("weight_input", ["raw", "normalized"])
@pytest.mark.parametrize("masks", [(None, None), ("prefix", "holes"), ("empty", "empty")], ids=str)
def test_weights_are_a_softmax_over_real_tokens(weight_input: str, masks: tuple[str, str]) -> None:
    layer = drl_fast.WTI(16, weight_input=weight_input).double()
    p = make((5, 9, 6, 4), 16, torch.float64, masks=masks)
    logits = layer(p.text, p.video, p.text_mask, p.video_mask)
    weights = []
    for head, x, mask in ((layer.text_weight_fc, p.text, p.text_mask), (layer.video_weight_fc, p.video, p.video_mask)):
        score = head(reference.unit(x) if weight_input == "normalized" else x).squeeze(-1)
        real = torch.ones_like(score, dtype=torch.bool) if mask is None else mask
        exp = torch.where(real, score.exp(), 0)
        weights.append(exp / exp.sum(-1, keepdim=True).clamp(min=1e-300))
    want = reference.token_interaction(p.text, p.video, *weights, p.text_mask, p.video_mask)
    torch.testing.assert_close(logits, want, atol=1e-12, rtol=0)


def grads(layer: nn.Module, *args: Tensor | None) -> dict[str, Tensor]:
    layer.zero_grad()
    text, video = (x.clone().requires_grad_() for x in args[:2])
    logits = layer(text, video, *args[2:])
    logits.square().sum().backward()
    found = {n: p.grad.clone() for n, p in layer.named_parameters()}
    return {"logits": logits.detach(), "text": text.grad, "video": video.grad, **found}


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("masking", ["drl", "exclude"])
@pytest.mark.parametrize("weight_input", ["raw", "normalized"])
def test_masked_features_reach_no_score_and_no_gradient(
    impl: Implementation, poison: float, masking: str, weight_input: str
) -> None:
    torch.manual_seed(0)
    layer = drl_fast.WTI(16, masking=masking, weight_input=weight_input).to(impl.device)
    p = make((5, 9, 6, 4), 16, masks=("empty", "empty")).map(lambda x: x.to(impl.device))
    want = grads(layer, p.text, p.video, p.text_mask, p.video_mask)
    p.text[~p.text_mask] = poison
    p.video[~p.video_mask] = poison
    got = grads(layer, p.text, p.video, p.text_mask, p.video_mask)
    for name, value in want.items():
        assert bool(value.isfinite().all()), name
        assert torch.equal(got[name], value), name
    assert not got["text"][~p.text_mask].any()
    assert not got["video"][~p.video_mask].any()


def test_an_empty_row_is_finite_and_zero(impl: Implementation) -> None:
    layer = drl_fast.WTI(16).to(impl.device)
    p = make((5, 9, 6, 4), 16, masks=("empty", "empty")).map(lambda x: x.to(impl.device))
    got = grads(layer, p.text, p.video, p.text_mask, p.video_mask)
    assert all(bool(x.isfinite().all()) for x in got.values())
    assert not got["logits"][0].any()
    assert not got["logits"][:, 0].any()
    assert not got["text"][0].any()
    assert not got["video"][0].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_features_with_a_float32_head(impl: Implementation, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = drl_fast.WTI(16).to(impl.device)
    p = make((5, 9, 6, 4), 16, dtype, masks=("prefix", "holes")).map(lambda x: x.to(impl.device))
    got = grads(layer, p.text, p.video, p.text_mask, p.video_mask)
    want = grads(layer, p.text.float(), p.video.float(), p.text_mask, p.video_mask)
    assert got["logits"].dtype == torch.float32
    torch.testing.assert_close(got["logits"], want["logits"], atol=1e-2, rtol=0)
    assert got["text"].dtype == dtype


def test_under_autocast(impl: Implementation) -> None:
    """Heads run in autocast's dtype, as every nn.Linear; softmax, products and sums do not."""
    torch.manual_seed(0)
    layer = drl_fast.WTI(64).to(impl.device)
    p = make((9, 12, 8, 6), 64, masks=("prefix", "holes")).map(lambda x: x.to(impl.device))
    want = layer(p.text, p.video, p.text_mask, p.video_mask)
    with torch.autocast(impl.device, dtype=torch.bfloat16):
        got = grads(layer, p.text, p.video, p.text_mask, p.video_mask)
    assert got["logits"].dtype == torch.float32
    torch.testing.assert_close(got["logits"], want, atol=1e-2, rtol=0)
    assert all(bool(x.isfinite().all()) for x in got.values())
    assert got["text_weight_fc.0.weight"].dtype == torch.float32


def test_matches(impl: Implementation) -> None:
    layer = drl_fast.WTI(16).to(impl.device)
    p = make((5, 9, 6, 4), 16, masks=("prefix", "holes")).map(lambda x: x.to(impl.device))
    logits, found = layer(p.text, p.video, p.text_mask, p.video_mask, return_matches=True)
    assert torch.equal(logits, layer(p.text, p.video, p.text_mask, p.video_mask))
    _, want = drl_fast.TI()(p.text, p.video, p.text_mask, p.video_mask, return_matches=True)
    assert torch.equal(found.video_index, want.video_index)
    assert torch.equal(found.text_index, want.text_index)


def test_one_way_uses_the_text_side_alone() -> None:
    p = make((5, 9, 6, 4), 16, masks=("prefix", "holes"))
    both, one = drl_fast.WTI(16), drl_fast.WTI(16, bidirectional=False)
    one.load_state_dict({k: v for k, v in both.state_dict().items() if k.startswith("text")}, strict=True)
    weight = both.text_weight_fc(p.text).squeeze(-1).masked_fill(~p.text_mask, -math.inf).softmax(-1)
    want = drl_fast.token_interaction(p.text, p.video, weight, None, p.text_mask, p.video_mask, bidirectional=False)
    torch.testing.assert_close(one(p.text, p.video, p.text_mask, p.video_mask), want)


def test_it_learns() -> None:
    """A few steps of Adam bring matching pairs to rank 1."""
    torch.manual_seed(0)
    layer = drl_fast.WTI(16)
    text = torch.randn(12, 6, 16, requires_grad=True)
    video = torch.randn(12, 4, 16, requires_grad=True)
    optimizer = torch.optim.Adam([text, video, *layer.parameters()], lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        loss = drl_fast.info_nce(layer(text, video), 20.0)
        loss.backward()
        optimizer.step()
    metrics = drl_fast.metrics.retrieval_metrics(layer(text, video))
    assert metrics["t2v"]["R1"] == metrics["v2t"]["R1"] == 100


def test_quantised_heads() -> None:
    """Dynamically quantised heads have no parameters."""
    layer = drl_fast.WTI(16)
    small = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, dtype=torch.qint8)
    p = make((5, 9, 6, 4), 16)
    torch.testing.assert_close(small(p.text, p.video), layer(p.text, p.video), atol=2e-2, rtol=0)


def test_vmap_with_a_float_mask() -> None:
    p = make((5, 9, 6, 4), 16)
    text, masks = torch.randn(3, 5, 9, 16), torch.ones(3, 5, 9)
    masks[1, :, 4:] = 0
    layer = drl_fast.TI()
    got = torch.func.vmap(lambda t, m: layer(t, p.video, m))(text, masks)
    want = torch.stack([layer(t, p.video, m) for t, m in zip(text, masks, strict=True)])
    assert torch.equal(got, want)
