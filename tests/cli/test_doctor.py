"""``drl-fast doctor`` accepts correct kernels and finds wrong ones."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import metadata
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import drl_fast
from drl_fast.cli import app
from drl_fast.cli.doctor import limit, version, worst_error
from drl_fast.ops import dispatch
from drl_fast.ops.chunked import cdcr as chunked_cdcr
from drl_fast.ops.chunked import token_interaction as chunked
from tests.implementations import Implementation, chunked_on_cpu, on_cpu

pytestmark = pytest.mark.usefixtures("one_thread")
WRONG = "A value is wrong on this device: do not train on it"


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "240")


def doctor() -> Any:
    return CliRunner().invoke(app, ["doctor"])


def test_this_machine_passes() -> None:
    result = doctor()
    assert result.exit_code == 0, result.output
    assert "drl-fast doctor" in result.stdout
    assert f"torch {metadata.version('torch')}" in result.stdout
    assert f"drl-fast {drl_fast.__version__}" in result.stdout
    row = next(line for line in result.stdout.splitlines() if " cpu " in line)
    assert f" {dispatch.implementation('cpu')} " in row
    assert "float32" in row
    assert "bfloat16" in row
    assert WRONG not in result.stdout
    assert result.stdout.splitlines()[-1].startswith("OK: results are right, ")


def test_it_fits_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = doctor().stdout.splitlines()
    assert max(map(len, lines)) <= 80
    # A dtype and its error stay on one line.
    for name in ("float32", "bfloat16", "float16"):
        assert any(re.search(rf"\b{name} \d\.\de-\d\d", line) for line in lines)
    assert lines[-1].startswith("OK: ")


def test_a_missing_package_is_named() -> None:
    assert version("typer") == f"typer {metadata.version('typer')}"
    assert version("no-such-package") == "no no-such-package"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_far_below_the_limit(impl: Implementation, dtype: torch.dtype) -> None:
    assert 0 < worst_error(impl.device, dtype) < limit(dtype) / 3


def forward_with(change: Callable[[Tensor], Tensor]) -> Callable:
    def forward(text: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        logits, *matches = chunked.forward(text, *arguments)
        return change(logits) if text.dtype != torch.float64 else logits, *matches

    return forward


def backward_with(number: int, change: Callable[[Tensor], Tensor]) -> Callable:
    def backward(*arguments: Any) -> tuple[Tensor, ...]:
        grads = list(chunked.backward(*arguments))
        grads[number] = change(grads[number])
        return tuple(grads)

    return backward


def nan(x: Tensor) -> Tensor:
    return x.clone().fill_(torch.nan)


def one_nan(x: Tensor) -> Tensor:
    x = x.clone()
    x.view(-1)[-1:] = torch.nan  # selects nothing if empty: with one direction the video's weights have no gradient
    return x


def off(x: Tensor) -> Tensor:
    return x * 1.1


@pytest.mark.parametrize(
    ("forward", "backward"),
    [
        (forward_with(off), chunked.backward),
        (forward_with(nan), chunked.backward),
        (forward_with(one_nan), chunked.backward),
        *((chunked.forward, backward_with(number, change)) for number in range(4) for change in (off, one_nan)),
    ],
)
def test_a_wrong_kernel_is_found(forward: Callable, backward: Callable) -> None:
    with chunked_on_cpu(forward, backward):
        result = doctor()
    assert result.exit_code == 1
    assert WRONG in result.stdout
    assert result.stdout.splitlines()[-1].startswith("PROBLEM: ")


@pytest.mark.parametrize(("name", "results"), [("statistics", 4), ("correlation", 2), ("gradient", 4)])
def test_a_wrong_decorrelation_is_found(name: str, results: int) -> None:
    """One wrong result of an operator is enough."""
    right = getattr(chunked_cdcr, name)
    for number in range(results):

        def wrong(*arguments: Any, number: int = number) -> tuple[Tensor, ...]:
            found = list(right(*arguments))
            found[number] = found[number] + 1
            return tuple(found)

        with on_cpu({f"cdcr_{name}": wrong}):
            assert worst_error("cpu", torch.float32) > limit(torch.float32), number


def test_wrong_matches_are_found() -> None:
    """The logits are right, but the forward pass returns wrong matches."""

    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        logits, video_index, *others = chunked.forward(*arguments)
        return logits, video_index.flip(1), *others

    with chunked_on_cpu(forward):
        result = doctor()
    assert result.exit_code == 1
    assert WRONG in result.stdout


def test_the_reason_for_a_missing_extension_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "EXTENSION_ERROR", "/a/[/b]/_C.so: undefined symbol")
    result = doctor()
    assert result.exit_code == 0, result.output
    row = next(line for line in result.stdout.splitlines() if " cpu " in line)
    assert " chunked " in row
    assert "no C++ extension: /a/[/b]/_C.so: undefined symbol" in row
    assert "but cpu runs without kernels" in result.stdout.splitlines()[-1]
