"""Reranking: every implementation against the float64 reference, and against token_interaction, text by text."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import drl_fast
from drl_fast import reference
from tests.conftest import use
from tests.implementations import Implementation
from tests.oracle import ATOL, NEAR, Problem, Result, assert_close, choices, make, plain

POOLINGS = ["max", "softmax", "logsumexp"]
MASKS = {
    "none": (None, None),
    "empty": ("empty", "empty"),
    "text only": ("holes", None),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
RAGGED = [0, 3, 3, 40, 41]  # an empty text, one of a single candidate, and one of more than a block
LEAVES = ("text", "candidates", "text_weight", "candidate_weight")
TENSORS = (*LEAVES, "text_mask", "candidate_mask", "offsets")

forward_op = torch.ops.drl_fast.rerank.default
backward_op = torch.ops.drl_fast.rerank_backward.default


class Ranking:
    """The arguments of one call of ``rerank``."""

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments

    def __getattr__(self, name: str) -> Any:
        return self.arguments[name]

    def but(self, **changes: Any) -> Ranking:
        return Ranking(**{**self.arguments, **changes})

    def map(self, change: Callable[[Tensor], Tensor]) -> Ranking:
        return self.but(**{name: change(x) for name, x in self.arguments.items() if isinstance(x, Tensor)})

    def double(self) -> Ranking:
        return self.map(lambda x: x.cpu().double() if x.is_floating_point() else x.cpu())

    def problems(self) -> list[Problem]:
        """Return each text with its candidates as a problem of token_interaction."""
        found = []
        options = {name: x for name, x in self.arguments.items() if name not in TENSORS}
        for a in range(len(self.text)):
            rows = a if self.offsets is None else slice(int(self.offsets[a]), int(self.offsets[a + 1]))
            one = [None if x is None else x[a : a + 1] for x in (self.text, self.text_weight, self.text_mask)]
            own = [
                None if x is None else x[rows] for x in (self.candidates, self.candidate_weight, self.candidate_mask)
            ]
            found.append(Problem(one[0], own[0], one[1], own[1], one[2], own[2], options))
        return found


def ranking(
    shape: tuple[int, int, int, int],
    dim: int = 17,
    dtype: torch.dtype = torch.float32,
    *,
    masks: tuple[str | None, str | None] = (None, None),
    weights: torch.dtype | None = None,
    offsets: list[int] | None = None,
    **options: Any,
) -> Ranking:
    """Draw a problem of shape (A, Nt, K, Nv); with offsets, A and K are theirs."""
    a, nt, k, nv = shape
    if offsets is not None:
        a, k = len(offsets) - 1, 1
    rows = a * k if offsets is None else offsets[-1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        drawn = make((a, nt, rows, nv), dim, dtype, masks=masks, weights=weights, **options)

    def by_text(x: Tensor | None) -> Tensor | None:
        return x if x is None or offsets is not None else x.unflatten(0, (a, k))

    return Ranking(
        text=drawn.text,
        candidates=by_text(drawn.video),
        text_weight=drawn.text_weight,
        candidate_weight=by_text(drawn.video_weight),
        text_mask=drawn.text_mask,
        candidate_mask=by_text(drawn.video_mask),
        offsets=None if offsets is None else torch.tensor(offsets),
        **options,
    )


def run(function: Callable[..., Tensor], r: Ranking, probe: Tensor | None = None) -> Result:
    """Call ``function`` and differentiate."""
    leaves = {n: r.arguments[n].detach().requires_grad_() for n in LEAVES if r.arguments[n] is not None}
    scores = function(**r.but(**leaves).arguments)
    if probe is None:
        return Result(scores.detach(), {})
    grads = torch.autograd.grad(scores, list(leaves.values()), probe.to(scores))
    return Result(scores.detach(), dict(zip(leaves, grads, strict=True)))


def plain_rerank(**arguments: Any) -> Tensor:
    """Compute the scores as user code does, text by text in the features' own dtype."""
    r = Ranking(**arguments)
    rows = [plain(*p.args(), **p.options)[0] for p in r.problems()]
    return torch.stack(rows) if r.offsets is None else torch.cat(rows)


