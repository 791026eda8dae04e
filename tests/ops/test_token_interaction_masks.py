"""The mask rules, case by case."""

from __future__ import annotations

import math

import pytest
import torch

import drl_fast
from drl_fast import reference
from tests.implementations import Implementation
from tests.oracle import make, probe_for, run

MASKINGS = ["drl", "exclude"]
POISON = [math.nan, math.inf, -math.inf]


def score(impl: Implementation, *args: object, **options: object) -> list[list[float]]:
    on_device = [None if a is None else torch.as_tensor(a).to(impl.device) for a in args]
    return drl_fast.token_interaction(*on_device, **options).tolist()


T, V = [[[1.0, 0.0]]], [[[-1.0, 0.0]]]
PADDED_T, PADDED_V = [[[1.0, 0.0], [9.0, 9.0]]], [[[-1.0, 0.0], [9.0, 9.0]]]


def test_negative_pair_at_exact_length_and_padded(impl: Implementation) -> None:
    """With "drl" a masked token's 0 beats a negative similarity, so the score depends on padding."""
    assert score(impl, T, V) == [[-1.0]]
    assert score(impl, T, V, None, None, [[1]], [[1]]) == [[-1.0]]
    assert score(impl, T, PADDED_V, None, None, None, [[1, 0]], bidirectional=False) == [[0.0]]
    # The text has no masked word, so the frame's maximum stays -1.
    assert score(impl, T, PADDED_V, None, None, None, [[1, 0]]) == [[-0.5]]
    assert score(impl, PADDED_T, PADDED_V, None, None, [[1, 0]], [[1, 0]]) == [[0.0]]


def test_negative_pair_under_the_other_rules(impl: Implementation) -> None:
    masks = ([[1, 0]], [[1, 0]])
    assert score(impl, PADDED_T, PADDED_V, None, None, *masks, masking="exclude") == [[-1.0]]
    s = reference.unit(torch.tensor(PADDED_T))[0] @ reference.unit(torch.tensor(PADDED_V))[0].T
    want = (s.amax(1)[0] + s.amax(0)[0]) / 2
    assert score(impl, PADDED_T, PADDED_V, None, None, *masks, masking="none") == [[pytest.approx(float(want))]]


def test_no_gradient_where_the_zero_won(impl: Implementation) -> None:
    text = torch.tensor(T, device=impl.device, requires_grad=True)
    video = torch.tensor(PADDED_V, device=impl.device, requires_grad=True)
    mask = torch.tensor([[1, 0]], device=impl.device)
    drl_fast.token_interaction(text, video, None, None, None, mask, bidirectional=False, normalize=False).backward()
    assert not text.grad.any()
    assert not video.grad.any()


@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_masked_features_reach_nothing(impl: Implementation, masking: str, poison: float, dtype: torch.dtype) -> None:
    problem = make((6, 9, 7, 5), 16, dtype, masks=("empty", "holes"), masking=masking)
    dirty = make((6, 9, 7, 5), 16, dtype, masks=("empty", "holes"), masking=masking)
    dirty.text[~dirty.text_mask] = poison
    dirty.video[~dirty.video_mask] = poison
    probe = torch.randn(6, 7, dtype=torch.float64)
    want, got = (run(drl_fast.token_interaction, p.map(lambda x: x.to(impl.device)), probe) for p in (problem, dirty))
    assert torch.equal(got.logits, want.logits)
    for name in ("text", "video"):
        assert torch.equal(got.grads[name], want.grads[name])
        masked = ~getattr(problem, f"{name}_mask").to(impl.device)
        assert torch.equal(got.grads[name][masked], torch.zeros_like(got.grads[name][masked]))


@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("weight", [1e6, *POISON])
def test_masked_weights_count_for_nothing(impl: Implementation, masking: str, weight: float) -> None:
    """A masked token's own maximum is 0 whatever its weight, and the weight's gradient is 0."""
    problem = make((6, 9, 7, 5), 16, masks=("empty", "holes"), weights=torch.float32, masking=masking)
    want = run(drl_fast.token_interaction, problem.map(lambda x: x.to(impl.device)), probe_for(problem))
    problem.text_weight[~problem.text_mask] = weight
    problem.video_weight[~problem.video_mask] = -weight
    got = run(drl_fast.token_interaction, problem.map(lambda x: x.to(impl.device)), probe_for(problem))
    assert torch.equal(got.logits, want.logits)
    assert torch.equal(got.grads["text"], want.grads["text"])
    assert not got.grads["text_weight"].cpu()[~problem.text_mask].any()
    assert not got.grads["video_weight"].cpu()[~problem.video_mask].any()


