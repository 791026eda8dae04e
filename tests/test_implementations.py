"""The fixture ``impl``: a row computes with the implementation that it names."""

from __future__ import annotations

import pytest
import torch

import drl_fast
from drl_fast.ops import dispatch
from drl_fast.ops.chunked import token_interaction as chunked
from tests.implementations import IMPLEMENTATIONS, chunked_on_cpu, must_exist


def step() -> torch.Tensor:
    text = torch.randn(3, 4, 8, requires_grad=True)
    logits = drl_fast.token_interaction(text, torch.randn(2, 5, 8))
    logits.sum().backward()
    return logits


def test_override_takes_effect_and_is_undone() -> None:
    calls = []

    def forward(*args: object) -> object:
        calls.append("forward")
        return chunked.forward(*args)

    def backward(*args: object) -> object:
        calls.append("backward")
        return chunked.backward(*args)

    step()
    assert calls == []
    for _ in range(2):
        with chunked_on_cpu(forward, backward):
            step()
        assert calls == ["forward", "backward"]
        calls.clear()
        step()
        assert calls == []


def test_override_is_undone_after_an_error() -> None:
    def fail(*args: object) -> object:
        raise ArithmeticError("from the override")

    with pytest.raises(ArithmeticError, match="from the override"), chunked_on_cpu(fail):
        step()
    step()


def test_the_extension_serves_the_cpu_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the extension, CPU tensors never reach chunked PyTorch."""
    if IMPLEMENTATIONS["cpp"].missing():
        pytest.skip(str(dispatch.EXTENSION_ERROR))

    def never(*args: object) -> object:
        raise AssertionError("chunked PyTorch was called")

    monkeypatch.setattr(chunked, "prepare", never)
    step()
    with pytest.raises(AssertionError, match="chunked PyTorch was called"), chunked_on_cpu():
        step()


def test_ci_does_not_skip_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    assert must_exist("cpp")
    assert not must_exist("cuda")
    monkeypatch.delenv("CI")
    assert not must_exist("cpp")


def test_implementation_names() -> None:
    assert dispatch.implementation("cpu") == ("chunked" if dispatch.EXTENSION_ERROR else "cpp")
    assert dispatch.implementation("meta") == "chunked"
