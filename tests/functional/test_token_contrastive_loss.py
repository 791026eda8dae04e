"""The contrastive loss from tokens: InfoNCE of the token interaction, computed in blocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from drl_fast import info_nce, reference, token_contrastive_loss, token_interaction
from drl_fast.ops import token_contrastive_loss as ops
from tests.implementations import Implementation
from tests.oracle import ATOL, LEAVES, Problem, assert_close, make, plain

SCALE = 20.0
SHAPE = (23, 7, 23, 4)
CASES: dict[str, dict[str, Any]] = {
    "uniform": {},
    "weights": {"weights": torch.float32},
    "holes": {"masks": ("holes", "prefix"), "weights": torch.float32},
    "empty rows, exclude": {"masks": ("empty", "empty"), "masking": "exclude"},
    "masking none": {"masks": ("holes", "holes"), "masking": "none", "weights": torch.float32},
    "not normalised": {"masks": ("prefix", None), "normalize": False},
    "half weights": {"weights": torch.bfloat16, "masks": ("prefix", "prefix"), "mask_dtype": torch.float32},
}
HALF = {
    "bfloat16": {"dtype": torch.bfloat16, "weights": torch.float32},
    "float16": {"dtype": torch.float16, "masks": ("prefix", "holes"), "weights": torch.float16},
}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use several blocks, the last of another size."""
    monkeypatch.setattr(ops, "BLOCK_BYTES", 1)
    monkeypatch.setattr(ops, "LEAST_WORDS", 5 * SHAPE[1])


@pytest.fixture(params=[True, False], ids=["kept", "scored again"])
def keeps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Say whether the forward pass keeps logits and matches for the backward pass."""
    if not request.param:
        monkeypatch.setattr(ops, "KEPT_BYTES", 0)
    return request.param


class Scored(NamedTuple):
    """A call of the operator: its texts, whether it returns matches, and where its results are."""

    rows: int
    matches: bool
    storages: list[StorageWeakRef]


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[Scored]:
    """Record the calls of the operator."""
    calls = []
    score = ops.score

    def record(text: Any, video: Any, rule: Any, matches: bool = False, maxima: bool = False) -> tuple[Tensor, ...]:
        # Not the packed form, which the loss does not keep.
        found = score(text, video, rule, matches, maxima)
        calls.append(Scored(len(text.features), matches, [StorageWeakRef(x.untyped_storage()) for x in found[:4]]))
        return found

    monkeypatch.setattr(ops, "score", record)
    return calls


RULE = ops.Rule(normalize=True, zero_competes=True)


def owners(problem: Problem) -> Tensor:
    return torch.arange(len(problem.text), device=problem.text.device) * 7 % 5


def step(
    function: Callable[..., Tensor], problem: Problem, scale: float = SCALE, **options: Any
) -> tuple[Tensor, dict]:
    """Compute the loss and its gradients with respect to features, weights and scale."""
    leaves = {n: getattr(problem, n).detach().requires_grad_() for n in LEAVES if getattr(problem, n) is not None}
    wide = torch.promote_types(problem.text.dtype, torch.float32)
    factor = torch.tensor(scale, dtype=wide, device=problem.text.device, requires_grad=True)
    tensors = Problem(**{**problem.__dict__, **leaves}).args()
    loss = function(*tensors, logit_scale=factor, **problem.options, **options)
    grads = torch.autograd.grad(loss, [*leaves.values(), factor])
    return loss.detach(), dict(zip([*leaves, "logit_scale"], grads, strict=True))


def of_all_logits(interaction: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make a loss that computes the whole logit matrix."""

    def loss(*tensors: Tensor | None, logit_scale: Tensor, **options: Any) -> Tensor:
        return info_nce(interaction(*tensors, **options), logit_scale)

    return loss


