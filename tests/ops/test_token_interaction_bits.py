"""Equal bits: from run to run, for any number of threads, and for a pair in any batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

import drl_fast
from tests.implementations import Implementation
from tests.oracle import Problem, make, run

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
MASKS = [(None, None), ("prefix", "holes"), ("empty", "prefix")]
# (A, Nt, B, Nv, D): partly filled blocks, and rows shorter and longer than a block.
SHAPES = [(37, 32, 41, 12, 64), (90, 9, 70, 5, 512), (33, 1, 300, 7, 17), (5, 300, 6, 260, 32), (70, 25, 3, 64, 3)]


def problem_of(shape: tuple[int, ...], dtype: torch.dtype, masks: tuple[str | None, str | None]) -> Problem:
    return make(shape[:4], shape[4], dtype, masks=masks, weights=torch.float32)


def interaction(p: Problem) -> Tensor:
    return drl_fast.token_interaction(*p.args(), **p.options)


def maxsim(p: Problem) -> Tensor:
    return drl_fast.maxsim(p.text, p.video, p.text_mask, p.video_mask, query_weight=p.text_weight)


def subset(p: Problem, rows: Tensor, columns: Tensor) -> Problem:
    """Select texts ``rows`` and videos ``columns``; repeats are allowed."""

    def pick(x: Tensor | None, index: Tensor) -> Tensor | None:
        return None if x is None else x[index.to(x.device)]

    return replace(
        p,
        text=pick(p.text, rows),
        text_weight=pick(p.text_weight, rows),
        text_mask=pick(p.text_mask, rows),
        video=pick(p.video, columns),
        video_weight=pick(p.video_weight, columns),
        video_mask=pick(p.video_mask, columns),
    )


def bits(x: Tensor) -> Tensor:
    """Return raw bytes, which distinguish -0 from 0 and compare NaN as equal."""
    return x.detach().contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("score", [interaction, maxsim], ids=["token_interaction", "maxsim"])
def test_batch_invariance(
    impl: Implementation, shape: tuple[int, ...], dtype: torch.dtype, score: Callable[[Problem], Tensor]
) -> None:
    p = problem_of(shape, dtype, ("prefix", "holes")).map(lambda x: x.to(impl.device))
    whole = score(p)
    a, b = p.pairs
    everything = torch.arange(a), torch.arange(b)
    batches = {
        "permuted": (torch.randperm(a), torch.randperm(b)),
        "reversed": (everything[0].flip(0), everything[1].flip(0)),
        "sub-batch": (everything[0][1::2], everything[1][2:]),
        "shifted by one": (everything[0].roll(1), everything[1].roll(-1)),
        "inside a bigger batch": (torch.cat([everything[0].flip(0)] * 3), torch.cat([everything[1].roll(3)] * 2)),
    }
    for text in (0, a // 2, a - 1):
        for video in (0, b // 3, b - 1):
            batches[f"alone {text} {video}"] = (torch.tensor([text]), torch.tensor([video]))
    batches["one text"] = (torch.tensor([a - 1]), everything[1])
    batches["one video"] = (everything[0], torch.tensor([b - 1]))
    for name, (rows, columns) in batches.items():
        want = whole[rows.to(impl.device)][:, columns.to(impl.device)]
        assert torch.equal(bits(score(subset(p, rows, columns))), bits(want)), name


@pytest.mark.parametrize("masks", MASKS, ids=str)
@pytest.mark.parametrize("masking", ["drl", "exclude", "none"])
def test_batch_invariance_under_every_mask_rule(impl: Implementation, masks: tuple[str, str], masking: str) -> None:
    """Masks affect packing, so other rows affect where a pair's tokens are in a block."""
    p = problem_of((37, 13, 41, 7, 32), torch.float32, masks).map(lambda x: x.to(impl.device))
    p.options["masking"] = masking
    whole = interaction(p)
    for rows, columns in [(torch.randperm(37), torch.randperm(41)), (torch.tensor([36, 3]), torch.tensor([40]))]:
        want = whole[rows.to(impl.device)][:, columns.to(impl.device)]
        assert torch.equal(bits(interaction(subset(p, rows, columns))), bits(want))


