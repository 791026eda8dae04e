"""The doctor's value check: right implementations pass, wrong ones do not, and its problems leave no room for luck."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from drl_fast.cli import _device_check as check
from drl_fast.cli import app
from drl_fast.ops.chunked import token_interaction as chunked
from tests.implementations import IMPLEMENTATIONS, Implementation, chunked_on_cpu
from tests.oracle import Problem, choices

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_implementation_passes(impl: Implementation, dtype: torch.dtype) -> None:
    assert check.worst_error(impl.device, dtype) <= check.limit(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masking", ["drl", "exclude"])
def test_no_near_ties(dtype: torch.dtype, masking: str) -> None:
    """Rounding may not choose another match, or a right device would be called wrong."""
    for case in check.CASES:
        inputs, _ = check.problem(case, dtype)
        found = choices(Problem(*inputs, {"masking": masking, "normalize": case.normalize}))
        gaps = [found.video_gap, *([found.text_gap] if case.both else [])]
        assert all(float(gap.min()) > 1e-6 for gap in gaps), case


@pytest.mark.parametrize("what", ["logits", "gradient", "matches"])
def test_a_wrong_value_is_found(what: str) -> None:
    """One number of one case, off by a little more than rounding, or one match."""

    def forward(*args: Tensor) -> tuple[Tensor, ...]:
        logits, by_word, by_frame = chunked.forward(*args)
        if what == "logits":
            logits[2, 1] *= 1.01
        if what == "matches":
            by_word[by_word != 255] = 0
        return logits, by_word, by_frame

    def backward(*args: Tensor) -> tuple[Tensor, ...]:
        grads = chunked.backward(*args)
        if what == "gradient":
            grads[0].view(-1)[grads[0].abs().argmax()] *= 1.01
        return grads

    if "interpreter" in IMPLEMENTATIONS:
        pytest.skip("says nothing about the interpreter")
    with chunked_on_cpu(forward, backward):
        assert check.worst_error("cpu", torch.float32) > check.limit(torch.float32)
        done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 1
    assert "A value is wrong on this device" in done.output


def test_doctor_names_what_serves() -> None:
    if "interpreter" in IMPLEMENTATIONS:
        pytest.skip("says nothing about the interpreter")
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 0, done.output
    for word in ("cpu", "cuda", "torch", "triton"):
        assert word in done.output
