"""Values and gradients of every implementation against the float64 reference."""

from __future__ import annotations

import pytest
import torch

from tests.implementations import Implementation
from tests.oracle import Problem, judge, make

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
MASKS = {
    "none": (None, None),
    "prefix": ("prefix", "prefix"),
    "holes": ("holes", "holes"),
    "empty rows": ("empty", "empty"),
    "text only": ("prefix", None),
    "video only": (None, "empty"),
}
# (A, Nt, B, Nv): odd and even, one row or token, one side far larger, more than 255 tokens on either side.
SHAPES = [
    (1, 1, 1, 1),
    (5, 1, 4, 6),
    (4, 6, 5, 1),
    (1, 7, 100, 3),
    (100, 3, 1, 7),
    (33, 9, 47, 5),
    (16, 32, 16, 12),
    (9, 64, 8, 64),
    (3, 255, 2, 4),
    (3, 256, 2, 4),
    (2, 4, 3, 255),
    (2, 4, 3, 256),
    (2, 300, 2, 300),
]
EMPTY = [(0, 3, 4, 5), (4, 3, 0, 5), (0, 1, 0, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("masks", MASKS)
def test_shapes(impl: Implementation, shape: tuple[int, int, int, int], masks: str) -> None:
    judge(make(shape, masks=MASKS[masks], weights=torch.float32), impl.device)


@pytest.mark.parametrize("dim", [1, 3, 17, 64, 512, 1030])
@pytest.mark.parametrize("normalize", [True, False])
def test_widths(impl: Implementation, dim: int, normalize: bool) -> None:
    problem = make((6, 8, 7, 5), dim, masks=("prefix", "holes"), normalize=normalize)
    # With one channel a unit token is a sign: its true gradient is 0.
    judge(problem, impl.device, floor=1.0 if dim == 1 else 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masking", ["drl", "exclude", "none"])
@pytest.mark.parametrize("normalize", [True, False], ids=["unit", "raw"])
@pytest.mark.parametrize("bidirectional", [True, False], ids=["both", "one way"])
@pytest.mark.parametrize("weights", [None, torch.float32], ids=["uniform", "given"])
def test_options(
    impl: Implementation,
    dtype: torch.dtype,
    masking: str,
    normalize: bool,
    bidirectional: bool,
    weights: torch.dtype | None,
) -> None:
    problem = make(
        (9, 11, 10, 6),
        32,
        dtype,
        masks=("empty", "empty"),
        weights=weights,
        masking=masking,
        normalize=normalize,
        bidirectional=bidirectional,
    )
    judge(problem, impl.device)


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("masking", ["drl", "exclude", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masks(impl: Implementation, masks: str, masking: str, dtype: torch.dtype) -> None:
    judge(make((6, 9, 7, 5), 24, dtype, masks=MASKS[masks], masking=masking), impl.device)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32, torch.uint8], ids=str)
def test_mask_dtypes(impl: Implementation, mask_dtype: torch.dtype) -> None:
    as_bool = judge(make((5, 9, 6, 4), masks=("holes", "empty")), impl.device)
    other = judge(make((5, 9, 6, 4), masks=("holes", "empty"), mask_dtype=mask_dtype), impl.device)
    assert torch.equal(as_bool.logits, other.logits)


def test_mask_values_other_than_zero_mean_real(impl: Implementation) -> None:
    problem = make((5, 9, 6, 4), masks=("holes", "holes"))
    want = judge(problem, impl.device)
    problem.text_mask = torch.where(problem.text_mask, 0.25, 0.0)
    problem.video_mask = torch.where(problem.video_mask, 7, 0)
    assert torch.equal(judge(problem, impl.device).logits, want.logits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_weight_dtypes(impl: Implementation, dtype: torch.dtype, weights: torch.dtype) -> None:
    """Weights of any float dtype, also negative or on masked tokens; their gradient has their dtype."""
    judge(make((6, 8, 5, 7), 16, dtype, masks=("holes", "prefix"), weights=weights), impl.device)


@pytest.mark.parametrize("shape", EMPTY, ids=str)
@pytest.mark.parametrize("masks", ["none", "prefix"])
def test_empty_batches(impl: Implementation, shape: tuple[int, int, int, int], masks: str) -> None:
    result = judge(make(shape, masks=MASKS[masks], weights=torch.float32), impl.device)
    assert all(not grad.any() for grad in result.grads.values())


def strided(kind: str) -> Problem:
    """Make a problem whose tensors have another memory layout."""
    p = make((6, 8, 7, 5), 16, masks=("holes", "holes"), weights=torch.float32)
    if kind == "transposed":
        return p.map(lambda x: x.transpose(0, 1).contiguous().transpose(0, 1))
    if kind == "channels first":
        return p.map(lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2))
    if kind == "every second":
        return p.map(lambda x: x.repeat_interleave(2, dim=-1)[..., ::2])
    if kind == "offset":
        return p.map(lambda x: torch.cat([x[:1], x], 0)[1:])
    if kind == "expanded":
        return p.map(lambda x: x[:1].expand(9, *x.shape[1:]))
    return p.map(lambda x: x[:, :, :1].expand(x.shape) if x.dim() == 3 else x[:, :1].expand(x.shape))


@pytest.mark.parametrize(
    "kind", ["transposed", "channels first", "every second", "offset", "expanded", "one channel expanded"]
)
@pytest.mark.parametrize("bidirectional", [True, False])
def test_strides(impl: Implementation, kind: str, bidirectional: bool) -> None:
    problem = strided(kind)
    problem.options["bidirectional"] = bidirectional
    if not bidirectional:
        problem.video_weight = None
    # Expanded tokens tie exactly, in the reference too, so the probe must not leave these pairs out.
    probe = torch.randn(problem.pairs, dtype=torch.float64) if kind == "expanded" else None
    judge(problem, impl.device, probe=probe, floor=1.0 if kind == "one channel expanded" else 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_and_small_magnitudes(impl: Implementation, dtype: torch.dtype) -> None:
    """Norms are computed in float32, so large or tiny half-precision features neither overflow nor vanish."""
    problem = make((6, 8, 7, 5), 64, dtype, masks=("prefix", "prefix"))
    problem.text = problem.text * (3e3 if dtype == torch.float16 else 1e6)
    problem.video = problem.video * 2.0**-8
    judge(problem, impl.device)


def test_deterministic_mode_fills_empty_memory_with_nan(impl: Implementation) -> None:
    """A kernel that reads memory before writing it returns NaN here."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    for shape in [(5, 9, 6, 4), (1, 1, 1, 1), (40, 20, 33, 13), (2, 300, 2, 3)]:
        judge(make(shape, masks=("empty", "empty"), weights=torch.float32), impl.device)


def test_scale_of_upstream_gradients(impl: Implementation) -> None:
    """Gradients are linear in the upstream gradient, and its strides do not matter."""
    problem = make((5, 9, 6, 4), masks=("holes", "holes"), weights=torch.float32)
    judge(problem, impl.device, probe=torch.zeros(5, 6, dtype=torch.float64))
    judge(problem, impl.device, probe=torch.ones((), dtype=torch.float64).expand(5, 6))
    judge(problem, impl.device, probe=torch.randn(6, 5, dtype=torch.float64).T)
