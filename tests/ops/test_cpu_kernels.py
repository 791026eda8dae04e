"""The C++ kernels of every instruction set, and their checks of arguments that public functions never pass."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from drl_fast.ops import dispatch
from tests.conftest import use
from tests.implementations import Implementation

ROOT = Path(__file__).parents[2]
# The tests that compare the kernels' values, masks and matches with the reference and with recorded results.
SUITES = (
    "tests/ops/test_fuzz.py",
    "tests/ops/test_token_interaction.py",
    "tests/ops/test_token_interaction_masks.py",
    "tests/ops/test_token_interaction_matches.py",
    "tests/ops/test_token_interaction_bits.py",
    "tests/ops/test_soft_token_interaction.py",
    "tests/ops/test_prepared.py",
    "tests/ops/test_cdcr.py",
    "tests/test_golden.py",
)


@pytest.fixture(autouse=True)
def extension() -> Implementation:
    with use("cpp") as row:
        yield row


@pytest.mark.parametrize(("limit", "name"), [("avx2", "avx2"), ("default", "portable")])
def test_smaller_instruction_sets(limit: str, name: str) -> None:
    """In a separate process, because kernels are chosen once per process."""
    if dispatch.cpu_capability() == "portable" or (name == "avx2" and dispatch.cpu_capability() != "avx512"):
        pytest.skip(f"all other tests use this CPU's best kernels, {dispatch.cpu_capability()}")
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": limit, "DRL_FAST_FUZZ": "0"}
    ask = "from drl_fast.ops import dispatch; print(dispatch.cpu_capability())"
    asked = subprocess.run([sys.executable, "-c", ask], env=environment, capture_output=True, text=True, check=True)
    assert asked.stdout.strip() == name
    # Schemas and traces are the same for every instruction set.
    chosen = "cpp and not opcheck and not compiled"
    run = [sys.executable, "-m", "pytest", "-q", "-x", "-k", chosen, "-p", "no:cacheprovider", *SUITES]
    done = subprocess.run(run, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


FORWARD = {
    "text": torch.zeros(4, 3, 8),
    "video": torch.zeros(2, 5, 8),
    "text_weight": torch.ones(4, 3),
    "video_weight": torch.ones(2, 5),
    "text_mask": torch.ones(4, 3, dtype=torch.bool),
    "video_mask": None,
    "normalize": True,
    "zero_competes": True,
    "keep_matches": True,
}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("video", torch.zeros(2, 5, 9), "one D"),
        ("video", torch.zeros(2, 5, 8).half(), "one dtype"),
        ("video", torch.zeros(2, 8), r"features must be \(rows, tokens, D\)"),
        ("text", torch.zeros(4, 3, 8).long(), "features must be float32"),
        ("text_mask", torch.ones(2, 2, dtype=torch.bool), r"masks must be bool \(rows, tokens\)"),
        ("text_mask", torch.ones(4, 3), "masks must be bool"),
        ("video_weight", torch.ones(2, 4), r"weights must be \(rows, tokens\)"),
        ("text_weight", torch.ones(4, 3).double(), "weights must be .*float32"),
    ],
)
def test_the_operator_reads_nothing_beyond_its_arguments(name: str, value: torch.Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.drl_fast.token_interaction(*{**FORWARD, name: value}.values())


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.zeros(4, 3), r"grad_logits must be \(A, B\)"),
        (0, torch.zeros(4, 2).double(), "grad_logits must be"),
        (
            7,
            torch.empty(0, dtype=torch.uint8),
            "forward kept; the CPU kernel does not recompute them.*keep_matches=True",
        ),
        (7, torch.zeros(4, 3, 2, dtype=torch.int16), "matches must be those"),
        (8, torch.zeros(4, 4, 2, dtype=torch.uint8), "matches must be those"),
        (13, [True] * 3, "output_mask must be four bools"),
    ],
)
def test_the_backward_reads_nothing_beyond_its_arguments(place: int, value: object, message: str) -> None:
    _, *kept = torch.ops.drl_fast.token_interaction(*FORWARD.values())
    arguments = [torch.zeros(4, 2), *list(FORWARD.values())[:6], *kept, True, True, [True] * 4]
    arguments[place] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.drl_fast.token_interaction_backward(*arguments)


@pytest.mark.parametrize("side", [0, 1])
def test_the_gradient_of_a_weight_needs_only_its_own_matches(side: int) -> None:
    """A token's gradient also needs the tokens that chose it; these matches are checked where they are read."""
    _, *matches = torch.ops.drl_fast.token_interaction(*FORWARD.values())
    matches[1 - side].fill_(9)  # beyond every row

    def backward(gradient: int) -> tuple[torch.Tensor, ...]:
        wanted = [i == gradient for i in range(4)]
        arguments = [torch.ones(4, 2), *list(FORWARD.values())[:6], *matches, True, True, wanted]
        return torch.ops.drl_fast.token_interaction_backward(*arguments)

    backward(2 + side)
    with pytest.raises(RuntimeError, match="a match names a token that is masked or beyond its row"):
        backward(side)


