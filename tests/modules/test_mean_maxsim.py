"""MeanMaxSim and the dual sigmoid loss against a dense form written from the paper; masks, dtypes, bad input."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import drl_fast
from tests.modules.plain import blocks, load, scramble, under
from tests.oracle import Problem, make

DIM = 128  # two heads
FRAMES, EXPANSION = 4, 3
pytestmark = pytest.mark.usefixtures("one_thread")


def small() -> drl_fast.MeanMaxSim:
    torch.manual_seed(0)
    layer = scramble(drl_fast.MeanMaxSim(DIM, layers=2, max_positions=FRAMES, expansion=EXPANSION))
    for name, p in layer.named_parameters():
        if name.endswith("weight") and p.dim() == 2:  # attention that is not saturated, whose gradient would vanish
            torch.nn.init.normal_(p, std=0.08)
    return layer


def problem(masks: tuple[str | None, str | None] = ("holes", "empty"), dtype: torch.dtype = torch.float64) -> Problem:
    return make((5, 9, 6, FRAMES), DIM, dtype, masks=masks)


def in_context(layer: drl_fast.MeanMaxSim, frames: Tensor, real: Tensor) -> Tensor:
    """Return one video's contextualized tokens (E + N, D): learned tokens and its N real frames through the blocks."""
    p = dict(layer.named_parameters())
    expansion, positions = p["expansion_tokens"], p["temporal.frame_position_embeddings.weight"]
    x = torch.cat([expansion, frames[real]])
    places = torch.cat([positions[: len(expansion)], positions[len(expansion) :][: len(real)][real]])
    return x + blocks(x + places, under("temporal.transformer.resblocks.", p), max(1, layer.dim // 64))


def plain_levels(
    layer: drl_fast.MeanMaxSim, text: Tensor, video: Tensor, text_mask: Tensor | None, video_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute MMS_F and MMS_V pair by pair: the mean over the words of the largest cosine similarity."""
    words_real = torch.ones(text.shape[:2], dtype=torch.bool) if text_mask is None else text_mask
    frames_real = torch.ones(video.shape[:2], dtype=torch.bool) if video_mask is None else video_mask
    levels: tuple[list[Tensor], list[Tensor]] = ([], [])
    for words, of_text in zip(text, words_real, strict=True):
        q = F.normalize(words[of_text], dim=-1)
        for frames, of_video in zip(video, frames_real, strict=True):
            for level, tokens in zip(levels, (frames[of_video], in_context(layer, frames, of_video)), strict=True):
                similarity = torch.einsum("md,nd->mn", q, F.normalize(tokens, dim=-1))
                scored = bool(of_text.any() and of_video.any())
                level.append(similarity.amax(dim=1).mean() if scored else similarity.sum() * 0)
    frame_level, video_level = (torch.stack(level).view(len(text), len(video)) for level in levels)
    return frame_level, video_level


def plain(layer: drl_fast.MeanMaxSim, *args: Tensor | None) -> Tensor:
    frame_level, video_level = plain_levels(layer, *args)
    return frame_level + video_level


def plain_dual_loss(frame_level: Tensor, video_level: Tensor, t: Tensor, b: Tensor) -> Tensor:
    """Sum the two levels' losses: -1/|B| sum_ij log 1 / (1 + exp(-z_ij (t MMS_ij + b))), z = 1 on the diagonal."""
    z = 2 * torch.eye(len(frame_level), dtype=frame_level.dtype) - 1
    losses = [-(1 / (1 + torch.exp(-z * (t * mms + b)))).log().sum() / len(mms) for mms in (frame_level, video_level)]
    return losses[0] + losses[1]


def gradients(
    layer: drl_fast.MeanMaxSim, p: Problem, function: Callable[..., Tensor] | None = None
) -> dict[str, Tensor]:
    """Return logits and the gradients of their weighted sum, by name."""
    layer.zero_grad()
    text, video = p.text.clone().requires_grad_(), p.video.clone().requires_grad_()
    logits = (layer if function is None else function)(text, video, p.text_mask, p.video_mask)
    weight = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    (logits * weight).sum().backward()
    found = {name: q.grad.clone() for name, q in layer.named_parameters()}
    return {"logits": logits.detach(), "text": text.grad, "video": video.grad, **found}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 1e-11) -> None:
    for name, truth in want.items():
        scale = max(1.0, float(truth.abs().max())) if truth.numel() else 1.0
        torch.testing.assert_close(got[name], truth, atol=tolerance * scale, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("masks", [(None, None), ("prefix", "prefix"), ("holes", "empty"), ("empty", "holes")], ids=str)
def test_against_the_paper(masks: tuple[str | None, str | None]) -> None:
    layer, p = small().double(), problem(masks)
    want = gradients(layer, p, lambda *args: plain(layer, *args))
    assert want["expansion_tokens"].abs().max() > 1e-3
    assert_same(gradients(layer, p), want)


def test_levels() -> None:
    layer, p = small().double(), problem()
    args = p.text, p.video, p.text_mask, p.video_mask
    levels, want = layer.levels(*args), plain_levels(layer, *args)
    for got, truth in zip(levels, want, strict=True):
        assert not truth[:, 0].any()  # a video without a real frame, although it has expansion tokens
        torch.testing.assert_close(got, truth, atol=1e-12, rtol=0)
    assert torch.equal(layer(*args), levels[0] + levels[1])
    assert (levels[0] - levels[1]).abs().max() > 0.1


@pytest.mark.parametrize("masks", [(None, None), ("holes", "empty")], ids=str)
def test_calls_may_share_what_depends_on_the_videos_alone(masks: tuple[str | None, str | None]) -> None:
    layer, p = small(), problem(masks, torch.float32)
    args = p.text, p.video, p.text_mask, p.video_mask
    shared = layer.in_context(p.video, p.video_mask)
    assert shared[0].shape == (6, EXPANSION + FRAMES, DIM)
    assert torch.equal(layer(*args, in_context=shared), layer(*args))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        shared = layer.in_context(p.video, p.video_mask)
        assert torch.equal(layer(*args, in_context=shared), layer(*args))
    with pytest.raises(
        ValueError, match=r"in_context must hold the video's tokens, \(6, 7, D\), got \(1, 7, 128\); call"
    ):
        layer(*args, in_context=layer.in_context(p.video[:1]))


def test_the_frame_level_reads_raw_frames() -> None:
    layer, p = small(), problem((None, None), torch.float32)
    got = layer.levels(p.text, p.video)[0]
    assert torch.equal(got, drl_fast.maxsim(p.text, p.video, normalize=True, reduction="mean"))
    assert torch.equal(got, layer.levels(p.text, p.video.flip(1))[0])
    assert (layer.levels(p.text, p.video.flip(1))[1] - layer.levels(p.text, p.video)[1]).abs().max() > 1e-3


def test_expansion_tokens_compete() -> None:
    """A word that is an expansion token's output scores 1 at the video level."""
    layer, p = small().double(), problem((None, None))
    word = in_context(layer, p.video[0], torch.ones(FRAMES, dtype=torch.bool))[:1]
    assert layer.levels(word[None], p.video[:1])[1].item() == pytest.approx(1, abs=1e-12)
    assert layer.levels(word[None], p.video[:1])[0].item() < 0.9


def test_without_expansion_tokens() -> None:
    layer = scramble(drl_fast.MeanMaxSim(DIM, layers=1, max_positions=FRAMES, expansion=0)).double()
    p = problem()
    assert_same(gradients(layer, p), gradients(layer, p, lambda *args: plain(layer, *args)))


def test_padding_of_either_side_changes_nothing() -> None:
    layer = small().double()
    p = make((5, 6, 6, FRAMES - 1), DIM, torch.float64)
    text, video = F.pad(p.text, (0, 0, 0, 2), value=math.nan), F.pad(p.video, (0, 0, 0, 1), value=math.nan)
    words, frames = torch.arange(8).expand(5, 8) < 6, torch.arange(FRAMES).expand(6, FRAMES) < FRAMES - 1
    torch.testing.assert_close(layer(text, video, words, frames), layer(p.text, p.video), atol=1e-12, rtol=0)


def test_the_dual_sigmoid_loss_against_the_paper() -> None:
    layer, found = small().double(), {}
    p = make((6, 9, 6, FRAMES), DIM, torch.float64, masks=("prefix", "prefix"))
    args = p.text, p.video, p.text_mask, p.video_mask
    for name, levels in (("fused", layer.levels), ("paper", lambda *xs: plain_levels(layer, *xs))):
        layer.zero_grad()
        t, b = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (10.0, -10.0))
        if name == "fused":
            loss = sum(drl_fast.sigmoid_loss(level, t, b) for level in levels(*args))
        else:
            loss = plain_dual_loss(*levels(*args), t, b)
        loss.backward()
        found[name] = {"loss": loss.detach(), "t": t.grad, "b": b.grad}
        found[name] |= {key: q.grad.clone() for key, q in layer.named_parameters()}
    assert_same(found["fused"], found["paper"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_against_the_paper(dtype: torch.dtype) -> None:
    layer, p = small().to(dtype), problem(("prefix", "holes"), dtype)
    exact = copy.deepcopy(layer).double()
    got = layer(p.text, p.video, p.text_mask, p.video_mask)
    assert got.dtype == torch.float32
    want = plain(exact, p.text.double(), p.video.double(), p.text_mask, p.video_mask)
    torch.testing.assert_close(got.double(), want, atol=3e-2, rtol=0)


@pytest.mark.filterwarnings("ignore")
def test_compiles() -> None:
    layer, p = small(), problem(("prefix", "prefix"), torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_same(gradients(layer, p, compiled), gradients(layer, p), 1e-4)


def test_a_new_one_starts_as_clip_does() -> None:
    clip = under("state.clip.", load("model_xti_none"))
    layer = drl_fast.MeanMaxSim(64, max_positions=14)
    assert layer.init_from_clip(clip["positional_embedding"], under("transformer.resblocks.", clip))
    assert torch.equal(layer.temporal.frame_position_embeddings.weight, clip["positional_embedding"][:16])
    of_clip = under("transformer.resblocks.", clip)
    own = layer.temporal.transformer.resblocks.state_dict()
    assert own
    assert all(torch.equal(x, of_clip[name]) for name, x in own.items())
    assert 0.01 < layer.expansion_tokens.std() < 0.03


def test_state() -> None:
    layer, p = small(), problem(dtype=torch.float32)
    args = p.text, p.video, p.text_mask, p.video_mask
    state = layer.state_dict()
    assert state["expansion_tokens"].shape == (EXPANSION, DIM)
    assert {name.partition(".")[0] for name in state} == {"expansion_tokens", "temporal"}
    other = drl_fast.MeanMaxSim(DIM, layers=2, max_positions=FRAMES, expansion=EXPANSION)
    other.load_state_dict(state)
    for twin in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(*args), layer(*args))
    assert str(layer).splitlines()[1].strip() == f"dim={DIM}, max_positions={FRAMES}, expansion={EXPANSION}"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"expansion": -1}, ValueError, "expansion must be an integer >= 0, got -1"),
        ({"expansion": 1.5}, TypeError, "expansion must be an integer >= 0, got float 1.5"),
        ({"layers": 0}, ValueError, "layers must be a positive integer, got 0"),
        ({"max_positions": 0}, ValueError, "max_positions must be a positive integer, got 0"),
        ({"dim": 200}, ValueError, "dim must be a multiple of heads = 3, got 200"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        drl_fast.MeanMaxSim(**{"dim": DIM, **options})


def test_bad_input() -> None:
    layer = small()
    with pytest.raises(ValueError, match=r"video must have at most 4 frames, the layer's max_positions, got 5; take"):
        layer(torch.randn(2, 3, DIM), torch.randn(2, 5, DIM))
    with pytest.raises(ValueError, match=r"D = 128 channels, the layer's dim, got 64; .*MeanMaxSim\(dim=64\)"):
        layer(torch.randn(2, 3, 64), torch.randn(2, 4, 64))
    with pytest.raises(ValueError, match=r"text_mask must be \(A, Nt\) = \(2, 3\) to match text, got \(2, 4\)"):
        layer.levels(torch.randn(2, 3, DIM), torch.randn(2, 4, DIM), torch.ones(2, 4))
