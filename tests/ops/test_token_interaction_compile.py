"""torch.compile and autocast: the same numbers, no graph break, no silent loss of precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import drl_fast
import drl_fast.reference
from tests.implementations import Implementation
from tests.oracle import ATOL, Problem, error, make, run

CASES = {
    "uniform": {},
    "masks and weights": {"masks": ("holes", "prefix"), "weights": torch.float32},
    "integer masks": {"masks": ("holes", "empty"), "mask_dtype": torch.int64},
    "float masks": {"masks": ("holes", "empty"), "mask_dtype": torch.float32, "masking": "exclude"},
    "one way": {"masks": ("holes", None), "bidirectional": False, "masking": "none"},
    "bfloat16": {"dtype": torch.bfloat16, "masks": ("prefix", "prefix"), "normalize": False},
    "double": {"dtype": torch.float64, "masks": ("prefix", "prefix")},
}


@pytest.fixture(autouse=True)
def _fresh_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Cached graphs identify an operator by its name only, and would call an earlier schema.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def check_compiled(problem: Problem, compiled: Callable[..., Tensor]) -> None:
    probe = torch.randn(problem.pairs)
    eager, got = run(drl_fast.token_interaction, problem, probe), run(compiled, problem, probe)
    torch.testing.assert_close(got.logits, eager.logits, atol=1e-6, rtol=0)
    for name, grad in eager.grads.items():
        assert got.grads[name].dtype == grad.dtype
        torch.testing.assert_close(got.grads[name], grad, atol=1e-6, rtol=2e-2 if grad.itemsize == 2 else 1e-5)
    with torch.no_grad():
        torch.testing.assert_close(run(compiled, problem).logits, eager.logits, atol=1e-6, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_fullgraph(impl: Implementation, case: str) -> None:
    problem = make((5, 9, 6, 4), 16, **CASES[case]).map(lambda x: x.to(impl.device))
    check_compiled(problem, torch.compile(drl_fast.token_interaction, fullgraph=True, backend="aot_eager"))


def test_dynamic_shapes(impl: Implementation) -> None:
    """One graph serves all batches and lengths up to 255 tokens."""
    compiles = []

    def counting(module: Any, inputs: Any) -> Any:
        compiles.append(module)
        return module

    compiled = torch.compile(drl_fast.token_interaction, fullgraph=True, backend=counting, dynamic=True)
    for shape in [(5, 9, 6, 4), (7, 12, 3, 8), (4, 20, 11, 5)]:
        problem = make(shape, 16, masks=("holes", "prefix"), weights=torch.float32).map(lambda x: x.to(impl.device))
        eager, got = run(drl_fast.token_interaction, problem), run(compiled, problem)
        torch.testing.assert_close(got.logits, eager.logits, atol=1e-6, rtol=0)
    assert len(compiles) == 1
    compiled = torch.compile(drl_fast.token_interaction, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in [(5, 9, 6, 4), (7, 12, 3, 8), (2, 7, 3, 256), (2, 300, 3, 5)]:
        problem = make(shape, 16, masks=("holes", "prefix"), weights=torch.float32).map(lambda x: x.to(impl.device))
        check_compiled(problem, compiled)


def test_inductor(impl: Implementation) -> None:
    problem = make((5, 9, 6, 4), 16, masks=("holes", "prefix"), weights=torch.float32).map(lambda x: x.to(impl.device))
    check_compiled(problem, torch.compile(drl_fast.token_interaction, fullgraph=True))


def test_compiled_matches(impl: Implementation) -> None:
    problem = make((5, 9, 6, 4), 16, masks=("holes", "empty")).map(lambda x: x.to(impl.device))
    compiled = torch.compile(drl_fast.token_interaction, fullgraph=True, backend="aot_eager")
    _, want = drl_fast.token_interaction(*problem.args(), return_matches=True)
    _, got = compiled(*problem.args(), return_matches=True)
    assert torch.equal(got.video_index, want.video_index)
    assert torch.equal(got.text_index, want.text_index)


def test_compiled_layer(impl: Implementation) -> None:
    torch.manual_seed(0)
    layer = drl_fast.WTI(16).to(impl.device)
    problem = make((5, 9, 6, 4), 16, masks=("holes", "empty")).map(lambda x: x.to(impl.device))
    args = (problem.text, problem.video, problem.text_mask, problem.video_mask)
    want = layer(*args)
    grads = torch.autograd.grad(want.square().sum(), list(layer.parameters()))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    got = compiled(*args)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    for ours, eager in zip(torch.autograd.grad(got.square().sum(), list(layer.parameters())), grads, strict=True):
        torch.testing.assert_close(ours, eager, atol=1e-6, rtol=1e-5)


def test_bad_shapes_raise_under_compilation(impl: Implementation) -> None:
    compiled = torch.compile(drl_fast.token_interaction, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="video must have D = 8 channels"):
        compiled(torch.randn(2, 3, 8, device=impl.device), torch.randn(2, 3, 9, device=impl.device))


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_autocast_casts_only_features(impl: Implementation, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Features, also of mixed dtypes, are rounded to autocast's dtype; products and sums stay in float32."""
    problem = make((9, 12, 8, 6), 64, masks=("holes", "prefix"), weights=torch.float32)
    problem = problem.map(lambda x: x.to(impl.device))
    problem.text, problem.video = problem.text.to(dtypes[0]), problem.video.to(dtypes[1])
    rounded = Problem(**{**vars(problem), "text": problem.text.bfloat16(), "video": problem.video.bfloat16()})
    probe = torch.randn(problem.pairs)
    want = run(drl_fast.token_interaction, rounded, probe)
    with torch.autocast(impl.device, dtype=torch.bfloat16):
        got = run(drl_fast.token_interaction, problem, probe)
    assert got.logits.dtype == torch.float32
    assert torch.equal(got.logits, want.logits)
    for name, grad in got.grads.items():
        assert grad.dtype == getattr(problem, name).dtype
        assert torch.equal(grad, want.grads[name].to(grad.dtype))
    exact = run(drl_fast.reference.token_interaction, rounded.double()).logits
    # The Triton kernels multiply in the features' dtype.
    multiplied_in = torch.bfloat16 if impl.name in ("cuda", "interpreter") else torch.float32
    assert error(got.logits, exact) < 10 * ATOL[multiplied_in]


def test_autocast_leaves_double_alone(impl: Implementation) -> None:
    problem = make((9, 12, 8, 6), 64, torch.float64).map(lambda x: x.to(impl.device))
    want = run(drl_fast.token_interaction, problem, torch.ones(9, 8))
    with torch.autocast(impl.device, dtype=torch.bfloat16):
        got = run(drl_fast.token_interaction, problem, torch.ones(9, 8))
    assert torch.equal(got.logits, want.logits)
    assert torch.equal(got.grads["text"], want.grads["text"])


def test_backward_inside_autocast(impl: Implementation) -> None:
    problem = make((9, 12, 8, 6), 64).map(lambda x: x.to(impl.device))
    text = problem.text.requires_grad_()
    with torch.autocast(impl.device, dtype=torch.bfloat16):
        loss = drl_fast.token_interaction(text, problem.video).sum()
    loss.backward()
    outside, text.grad = text.grad, None
    with torch.autocast(impl.device, dtype=torch.bfloat16):
        drl_fast.token_interaction(text, problem.video).sum().backward()
    assert torch.equal(text.grad, outside)