def test_token_interaction_without_channels() -> None:
    """With D = 0 every similarity is 0. The kernels once read uninitialized scores and divided by zero."""
    inputs = {**FORWARD, "text": torch.zeros(4, 3, 0), "video": torch.zeros(2, 5, 0)}
    logits, *kept = torch.ops.drl_fast.token_interaction(*inputs.values())
    assert (logits == 0).all()
    arguments = [torch.ones(4, 2), *list(inputs.values())[:6], *kept, True, True, [True] * 4]
    text, video, *weights = torch.ops.drl_fast.token_interaction_backward(*arguments)
    assert (text.shape, video.shape) == ((4, 3, 0), (2, 5, 0))
    assert all((weight == 0).all() for weight in weights)


SOFT = {**{name: FORWARD[name] for name in list(FORWARD)[:8]}, "logsumexp": True, "temperature": 0.5}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("video", torch.zeros(2, 5, 9), "one D"),
        ("video", torch.zeros(2, 5, 8).half(), "one dtype"),
        ("text_mask", torch.ones(2, 2, dtype=torch.bool), r"masks must be bool \(rows, tokens\)"),
        ("video_weight", torch.ones(2, 4), r"weights must be \(rows, tokens\)"),
        ("temperature", 0.0, "temperature must be positive"),
        ("temperature", float("nan"), "temperature must be positive"),
    ],
)
def test_soft_pooling_reads_nothing_beyond_its_arguments(name: str, value: object, message: str) -> None:
    arguments = list({**SOFT, name: value}.values())
    with pytest.raises(RuntimeError, match=message):
        torch.ops.drl_fast.soft_token_interaction(*arguments)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.drl_fast.soft_token_interaction_backward(torch.zeros(4, 2), *arguments, [True] * 4)


@pytest.mark.parametrize(
    ("grad", "wanted", "message"),
    [
        (torch.zeros(4, 3), [True] * 4, r"grad_logits must be \(A, B\)"),
        (torch.zeros(4, 2).double(), [True] * 4, "grad_logits must be"),
        (torch.zeros(4, 2), [True] * 3, "output_mask must be four bools"),
    ],
)
def test_soft_pooling_checks_its_gradient(grad: torch.Tensor, wanted: list[bool], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.drl_fast.soft_token_interaction_backward(grad, *SOFT.values(), wanted)


SIDES = {"text": torch.randn(4, 3, 8), "video": torch.randn(4, 5, 8)}
PAIRS = {
    **SIDES,
    "text_weight": torch.ones(4, 3),
    "video_weight": torch.ones(4, 5),
    "video_index": torch.zeros(4, 3, dtype=torch.int16),
    "text_index": torch.zeros(4, 5, dtype=torch.int16),
    "channels": torch.ones(2, 4, 8, dtype=torch.float64),
    "normalize": True,
    "full": True,
}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("video", torch.randn(3, 5, 8), "as many rows"),
        ("video", torch.randn(4, 5, 9), "one D"),
        ("text_weight", torch.ones(4, 2), r"weights must be \(B, tokens\)"),
        ("text_weight", torch.ones(4, 3).double(), "weights must be .*float32"),
        ("video_index", torch.zeros(4, 3), "partners must be .* int16"),
        ("text_index", torch.zeros(4, 4, dtype=torch.int16), "partners must be"),
        ("video_index", torch.full((4, 3), 5, dtype=torch.int16), "a partner lies beyond its row"),
        ("channels", torch.ones(2, 4, 7, dtype=torch.float64), r"channels must be \(kinds, roles, D\)"),
        ("channels", torch.ones(2, 4, 8), "channels must be .*float64"),
    ],
)
def test_cdcr_reads_nothing_beyond_its_arguments(name: str, value: torch.Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.drl_fast.cdcr_correlation(*{**PAIRS, name: value}.values())


@pytest.mark.parametrize("empty", ["tokens", "channels"])
@pytest.mark.parametrize("full", [True, False])
def test_cdcr_without_tokens_or_channels(empty: str, full: bool) -> None:
    tokens, dim = (0, 8) if empty == "tokens" else (3, 0)
    sides = [torch.zeros(4, tokens, dim), torch.zeros(4, tokens, dim)]
    index = [torch.full((4, tokens), -1, dtype=torch.int16)] * 2
    weights, channels = [torch.ones(4, tokens)] * 2, torch.zeros(2, 4, dim, dtype=torch.float64)
    cross, _ = torch.ops.drl_fast.cdcr_correlation(*sides, *weights, *index, channels, True, full)
    assert cross.shape == ((2, dim, dim) if full else (2, dim))
    assert (cross == 0).all()


def test_cdcr_gradient_reads_nothing_beyond_its_pull() -> None:
    arguments = [*list(PAIRS.values())[:6], torch.ones(4, 4, 8, dtype=torch.float64)]
    for pull in (torch.ones(7), torch.ones(8, 7), torch.ones(8).double()):
        with pytest.raises(RuntimeError, match=r"pull must be \(D,\) or \(D, D\)"):
            torch.ops.drl_fast.cdcr_gradient(*arguments, pull, True)
