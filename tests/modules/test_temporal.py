"""The temporal modules against plain code, video by video without masked frames, and against recorded models."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drl_fast.modules import SeqLSTM, SeqTransf
from drl_fast.modules.blocks import LayerNorm
from tests.modules.plain import blocks, load, scramble, under
from tests.oracle import make_mask

DIM = 128
pytestmark = pytest.mark.usefixtures("one_thread")
MODULES: dict[str, Callable[[], nn.Module]] = {
    "seqTransf": lambda: SeqTransf(DIM, layers=2, max_positions=6),
    "seqLSTM": lambda: SeqLSTM(DIM),
}


@pytest.fixture(params=MODULES)
def module(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return MODULES[request.param]().apply(lambda m: scramble(m) if isinstance(m, SeqTransf) else None)


def plain(module: nn.Module, video: Tensor, mask: Tensor) -> Tensor:
    """Apply the module to each video's real frames only; leave masked frames unchanged."""
    p = dict(module.named_parameters())
    out = []
    for frames, real in zip(video, mask.bool(), strict=True):
        x, new = frames[real], frames.clone()
        if not len(x):
            pass
        elif isinstance(module, SeqTransf):
            positions = p["frame_position_embeddings.weight"][: len(frames)][real]
            new[real] = x + blocks(x + positions, under("transformer.resblocks.", p), DIM // 64)
        else:
            new[real] = x + lstm(x, under("lstm.", p))
        out.append(new)
    return torch.stack(out)


def lstm(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    hidden = cell = x.new_zeros(DIM)
    out = []
    for frame in x:
        gates = p["weight_ih_l0"] @ frame + p["bias_ih_l0"] + p["weight_hh_l0"] @ hidden + p["bias_hh_l0"]
        enter, forget, new, leave = gates.split(DIM)
        cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
        hidden = leave.sigmoid() * cell.tanh()
        out.append(hidden)
    return torch.stack(out)


def gradients(function: Callable[..., Tensor], module: nn.Module, *args: Tensor | None) -> dict[str, Tensor]:
    module.zero_grad()
    video = args[0].clone().requires_grad_()
    out = function(video, *args[1:])
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    found = {name: p.grad.clone() for name, p in module.named_parameters()}
    return {"out": out.detach(), "video": video.grad, **found}


@pytest.mark.parametrize("kind", [None, "prefix", "holes", "empty"])
def test_against_the_definition(module: nn.Module, kind: str | None) -> None:
    module.double()
    video = torch.randn(5, 6, DIM, dtype=torch.float64)
    mask = make_mask(kind, 5, 6)
    real = torch.ones(5, 6) if mask is None else mask
    got = gradients(module, module, video, mask)
    want = gradients(lambda *args: plain(module, *args), module, video, real)
    for name, truth in want.items():
        scale = max(1.0, float(truth.abs().max()))
        torch.testing.assert_close(got[name], truth, atol=1e-11 * scale, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", ["model_dp_seqlstm", "model_wti_seqtransf"])
def test_the_recorded_models(case: str) -> None:
    open_clip_model = pytest.importorskip("open_clip.model")
    arrays = load(case)
    state = under("state.", arrays)
    clip = open_clip_model.build_model_from_openai_state_dict(under("clip.", state)).float().eval()
    clip.load_state_dict(under("clip.", state), strict=False)  # the builder rounds weights to half precision
    video, mask = arrays["video"], arrays["video_mask"]
    with torch.no_grad():
        frames = clip.encode_image(video.flatten(0, 1)).unflatten(0, video.shape[:2])
    module = SeqLSTM(64, max_positions=16) if case.endswith("lstm") else SeqTransf(64, max_positions=16)
    names = {"transformerClip.": "transformer.", "lstm_visual.": "lstm."}
    for theirs, ours in names.items():
        state = {k.replace(theirs, ours): v for k, v in state.items()}
    own = {k: v for k, v in state.items() if k.startswith((*names.values(), "frame_position_embeddings."))}
    module.load_state_dict(own)
    got = module(frames, mask)
    compared = slice(None) if case.endswith("lstm") else mask.bool()
    torch.testing.assert_close(got[compared], arrays["video_feat"][compared], atol=5e-6, rtol=0)

    new = type(module)(64, max_positions=16)
    parts = under("state.clip.", arrays)
    assert new.init_from_clip(parts["positional_embedding"], under("transformer.resblocks.", parts))
    started = new.state_dict()
    for name, value in under("fresh.", arrays).items():
        ours = name.replace("transformerClip.", "transformer.")
        if not name.startswith(("text_weight_fc", "video_weight_fc")):
            assert torch.equal(started[ours], value), name


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_masked_frames_reach_nothing(module: nn.Module, poison: float) -> None:
    video, mask = torch.randn(5, 6, DIM), make_mask("empty", 5, 6)
    dirty = video.masked_fill(~mask[..., None], poison)

    def real(x: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask[..., None], module(x, mask), 0)

    want, got = gradients(real, module, video, mask), gradients(real, module, dirty, mask)
    for name in want:
        assert torch.equal(got[name], want[name]), name
    assert not got["video"][~mask].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(module: nn.Module, dtype: torch.dtype) -> None:
    video, mask = torch.randn(5, 6, DIM), make_mask("empty", 5, 6)
    module = module.apply(start_small)
    want = module(video.to(dtype).float(), mask)
    got = module(video.to(dtype), mask)  # float32 parameters
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), want, atol=4e-2, rtol=1e-2)
    if isinstance(module, SeqTransf):  # torch's LSTM has no half precision on every CPU
        got = copy.deepcopy(module).to(dtype)(video.to(dtype), mask)
        torch.testing.assert_close(got.float(), want, atol=0.1, rtol=2e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = module(video, mask)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, atol=0.1, rtol=2e-2)


def start_small(module: nn.Module) -> None:
    """Scale scrambled weights down so that half precision is accurate enough."""
    for p in module.parameters(recurse=False):
        p.data.mul_(0.3)


def test_empty_batches_copies_and_repr(module: nn.Module) -> None:
    assert module(torch.randn(0, 3, DIM)).shape == (0, 3, DIM)
    assert module(torch.randn(0, 3, DIM), torch.ones(0, 3)).shape == (0, 3, DIM)
    video, mask = torch.randn(2, 3, DIM), torch.tensor([[1, 1, 0], [0, 0, 7]])
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(video, mask), module(video, mask))
    assert torch.equal(module(video, mask > 0), module(video, mask))
    assert f"dim={DIM}" in repr(module)