@pytest.mark.parametrize("masking", ["drl", "exclude", "none"])
def test_rows_without_a_real_token_score_zero(impl: Implementation, masking: str) -> None:
    problem = make((4, 3, 5, 2), masks=("holes", "holes"), masking=masking)
    problem.text_mask[1] = False
    problem.video_mask[2] = False
    result = run(drl_fast.token_interaction, problem.map(lambda x: x.to(impl.device)), torch.ones(4, 5))
    assert all(bool(g.isfinite().all()) for g in (result.logits, *result.grads.values()))
    if masking == "none":  # every token competes, and the other side's weights still count
        assert result.logits[1, 2] == 0
    else:
        assert not result.logits[1].any()
        assert not result.logits[:, 2].any()
        assert not result.grads["text"][1].any()
        assert not result.grads["video"][2].any()


@pytest.mark.parametrize("poison", POISON)
def test_a_bad_real_token_affects_only_its_own_scores(impl: Implementation, poison: float) -> None:
    problem = make((40, 7, 30, 9), 16, masks=("prefix", "prefix"))
    clean = run(drl_fast.token_interaction, problem.map(lambda x: x.to(impl.device))).logits
    problem.text[17, 0, 3] = poison
    problem.video[11, 0, 5] = poison
    got = run(drl_fast.token_interaction, problem.map(lambda x: x.to(impl.device))).logits
    hit = torch.zeros(40, 30, dtype=torch.bool, device=impl.device)
    hit[17], hit[:, 11] = True, True
    assert bool(got[hit].isnan().all())
    assert torch.equal(got[~hit], clean[~hit])


@pytest.mark.parametrize("masking", ["drl", "exclude", "none"])
@pytest.mark.parametrize("tokens", [1, 4, 20])
def test_nan_wins_the_maximum_at_every_position(impl: Implementation, masking: str, tokens: int) -> None:
    """As in torch.max: a comparison does not drop a NaN, nor does a masked token's 0 hide it."""
    for place in range(tokens):
        problem = make((2, 3, 2, tokens), 8, masking=masking, bidirectional=False)
        problem.video[1, place, 0] = math.nan
        problem.video_mask = torch.ones(2, tokens)
        if tokens > 1:
            problem.video_mask[1, (place + 1) % tokens] = 0
        got = run(drl_fast.token_interaction, problem.map(lambda x: x.to(impl.device))).logits
        assert bool(got[:, 1].isnan().all())
        assert bool(got[:, 0].isfinite().all())


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("words", [3, 40])
def test_an_overflowing_product_is_not_hidden(impl: Implementation, words: int, bidirectional: bool) -> None:
    """A raw product may become inf or, as inf - inf, NaN, although no token is: no maximum may drop it."""
    problem = make((4, words, 5, 4), 128, normalize=False, bidirectional=bidirectional)
    problem.text[2, -1] = 1e30
    problem.video[3, 2] = 1e30
    problem.video[3, 2, 64:] = -1e30
    got = run(drl_fast.token_interaction, problem.map(lambda x: x.to(impl.device))).logits
    hit = torch.zeros(4, 5, dtype=torch.bool, device=impl.device)
    hit[2, 3] = True
    assert torch.equal(got.isfinite(), ~hit)


def test_an_infinite_similarity_does_not_depend_on_the_batch(impl: Implementation) -> None:
    """An empty slot has weight 0, and 0 times infinity is NaN; so empty slots must not count at all."""
    text, video = torch.full((1, 2, 8), 1e25), torch.full((2, 3, 8), 1e25)
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]])
    inputs = [x.to(impl.device) for x in (text, video, mask)]
    options = {"normalize": False, "masking": "exclude"}
    both = drl_fast.token_interaction(inputs[0], inputs[1], video_mask=inputs[2], **options)
    alone = drl_fast.token_interaction(inputs[0], inputs[1][:1], video_mask=inputs[2][:1], **options)
    assert both.tolist() == [[math.inf, math.inf]]
    assert alone.tolist() == [[math.inf]]