@pytest.mark.parametrize("owned", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_against_the_reference(impl: Implementation, keeps: bool, case: str, owned: bool) -> None:
    problem = make(SHAPE, **CASES[case]).map(lambda x: x.to(impl.device))
    owner = owners(problem) if owned else None
    loss, grads = step(token_contrastive_loss, problem, owner=owner)
    truth, want = step(reference.token_contrastive_loss, problem.double(), owner=None if owner is None else owner.cpu())
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5)
    for name, grad in grads.items():
        rounding = 1e-2 if grad.dtype == torch.bfloat16 else 1e-4
        assert grad.shape == want[name].shape
        torch.testing.assert_close(
            grad.double().cpu(), want[name], rtol=0, atol=rounding * float(want[name].abs().max())
        )


MANY = torch.tensor([3, 0, -1, 3, 8, 8, -1, 2, 1, 0])
MATRIX = (torch.arange(10)[:, None] * 3 + torch.arange(9)) % 7 == 0
MATRIX[4] = False
RECTANGLE = (10, 7, 9, 4)
WIDER: dict[str, tuple[tuple[int, ...], dict[str, Any], dict[str, Any]]] = {
    "text to video": (SHAPE, {"weights": torch.float32}, {"direction": "t2v"}),
    "video to text, masks": (SHAPE, {"masks": ("holes", "prefix")}, {"direction": "v2t"}),
    "one way": (SHAPE, {"masks": ("holes", "prefix"), "bidirectional": False, "weights": torch.float32}, {}),
    "softmax pooling": (SHAPE, {"masks": ("holes", "prefix"), "pooling": "softmax", "temperature": 0.1}, {}),
    "logsumexp, one way": (SHAPE, {"bidirectional": False, "pooling": "logsumexp", "temperature": 0.1}, {}),
    "sigmoid": (SHAPE, {"weights": torch.float32, "masks": ("empty", "holes")}, {"loss": "sigmoid"}),
    "sigmoid, softmax pooling": (SHAPE, {"pooling": "softmax"}, {"loss": "sigmoid"}),
    "more texts": (RECTANGLE, {"weights": torch.float32}, {"positives": MANY}),
    "more texts, text to video": (RECTANGLE, {}, {"positives": MANY, "direction": "t2v"}),
    "more texts, sigmoid": (RECTANGLE, {"masks": ("prefix", None)}, {"positives": MANY, "loss": "sigmoid"}),
    "many positives": (RECTANGLE, {"masks": ("prefix", "holes")}, {"positives": MATRIX}),
    "many positives, video to text": (RECTANGLE, {}, {"positives": MATRIX, "direction": "v2t"}),
    "many positives, sigmoid": (RECTANGLE, {"weights": torch.float32}, {"positives": MATRIX, "loss": "sigmoid"}),
    "hard negative videos": ((5, 7, 9, 4), {}, {"positives": torch.arange(5)}),
}


@pytest.mark.parametrize("case", WIDER)
def test_wider_against_the_reference(impl: Implementation, keeps: bool, case: str) -> None:
    """Loss and gradients of sides of different sizes, several positives, one direction, sigmoid and soft pooling."""
    shape, made, options = WIDER[case]
    problem = make(shape, **made)

    def run(function: Callable[..., Tensor], p: Problem) -> tuple[Tensor, dict[str, Tensor]]:
        wide = torch.promote_types(p.text.dtype, torch.float32)
        bias = {"logit_bias": torch.tensor(-8.0, dtype=wide).to(p.text.device).requires_grad_()}
        moved = {name: x.to(p.text.device) if isinstance(x, Tensor) else x for name, x in options.items()}
        if options.get("loss") != "sigmoid":
            return step(function, p, **moved)
        loss, grads = step(function, p, **moved, **{name: x.detach() for name, x in bias.items()})
        again = function(*p.args(), logit_scale=SCALE, **p.options, **moved, **bias)
        again.backward()
        torch.testing.assert_close(again.detach(), loss, rtol=1e-6, atol=0)
        return loss, {**grads, "logit_bias": bias["logit_bias"].grad}

    loss, grads = run(token_contrastive_loss, problem.map(lambda x: x.to(impl.device)))
    truth, want = run(reference.token_contrastive_loss, problem.double())
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5)
    assert set(grads) == set(want)
    for name, grad in grads.items():
        assert grad.shape == want[name].shape
        torch.testing.assert_close(grad.double().cpu(), want[name], rtol=0, atol=1e-4 * float(want[name].abs().max()))


