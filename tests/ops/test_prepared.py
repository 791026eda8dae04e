"""Prepared videos: the bits of unprepared ones, whatever the masks, options, slices and implementation."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import drl_fast
from drl_fast import reference
from tests.conftest import use
from tests.implementations import Implementation
from tests.oracle import ATOL, Problem, error, make

MASKS = [(None, None), ("prefix", "holes"), ("empty", "empty")]
SHAPES = [(1, 12, 70, 12), (5, 7, 33, 6), (37, 3, 40, 9), (2, 1, 1, 1), (3, 5, 6, 260)]
POOLINGS = [{}, {"pooling": "softmax", "temperature": 0.1}, {"pooling": "logsumexp", "temperature": 0.1}]
# The error of one stored number of a unit token, relative to itself.
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def bits(x: Tensor) -> Tensor:
    """Return raw bytes, which compare NaN as equal."""
    return x.detach().contiguous().view(torch.uint8)


def prepare(p: Problem, **options: Any) -> drl_fast.PreparedVideos:
    return drl_fast.prepare(p.video, p.video_weight, p.video_mask, **options)


def score(p: Problem, video: drl_fast.PreparedVideos, **options: Any) -> Any:
    return drl_fast.token_interaction(p.text, video, p.text_weight, None, p.text_mask, **p.options, **options)


def problem(impl: Implementation, *arguments: Any, **options: Any) -> Problem:
    return make(*arguments, **options).map(lambda x: x.to(impl.device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("masks", MASKS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits(impl: Implementation, shape: tuple[int, ...], masks: tuple[str, str], dtype: torch.dtype) -> None:
    p = problem(impl, shape, 33, dtype, masks=masks, weights=torch.float32)
    storage = None if dtype == torch.float64 else torch.float32
    prepared = prepare(p, dtype=storage)
    assert (prepared.shape, prepared.dtype) == ((*shape[2:], 33), storage or dtype)
    assert torch.equal(bits(score(p, prepared)), bits(drl_fast.token_interaction(*p.args())))


@pytest.mark.parametrize("pooling", POOLINGS, ids=lambda x: x.get("pooling", "max"))
@pytest.mark.parametrize(("normalize", "bidirectional"), list(product([True, False], repeat=2)))
@pytest.mark.parametrize("masking", ["drl", "exclude", "none"])
def test_bits_under_every_option(
    impl: Implementation, masking: str, normalize: bool, bidirectional: bool, pooling: dict[str, Any]
) -> None:
    masks = ("holes", None if masking == "none" else "holes")
    options = {"masking": masking, "normalize": normalize, "bidirectional": bidirectional, **pooling}
    p = problem(impl, (6, 7, 45, 5), 64, masks=masks, weights=torch.float32, **options)
    prepared = prepare(p, normalize=normalize)
    assert torch.equal(bits(score(p, prepared)), bits(drl_fast.token_interaction(*p.args(), **p.options)))


@pytest.mark.parametrize("masks", MASKS, ids=str)
def test_uniform_weights_and_matches(impl: Implementation, masks: tuple[str, str]) -> None:
    p = problem(impl, (6, 7, 45, 5), 16, masks=masks)
    logits, matches = score(p, prepare(p), return_matches=True)
    want, expected = drl_fast.token_interaction(*p.args(), return_matches=True)
    assert torch.equal(bits(logits), bits(want))
    assert torch.equal(matches.video_index, expected.video_index)
    assert torch.equal(matches.text_index, expected.text_index)


@pytest.mark.parametrize("masking", ["drl", "exclude"])
def test_maxsim_and_token_maxsim(impl: Implementation, masking: str) -> None:
    p = problem(impl, (6, 7, 45, 5), 16, masks=("holes", "empty"), weights=torch.float32)
    prepared = prepare(p)
    sides, masks = (p.text, p.video), (p.text_mask, p.video_mask)
    for function, options in (
        (drl_fast.token_maxsim, {}),
        (drl_fast.token_maxsim, {"pooling": "softmax", "temperature": 0.1}),
        (drl_fast.maxsim, {"normalize": True}),
        (drl_fast.maxsim, {"normalize": True, "reduction": "mean"}),
    ):
        got = function(p.text, prepared, p.text_mask, masking=masking, **options)
        assert torch.equal(bits(got), bits(function(*sides, *masks, masking=masking, **options)))


@pytest.mark.parametrize("storage", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("slices", [(slice(0, 7),), (slice(5, 6),), (slice(30, None), slice(1, 40)), (slice(9, 9),)])
def test_slices(impl: Implementation, slices: tuple[slice, ...], storage: torch.dtype) -> None:
    p = problem(impl, (4, 7, 75, 5), 16, masks=("holes", "empty"), weights=torch.float32)
    part = prepare(p, dtype=storage)
    whole = score(p, part)
    for rows in slices:
        part, whole = part[rows], whole[:, rows]
    assert len(part) == whole.shape[1]
    assert torch.equal(bits(score(p, part)), bits(whole))
    assert part.mask is not None
    assert len(part.mask) == len(part)


def test_slices_of_many_videos(impl: Implementation) -> None:
    """Lengths are sorted among 1,024 videos, and a slice may begin and end among them."""
    p = problem(impl, (2, 3, 2500, 4), 8, masks=(None, "prefix"))
    prepared, whole = prepare(p), drl_fast.token_interaction(*p.args())
    for rows in (slice(0, 1100), slice(1000, 1030), slice(2047, 2050), slice(0, 2500)):
        assert torch.equal(bits(score(p, prepared[rows])), bits(whole[:, rows]))


@pytest.mark.parametrize("storage", list(ROUNDING), ids=str)
@pytest.mark.parametrize("pooling", POOLINGS, ids=lambda x: x.get("pooling", "max"))
@pytest.mark.parametrize("text_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_storage_in_16_bits(
    impl: Implementation, text_dtype: torch.dtype, pooling: dict[str, Any], storage: torch.dtype
) -> None:
    """Against the reference of the stored numbers: nothing else is rounded to 16 bits."""
    p = problem(impl, (6, 7, 45, 5), 512, masks=("holes", "empty"), weights=torch.float32, **pooling)
    p = replace(p, text=p.text.to(text_dtype))
    prepared = prepare(p, dtype=storage)
    got = score(p, prepared)
    rounded, d = replace(p, options={**p.options, "normalize": False}).double(), p.double()
    rounded.text = reference.unit(d.text)
    rounded.video = reference.unit(d.video).to(storage).double()
    want = reference.token_interaction(*rounded.args(), **rounded.options)
    # A number next to a rounding boundary may go either way, because it is normalised in float32.
    assert error(got, want) <= ATOL[torch.float32] * max(1.0, float(want.abs().max())) + ROUNDING[storage] / 500
    truth = reference.token_interaction(*d.args(), **d.options)
    weights = 0.5 * (d.text_weight.abs().sum(1)[:, None] + d.video_weight.abs().sum(1))
    slope = 1 if p.options.get("pooling") != "softmax" else 1 + 2 / p.options["temperature"]
    assert bool(((got.double().cpu() - truth).abs() <= 1.01 * slope * ROUNDING[storage] * weights + 1e-6).all())


def test_16_bits_as_given_take_half_the_memory() -> None:
    video = torch.randn(320, 12, 512)
    sizes = {dtype: drl_fast.prepare(video, dtype=dtype).nbytes for dtype in (None, torch.float16, torch.bfloat16)}
    assert video.nbytes <= sizes[None] <= 1.02 * video.nbytes
    for dtype in (torch.float16, torch.bfloat16):
        assert sizes[dtype] <= 0.52 * video.nbytes
        prepared = drl_fast.prepare(video.to(dtype))
        assert (prepared.dtype, prepared.nbytes) == (dtype, sizes[dtype])


@pytest.mark.parametrize("pooling", POOLINGS[:2], ids=lambda x: x.get("pooling", "max"))
def test_gradients_of_the_text(impl: Implementation, pooling: dict[str, Any]) -> None:
    p = problem(impl, (6, 7, 45, 5), 16, masks=("holes", "empty"), weights=torch.float32, **pooling)
    probe = torch.randn(p.pairs).to(impl.device)
    p.video.requires_grad_()
    prepared = prepare(p)
    grads = []
    for call in (lambda q: drl_fast.token_interaction(*q.args(), **q.options), lambda q: score(q, prepared)):
        leaves = [x.detach().requires_grad_() for x in (p.text, p.text_weight)]
        logits = call(replace(p, text=leaves[0], text_weight=leaves[1]))
        grads.append(torch.autograd.grad(logits, leaves, probe))
        # One of the two alone.
        only = call(replace(p, text=leaves[0], text_weight=p.text_weight))
        assert torch.equal(torch.autograd.grad(only, leaves[0], probe)[0], grads[-1][0])
    for ours, want in zip(grads[1], grads[0], strict=True):
        assert error(ours, want.double().cpu()) <= 1e-6 * float(want.abs().max())
    assert p.video.grad is None


@pytest.mark.parametrize("pooling", POOLINGS, ids=lambda x: x.get("pooling", "max"))
def test_the_text_has_no_second_derivative(impl: Implementation, pooling: dict[str, Any]) -> None:
    """It raises also if the loss depends on the text on another path, whose term alone would be wrong."""
    p = problem(impl, (3, 4, 5, 6), **pooling)
    p.text.requires_grad_()
    (grad,) = torch.autograd.grad(score(p, prepare(p)).sum(), p.text, create_graph=True)
    with pytest.raises(NotImplementedError, match="the token interaction has no second derivative"):
        (grad.square().sum() + p.text.square().sum()).backward()


@pytest.mark.parametrize("storage", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("pooling", POOLINGS[:2], ids=lambda x: x.get("pooling", "max"))
def test_masked_words_get_no_gradient(
    impl: Implementation, pooling: dict[str, Any], poison: float, storage: torch.dtype
) -> None:
    p = problem(impl, (4, 6, 40, 5), 16, masks=("holes", "holes"), **pooling)
    assert p.text_mask is not None
    prepared = prepare(p, dtype=storage)
    grads = []
    for value in (0.0, poison):
        text = p.text.masked_fill(~p.text_mask[..., None], value).requires_grad_()
        score(replace(p, text=text), prepared).sum().backward()
        grads.append(text.grad)
    assert torch.equal(*grads)
    assert not grads[1][~p.text_mask].any()


@pytest.mark.parametrize("storage", [torch.float32, torch.float16], ids=str)
def test_float64_videos_are_normalised_in_float64(impl: Implementation, storage: torch.dtype) -> None:
    p = problem(impl, (2, 3, 40, 5), 16)
    small = drl_fast.prepare(p.video.double(), dtype=storage)
    large = drl_fast.prepare(p.video.double() * 2.0**300, dtype=storage)
    assert torch.equal(score(p, large), score(p, small))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_masked_tokens_are_never_read_and_bad_ones_reach_their_own_scores(impl: Implementation, poison: float) -> None:
    p = problem(impl, (4, 3, 40, 5), 16, masks=(None, "prefix"))
    assert p.video_mask is not None
    want = score(p, prepare(p))
    p.video[~p.video_mask] = poison
    assert torch.equal(bits(score(p, prepare(p))), bits(want))
    p.video[7, 0] = torch.nan
    got = score(p, prepare(p))
    assert got[:, 7].isnan().all()
    others = [b for b in range(40) if b != 7]
    assert torch.equal(bits(got[:, others]), bits(want[:, others]))


def test_no_texts_and_no_videos(impl: Implementation) -> None:
    p = problem(impl, (0, 3, 5, 4))
    assert score(p, prepare(p)).shape == (0, 5)
    p = problem(impl, (5, 3, 0, 4))
    prepared = prepare(p)
    assert len(prepared) == 0
    assert score(p, prepared).shape == (5, 0)
    assert score(p, prepared, return_matches=True)[1].video_index.shape == (5, 0, 3)


@pytest.mark.parametrize("storage", [torch.float32, torch.float16], ids=str)
def test_lanes_serve_the_other_implementations(storage: torch.dtype) -> None:
    """Videos that the C++ kernels prepared can be scored by chunked PyTorch, matches included."""
    p = make((4, 7, 75, 5), 16, masks=("holes", "empty"), weights=torch.float32)
    with use("cpp"):
        prepared = prepare(p, dtype=storage)[3:70]
        logits, matches = score(p, prepared, return_matches=True)
        soft = score(p, prepared, pooling="softmax")
    with use("chunked"):
        again, same = score(p, prepared, return_matches=True)
        assert error(score(p, prepared, pooling="softmax"), soft.double()) <= 1e-6
    assert error(again, logits.double()) <= 1e-6
    assert torch.equal(matches.video_index, same.video_index)
    assert torch.equal(matches.text_index, same.text_index)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_change_bits(threads: int) -> None:
    with use("cpp"):
        p = make((4, 12, 500, 12), 64, masks=("prefix", "prefix"))
        prepared, want = prepare(p), drl_fast.token_interaction(*p.args())
        torch.set_num_threads(threads)
        assert torch.equal(bits(prepare(p)._tensors()[0]), bits(prepared._tensors()[0]))
        assert torch.equal(bits(score(p, prepared)), bits(want))


def test_saved_and_moved(impl: Implementation) -> None:
    p = problem(impl, (4, 7, 75, 5), 16, masks=("holes", "empty"), weights=torch.float32)
    prepared = prepare(p)[2:60]
    file = io.BytesIO()
    torch.save(prepared, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(bits(score(p, loaded)), bits(score(p, prepared)))
    assert prepared.to(impl.device) is prepared
    assert "58, 5, 16" in repr(prepared)


def test_layers(impl: Implementation) -> None:
    p = problem(impl, (4, 7, 45, 5), 16, masks=("holes", "empty"))
    layers: list[Callable[..., Tensor]] = [
        *(drl_fast.WTI(16, masking=masking) for masking in ("drl", "exclude", "none")),
        drl_fast.WTI(16, weight_input="normalized", normalize=False),
        drl_fast.WTI(16, bidirectional=False),
        drl_fast.WTI(16, pooling="softmax", temperature=0.1),
        *(drl_fast.TI(masking=masking) for masking in ("drl", "exclude", "none")),
        drl_fast.TI(bidirectional=False, masking="none"),
    ]
    for layer in layers:
        layer.to(impl.device)
        got = layer(p.text, layer.prepare(p.video, p.video_mask), p.text_mask)
        assert torch.equal(bits(got), bits(layer(p.text, p.video, p.text_mask, p.video_mask)))


def test_a_layer_trains_beside_prepared_videos(impl: Implementation) -> None:
    p = problem(impl, (4, 7, 45, 5), 16, masks=("holes", "empty"))
    layer = drl_fast.WTI(16).to(impl.device)
    layer(p.text, layer.prepare(p.video, p.video_mask), p.text_mask).sum().backward()
    assert layer.video_weight_fc[0].weight.grad is None
    ours = layer.text_weight_fc[0].weight.grad.clone()
    layer.zero_grad()
    layer(p.text, p.video, p.text_mask, p.video_mask).sum().backward()
    assert error(ours, layer.text_weight_fc[0].weight.grad.double().cpu()) <= 1e-5


def test_autocast() -> None:
    p = make((4, 7, 45, 5), 16, masks=("holes", "empty"))
    with torch.autocast("cpu", torch.bfloat16):
        want = drl_fast.token_interaction(*p.args())
        prepared = prepare(p, dtype=torch.float32)
        assert prepare(p).dtype == torch.bfloat16
        assert torch.equal(bits(score(p, prepared)), bits(want))


T, V = torch.zeros(2, 3, 8), torch.zeros(4, 5, 8)
M = torch.ones(4, 5)


def interact(video: drl_fast.PreparedVideos, **changes: Any) -> object:
    return drl_fast.token_interaction(**{"text": T, "video": video, **changes})


WEIGHTED = {"video_weight": torch.ones(4, 5)}
# By what is wrong: what is prepared beside the video, the arguments beside that, the error, and its message.
ERRORS: dict[str, tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = {
    "video_weight": ({}, WEIGHTED, ValueError, r"video_weight must be None beside prepared videos.*pass it to prepare"),
    "video_mask": ({}, {"video_mask": M}, ValueError, r"video_mask must be None beside prepared videos.*prepare\(\)"),
    "normalize": ({}, {"normalize": False}, ValueError, "normalize must be True, as in prepare.*got False"),
    "raw": ({"normalize": False}, {}, ValueError, "normalize must be False, as in prepare.*got True"),
    "masking": ({"video_mask": M}, {"masking": "none"}, ValueError, "masking must be 'drl' or 'exclude'.*'none'"),
    "one way": (WEIGHTED, {"bidirectional": False}, ValueError, "video_weight must be None when bidirectional=False"),
    "double text": ({}, {"text": T.double()}, TypeError, "both be float64 or neither, got torch.float64"),
    "width": ({}, {"text": T[..., :7]}, ValueError, "video must have D = 7 channels to match text, got 8"),
    "device": ({}, {"text": T.to("meta")}, ValueError, r"video must be on text's device meta, got cpu"),
    "text": ({}, {"text": T[0]}, ValueError, r"text must be \(A, Nt, D\)"),
    "matches": ({}, {"return_matches": True, "pooling": "softmax"}, ValueError, "return_matches must be False"),
}


@pytest.mark.parametrize(("prepared", "changes", "kind", "message"), list(ERRORS.values()), ids=list(ERRORS))
def test_errors(
    cpu_impl: Implementation, prepared: dict[str, Any], changes: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        interact(drl_fast.prepare(V, **prepared), **changes)


def test_errors_of_prepare() -> None:
    for changes, kind, message in (
        ({"video": V[0]}, ValueError, r"video must be \(B, Nv, D\)"),
        ({"video": V.long()}, TypeError, "video must be float32"),
        ({"video_weight": torch.ones(4, 6)}, ValueError, r"video_weight must be \(B, Nv\)"),
        ({"video_mask": -M}, ValueError, "video_mask must not be negative"),
        ({"dtype": torch.int8}, ValueError, "dtype must be None, torch.float32.*torch.int8"),
        ({"dtype": torch.float64}, ValueError, "dtype must be None, torch.float32.*torch.float64"),
        ({"normalize": 1}, TypeError, "normalize must be True or False"),
    ):
        with pytest.raises(kind, match=message):
            drl_fast.prepare(**{"video": V, **changes})
    prepared = drl_fast.prepare(V)
    with pytest.raises(ValueError, match="step 1, got 2"):
        prepared[::2]
    with pytest.raises(TypeError, match=r"slice, got int 0; use prepared\[a:b\]"):
        prepared[0]
    with pytest.raises(ValueError, match="normalize must be True"):
        drl_fast.maxsim(T, prepared)
    with pytest.raises(ValueError, match="document_mask must be None beside prepared"):
        drl_fast.maxsim(T, prepared, None, M, normalize=True)


def test_errors_of_layers() -> None:
    with pytest.raises(ValueError, match=r"weights, got none; prepare it with layer.prepare"):
        drl_fast.WTI(8)(T, drl_fast.prepare(V))
    with pytest.raises(ValueError, match="video_weight must be None when bidirectional=False"):
        drl_fast.WTI(8, bidirectional=False)(T, drl_fast.WTI(8).prepare(V))
    with pytest.raises(ValueError, match="D = 9 channels"):
        drl_fast.WTI(9).prepare(V)
    with pytest.raises(ValueError, match="prepare needs interaction 'ti' or 'wti', got 'dp'"):
        drl_fast.Head(8, interaction="dp").prepare(V)


def test_a_head_takes_prepared_videos() -> None:
    head = drl_fast.Head(12, 10, dim=16).eval()
    text, text_mask = head.text_tokens(torch.randn(3, 4, 12), torch.rand(3, 4) < 0.7)
    video, video_mask = head.video_tokens(torch.randn(5, 6, 10), torch.rand(5, 6) < 0.7)
    prepared = head.prepare(video, video_mask)
    got, matches = head.similarity(text, prepared, text_mask, return_matches=True)
    want, expected = head.similarity(text, video, text_mask, video_mask, return_matches=True)
    assert torch.equal(bits(got), bits(want))
    assert torch.equal(matches.text_index, expected.text_index)


def test_lanes_of_another_kind_are_refused() -> None:
    with use("cpp"):
        lanes = torch.ops.drl_fast.prepare_videos(V, M, None, True, torch.float32)
        rest = (0, 4, 5, True, True, True, False)
        operator = torch.ops.drl_fast.prepared_token_interaction
        assert operator(T, torch.ones(2, 3), None, lanes, *rest)[0].shape == (2, 4)
        other_width = [*lanes[:6], lanes[6] // 2]
        for bad in (lanes[:6], [lanes[0].double(), *lanes[1:]], [lanes[0][:-1], *lanes[1:]], other_width):
            with pytest.raises(RuntimeError, match="prepare them again"):
                operator(T, torch.ones(2, 3), None, bad, *rest)
        with pytest.raises(RuntimeError, match="prepare them again"):
            operator(T.double(), torch.ones(2, 3).double(), None, lanes, *rest)


def test_matches_are_stored_inside_of_their_tensor() -> None:
    with use("cpp"):
        lanes = torch.ops.drl_fast.prepare_videos(V, M, None, True, torch.float32)
        operator = torch.ops.drl_fast.prepared_token_interaction
        for frames, position in ((1, lanes[2]), (5, lanes[2] + 1_000_000), (5, lanes[2] - 1_000_000)):
            bad = [*lanes[:2], position.int(), *lanes[3:]]
            with pytest.raises(RuntimeError, match="frames must be the padded length of the prepared videos"):
                operator(T, torch.ones(2, 3), None, bad, 0, 4, frames, True, True, True, True)
        too_long = [*lanes[:6], lanes[6] * torch.tensor([1, 1 << 59])]
        with pytest.raises(RuntimeError, match="prepare them again"):
            operator(T, torch.ones(2, 3), None, too_long, 0, 4, 5, True, True, True, False)
