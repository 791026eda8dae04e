"""The check of doctor: correct implementations pass, and its problems have no near ties."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from drl_fast.cli import device_check as check
from drl_fast.ops.chunked import token_interaction as chunked
from tests.implementations import Implementation, chunked_on_cpu
from tests.oracle import Problem, choices

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_implementation_passes(impl: Implementation, dtype: torch.dtype) -> None:
    assert check.worst_error(impl.device, dtype) <= check.limit(dtype)


@pytest.mark.parametrize("which", [0, 1])
def test_one_wrong_match_fails(which: int) -> None:
    """Also where the gradients would hide it: bfloat16's rounding moves them more than one match does."""

    def forward(*arguments: Any) -> tuple[torch.Tensor, ...]:
        found = chunked.forward(*arguments)
        matches = found[1 + which]
        if len(matches) and arguments[4 + which] is not None:
            # The first real token's: 0 becomes 1, and 1 becomes 0.
            first = arguments[4 + which][0].nonzero()[0]
            matches[0, first, 0] = matches[0, first, 0] ^ 1
        return found

    with chunked_on_cpu(forward=forward):
        assert check.worst_error("cpu", torch.bfloat16) == torch.inf


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masking", ["drl", "exclude"])
def test_no_near_ties(dtype: torch.dtype, masking: str) -> None:
    """Rounding must not change a match: a correct device would fail the check."""
    for case in check.CASES:
        inputs, _ = check.problem(case, dtype)
        found = choices(Problem(*inputs, {"masking": masking, "normalize": case.normalize}))
        gaps = [found.video_gap, *([found.text_gap] if case.both else [])]
        assert all(float(gap.min()) > 1e-6 for gap in gaps), case


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_near_ties_in_pairs(dtype: torch.dtype) -> None:
    for case in check.PAIR_CASES:
        inputs, _ = check.problem(case, dtype)
        found = choices(Problem(*inputs, {"masking": "exclude", "normalize": case.normalize}))
        own = torch.arange(case.texts)
        assert all(float(gap[own, own].min()) > 1e-6 for gap in (found.video_gap, found.text_gap)), case