def test_the_diagonal_given_as_positives_changes_only_rounding() -> None:
    problem = make(SHAPE, weights=torch.float32)
    for more in ({}, {"loss": "sigmoid", "logit_bias": -5.0}, {"direction": "t2v"}):
        loss, grads = step(token_contrastive_loss, problem, **more)
        for positives in (torch.arange(SHAPE[0]), torch.eye(SHAPE[0]).bool()):
            again, same = step(token_contrastive_loss, problem, positives=positives, **more)
            torch.testing.assert_close(again, loss, rtol=1e-6, atol=0)
            for name, grad in grads.items():
                torch.testing.assert_close(same[name], grad, rtol=1e-4, atol=1e-6 * float(grad.abs().max()))


@pytest.mark.usefixtures("keeps")
def test_sigmoid_leaves_siblings_out() -> None:
    """Captions of one video are neither positives nor negatives of each other's copies of it."""
    problem = make(SHAPE)
    owner = owners(problem)
    loss, grads = step(token_contrastive_loss, problem, owner=owner, loss="sigmoid", logit_bias=-5.0)
    double = problem.double()
    text = double.text.requires_grad_()
    y = token_interaction(text, double.video) * SCALE - 5
    own = torch.eye(SHAPE[0], dtype=torch.bool)
    negative = owner[:, None] != owner
    want = (torch.where(own, -y, y).exp().log1p() * (own | negative)).sum() / SHAPE[0]
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    (grad,) = torch.autograd.grad(want, text)
    torch.testing.assert_close(grads["text"].double(), grad, rtol=0, atol=1e-4 * float(grad.abs().max()))


@pytest.mark.usefixtures("keeps")
@pytest.mark.parametrize("case", HALF)
def test_half_precision(impl: Implementation, case: str) -> None:
    problem = make(SHAPE, **HALF[case])
    loss, grads = step(token_contrastive_loss, problem.map(lambda x: x.to(impl.device)))
    rival, rival_grads = step(of_all_logits(plain), problem)
    truth, want = step(reference.token_contrastive_loss, problem.double())
    assert loss.dtype == torch.float32
    assert_close("loss", loss, rival, truth, ATOL[problem.text.dtype], 1.0)
    for name, grad in grads.items():
        assert grad.dtype == rival_grads[name].dtype
        assert_close(name, grad, rival_grads[name], want[name], ATOL[problem.text.dtype], 0.0)