@pytest.mark.parametrize("poison", POISON)
def test_a_bad_upstream_gradient_reaches_only_its_own_tokens(impl: Implementation, poison: float) -> None:
    problem = make((3, 5, 4, 6), 16, masks=("holes", "holes"), weights=torch.float32)
    real = [problem.text_mask != 0, problem.video_mask != 0]
    problem = problem.map(lambda x: x.to(impl.device))
    probe = torch.ones(3, 4)
    probe[0, 1] = poison
    grads = run(drl_fast.token_interaction, problem, probe).grads
    for name, mask, row in (("text", real[0], 0), ("video", real[1], 1)):
        weight, features = grads[f"{name}_weight"].cpu(), grads[name].cpu()
        assert not weight[~mask].any(), "a masked weight's gradient is 0"
        assert not features[~mask].any()
        others = torch.arange(len(mask)) != row
        assert bool(weight[others].isfinite().all())
        assert bool(features[others].isfinite().all())


def test_small_tokens_on_both_sides_keep_the_digits_of_others(impl: Implementation) -> None:
    """In float16 the inverse norms of both would leave the other tokens' gradients no digits."""
    problem = make((6, 4, 5, 3), 64, torch.float16, weights=torch.float32)
    problem.text[0, 0] *= 1e-4
    problem.video[0, 0] *= 1e-4
    probe = torch.randn(6, 5, dtype=torch.float64)
    got = run(drl_fast.token_interaction, problem.map(lambda x: x.to(impl.device)), probe).grads
    want = run(reference.token_interaction, problem.double(), probe).grads
    for name in ("text", "video"):
        ours, true = got[name][1:].cpu().double(), want[name][1:]
        assert float((ours - true).abs().max() / true.abs().max()) < 1e-3, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_zero_vectors(impl: Implementation, dtype: torch.dtype) -> None:
    """A token of norm <= 1e-12 maps to 0, with gradient 0 (F.normalize's is 1e12 there)."""
    problem = make((5, 6, 4, 7), 8, dtype, masks=(None, "holes"))
    problem.text[0, 2] = 0
    problem.text[3] = 0
    problem.video[1, :] = 0
    problem.video[2, 0] = 1e-13 if dtype != torch.float16 else 0
    probe = torch.randn(5, 4, dtype=torch.float64)
    got = run(drl_fast.token_interaction, problem.map(lambda x: x.to(impl.device)), probe)
    want = run(reference.token_interaction, problem.double(), probe)
    torch.testing.assert_close(got.logits.cpu().double(), want.logits, atol=2e-6, rtol=0)
    assert not got.logits[3].any()
    assert not got.logits[:, 1].any()
    assert not got.grads["text"][3].any()
    assert not got.grads["text"][0, 2].any()
    assert not got.grads["video"][1].any()
    assert not got.grads["video"][2, 0].any()
    assert all(bool(g.isfinite().all()) for g in got.grads.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tiny_norms_that_are_not_zero(impl: Implementation, dtype: torch.dtype) -> None:
    """A token just above the threshold is normalised, although its square is far below 1."""
    text = torch.zeros(1, 1, 4, dtype=dtype, device=impl.device)
    text[0, 0] = torch.tensor([3e-12, 4e-12, 0, 0], dtype=dtype)
    video = torch.eye(4, dtype=dtype, device=impl.device)[:2].view(2, 1, 4)
    assert drl_fast.token_interaction(text, video).tolist() == [[pytest.approx(0.6), pytest.approx(0.8)]]


def test_uniform_weights_are_those_of_the_real_tokens(impl: Implementation) -> None:
    problem = make((5, 6, 4, 7), 8, masks=("empty", "holes")).map(lambda x: x.to(impl.device))
    given = make((5, 6, 4, 7), 8, masks=("empty", "holes")).map(lambda x: x.to(impl.device))
    given.text_weight = reference.uniform_weight(given.text_mask, torch.float32)
    given.video_weight = reference.uniform_weight(given.video_mask, torch.float32)
    assert torch.equal(*(run(drl_fast.token_interaction, p).logits for p in (problem, given)))