def probe_for(r: Ranking) -> Tensor:
    """Draw upstream gradients; 0 for pairs in which rounding may change a match, and so the gradient."""
    probe = torch.randn(r.candidates.shape[:-2], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if r.arguments.get("pooling", "max") != "max":
        return probe
    near, close = NEAR[r.text.dtype], []
    for p in r.problems():
        found = choices(p)
        hit = (found.video_gap < near).any(-1)
        close.append(hit | (found.text_gap < near).any(-1) if r.arguments.get("bidirectional", True) else hit)
    return probe.masked_fill(torch.cat(close, 1).view(probe.shape), 0)


def judge(r: Ranking, device: str, *, probe: Tensor | None = None, floor: float = 0.0) -> Result:
    """Compare with the float64 reference: at most twice plain PyTorch's error in the same dtype, plus atol.

    ``floor``: the size below which a true gradient counts as nothing but rounding.
    """
    probe = probe_for(r) if probe is None else probe
    ours = run(drl_fast.rerank, r.map(lambda x: x.to(device)), probe)
    truth, rival = run(reference.rerank, r.double(), probe), run(plain_rerank, r, probe)
    dtype = r.text.dtype
    assert ours.logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert ours.logits.shape == r.candidates.shape[:-2]
    largest = max(1.0, float(truth.logits.abs().max()) if truth.logits.numel() else 0.0)
    assert_close("scores", ours.logits, rival.logits, truth.logits, ATOL[dtype], largest)
    for name, grad in ours.grads.items():
        assert grad.dtype == r.arguments[name].dtype
        assert grad.shape == r.arguments[name].shape
        atol = max(4 * ATOL[dtype], 2 * torch.finfo(grad.dtype).eps)
        assert_close(f"grad of {name}", grad, rival.grads[name], truth.grads[name], atol, floor)
    return ours


def on(impl: Implementation, r: Ranking) -> Ranking:
    return r.map(lambda x: x.to(impl.device))


# (A, Nt, K, Nv): one row, token or candidate; one side far longer; more than 128 words and more than 255 frames.
SHAPES = [
    (1, 1, 1, 1),
    (5, 1, 4, 6),
    (4, 6, 5, 1),
    (1, 7, 100, 3),
    (40, 3, 1, 7),
    (6, 12, 20, 12),
    (3, 40, 3, 20),
    (2, 140, 3, 4),
    (2, 300, 2, 5),
    (2, 4, 3, 300),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_shapes(impl: Implementation, pooling: str, masks: str, shape: tuple[int, int, int, int]) -> None:
    options = {"pooling": pooling, "temperature": 1.0 if pooling == "max" else 0.1}
    judge(ranking(shape, masks=MASKS[masks], weights=torch.float32, **options), impl.device)


@pytest.mark.parametrize("words", [9, 140])
@pytest.mark.parametrize("offsets", [RAGGED, [0, 0], [0, 7], [0, 0, 0, 70], [0, *range(1, 20)]], ids=str)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_ragged(impl: Implementation, pooling: str, offsets: list[int], words: int) -> None:
    options = {"pooling": pooling, "temperature": 1.0 if pooling == "max" else 0.2}
    r = ranking((0, words, 0, 5), masks=("holes", "empty"), weights=torch.float32, offsets=offsets, **options)
    judge(r, impl.device)


@pytest.mark.parametrize("dim", [1, 3, 64, 512, 1030])
@pytest.mark.parametrize("normalize", [True, False])
def test_widths(impl: Implementation, normalize: bool, dim: int) -> None:
    r = ranking((3, 8, 6, 5), dim, masks=("prefix", "holes"), normalize=normalize)
    judge(r, impl.device, floor=1.0 if dim == 1 else 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masking", ["drl", "exclude", "none"])
@pytest.mark.parametrize("normalize", [True, False], ids=["unit", "raw"])
@pytest.mark.parametrize("bidirectional", [True, False], ids=["both", "one way"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_options(
    impl: Implementation, pooling: str, bidirectional: bool, normalize: bool, masking: str, dtype: torch.dtype
) -> None:
    options = {"masking": masking, "normalize": normalize, "bidirectional": bidirectional, "pooling": pooling}
    if pooling != "max":
        options["temperature"] = 1.0 if normalize else 0.3
    weights = None if masking == "exclude" else torch.float32
    judge(ranking((4, 11, 9, 6), 32, dtype, masks=("empty", "empty"), weights=weights, **options), impl.device)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (4, 3, 0, 5), (0, 1, 0, 1)], ids=str)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_nothing_to_score(impl: Implementation, pooling: str, shape: tuple[int, int, int, int]) -> None:
    r = ranking(shape, masks=("prefix", "prefix"), weights=torch.float32, pooling=pooling)
    found = run(drl_fast.rerank, on(impl, r), torch.ones(shape[0], shape[2]))
    assert found.logits.shape == reference.rerank(**r.arguments).shape == (shape[0], shape[2])
    for name, grad in found.grads.items():
        assert grad.shape == r.arguments[name].shape
        assert not grad.any()


@pytest.mark.parametrize("weights", [torch.float16, torch.float64], ids=str)
def test_weight_dtypes(impl: Implementation, weights: torch.dtype) -> None:
    judge(ranking((4, 8, 5, 7), 16, masks=("holes", "prefix"), weights=weights), impl.device)


@pytest.mark.parametrize("kind", ["transposed", "channels first", "every second", "shared"])
def test_strides(impl: Implementation, kind: str) -> None:
    change: Callable[[Tensor], Tensor] = {
        "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        "channels first": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
        "every second": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
        "shared": lambda x: x[:1].expand_as(x),
    }[kind]
    r = ranking((4, 8, 7, 5), 16, masks=("holes", "holes"), weights=torch.float32)
    judge(r.map(change), impl.device)


def test_equals_token_interaction_for_each_text(impl: Implementation) -> None:
    for pooling in POOLINGS:
        options = {"pooling": pooling, "temperature": 1.0 if pooling == "max" else 0.2}
        for offsets in (None, RAGGED):
            r = ranking((5, 9, 40, 5), 32, masks=("empty", "holes"), weights=torch.float32, offsets=offsets, **options)
            r = on(impl, r)
            want = torch.cat([drl_fast.token_interaction(*p.args(), **p.options)[0] for p in r.problems()])
            torch.testing.assert_close(run(drl_fast.rerank, r).logits.flatten(), want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(5, 9, 40, 5), (2, 33, 9, 12), (3, 150, 4, 70)], ids=str)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_has_the_bits_of_token_interaction(pooling: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """In C++. Matrix products of chunked PyTorch round differently in another shape."""
    with use("cpp"):
        for dim, masks in ((512, ("empty", "holes")), (1030, (None, None))):
            for one_way in (False, True):
                options = {"pooling": pooling, "bidirectional": not one_way}
                weights = torch.float64 if dtype == torch.float64 else torch.float32
                r = ranking(shape, dim, dtype, masks=masks, weights=weights, **options)
                want = torch.cat([drl_fast.token_interaction(*p.args(), **p.options) for p in r.problems()])
                assert torch.equal(run(drl_fast.rerank, r).logits, want)


def test_equal_bits_from_run_to_run(impl: Implementation) -> None:
    r = on(impl, ranking((0, 9, 0, 5), 32, masks=("holes", "holes"), weights=torch.float32, offsets=RAGGED))
    first, second = (run(drl_fast.rerank, r, torch.ones(41)) for _ in range(2))
    assert torch.equal(first.logits, second.logits)
    assert all(torch.equal(grad, second.grads[name]) for name, grad in first.grads.items())


@pytest.mark.parametrize("pooling", POOLINGS)
def test_any_number_of_threads(pooling: str) -> None:
    r = ranking((3, 12, 300, 12), 64, masks=("holes", "prefix"), weights=torch.float32, pooling=pooling)
    found = []
    with use("cpp"):
        for threads in (1, 2, 8):
            torch.set_num_threads(threads)
            found.append(run(drl_fast.rerank, r, torch.ones(3, 300)))
    for other in found[1:]:
        assert torch.equal(found[0].logits, other.logits)
        assert all(torch.equal(grad, other.grads[name]) for name, grad in found[0].grads.items())


@pytest.mark.parametrize("masking", ["drl", "exclude"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_masked_features_reach_nothing(impl: Implementation, pooling: str, poison: float, masking: str) -> None:
    options = {"masking": masking, "pooling": pooling}
    r = ranking((3, 9, 7, 5), 16, masks=("empty", "holes"), weights=torch.float32, **options)
    want = run(drl_fast.rerank, on(impl, r), torch.ones(3, 7))
    for name, mask in (("text", r.text_mask), ("candidate", r.candidate_mask)):
        features = "text" if name == "text" else "candidates"
        dirty = r.arguments[features].masked_fill(~mask[..., None], poison)
        r = r.but(**{features: dirty, f"{name}_weight": r.arguments[f"{name}_weight"].masked_fill(~mask, poison)})
    got = run(drl_fast.rerank, on(impl, r), torch.ones(3, 7))
    assert torch.equal(got.logits, want.logits)
    for name, grad in got.grads.items():
        assert torch.equal(grad, want.grads[name])
        mask = r.text_mask if name.startswith("text") else r.candidate_mask
        assert not grad.cpu()[~mask].any()


@pytest.mark.parametrize("masking", ["drl", "exclude", "none"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_rows_without_a_real_token_score_zero(impl: Implementation, pooling: str, masking: str) -> None:
    r = ranking((3, 4, 5, 2), masks=("prefix", "prefix"), weights=torch.float32, masking=masking, pooling=pooling)
    r.text_mask[1] = False
    r.candidate_mask[0, 2] = False
    # The other side's weights do not matter, and neither does the gradient of a constant.
    r.candidate_weight[1], probe = math.inf, torch.ones(3, 5)
    probe[1], probe[0, 2] = math.nan, math.nan
    if masking == "none":
        r.candidate_weight[1], probe = 1.0, torch.ones(3, 5)
    found = run(drl_fast.rerank, on(impl, r), probe)
    assert all(bool(x.isfinite().all()) for x in (found.logits, *found.grads.values()))
    if masking != "none":
        assert not found.logits[1].any()
        assert found.logits[0, 2] == 0
        assert not found.grads["text"][1].any()
        assert not found.grads["candidates"][1].any()
        assert not found.grads["candidates"][0, 2].any()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_bad_real_token_affects_only_its_own_scores(impl: Implementation, pooling: str, poison: float) -> None:
    r = ranking((4, 7, 20, 9), 16, masks=("prefix", "prefix"), pooling=pooling)
    clean = run(drl_fast.rerank, on(impl, r)).logits
    r.text[2, 0, 3] = poison
    r.candidates[1, 11, 0, 5] = poison
    got = run(drl_fast.rerank, on(impl, r)).logits
    hit = torch.zeros(4, 20, dtype=torch.bool, device=impl.device)
    hit[2], hit[1, 11] = True, True
    assert bool(got[hit].isnan().all())
    assert torch.equal(got[~hit], clean[~hit])


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_bad_upstream_gradient_reaches_only_its_own_tokens(impl: Implementation, pooling: str, poison: float) -> None:
    r = ranking((0, 5, 0, 6), 16, masks=("holes", "holes"), weights=torch.float32, offsets=RAGGED, pooling=pooling)
    probe = torch.ones(41)
    want = run(drl_fast.rerank, on(impl, r), probe).grads
    probe[1] = poison
    got = run(drl_fast.rerank, on(impl, r), probe).grads
    for name, row in (("text", 0), ("text_weight", 0), ("candidates", 1), ("candidate_weight", 1)):
        others = torch.arange(len(got[name])) != row
        assert torch.equal(got[name].cpu()[others], want[name].cpu()[others])
        mask = r.text_mask if name.startswith("text") else r.candidate_mask
        assert not got[name].cpu()[~mask].any()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_zero_vectors(impl: Implementation, pooling: str) -> None:
    r = ranking((2, 6, 4, 7), 8, masks=(None, "holes"), pooling=pooling)
    r.text[0, 2] = 0
    r.candidates[1, 1] = 0
    got = judge(r, impl.device)
    assert not got.grads["text"][0, 2].any()
    assert not got.grads["candidates"][1, 1].any()


def test_ties_go_to_the_lowest_index(impl: Implementation) -> None:
    """Also for a real token that ties with a masked 0."""
    text = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]], device=impl.device)
    candidates = torch.tensor([[[[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]]], device=impl.device)
    weight = torch.tensor([[[1.0, 10.0, 100.0]]], device=impl.device)
    r = Ranking(
        text=text,
        candidates=candidates,
        text_weight=torch.ones(1, 2, device=impl.device),
        candidate_weight=weight,
        text_mask=None,
        candidate_mask=torch.tensor([[[1, 1, 0]]], device=impl.device),
        offsets=None,
    )
    grads = run(drl_fast.rerank, r, torch.ones(1, 1)).grads
    # Word 0 has similarity 1 with both frames, word 1 has 0 with both and with the masked one: frame 0 is chosen.
    assert torch.equal(grads["candidates"][0, 0, :, 1].cpu(), torch.tensor([0.5, 0.0, 0.0]))
    assert torch.equal(grads["text"][0, :, 1].cpu(), torch.zeros(2))


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_gradcheck(impl: Implementation, pooling: str, bidirectional: bool) -> None:
    options = {"bidirectional": bidirectional, "pooling": pooling}
    r = ranking((0, 4, 0, 5), 6, torch.float64, masks=("holes", "prefix"), weights=torch.float64, offsets=[0, 2, 2, 5])
    r = on(impl, r.but(**options, candidate_weight=r.candidate_weight if bidirectional else None))
    leaves = {n: r.arguments[n].requires_grad_() for n in LEAVES if r.arguments[n] is not None}
    assert torch.autograd.gradcheck(
        lambda *x: drl_fast.rerank(**r.but(**dict(zip(leaves, x, strict=True))).arguments), list(leaves.values())
    )


def op_args(r: Ranking, grad: bool, pooling: str) -> tuple[Any, ...]:
    floats = [None if x is None else x.clone().requires_grad_(grad) for x in map(r.arguments.get, LEAVES)]
    return (*floats, r.text_mask, r.candidate_mask, r.offsets, True, True, pooling, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_opcheck(impl: Implementation, pooling: str, dtype: torch.dtype) -> None:
    weights = torch.float64 if dtype == torch.float64 else torch.float32
    # The other forms of offsets do not depend on the dtype.
    forms = (([0, 2, 2, 5], False), ([0, 3], True), ([0, 0], False))
    for offsets, one_way in forms if dtype == torch.float32 else forms[:1]:
        r = ranking((0, 4, 0, 6), 8, dtype, masks=("prefix", "holes"), weights=weights, offsets=offsets)
        r = on(impl, r.but(candidate_weight=None) if one_way else r)
        torch.library.opcheck(forward_op, op_args(r, True, pooling))
        probe = torch.randn(offsets[-1], dtype=weights, device=impl.device)
        for wanted in ([True] * 4, [True, False, False, True], [False, True, True, False]):
            torch.library.opcheck(backward_op, (probe, *op_args(r, False, pooling), wanted))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_any_choice_of_gradients(impl: Implementation, pooling: str) -> None:
    r = on(impl, ranking((0, 9, 0, 5), 16, masks=("holes", "holes"), weights=torch.float32, offsets=RAGGED))
    probe, arguments = torch.ones(41, device=impl.device), op_args(r, False, pooling)
    whole = backward_op(probe, *arguments, [True] * 4)
    for number in range(16):
        wanted = [bool(number >> bit & 1) for bit in range(4)]
        for found, want, needed in zip(backward_op(probe, *arguments, wanted), whole, wanted, strict=True):
            assert torch.equal(found, want) if needed else found.numel() == 0, wanted


def test_the_operator_refuses_offsets_that_lead_outside() -> None:
    """A compiled graph does not check their values."""
    with use("cpp"):
        for offsets in ([0, 9], [0, -2], [1, 3], [0, 4, 3]):
            r = ranking((0, 4, 0, 6), 8, weights=torch.float32, offsets=[0, *[3] * (len(offsets) - 1)])
            r = r.but(offsets=torch.tensor(offsets))
            with pytest.raises(RuntimeError, match="offsets must start at 0, not decrease and end at the number of"):
                forward_op(*op_args(r, False, "max"))


def test_offsets_that_do_not_fit_read_nothing_outside() -> None:
    """Where they cannot be checked, chunked PyTorch gives some other score."""
    r = ranking((0, 4, 0, 6), 8, weights=torch.float32, offsets=[0, 3, 5])
    with use("chunked"):
        for offsets in ([0, 9, 12], [-4, -2, 1], [3, 1, 0]):
            found = forward_op(*op_args(r.but(offsets=torch.tensor(offsets)), False, "max"))
            assert bool(found.isfinite().all())


def test_offsets_that_do_not_fit_write_nothing_outside(impl: Implementation, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Triton kernel cannot refuse them."""
    if impl.name != "interpreter":
        pytest.skip("only the interpreter's memory can be looked at")
    memory = torch.full((1000,), 7.0)
    monkeypatch.setattr(Tensor, "new_zeros", lambda self, rows, dtype: memory[500 : 500 + rows].zero_())
    for offsets in ([-1000, -500, 5], [0, -64, 5], [0, 700, 5], [-70, -200, 5]):
        r = ranking((0, 4, 0, 6), 8, weights=torch.float32, offsets=[0, 3, 5])
        forward_op(*op_args(r.but(offsets=torch.tensor(offsets)), False, "max"))
        assert bool((memory[:500] == 7).all()), offsets
        assert bool((memory[505:] == 7).all()), offsets


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("pooling", ["max", "softmax"])
def test_compiled(
    impl: Implementation, pooling: str, ragged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    compiled = torch.compile(drl_fast.rerank, fullgraph=True, backend="aot_eager")
    offsets = [0, 2, 2, 7] if ragged else None
    r = ranking((4, 9, 6, 5), 16, masks=("holes", "prefix"), weights=torch.float32, offsets=offsets, pooling=pooling)
    r = on(impl, r)
    probe = torch.ones(r.candidates.shape[:-2])
    eager, got = run(drl_fast.rerank, r, probe), run(compiled, r, probe)
    assert torch.equal(got.logits, eager.logits)
    for name, grad in eager.grads.items():
        torch.testing.assert_close(got.grads[name], grad, atol=1e-6, rtol=1e-5)
    torch._dynamo.reset()


def test_compiled_with_dynamic_shapes(impl: Implementation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph serves all batches and lengths."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    graphs = []
    compiled = torch.compile(drl_fast.rerank, fullgraph=True, backend=lambda g, _: graphs.append(g) or g, dynamic=True)
    for shape in ((4, 9, 6, 5), (7, 12, 3, 8), (3, 20, 11, 4)):
        r = on(impl, ranking(shape, 16, masks=("holes", "prefix"), weights=torch.float32))
        torch.testing.assert_close(run(compiled, r).logits, run(drl_fast.rerank, r).logits, atol=1e-6, rtol=0)
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_autocast_casts_only_features(impl: Implementation) -> None:
    r = on(impl, ranking((3, 12, 8, 6), 64, masks=("holes", "prefix"), weights=torch.float32))
    want = run(drl_fast.rerank, r.but(text=r.text.bfloat16(), candidates=r.candidates.bfloat16()), torch.ones(3, 8))
    with torch.autocast(impl.device, dtype=torch.bfloat16):
        got = run(drl_fast.rerank, r, torch.ones(3, 8))
    assert got.logits.dtype == torch.float32
    assert torch.equal(got.logits, want.logits)
    for name, grad in got.grads.items():
        assert torch.equal(grad, want.grads[name].to(grad.dtype))


def test_derivatives_that_do_not_exist_raise(impl: Implementation) -> None:
    text = torch.randn(2, 4, 8, device=impl.device, requires_grad=True)
    candidates = torch.randn(2, 3, 5, 8, device=impl.device)
    (grad,) = torch.autograd.grad(drl_fast.rerank(text, candidates).sum(), text, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"rerank has no second derivative.*reference\.rerank"):
        grad.square().sum().backward()
    with pytest.raises(NotImplementedError, match=r"rerank has no forward-mode derivative"):
        torch.func.jvp(lambda x: drl_fast.rerank(x, candidates), (text.detach(),), (torch.ones_like(text),))
    with pytest.raises(NotImplementedError, match=r"rerank does not work under torch\.func\.grad"):
        torch.func.grad(lambda x: drl_fast.rerank(x, candidates).sum())(text.detach())


def test_changed_buffers_change_no_gradient(cpu_impl: Implementation) -> None:
    """A data loader may write its next batch into masks, weights and offsets before the backward pass."""
    found = []
    for refill in (False, True):
        r = ranking((0, 9, 0, 5), masks=("holes", "holes"), weights=torch.float32, offsets=[0, 3, 8])
        r.text.requires_grad_()
        scores = drl_fast.rerank(**r.arguments)
        if refill:
            for x in (r.text_mask, r.candidate_mask, r.text_weight, r.candidate_weight, r.offsets):
                x.numpy()[...] = 1
        found.append(torch.autograd.grad(scores.sum(), r.text)[0])
    assert torch.equal(*found)


def test_deterministic_mode_fills_empty_memory_with_nan(impl: Implementation) -> None:
    """A kernel that reads memory before writing it returns NaN here."""
    torch.use_deterministic_algorithms(True)
    for pooling in POOLINGS:
        for shape in [(5, 9, 6, 4), (1, 1, 1, 1), (2, 20, 70, 13)]:
            judge(ranking(shape, masks=("empty", "empty"), weights=torch.float32, pooling=pooling), impl.device)


@pytest.mark.parametrize(
    "layer",
    [
        drl_fast.TI(),
        drl_fast.TI(bidirectional=False, masking="exclude"),
        drl_fast.WTI(16),
        drl_fast.WTI(16, pooling="softmax", temperature=0.1, weight_input="normalized"),
        drl_fast.WTI(16, bidirectional=False),
    ],
    ids=repr,
)
@pytest.mark.parametrize("ragged", [False, True])
def test_layers(impl: Implementation, layer: torch.nn.Module, ragged: bool) -> None:
    """A layer reranks as it scores each text against its candidates alone."""
    layer = layer.to(impl.device)
    r = on(impl, ranking((3, 9, 6, 4), 16, masks=("holes", "empty"), offsets=[0, 2, 2, 7] if ragged else None))
    got = layer.rerank(r.text, r.candidates, r.text_mask, r.candidate_mask, offsets=r.offsets)
    want = [layer(p.text, p.video, p.text_mask, p.video_mask)[0] for p in r.problems()]
    torch.testing.assert_close(got, torch.cat(want) if ragged else torch.stack(want), atol=1e-6, rtol=0)
    for parameter in layer.parameters():
        (grad,) = torch.autograd.grad(got.sum(), parameter, retain_graph=True)
        assert grad.shape == parameter.shape