@pytest.mark.usefixtures("keeps")
def test_blocks_change_only_rounding(impl: Implementation, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make(SHAPE, weights=torch.float32, masks=("holes", "prefix")).map(lambda x: x.to(impl.device))
    loss, grads = step(token_contrastive_loss, problem)
    again, same = step(token_contrastive_loss, problem)
    assert torch.equal(loss, again)
    assert all(torch.equal(grads[name], same[name]) for name in grads)
    monkeypatch.setattr(ops, "BLOCK_BYTES", 1 << 30)
    whole, want = step(token_contrastive_loss, problem)
    torch.testing.assert_close(loss, whole, rtol=1e-6, atol=0)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, want[name], rtol=1e-4, atol=1e-6 * float(want[name].abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_what_is_kept_changes_no_bit(impl: Implementation, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make(SHAPE, dtype=dtype, weights=torch.float32, masks=("empty", "holes"))
    problem = problem.map(lambda x: x.to(impl.device))
    loss, grads = step(token_contrastive_loss, problem, owner=owners(problem))
    monkeypatch.setattr(ops, "KEPT_BYTES", 0)
    again, same = step(token_contrastive_loss, problem, owner=owners(problem))
    assert torch.equal(loss, again)
    assert all(torch.equal(grads[name], same[name]) for name in grads)


def test_shapes_decide_what_is_kept(scored: list[Scored], monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make(SHAPE)
    rows, words, _, frames = SHAPE
    # float32 logits and one byte of matches per token
    bytes_of_all = rows * rows * (4 + words + frames)
    monkeypatch.setattr(ops, "KEPT_BYTES", bytes_of_all)
    step(token_contrastive_loss, problem)
    assert [(x.rows, x.matches) for x in scored] == [(rows, True)]
    scored.clear()
    monkeypatch.setattr(ops, "KEPT_BYTES", bytes_of_all - 1)
    step(token_contrastive_loss, problem)
    assert sum(x.rows for x in scored if not x.matches) == sum(x.rows for x in scored if x.matches) == rows
    assert max(x.rows for x in scored) < rows


def test_what_is_kept_is_freed_with_the_graph(scored: list[Scored]) -> None:
    problem = make(SHAPE)
    text = problem.text.clone().requires_grad_()
    loss = token_contrastive_loss(text, problem.video, logit_scale=SCALE)
    (one,) = scored
    assert not any(x.expired() for x in one.storages)
    loss.backward()
    assert all(x.expired() for x in one.storages)


def test_nothing_is_kept_without_gradients(scored: list[Scored]) -> None:
    problem = make(SHAPE)
    losses = [token_contrastive_loss(*problem.args(), logit_scale=SCALE)]
    problem.text.requires_grad_()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            losses.append(token_contrastive_loss(*problem.args(), logit_scale=SCALE))
    assert not any(x.requires_grad for x in losses)
    assert sum(x.rows for x in scored) == 3 * SHAPE[0]
    assert max(x.rows for x in scored) < SHAPE[0]
    assert not any(x.matches for x in scored)
    assert all(storage.expired() for x in scored for storage in x.storages)


def test_blocks_are_even_and_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "BLOCK_BYTES", 16 << 20)
    monkeypatch.setattr(ops, "LEAST_WORDS", 2048)

    def sizes(rows: int, matches: bool, words: int = 16) -> list[int]:
        sides = [
            ops.WeightedTokens(torch.empty(rows, n, 1, device="meta"), torch.empty(rows, n, device="meta"), None, None)
            for n in (words, 8)
        ]
        return [block.stop - block.start for block in ops.blocks(*sides, RULE, matches=matches)]

    assert sizes(100, True) == [100]
    many = sizes(3000, True)
    assert sum(many) == 3000
    assert max(many) - min(many) <= 1
    assert (16 << 20) // 2 < max(many) * 3000 * (16 + 8 + 16) <= 16 << 20
    assert len(sizes(3000, False)) < len(many)
    assert max(sizes(100_000, True, words=77)) == 2048 // 77


def test_a_confident_positive_keeps_its_gradient() -> None:
    """If every positive's probability is close to 1, its small gradient is accurate."""
    # Logits are near 1000, where float32 has a resolution of 6e-5, and negatives are 10 lower.
    common = torch.full((6, 1, 1), 0.99**0.5)
    video = torch.cat([common, 0.1 * torch.eye(6)[:, None]], 2)
    problem = Problem(video + 1e-3 * torch.randn(6, 1, 7), video)
    loss, grads = step(token_contrastive_loss, problem, 1000.0)
    truth, want = step(reference.token_contrastive_loss, problem.double(), 1000.0)
    assert 0 < truth < 2e-3
    assert loss.item() == pytest.approx(truth.item(), rel=1e-2)
    for name in grads:
        torch.testing.assert_close(grads[name].double(), want[name], rtol=0, atol=1e-2 * float(want[name].abs().max()))


def test_owners_by_hand() -> None:
    """Two captions of one video and one of another: the captions of the first have one negative each."""
    text = torch.eye(3)[:, None]
    video = torch.eye(3)[[0, 0, 2]][:, None]
    loss = token_contrastive_loss(text, video, logit_scale=2.0, owner=torch.tensor([5, 5, -1], dtype=torch.int16))
    logits = torch.tensor([[2.0, -torch.inf, 0], [-torch.inf, 0, 0], [0, 0, 2]])
    assert loss.item() == pytest.approx(info_nce(logits, 1.0).item(), rel=1e-6)


def test_one_owner_for_all_leaves_no_negative() -> None:
    problem = make(SHAPE)
    loss, grads = step(token_contrastive_loss, problem, owner=torch.zeros(len(problem.text), dtype=torch.int64))
    assert loss == 0
    assert all(bool((grad == 0).all()) for grad in grads.values())


def test_one_pair_scores_zero(impl: Implementation) -> None:
    problem = make((1, 4, 1, 3), weights=torch.float32).map(lambda x: x.to(impl.device))
    loss, grads = step(token_contrastive_loss, problem, 100.0)
    assert loss == 0
    assert all(bool((grad == 0).all()) for grad in grads.values())


@pytest.mark.usefixtures("keeps")
def test_gradcheck() -> None:
    problem = make((6, 3, 6, 2), 4, torch.float64, masks=("holes", "prefix"), weights=torch.float64)
    leaves = [getattr(problem, name).requires_grad_() for name in LEAVES]
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)

    def loss(*x: Tensor) -> Tensor:
        return token_contrastive_loss(*x[:4], problem.text_mask, problem.video_mask, logit_scale=x[4])

    assert torch.autograd.gradcheck(loss, (*leaves, scale))


@pytest.mark.parametrize("wanted", [*LEAVES, "logit_scale"])
def test_only_needed_gradients_are_computed(
    wanted: str, keeps: bool, scored: list[Scored], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = make(SHAPE, weights=torch.float32)
    _, want = step(token_contrastive_loss, problem)
    scored.clear()
    asked = []
    differentiate = ops.differentiate
    monkeypatch.setattr(ops, "differentiate", lambda *x: asked.append(x[-1]) or differentiate(*x))
    leaves = {**{name: getattr(problem, name) for name in LEAVES}, "logit_scale": torch.tensor(SCALE)}
    leaves[wanted] = leaves[wanted].clone().requires_grad_()
    loss = token_contrastive_loss(**leaves)
    assert any(x.matches for x in scored) is (keeps and wanted != "logit_scale")
    (grad,) = torch.autograd.grad(loss, leaves[wanted])
    assert torch.equal(grad, want[wanted])
    if wanted == "logit_scale":
        assert not asked
        assert not any(x.matches for x in scored)
    else:
        assert {needs.index(True) for needs in asked} == {LEAVES.index(wanted)}
        assert {sum(needs) for needs in asked} == {1}


def test_without_gradients() -> None:
    problem = make(SHAPE)
    assert not token_contrastive_loss(*problem.args(), logit_scale=SCALE).requires_grad
    text = problem.text.clone().requires_grad_()
    with torch.no_grad():
        assert not token_contrastive_loss(text, problem.video, logit_scale=SCALE).requires_grad


def test_a_scale_of_another_dtype_and_shape() -> None:
    problem = make(SHAPE)
    _, want = step(token_contrastive_loss, problem)
    for dtype in (torch.float64, torch.float16):
        scale = torch.full((1, 1), SCALE, dtype=dtype, requires_grad=True)
        loss = token_contrastive_loss(problem.text, problem.video, logit_scale=scale)
        assert loss.dtype == torch.float32
        loss.backward()
        assert scale.grad.dtype == dtype
        assert scale.grad.shape == (1, 1)
        assert scale.grad.item() == pytest.approx(want["logit_scale"].item(), rel=1e-2)


@pytest.mark.usefixtures("keeps")
def test_real_nan_is_kept_and_masked_nan_is_ignored(impl: Implementation) -> None:
    problem = make(SHAPE, masks=("prefix", "prefix"), weights=torch.float32).map(lambda x: x.to(impl.device))
    problem.text_mask[3, -1] = problem.video_mask[20, -1] = False
    clean, want = step(token_contrastive_loss, problem)
    problem.text[3, -1] = problem.video[20, -1] = torch.nan
    loss, grads = step(token_contrastive_loss, problem)
    assert torch.equal(loss, clean)
    assert all(torch.equal(grads[name], want[name]) for name in grads)
    for side in (problem.text, problem.video):
        broken = side[22, 0].clone()
        side[22, 0] = torch.nan
        assert token_contrastive_loss(*problem.args(), logit_scale=SCALE).isnan()
        side[22, 0] = broken


def test_large_logits_do_not_overflow() -> None:
    problem = make(SHAPE, normalize=False)
    loss, grads = step(token_contrastive_loss, problem.map(lambda x: x * 1e3), 100.0)
    assert bool(loss.isfinite())
    assert all(bool(grad.isfinite().all()) for grad in grads.values())


def test_strides_do_not_matter() -> None:
    problem = make(SHAPE, weights=torch.float32)
    odd = problem.map(lambda x: x.transpose(0, 1).contiguous().transpose(0, 1))
    loss, grads = step(token_contrastive_loss, problem)
    again, same = step(token_contrastive_loss, odd)
    assert torch.equal(loss, again)
    assert all(torch.equal(grads[name], same[name]) for name in grads)


def test_autocast_casts_features() -> None:
    problem = make(SHAPE, weights=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, grads = step(token_contrastive_loss, problem)
    half = Problem(problem.text.bfloat16(), problem.video.bfloat16(), problem.text_weight, problem.video_weight)
    want, _ = step(token_contrastive_loss, half)
    assert torch.equal(loss, want)
    assert grads["text"].dtype == torch.float32


@pytest.mark.usefixtures("keeps")
@pytest.mark.parametrize("case", ["uniform", "holes"])
def test_compiles(case: str) -> None:
    torch._dynamo.reset()
    problem = make(SHAPE, **CASES[case])
    options = {"owner": owners(problem)}
    compiled = torch.compile(token_contrastive_loss, fullgraph=True, backend="aot_eager")
    loss, grads = step(token_contrastive_loss, problem, **options)
    again, same = step(compiled, problem, **options)
    torch.testing.assert_close(again, loss, rtol=1e-6, atol=0)
    for name in grads:
        torch.testing.assert_close(same[name], grads[name], rtol=1e-4, atol=1e-7)
    torch._dynamo.reset()


@pytest.mark.usefixtures("keeps")
def test_functional_gradient() -> None:
    problem = make(SHAPE)
    _, want = step(token_contrastive_loss, problem)
    grad = torch.func.grad(lambda text: token_contrastive_loss(text, problem.video, logit_scale=SCALE))(problem.text)
    torch.testing.assert_close(grad, want["text"])


@pytest.mark.usefixtures("keeps")
def test_no_second_derivative_and_no_forward_mode() -> None:
    problem = make((3, 2, 3, 2), 4)
    text = problem.text.clone().requires_grad_()
    loss = token_contrastive_loss(text, problem.video, logit_scale=2.0)
    (grad,) = torch.autograd.grad(loss, text, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"no second derivative.*reference\.token_contrastive_loss"):
        (loss + grad.sum()).backward()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(problem.text, torch.ones_like(problem.text))
        with pytest.raises(NotImplementedError, match=r"no forward-mode.*reference\.token_contrastive_loss"):
            token_contrastive_loss(dual, problem.video, logit_scale=2.0)


T, V = torch.zeros(2, 3, 8), torch.zeros(2, 5, 8)
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no pair": ({"text": T[:0], "video": V[:0]}, ValueError, r"text must hold at least one pair.*\(0, 3, 8\).*skip"),
    "more videos": ({"video": V.repeat(2, 1, 1)}, ValueError, "video must have as many rows as text.* 2, got 4.*owner"),
    "D differs": ({"video": V[..., :7]}, ValueError, "video must have D = 8 channels to match text, got 7"),
    "masks swapped": ({"text_mask": torch.ones(2, 5)}, ValueError, r"text_mask must be.*\(2, 3\).*got \(2, 5\)"),
    "weight": ({"text_weight": torch.ones(3, 2)}, ValueError, r"text_weight must be \(A, Nt\) = \(2, 3\).*\(3, 2\)"),
    "owner's shape": ({"owner": torch.zeros(2, 1).long()}, ValueError, r"owner must be \(B,\) = \(2,\).*\(2, 1\)"),
    "owner's dtype": ({"owner": torch.zeros(2)}, TypeError, r"owner must hold integers.*float32.*owner\.long\(\)"),
    "owner bool": ({"owner": torch.zeros(2).bool()}, TypeError, "owner must hold integers.*torch.bool"),
    "owner a list": ({"owner": [0, 1]}, TypeError, r"owner must be a torch.Tensor.*as_tensor\(owner\)"),
    "owner elsewhere": ({"owner": torch.zeros(2, device="meta").long()}, ValueError, "owner must be on text's device"),
    "scale 0": ({"logit_scale": 0.0}, ValueError, "logit_scale must be positive and finite, got 0.0"),
    "scale negative": ({"logit_scale": -1}, ValueError, "logit_scale must be positive and finite, got -1"),
    "scale NaN": ({"logit_scale": math.nan}, ValueError, "logit_scale must be positive and finite, got nan"),
    "scale of rank 1": ({"logit_scale": torch.ones(2)}, ValueError, r"logit_scale must be a scalar.*\(2,\)"),
    "masking": ({"masking": "mean"}, ValueError, "masking must be one of 'drl', 'exclude', 'none', got 'mean'"),
    "normalize": ({"normalize": 1}, TypeError, "normalize must be True or False, got int 1"),
    "one way with weights": (
        {"bidirectional": False, "video_weight": torch.ones(2, 5)},
        ValueError,
        "video_weight must be None when bidirectional=False",
    ),
    "owner and positives": (
        {"owner": torch.zeros(2).long(), "positives": torch.arange(2)},
        ValueError,
        "owner must be None with positives",
    ),
    "positives' shape": ({"positives": torch.arange(3)}, ValueError, r"positives must be \(A,\) = \(2,\) integers"),
    "positives out of range": ({"positives": torch.tensor([0, 2])}, ValueError, r"positives must lie in 0\.\.1"),
    "no positive": (
        {"positives": torch.tensor([-1, -1])},
        ValueError,
        "positives must hold at least one positive pair",
    ),
    "loss": ({"loss": "hinge"}, ValueError, "loss must be one of 'softmax', 'sigmoid', got 'hinge'"),
    "direction": ({"direction": "up"}, ValueError, "direction must be one of 'both', 't2v', 'v2t', got 'up'"),
    "sigmoid without bias": ({"loss": "sigmoid"}, ValueError, "logit_bias must be given with loss='sigmoid', got None"),
    "softmax with bias": ({"logit_bias": -1.0}, ValueError, "logit_bias must be None with loss='softmax'"),
    "sigmoid with one direction": (
        {"loss": "sigmoid", "logit_bias": -1.0, "direction": "t2v"},
        ValueError,
        "direction must be 'both' with loss='sigmoid'.*got 't2v'",
    ),
    "pooling": ({"pooling": "mean"}, ValueError, "pooling must be one of 'max', 'softmax', 'logsumexp', got 'mean'"),
    "temperature": ({"temperature": 0.1}, ValueError, "temperature must be 1 with pooling='max'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    changes, error, message = BAD[case]
    with pytest.raises(error, match=message) as caught:
        token_contrastive_loss(**{"text": T, "video": V, "logit_scale": 1.0, **changes})
    assert len(str(caught.value).splitlines()) == 1


def test_equals_info_nce_of_the_interaction() -> None:
    problem = make((60, 16, 60, 8), 32, weights=torch.float32)
    loss, grads = step(token_contrastive_loss, problem, 100.0)
    whole, want = step(of_all_logits(token_interaction), problem, 100.0)
    assert loss.item() == pytest.approx(whole.item(), rel=1e-5)
    for name in grads:
        torch.testing.assert_close(grads[name], want[name], rtol=0, atol=1e-4 * float(want[name].abs().max()))
