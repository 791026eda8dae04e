"""Random shapes, masks, dtypes, strides and options against the float64 reference.

`make test` runs a short, fixed part; `make fuzz` (DRL_FAST_FUZZ=1) a long one, different each time.
"""

from __future__ import annotations

import os
from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

import drl_fast
from tests.implementations import Implementation
from tests.ops import test_soft_token_interaction as soft
from tests.oracle import NEAR, Problem, choices, judge, make, probe_for, term_sizes

LONG = os.environ.get("DRL_FAST_FUZZ") == "1"
FUZZ = settings(
    max_examples=3000 if LONG else 60,
    # The short part is the same every time, so that a failure is due to the change.
    derandomize=not LONG,
    deadline=None,
    # The fixture only selects an implementation, so all examples can share it.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)

LENGTH = st.one_of(st.integers(1, 20), st.sampled_from([31, 32, 33, 64, 100]), st.sampled_from([255, 256, 257, 300]))
ROWS = st.one_of(st.integers(0, 12), st.sampled_from([31, 64, 65]))
# One channel is drawn often: there sums cancel, and a gradient has no larger entries that would hide its error.
DIM = st.one_of(st.just(1), st.integers(1, 40), st.sampled_from([63, 64, 65, 128, 257, 512]))
MASK = st.sampled_from([None, "prefix", "holes", "empty"])
LAYOUT = st.sampled_from(["contiguous", "rows apart", "transposed", "channels first", "offset", "reversed batch"])
# Limit of the elements of the dense similarities in the reference.
BUDGET = 400_000


def lay_out(x: Tensor, layout: str) -> Tensor:
    """Copy a tensor into another memory layout."""
    if layout == "rows apart":
        return torch.stack([x, torch.full_like(x, 7)], dim=1)[:, 0]
    if layout == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "channels first":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "offset":
        return torch.cat([x.flatten()[:0], x.new_ones(3), x.flatten()])[3:].view(x.shape)
    if layout == "reversed batch":
        return x.flip(0)
    return x


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    a, nt, b, nv = draw(ROWS), draw(LENGTH), draw(ROWS), draw(LENGTH)
    while a * nt * b * nv > BUDGET:
        a, b = (a // 2, b) if a > b else (a, b // 2)
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    options: dict[str, Any] = {
        "masking": draw(st.sampled_from(["drl", "exclude", "none"])),
        "normalize": draw(st.booleans()),
        "bidirectional": draw(st.booleans()),
    }
    problem = make(
        (a, nt, b, nv),
        draw(DIM),
        dtype,
        masks=(draw(MASK), draw(MASK)),
        mask_dtype=draw(st.sampled_from([torch.bool, torch.int64, torch.float32, torch.uint8])),
        weights=draw(st.sampled_from([None, torch.float16, torch.float32, torch.float64])),
        seed=draw(st.integers(0, 2**31)),
        **options,
    )
    if draw(st.booleans()):
        problem.text[:, draw(st.integers(0, nt - 1))] = 0
    scale = draw(st.sampled_from([1.0, 2.0**-6, 2.0**6]))
    problem.video = problem.video * scale
    layout = draw(LAYOUT)
    return problem.map(lambda x: lay_out(x, layout))


@FUZZ
@given(problem=problems())
def test_against_the_oracle(impl: Implementation, problem: Problem) -> None:
    probe = probe_for(problem)
    result = judge(problem, impl.device, probe=probe, floor=1e-3, floors=term_sizes(problem, probe))
    assert bool(result.logits.isfinite().all())


@FUZZ
@given(problem=problems())
def test_matches_against_the_oracle(impl: Implementation, problem: Problem) -> None:
    args = problem.map(lambda x: x.to(impl.device)).args()
    _, found = drl_fast.token_interaction(*args, **problem.options, return_matches=True)
    want = choices(problem)
    # Without normalisation, similarities and their rounding errors grow with the features.
    largest = float(problem.video.double().abs().max()) if problem.video.numel() else 0.0
    near = NEAR[problem.text.dtype] * (1.0 if problem.options["normalize"] else max(1.0, 40 * largest))
    assert bool(((found.video_index.cpu() == want.video_index) | (want.video_gap < near)).all())
    if problem.options["bidirectional"]:
        assert bool(((found.text_index.cpu() == want.text_index) | (want.text_gap < near)).all())


@FUZZ
@given(problem=problems(), seed=st.integers(0, 2**31))
def test_buffers_refilled_before_the_backward(cpu_impl: Implementation, problem: Problem, seed: int) -> None:
    """Masks and weights in NumPy's memory, which a loader fills with its next batch: gradients stay those of this one.

    A backward that trusts them reads out of bounds, which ends this process.
    """
    torch.manual_seed(seed)
    found = []
    for refill in (False, True):
        p = problem.map(lambda x: x if x.dtype == torch.bfloat16 else torch.from_numpy(x.numpy().copy()))
        p.text, p.video = (x.detach().clone().requires_grad_() for x in (p.text, p.video))
        logits = drl_fast.token_interaction(*p.args(), **p.options)
        for x in p.args()[2:] if refill else ():
            if x is not None:
                x.numpy()[...] = (torch.randn(x.shape) * 2).to(x.dtype).numpy()
        found.append(torch.autograd.grad(logits.sum(), (p.text, p.video)))
    for want, got in zip(*found, strict=True):
        assert torch.equal(got.nan_to_num(7), want.nan_to_num(7))


@settings(FUZZ, max_examples=3000 if LONG else 12)
@given(problem=problems(), pooling=st.sampled_from(soft.POOLINGS), temperature=st.sampled_from([0.05, 0.5, 3.0]))
def test_soft_pooling_against_the_oracle(
    impl: Implementation, problem: Problem, pooling: str, temperature: float
) -> None:
    problem.options |= {"pooling": pooling, "temperature": temperature}
    largest = float(problem.video.double().abs().max()) if problem.video.numel() else 1.0
    # Rounding of raw similarities is amplified by 1 / temperature in every probability.
    raw = 1.0 if problem.options["normalize"] else max(1.0, 40 * largest)
    result = soft.judge(problem, impl.device, floor=raw / min(temperature, 1.0))
    assert bool(result.logits.isfinite().all())
