"""XTI against its definition, pair by pair, against the recorded model, and with other chunk sizes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import drl_fast
from drl_fast.modules import xti
from tests.modules.plain import blocks, layer_norm, load, quick_gelu, scramble, under
from tests.oracle import Problem, make

DIM, HEADS = 16, 8
pytestmark = pytest.mark.usefixtures("one_thread")


def small(**options: object) -> drl_fast.XTI:
    torch.manual_seed(0)
    return scramble(drl_fast.XTI(DIM, layers=2, max_positions=7, **options))


def problem(masks: tuple[str | None, str | None] = ("holes", "empty"), dtype: torch.dtype = torch.float64) -> Problem:
    return make((5, 9, 6, 4), DIM, dtype, masks=masks)


def plain(
    layer: drl_fast.XTI, text: Tensor, video: Tensor, text_mask: Tensor | None, video_mask: Tensor | None
) -> Tensor:
    """Score one pair after the other, with sequences without masked frames."""
    p = dict(layer.named_parameters())
    logits = []
    for a in range(len(text)):
        end = text.shape[1] - 1 if text_mask is None else int(text_mask[a].nonzero().max())
        for b in range(len(video)):
            real = torch.ones(video.shape[1], dtype=torch.bool) if video_mask is None else video_mask[b]
            sequence = torch.cat([text[a, end][None], video[b][real]])
            positions = torch.cat([torch.zeros(1, dtype=torch.long), 1 + real.nonzero()[:, 0]])
            x = blocks(sequence + p["position_embeddings.weight"][positions], under("transformer.resblocks.", p), HEADS)
            pooled = layer_norm(x[0], under("pooler.ln_pool.", p)) @ p["pooler.dense.weight"].T + p["pooler.dense.bias"]
            logits.append(quick_gelu(pooled) @ p["similarity_dense.weight"][0] + p["similarity_dense.bias"][0])
    return torch.stack(logits).view(len(text), len(video))


def gradients(layer: drl_fast.XTI, p: Problem, function: Callable[..., Tensor] | None = None) -> dict[str, Tensor]:
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
        scale = max(1.0, float(truth.abs().max()))
        torch.testing.assert_close(got[name], truth, atol=tolerance * scale, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("chunk", [None, 1, 4, 7])
def test_the_recorded_model(chunk: int | None) -> None:
    case = load("model_xti_none")
    state = {k: v for k, v in under("state.", case).items() if k.startswith(("cross.", "similarity_dense."))}
    layer = drl_fast.XTI(64, max_positions=16, chunk=chunk).eval()
    layer.load_state_dict({k.removeprefix("cross.").removeprefix("embeddings."): v for k, v in state.items()})
    logits = layer(*(case[k] for k in ("text_feat", "video_feat", "text_mask", "video_mask")))
    torch.testing.assert_close(logits, case["eval_logits"], atol=2e-6, rtol=0)


@pytest.mark.parametrize("masks", [(None, None), ("prefix", "prefix"), ("holes", "empty")], ids=str)
@pytest.mark.parametrize("chunk", [None, 3])
def test_against_the_definition(masks: tuple[str, str], chunk: int | None) -> None:
    layer, p = small(chunk=chunk).double().eval(), problem(masks)
    if p.text_mask is not None:
        p.text_mask[:, 2] = True
    assert_same(gradients(layer, p), gradients(layer, p, lambda *args: plain(layer, *args)))


@pytest.mark.parametrize("chunk", [1, 3, 7, 29, 30, 1000])
def test_the_chunk_changes_neither_values_nor_gradients(chunk: int) -> None:
    layer, p = small().double().eval(), problem()
    want = gradients(layer, p)
    layer.chunk = chunk
    assert_same(gradients(layer, p), want)


@pytest.mark.parametrize("chunk", [None, 4])
def test_the_backward_pass_sees_the_parameters_of_its_call(chunk: int | None) -> None:
    layer, other, p = small(chunk=chunk).double().eval(), small().double().eval(), problem()
    scramble(other)
    parameters = {k: v.detach().clone().requires_grad_() for k, v in other.named_parameters()}
    want = gradients(other, p)
    text, video = p.text.clone().requires_grad_(), p.video.clone().requires_grad_()
    logits = torch.func.functional_call(layer, parameters, (text, video, p.text_mask, p.video_mask))
    weight = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    (logits * weight).sum().backward()
    got = {"logits": logits.detach(), "text": text.grad, "video": video.grad}
    assert_same({**got, **{k: v.grad for k, v in parameters.items()}}, want)


def test_dropout_is_the_same_in_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, p = small(chunk=4, dropout=0.5).double().train(), problem()

    def stopped(*args: Tensor | None) -> Tensor:
        logits = layer(*args)
        layer.eval()  # between the passes: must have no effect
        torch.rand(3)
        return logits

    torch.manual_seed(1)
    got = gradients(layer, p, stopped)
    end = torch.rand(3)
    layer.train()

    # Score the same blocks in the same order, but keep their graphs.
    def kept(run: object, text: Tensor, *video: Tensor, size: int = 4, **options: object) -> Tensor:
        lines = [[run(t, *v) for v in zip(*(x.split(size) for x in video), strict=True)] for t in text.split(1)]
        return torch.cat([torch.cat(line, dim=1) for line in lines])

    monkeypatch.setattr(xti, "score_pairs", lambda layer, score, text, video, pairs, random: kept(score, text, *video))
    torch.manual_seed(1)
    assert_same(got, gradients(layer, p))
    torch.rand(3)
    assert torch.equal(end, torch.rand(3))  # the backward pass restored the generator


def test_dropout_applies_to_the_sequence_of_each_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, p = small(dropout=0.1).double().train(), problem((None, None))
    seen: list[tuple[torch.Size, float, bool]] = []
    dropout = F.dropout

    def watched(x: Tensor, p: float, training: bool) -> Tensor:
        seen.append((x.shape, p, training))
        return dropout(x, p, training)

    monkeypatch.setattr(F, "dropout", watched)
    assert not torch.equal(layer(p.text, p.video), layer(p.text, p.video))
    assert seen == [(torch.Size([30, 5, DIM]), 0.1, True)] * 2
    layer.eval()
    assert torch.equal(layer(p.text, p.video), layer(p.text, p.video))
    still = small(dropout=0.0).double().train()
    torch.testing.assert_close(still(p.text, p.video), layer(p.text, p.video))


def test_the_order_of_frames_counts() -> None:
    layer, p = small().eval(), problem((None, None), torch.float32)
    assert (layer(p.text, p.video.flip(1)) - layer(p.text, p.video)).abs().max() > 1e-3


def test_a_lone_real_position_is_finite() -> None:
    """A video without real frames leaves only the text; a text without real tokens is a zero vector."""
    layer, p = small().double().eval(), problem((None, None))
    none = torch.zeros(6, 4)
    got = layer(p.text, p.video, None, none)
    want = plain(layer, p.text, p.video, None, none.bool())
    torch.testing.assert_close(got, want, atol=1e-11, rtol=0)
    got = layer(p.text, p.video, torch.zeros(5, 9))
    want = plain(layer, torch.zeros_like(p.text), p.video, None, None)
    torch.testing.assert_close(got, want, atol=1e-11, rtol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("chunk", [None, 7])
def test_compiles(chunk: int | None) -> None:
    layer, p = small(chunk=chunk, dropout=0.0).train(), problem(("prefix", "prefix"), torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_same(gradients(layer, p, compiled), gradients(layer, p), 1e-4)


def test_a_new_one_starts_as_clip_does() -> None:
    case = load("model_xti_none")
    layer = drl_fast.XTI(64, max_positions=16)
    clip = under("state.clip.", case)
    assert layer.init_from_clip(clip["positional_embedding"], under("transformer.resblocks.", clip))
    fresh = {k.removeprefix("embeddings."): v for k, v in under("fresh.cross.", case).items()}
    state = layer.state_dict()
    assert set(state) == {*fresh, "similarity_dense.weight", "similarity_dense.bias"}
    drawn = {"pooler.dense.weight", "similarity_dense.weight"}
    for name in set(fresh) - drawn:
        assert torch.equal(state[name], fresh[name]), name
    for name in drawn:
        assert 0.015 < state[name].std() < 0.025
    assert not state["similarity_dense.bias"].any()


def test_without_a_clip_it_is_drawn() -> None:
    state = drl_fast.XTI(64, layers=1).state_dict()
    for name, value in state.items():
        if "ln_" in name or name.endswith("bias"):
            assert torch.equal(value, torch.full_like(value, float("ln_" in name and name.endswith("weight"))))
        else:
            assert 0.015 < value.std() < 0.025, name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 12}, "dim must be a multiple of heads = 8, got 12"),
        ({"layers": 0}, "layers must be a positive integer, got 0"),
        ({"chunk": 0}, "chunk must be a positive integer, got 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": math.nan}, r"dropout must be in \[0, 1\), got nan"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        drl_fast.XTI(**options)


def test_dropout_must_be_a_number() -> None:
    with pytest.raises(TypeError, match="dropout must be a number, got bool True"):
        drl_fast.XTI(16, dropout=True)


def test_more_frames_than_positions() -> None:
    layer = small()
    with pytest.raises(ValueError, match=r"video must have at most 6 frames, .* got 7; .*XTI\(max_positions=8\)"):
        layer(torch.randn(2, 3, DIM), torch.randn(2, 7, DIM))
    assert layer(torch.randn(2, 3, DIM), torch.randn(2, 6, DIM)).shape == (2, 2)
