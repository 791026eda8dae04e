"""Soft pooling, softmax and logsumexp in place of the maximum: values, gradients, masks and bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import drl_fast
from drl_fast import reference
from tests.conftest import use
from tests.implementations import Implementation
from tests.oracle import ATOL, LEAVES, Problem, Result, assert_close, make, plain, run

POOLINGS = ["softmax", "logsumexp"]
MASKS = {"none": (None, None), "prefix": ("prefix", "prefix"), "holes": ("holes", "holes"), "empty": ("empty", "empty")}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
POISON = [math.nan, math.inf, -math.inf]

forward_op = torch.ops.drl_fast.soft_token_interaction.default
backward_op = torch.ops.drl_fast.soft_token_interaction_backward.default


def judge(problem: Problem, device: str, floor: float = 0.0) -> Result:
    """Compare with the float64 reference: at most twice plain PyTorch's error in the same dtype, plus atol.

    ``floor``: the size below which a true gradient counts as nothing but rounding. Pairs whose tokens have no
    similarity to speak of have gradients of that kind: with one channel, they are differences of equal numbers.
    """
    probe = torch.randn(problem.pairs, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours = run(drl_fast.token_interaction, problem.map(lambda x: x if x.device.type == device else x.to(device)), probe)
    truth = run(reference.token_interaction, problem.double(), probe)
    rival = run(plain, problem, probe)
    dtype = problem.text.dtype
    assert ours.logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert ours.logits.shape == problem.pairs
    largest = max(1.0, float(truth.logits.abs().max()) if truth.logits.numel() else 0.0)
    assert_close("logits", ours.logits, rival.logits, truth.logits, ATOL[dtype], largest)
    for name, grad in ours.grads.items():
        assert grad.dtype == getattr(problem, name).dtype
        assert grad.shape == getattr(problem, name).shape
        atol = max(4 * ATOL[dtype], 2 * torch.finfo(grad.dtype).eps)
        assert_close(f"grad of {name}", grad, rival.grads[name], truth.grads[name], atol, floor)
    return ours


def on(impl: Implementation, problem: Problem) -> Problem:
    return problem.map(lambda x: x.to(impl.device))


def bits(x: Tensor) -> Tensor:
    return x.nan_to_num(7.0)


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1),
        (5, 1, 4, 6),
        (4, 6, 5, 1),
        (100, 3, 1, 7),
        (16, 32, 16, 12),
        (3, 255, 2, 4),
        (2, 4, 3, 300),
    ],
    ids=str,
)
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_shapes(impl: Implementation, pooling: str, masks: str, shape: tuple[int, int, int, int]) -> None:
    judge(make(shape, masks=MASKS[masks], weights=torch.float32, pooling=pooling, temperature=0.1), impl.device)


@pytest.mark.parametrize("dim", [1, 3, 64, 512, 1030])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_widths(impl: Implementation, pooling: str, dim: int) -> None:
    problem = make((6, 8, 7, 5), dim, masks=("prefix", "holes"), pooling=pooling, temperature=0.2)
    judge(problem, impl.device, floor=1.0 if dim == 1 else 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masking", ["drl", "exclude", "none"])
@pytest.mark.parametrize("normalize", [True, False], ids=["unit", "raw"])
@pytest.mark.parametrize("bidirectional", [True, False], ids=["both", "one way"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_options(
    impl: Implementation, pooling: str, bidirectional: bool, normalize: bool, masking: str, dtype: torch.dtype
) -> None:
    options = {"masking": masking, "normalize": normalize, "bidirectional": bidirectional, "pooling": pooling}
    options["temperature"] = 1.0 if normalize else 0.3
    weights = None if masking == "exclude" else torch.float32
    judge(make((9, 11, 10, 6), 32, dtype, masks=("empty", "empty"), weights=weights, **options), impl.device)


@pytest.mark.parametrize("temperature", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_temperatures(impl: Implementation, pooling: str, temperature: float) -> None:
    """Also with raw similarities of a few hundred, whose exponentials would overflow."""
    for normalize in (True, False):
        problem = make(
            (6, 9, 7, 5),
            400,
            masks=("prefix", None),
            weights=torch.float32,
            normalize=normalize,
            pooling=pooling,
            temperature=temperature,
        )
        found = judge(problem, impl.device, floor=1e-2)
        assert all(bool(x.isfinite().all()) for x in (found.logits, *found.grads.values()))


@pytest.mark.parametrize("temperature", [1e-30, 1e30])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_extreme_temperatures_are_finite(impl: Implementation, pooling: str, temperature: float) -> None:
    """Also for a single candidate and for ties, whose similarities may differ from their mean by rounding."""
    for shape in ((4, 1, 3, 1), (4, 5, 3, 6)):
        problem = make(shape, masks=(None, "holes"), pooling=pooling, temperature=temperature)
        problem.video[:, 1:3] = problem.video[:, :1]
        found = run(drl_fast.token_interaction, on(impl, problem), torch.ones(problem.pairs))
        assert all(bool(x.isfinite().all()) for x in (found.logits, *found.grads.values()))


def test_limits(impl: Implementation) -> None:
    """A small temperature gives the maximum, a large one the mean."""
    problem = on(impl, make((6, 9, 7, 5), masks=("holes", "prefix"), masking="exclude"))
    maximum = drl_fast.token_interaction(*problem.args(), masking="exclude")
    for pooling in POOLINGS:
        soft = {"masking": "exclude", "pooling": pooling}
        near = drl_fast.token_interaction(*problem.args(), **soft, temperature=1e-4)
        torch.testing.assert_close(near, maximum, atol=1e-3, rtol=0)
    problem = on(impl, make((3, 4, 2, 5)))
    mean = drl_fast.token_interaction(*problem.args(), pooling="softmax", temperature=1e4)
    s = torch.einsum("aid,bjd->ab", reference.unit(problem.text), reference.unit(problem.video)) / 20
    torch.testing.assert_close(mean, s, atol=1e-4, rtol=0)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_masked_slot_counts_with_drl(impl: Implementation, pooling: str) -> None:
    """A word meets one frame of similarity 1 and ``masked`` slots of similarity 0."""
    for masked in (0, 1, 3):
        text = torch.tensor([[[1.0, 0.0]]], device=impl.device)
        video = torch.tensor([[[1.0, 0.0]] + [[9.0, 9.0]] * masked], device=impl.device)
        mask = torch.tensor([[1] + [0] * masked], device=impl.device)
        options = {"bidirectional": False, "pooling": pooling, "temperature": 0.5}
        got = drl_fast.token_interaction(text, video, video_mask=mask, **options).item()
        total = math.exp(2) + masked
        assert got == pytest.approx(math.exp(2) / total if pooling == "softmax" else 0.5 * math.log(total), rel=1e-5)
        got = drl_fast.token_interaction(text, video, video_mask=mask, masking="exclude", **options).item()
        assert got == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("masking", ["drl", "exclude"])
@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_masked_features_reach_nothing(impl: Implementation, pooling: str, poison: float, masking: str) -> None:
    found = []
    for dirty in (False, True):
        options = {"masking": masking, "pooling": pooling}
        problem = make((6, 9, 7, 5), 16, masks=("empty", "holes"), weights=torch.float32, **options)
        if dirty:
            for x in (problem.text, problem.text_weight):
                x[~problem.text_mask] = poison
            for x in (problem.video, problem.video_weight):
                x[~problem.video_mask] = poison
        found.append(run(drl_fast.token_interaction, on(impl, problem), torch.ones(6, 7)))
    want, got = found
    assert torch.equal(got.logits, want.logits)
    for name, grad in got.grads.items():
        assert torch.equal(grad, want.grads[name])
        assert not grad.cpu()[~getattr(problem, f"{name.removesuffix('_weight')}_mask")].any()


@pytest.mark.parametrize("masking", ["drl", "exclude", "none"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_rows_without_a_real_token_score_zero(impl: Implementation, pooling: str, masking: str) -> None:
    problem = make((4, 3, 5, 2), masks=("holes", "holes"), masking=masking, pooling=pooling)
    problem.text_mask[1] = False
    problem.video_mask[2] = False
    result = run(drl_fast.token_interaction, on(impl, problem), torch.ones(4, 5))
    assert all(bool(g.isfinite().all()) for g in (result.logits, *result.grads.values()))
    if masking != "none":
        assert not result.logits[1].any()
        assert not result.logits[:, 2].any()
        assert not result.grads["text"][1].any()
        assert not result.grads["video"][2].any()


@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_bad_real_token_affects_only_its_own_scores(impl: Implementation, pooling: str, poison: float) -> None:
    problem = make((40, 7, 30, 9), 16, masks=("prefix", "prefix"), pooling=pooling)
    clean = run(drl_fast.token_interaction, on(impl, problem)).logits
    problem.text[17, 0, 3] = poison
    problem.video[11, 0, 5] = poison
    got = run(drl_fast.token_interaction, on(impl, problem)).logits
    hit = torch.zeros(40, 30, dtype=torch.bool, device=impl.device)
    hit[17], hit[:, 11] = True, True
    assert bool(got[hit].isnan().all())
    assert torch.equal(got[~hit], clean[~hit])


@pytest.mark.parametrize("poison", POISON)
def test_a_bad_upstream_gradient_reaches_only_its_own_tokens(impl: Implementation, poison: float) -> None:
    problem = make((3, 5, 4, 6), 16, masks=("holes", "holes"), weights=torch.float32, pooling="softmax")
    probe = torch.ones(3, 4)
    probe[0, 1] = poison
    grads = run(drl_fast.token_interaction, on(impl, problem), probe).grads
    for name, row in (("text", 0), ("video", 1)):
        mask = getattr(problem, f"{name}_mask")
        others = torch.arange(len(mask)) != row
        for grad in (grads[name].cpu(), grads[f"{name}_weight"].cpu()):
            assert not grad[~mask].any()
            assert bool(grad[others].isfinite().all())


@pytest.mark.parametrize("poison", POISON)
def test_a_bad_upstream_gradient_of_a_pair_with_an_empty_side_reaches_nothing(
    impl: Implementation, poison: float
) -> None:
    problem = make((3, 5, 4, 6), 16, masks=("holes", "holes"), weights=torch.float32, pooling="softmax")
    problem.text_mask[1], problem.video_mask[2] = False, False
    probe = torch.ones(3, 4)
    want = run(drl_fast.token_interaction, on(impl, problem), probe).grads
    probe[1], probe[:, 2] = poison, poison
    got = run(drl_fast.token_interaction, on(impl, problem), probe).grads
    for name, grad in got.items():
        assert torch.equal(grad, want[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("masks", MASKS)
def test_a_pair_has_the_same_bits_in_every_batch(impl: Implementation, masks: str, dtype: torch.dtype) -> None:
    problem = on(impl, make((37, 9, 41, 5), 32, dtype, masks=MASKS[masks], weights=torch.float32))

    def score(rows: Tensor, columns: Tensor, pooling: str) -> Tensor:
        text, video, wt, wv, tm, vm = problem.args()
        parts = [
            x if x is None else x[i] for x, i in zip((text, video, wt, wv, tm, vm), (rows, columns) * 3, strict=True)
        ]
        return drl_fast.token_interaction(*parts, pooling=pooling, temperature=0.2)

    everything = torch.arange(37, device=impl.device), torch.arange(41, device=impl.device)
    for pooling in POOLINGS:
        whole = score(*everything, pooling)
        for rows, columns in (
            (torch.randperm(37), torch.randperm(41)),
            (torch.tensor([36, 3]), torch.tensor([40])),
            (torch.tensor([5]), torch.arange(41)),
            (torch.arange(37), torch.tensor([7])),
        ):
            rows, columns = rows.to(impl.device), columns.to(impl.device)
            assert torch.equal(bits(score(rows, columns, pooling)), bits(whole[rows][:, columns]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 6, 4, 5), (70, 20, 40, 12)], ids=str)
def test_any_choice_of_gradients(impl: Implementation, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    if impl.name == "chunked" and shape[0] > 9:
        pytest.skip("slow, and no other code than in small batches")
    p = on(impl, make(shape, 32, dtype, masks=("holes", "prefix"), weights=torch.float32))
    arguments = (*p.args(), True, True, False, 0.3)
    probe = torch.randn(p.pairs, device=impl.device)

    def gradients(wanted: list[bool]) -> tuple[Tensor, ...]:
        return backward_op(probe, *arguments, wanted)

    whole = gradients([True] * 4)
    again = gradients([True] * 4)
    assert all(torch.equal(one, other) for one, other in zip(whole, again, strict=True))
    for wanted in product([False, True], repeat=4):
        for found, want, needed in zip(gradients(list(wanted)), whole, wanted, strict=True):
            assert torch.equal(found, want) if needed else found.numel() == 0, wanted


@pytest.mark.parametrize("shape", [(17, 33, 20, 12), (3, 300, 2, 5), (130, 9, 150, 9)], ids=str)
def test_any_number_of_threads(cpu_impl: Implementation, shape: tuple[int, int, int, int]) -> None:
    p = make(shape, 32, masks=("prefix", "holes"), weights=torch.float32, pooling="logsumexp", temperature=0.1)
    results = []
    for threads in (1, 2, 8):
        torch.set_num_threads(threads)
        results.append(run(drl_fast.token_interaction, p, torch.ones(p.pairs)))
    for other in results[1:]:
        assert torch.equal(results[0].logits, other.logits)
        # Chunked PyTorch's backward uses torch.mm, which splits long sums among threads.
        for name, grad in results[0].grads.items() if cpu_impl.name == "cpp" else ():
            assert torch.equal(grad, other.grads[name]), name


@pytest.mark.parametrize("shape", [(300, 9, 150, 9), (150, 9, 300, 9)], ids=str)
def test_several_superblocks(shape: tuple[int, int, int, int]) -> None:
    """The C++ backward cuts 2,700 rows and 1,350 columns of d loss / d S into superblocks of about 1,024 each."""
    with use("cpp"):
        p = make(shape, 16, weights=torch.float32, pooling="softmax", temperature=0.1)
        want = judge(p, "cpu")
        torch.set_num_threads(1)
        again = judge(p, "cpu")
    assert all(torch.equal(grad, again.grads[name]) for name, grad in want.grads.items())


@pytest.mark.parametrize("kind", ["transposed", "channels first", "every second", "expanded"])
def test_strides(impl: Implementation, kind: str) -> None:
    change = {
        "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        "channels first": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
        "every second": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
        "expanded": lambda x: x[:1].expand(9, *x.shape[1:]),
    }[kind]
    options = {"pooling": "softmax", "temperature": 0.2}
    problem = make((6, 8, 7, 5), 16, masks=("holes", "holes"), weights=torch.float32, **options)
    judge(problem.map(change), impl.device)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (4, 3, 0, 5)], ids=str)
def test_empty_batches(impl: Implementation, shape: tuple[int, int, int, int]) -> None:
    result = judge(make(shape, masks=("prefix", "prefix"), weights=torch.float32, pooling="softmax"), impl.device)
    assert all(not grad.any() for grad in result.grads.values())


def test_deterministic_mode_fills_empty_memory_with_nan(impl: Implementation) -> None:
    """A kernel that reads memory before writing it returns NaN here."""
    torch.use_deterministic_algorithms(True)
    for shape in [(5, 9, 6, 4), (1, 1, 1, 1), (40, 20, 33, 13)]:
        judge(make(shape, masks=("empty", "empty"), weights=torch.float32, pooling="softmax"), impl.device)


def test_zero_vectors(impl: Implementation) -> None:
    problem = make((5, 6, 4, 7), 8, masks=(None, "holes"), pooling="logsumexp", temperature=0.5)
    problem.text[0, 2] = 0
    problem.video[1, :] = 0
    got = run(drl_fast.token_interaction, on(impl, problem), torch.ones(5, 4))
    want = run(reference.token_interaction, problem.double(), torch.ones(5, 4))
    torch.testing.assert_close(got.logits.cpu().double(), want.logits, atol=2e-6, rtol=0)
    assert not got.grads["text"][0, 2].any()
    assert not got.grads["video"][1].any()


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_gradcheck(impl: Implementation, pooling: str, bidirectional: bool) -> None:
    options = {"bidirectional": bidirectional, "pooling": pooling, "temperature": 0.4}
    p = on(impl, make((3, 4, 2, 5), 6, torch.float64, masks=("holes", "prefix"), weights=torch.float64, **options))
    leaves = [getattr(p, n).requires_grad_() for n in LEAVES if getattr(p, n) is not None]
    assert torch.autograd.gradcheck(
        lambda *_: drl_fast.token_interaction(*p.args(), **p.options), leaves, fast_mode=True
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(impl: Implementation, dtype: torch.dtype) -> None:
    weights = torch.float64 if dtype == torch.float64 else torch.float32
    for shape, one_way in (((5, 4, 3, 6), False), ((0, 3, 2, 4), True)):
        p = on(impl, make(shape, 8, dtype, masks=("prefix", "holes"), weights=weights, bidirectional=not one_way))
        leaves = [x if x is None else x.clone().requires_grad_() for x in p.args()[:4]]
        options = (p.text_mask, p.video_mask, True, True, True, 0.5)
        torch.library.opcheck(forward_op, (*leaves, *options))
        floats = [x if x is None else x.detach() for x in leaves]
        probe = torch.randn(p.pairs, dtype=weights, device=impl.device)
        torch.library.opcheck(backward_op, (probe, *floats, *options, [True, False, True, True]))


def test_compiled(impl: Implementation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    compiled = torch.compile(drl_fast.token_interaction, fullgraph=True, backend="aot_eager")
    p = on(impl, make((5, 9, 6, 4), 16, masks=("holes", "prefix"), weights=torch.float32, pooling="softmax"))
    eager, got = run(drl_fast.token_interaction, p, torch.ones(5, 6)), run(compiled, p, torch.ones(5, 6))
    assert torch.equal(got.logits, eager.logits)
    for name, grad in eager.grads.items():
        torch.testing.assert_close(got.grads[name], grad, atol=1e-6, rtol=1e-5)
    torch._dynamo.reset()


def test_autocast_casts_only_features(impl: Implementation) -> None:
    p = on(impl, make((9, 12, 8, 6), 64, masks=("holes", "prefix"), weights=torch.float32, pooling="softmax"))
    rounded = Problem(**{**vars(p), "text": p.text.bfloat16(), "video": p.video.bfloat16()})
    want = run(drl_fast.token_interaction, rounded, torch.ones(p.pairs))
    with torch.autocast(impl.device, dtype=torch.bfloat16):
        got = run(drl_fast.token_interaction, p, torch.ones(p.pairs))
    assert torch.equal(got.logits, want.logits)
    for name, grad in got.grads.items():
        assert torch.equal(grad, want.grads[name].to(grad.dtype))


def test_derivatives_that_do_not_exist_raise(impl: Implementation) -> None:
    text = torch.randn(3, 4, 8, device=impl.device, requires_grad=True)
    video = torch.randn(2, 5, 8, device=impl.device)
    logits = drl_fast.token_interaction(text, video, pooling="softmax")
    (grad,) = torch.autograd.grad(logits.sum(), text, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"no second derivative.*reference"):
        grad.square().sum().backward()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(text.detach(), torch.ones_like(text))
        with pytest.raises((NotImplementedError, RuntimeError)):
            drl_fast.token_interaction(dual, video, pooling="softmax")


def test_changed_masks_change_no_gradient(cpu_impl: Implementation) -> None:
    """A data loader may write its next batch into a mask's memory before the backward pass."""
    found = []
    for refill in (False, True):
        p = make((6, 9, 7, 5), masks=("holes", "holes"), weights=torch.float32, pooling="softmax")
        p.text.requires_grad_()
        logits = drl_fast.token_interaction(*p.args(), **p.options)
        if refill:
            for x in (p.text_mask, p.video_mask, p.text_weight):
                x.numpy()[...] = 1
        found.append(torch.autograd.grad(logits.sum(), p.text)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "layer", [drl_fast.TI(pooling="softmax", temperature=0.1), drl_fast.WTI(16, pooling="logsumexp")]
)
def test_layers(impl: Implementation, layer: torch.nn.Module) -> None:
    layer = layer.to(impl.device)
    p = on(impl, make((5, 9, 6, 4), 16, masks=("holes", "empty")))
    args = (p.text, p.video, p.text_mask, p.video_mask)
    weights = layer.weights(*args) if isinstance(layer, drl_fast.WTI) else (None, None)
    soft = {"pooling": layer.pooling, "temperature": layer.temperature}
    assert torch.equal(layer(*args), drl_fast.token_interaction(*args[:2], *weights, *args[2:], **soft))
    assert f"pooling='{layer.pooling}'" in repr(layer)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"pooling": "mean"}, ValueError, "pooling must be one of 'max', 'softmax', 'logsumexp', got 'mean'"),
        ({"pooling": "softmax", "temperature": 0}, ValueError, "temperature must be positive and finite, got 0.0"),
        ({"pooling": "softmax", "temperature": -1.0}, ValueError, "temperature must be positive and finite, got -1.0"),
        ({"pooling": "logsumexp", "temperature": math.nan}, ValueError, "temperature must be positive and finite"),
        (
            {"pooling": "softmax", "temperature": 1e-40},
            ValueError,
            "temperature must be between 1e-30 and 1e30, got 1e-4",
        ),
        ({"pooling": "softmax", "temperature": 1e39}, ValueError, r"between 1e-30 and 1e30, got 1e\+39; similarities"),
        ({"pooling": "softmax", "temperature": "0.1"}, TypeError, "temperature must be a number, got str '0.1'"),
        ({"temperature": 0.1}, ValueError, "temperature must be 1 with pooling='max'.* got 0.1; leave it out"),
        (
            {"pooling": "softmax", "return_matches": True},
            ValueError,
            "return_matches must be False with pooling='softm",
        ),
    ],
)
def test_bad_input(options: dict[str, Any], error: type[Exception], message: str) -> None:
    x = torch.randn(2, 3, 4)
    with pytest.raises(error, match=message):
        drl_fast.token_interaction(x, x, **options)
    if "return_matches" not in options:
        for layer in (drl_fast.TI, drl_fast.WTI):
            with pytest.raises(error, match=message):
                layer(**options)


@pytest.mark.parametrize(
    "score",
    [
        drl_fast.TI(pooling="softmax"),
        drl_fast.WTI(4, pooling="softmax"),
    ],
    ids=["TI", "WTI"],
)
def test_layers_refuse_matches(score: Callable[..., object]) -> None:
    x = torch.randn(2, 3, 4)
    with pytest.raises(ValueError, match=r"return_matches must be False with pooling='softmax'.*pooling='max'"):
        score(x, x, return_matches=True)