def test_every_row_attends_to_something() -> None:
    module, seen = SeqTransf(DIM, layers=1, max_positions=6), []
    module.transformer.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    mask = make_mask("empty", 5, 6)
    module(torch.randn(5, 6, DIM), mask)
    assert torch.equal(seen[0][1:], mask[1:])
    assert seen[0][0].all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_layer_norm_computes_in_float32(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    seen, layer_norm = [], F.layer_norm
    monkeypatch.setattr(F, "layer_norm", lambda x, *args: seen.append((x.dtype, args[-1])) or layer_norm(x, *args))
    out = LayerNorm(DIM).to(dtype)(torch.ones(2, DIM, dtype=dtype))
    assert out.dtype == dtype
    assert not out.any()
    assert seen == [(torch.float32, 1e-12)]


def test_heads_are_64_wide() -> None:
    heads = [SeqTransf(dim, layers=1).transformer.resblocks[0].attn.heads for dim in (16, 64, 128, 512)]
    assert heads == [1, 1, 2, 8]


def test_the_unused_table_takes_no_gradient() -> None:
    module = SeqLSTM(16, max_positions=9)
    module(torch.randn(2, 3, 16)).sum().backward()
    assert module.frame_position_embeddings.weight.shape == (9, 16)
    assert not module.frame_position_embeddings.weight.requires_grad
    assert "frame_position_embeddings.weight" not in SeqLSTM(16).state_dict()


def test_init_from_clip_takes_what_fits() -> None:
    clip = SeqTransf(64, layers=3, max_positions=5)
    parts = clip.frame_position_embeddings.weight, clip.transformer.resblocks.state_dict()
    module = SeqTransf(64, layers=4, max_positions=8)
    before = copy.deepcopy(module.state_dict())
    assert module.init_from_clip(*parts)
    after = module.state_dict()
    assert torch.equal(after["frame_position_embeddings.weight"][:5], parts[0])
    assert torch.equal(after["frame_position_embeddings.weight"][5:], before["frame_position_embeddings.weight"][5:])
    name = "attn.in_proj_weight"
    assert torch.equal(after[f"transformer.resblocks.2.{name}"], parts[1][f"2.{name}"])
    assert torch.equal(after[f"transformer.resblocks.3.{name}"], before[f"transformer.resblocks.3.{name}"])
    assert SeqTransf(64, layers=1, max_positions=3).init_from_clip(*parts)

    other = SeqTransf(128, layers=1)
    before = copy.deepcopy(other.state_dict())
    assert not other.init_from_clip(*parts)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
    assert not SeqLSTM(64).init_from_clip(*parts)
    with pytest.raises(ValueError, match="blocks must hold CLIP's text resblocks, and block 0 does not fit"):
        module.init_from_clip(parts[0], {"0.attn.weight": torch.ones(1)})


def test_bad_input(module: nn.Module) -> None:
    name = type(module).__name__
    with pytest.raises(ValueError, match=rf"video must have D = {DIM} channels, .* got 8; build it with {name}\(dim=8"):
        module(torch.randn(2, 3, 8))
    with pytest.raises(ValueError, match=r"mask must be \(B, Nv\) = \(2, 3\) to match video, got \(2, 4\)"):
        module(torch.randn(2, 3, DIM), torch.ones(2, 4))
    with pytest.raises(TypeError, match=r"video must be no wider than the layer's torch.float32, got torch.float64"):
        module(torch.randn(2, 3, DIM).double())
    with pytest.raises(TypeError, match="dim must be a positive integer"):
        type(module)(dim=1.5)
    if isinstance(module, SeqTransf):
        with pytest.raises(ValueError, match="video must have at most 6 frames, the module's max_positions, got 7"):
            module(torch.randn(2, 7, DIM))
