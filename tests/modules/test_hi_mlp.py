"""HI and MLP against their definitions, computed level by level and pair by pair."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import drl_fast
from drl_fast.modules import mlp
from tests.modules.plain import scramble
from tests.oracle import Problem, make

DIM = 16
MASKS = [(None, None), ("prefix", "prefix"), ("holes", "empty")]
pytestmark = pytest.mark.usefixtures("one_thread")


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt()


def rows(p: Problem) -> tuple[list[Tensor], list[Tensor]]:
    """Return each text's and each video's real tokens, as unit vectors."""
    t_mask = torch.ones(p.text.shape[:2], dtype=torch.bool) if p.text_mask is None else p.text_mask
    v_mask = torch.ones(p.video.shape[:2], dtype=torch.bool) if p.video_mask is None else p.video_mask
    texts = [unit(x[real]) for x, real in zip(p.text, t_mask, strict=True)]
    return texts, [unit(x[real]) for x, real in zip(p.video, v_mask, strict=True)]


def problem(masks: tuple[str | None, str | None]) -> Problem:
    p = make((5, 9, 6, 4), DIM, torch.float64, masks=masks)
    if p.text_mask is not None:
        p.text_mask[:, 3] = True
    return p


def gradients(layer: torch.nn.Module, p: Problem, plain: bool) -> dict[str, Tensor]:
    layer.zero_grad()
    q = p.map(lambda x: x.clone().requires_grad_() if x.is_floating_point() else x)
    logits = (
        {drl_fast.HI: plain_hi, drl_fast.MLP: plain_mlp}[type(layer)](layer, q)
        if plain
        else layer(q.text, q.video, q.text_mask, q.video_mask)
    )
    (logits * torch.linspace(-1, 1, 30, dtype=torch.float64).view(5, 6)).sum().backward()
    found = {k: v.grad.clone() for k, v in layer.named_parameters()}
    return {"logits": logits.detach(), "text": q.text.grad, "video": q.video.grad, **found}


def check(layer: torch.nn.Module, p: Problem) -> None:
    want, got = gradients(layer, p, plain=True), gradients(layer, p, plain=False)
    for name, truth in want.items():
        torch.testing.assert_close(got[name], truth, atol=1e-11, rtol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def plain_hi(layer: drl_fast.HI, p: Problem) -> Tensor:
    texts, videos = rows(p)
    level = layer.level_logits.exp() / layer.level_logits.exp().sum()
    t_mask = torch.ones(p.text.shape[:2], dtype=torch.bool) if p.text_mask is None else p.text_mask
    logits = []
    for a, words in enumerate(texts):
        score = layer.text_weight_fc(p.text[a][t_mask[a]]).squeeze(-1).exp()
        for frames in videos:
            if len(frames) == 0:
                logits.append(0 * score.sum())
                continue
            mean = unit(frames.mean(0))
            nearest = (frames @ words[-1]).max()
            if layer.masking == "drl" and len(frames) < p.video.shape[1]:
                nearest = nearest.clamp(min=0)
            by_word = (score / score.sum() * (words @ mean)).sum()
            logits.append(level[0] * (words[-1] @ mean) + level[1] * nearest + level[2] * by_word)
    return torch.stack(logits).view(len(texts), len(videos))


def plain_mlp(layer: drl_fast.MLP, p: Problem) -> Tensor:
    texts, videos = rows(p)
    logits = []
    for words in texts:
        for frames in videos:
            mean = unit(frames.mean(0)) if len(frames) else torch.zeros(DIM, dtype=torch.float64)
            hidden = layer.hidden(torch.cat([words[-1], mean])).clamp(min=0)
            logits.append(layer.similarity_dense(hidden).squeeze(0))
    return torch.stack(logits).view(len(texts), len(videos))


@pytest.mark.parametrize("masks", MASKS, ids=str)
@pytest.mark.parametrize("masking", ["drl", "exclude"])
def test_hi_against_the_definition(masks: tuple[str, str], masking: str) -> None:
    check(scramble(drl_fast.HI(DIM, masking=masking)).double(), problem(masks))


def test_hi_starts_with_equal_levels_and_can_become_dp() -> None:
    p = problem(("prefix", "prefix"))
    args = (p.text, p.video, p.text_mask, p.video_mask)
    layer = drl_fast.HI(DIM).double()
    level = layer.level_logits.data
    assert level.softmax(0).tolist() == pytest.approx([1 / 3] * 3)
    level.copy_(torch.tensor([50.0, 0, 0]))
    torch.testing.assert_close(layer(*args), drl_fast.DP()(*args))
    assert layer(*args).abs().max() <= 1


def test_hi_cites_its_sources() -> None:
    assert "our interpretation" in drl_fast.HI.__doc__
    for paper in ("2104.08860", "2207.07285", "2003.00392", "2203.07111"):
        assert paper in drl_fast.HI.__doc__
    assert "masking='exclude'" in repr(drl_fast.HI(DIM, masking="exclude"))
    with pytest.raises(ValueError, match="masking must be one of"):
        drl_fast.HI(DIM, masking="all")


def test_hi_competes_with_every_frame_under_none() -> None:
    p = problem((None, "prefix"))
    layer = drl_fast.HI(DIM, masking="none").double()
    layer.level_logits.data.copy_(torch.tensor([0.0, 50, 0]))
    want = (unit(p.text[:, -1]) @ unit(p.video).transpose(1, 2)).amax(-1).T
    torch.testing.assert_close(layer(p.text, p.video, None, p.video_mask), want)


@pytest.mark.parametrize("masks", MASKS, ids=str)
@pytest.mark.parametrize("chunk", [None, 1, 4, 13])
def test_mlp_against_the_definition(masks: tuple[str, str], chunk: int | None) -> None:
    check(scramble(drl_fast.MLP(DIM, chunk=chunk)).double(), problem(masks))


def test_mlp_chooses_chunks_by_its_width(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    score = mlp.score_pairs
    monkeypatch.setattr(mlp, "score_pairs", lambda *args, **options: seen.append(args[-1]) or score(*args, **options))
    text, video = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    drl_fast.MLP(8)(text, video)
    drl_fast.MLP(8, chunk=3)(text, video)
    assert seen == [2**19, 3]