def test_batch_invariance_beside_unusual_rows(impl: Implementation) -> None:
    """Rows that are zero, huge, NaN, or without a real token do not affect others."""
    p = problem_of((37, 13, 41, 7, 32), torch.float32, ("prefix", "prefix")).map(lambda x: x.to(impl.device))
    want = interaction(p)
    p.text[3], p.text[9], p.text[20] = 0, 1e30, torch.nan
    p.video[5], p.video[8] = torch.inf, 0
    p.text_mask[30], p.video_mask[40] = False, False
    texts = torch.tensor([a for a in range(37) if a not in (3, 9, 20, 30)], device=impl.device)
    videos = torch.tensor([b for b in range(41) if b not in (5, 8, 40)], device=impl.device)
    assert torch.equal(bits(interaction(p)[texts][:, videos]), bits(want[texts][:, videos]))


@pytest.mark.parametrize("kind", ["transposed", "offset", "expanded batch"])
def test_layout_in_memory_does_not_change_bits(impl: Implementation, kind: str) -> None:
    p = problem_of((9, 13, 8, 7, 64), torch.float32, ("prefix", "holes")).map(lambda x: x.to(impl.device))
    if kind == "expanded batch":
        p = subset(p, torch.zeros(9, dtype=torch.int64), torch.zeros(8, dtype=torch.int64))
    want = interaction(p)
    change = {
        "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        "offset": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
        "expanded batch": lambda x: x[:1].expand(x.shape),
    }[kind]
    assert torch.equal(bits(interaction(p.map(change))), bits(want))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("masks", MASKS[:2], ids=str)
def test_two_runs(impl: Implementation, shape: tuple[int, ...], dtype: torch.dtype, masks: tuple[str, str]) -> None:
    p = problem_of(shape, dtype, masks).map(lambda x: x.to(impl.device))
    probe = torch.randn(p.pairs)
    first, second = (run(drl_fast.token_interaction, p, probe) for _ in range(2))
    assert torch.equal(bits(first.logits), bits(second.logits))
    for name, grad in first.grads.items():
        assert torch.equal(bits(grad), bits(second.grads[name])), name


@pytest.mark.parametrize("masks", MASKS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_choice_of_gradients(
    impl: Implementation, shape: tuple[int, ...], dtype: torch.dtype, masks: tuple[str, str]
) -> None:
    p = problem_of(shape, dtype, masks).map(lambda x: x.to(impl.device))
    wide = torch.promote_types(dtype, torch.float32)
    tensors = (p.text, p.video, p.text_weight.to(wide), p.video_weight.to(wide), p.text_mask, p.video_mask)
    logits, *matches = torch.ops.drl_fast.token_interaction(*tensors, True, True, True)
    probe = torch.randn_like(logits)

    def gradients(wanted: list[bool]) -> tuple[Tensor, ...]:
        return torch.ops.drl_fast.token_interaction_backward(probe, *tensors, *matches, True, True, wanted)

    whole = gradients([True] * 4)
    for wanted in product([False, True], repeat=4):
        for found, want, needed in zip(gradients(list(wanted)), whole, wanted, strict=True):
            assert torch.equal(bits(found), bits(want)) if needed else found.numel() == 0, wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_number_of_threads(cpu_impl: Implementation, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    p = problem_of(shape, dtype, ("prefix", "holes"))
    probe = torch.randn(p.pairs)
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(run(drl_fast.token_interaction, p, probe))
    for other in results[1:]:
        assert torch.equal(bits(results[0].logits), bits(other.logits))
        # Chunked PyTorch's backward uses torch.mm, which splits long sums among threads.
        for name, grad in results[0].grads.items() if cpu_impl.name == "cpp" else ():
            assert torch.equal(bits(grad), bits(other.grads[name])), name
