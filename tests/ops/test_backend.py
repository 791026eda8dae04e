"""The switch that forces one implementation."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import drl_fast
from drl_fast.ops import backend, dispatch
from drl_fast.ops.chunked import token_interaction as chunked
from tests.conftest import use

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="other registrations are active")
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the calls of chunked PyTorch's forward and backward."""
    found = []
    prepare = chunked.prepare
    monkeypatch.setattr(chunked, "prepare", lambda *x: found.append("prepare") or prepare(*x))
    return found


def step() -> list[Tensor]:
    torch.manual_seed(0)
    text, video = torch.randn(3, 4, 8, requires_grad=True), torch.randn(5, 6, 8)
    logits = drl_fast.token_interaction(text, video)
    return [logits.detach(), *torch.autograd.grad(logits.sum(), text)]


def test_torch_serves_both_passes(calls: list[str]) -> None:
    with use("cpp"):
        before = step()
        assert calls == []
        with drl_fast.backend("torch"):
            assert dispatch.implementation("cpu") == "chunked"
            inside = step()
        assert len(calls) == 4  # two sides in two passes
        assert dispatch.implementation("cpu") == "cpp"
        after = step()
        assert len(calls) == 4
    for x, y, z in zip(before, inside, after, strict=True):
        torch.testing.assert_close(x, y)
        assert torch.equal(x, z)


def test_blocks_nest_and_end_with_an_error(calls: list[str]) -> None:

    def nested() -> None:
        with drl_fast.backend("torch"):
            for inner in ("cpp", "auto"):
                with drl_fast.backend(inner):
                    step()
                    assert calls == []
            step()
            assert len(calls) == 4
            raise KeyError

    with use("cpp"), pytest.raises(KeyError):
        nested()
    assert dispatch.forced == "auto"
    step()
    assert len(calls) == 4


def test_overlapping_blocks(calls: list[str]) -> None:
    """As in two threads: the first block ends before the second."""
    first, second = drl_fast.backend("torch"), drl_fast.backend("cpp")
    with use("cpp"):
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert dispatch.forced == "cpp"
        second.__exit__(None, None, None)
        assert dispatch.forced == "auto"
        step()
    assert calls == []


def test_every_operator_is_switched(monkeypatch: pytest.MonkeyPatch) -> None:
    called = set()
    for name, function in backend.CHUNKED.items():

        def record(*x: object, name: str = name, function: Callable[..., object] = function) -> object:
            called.add(name)
            return function(*x)

        monkeypatch.setitem(backend.CHUNKED, name, record)
    torch.manual_seed(0)
    text, video = torch.randn(4, 9, 16, requires_grad=True), torch.randn(4, 5, 16)
    with use("cpp"):
        prepared = drl_fast.prepare(video)
    with drl_fast.backend("torch"):
        drl_fast.prepare(video)
        drl_fast.token_interaction(text, prepared)
        drl_fast.token_interaction(text, prepared, pooling="softmax")
        drl_fast.token_interaction(text, video).sum().backward()
        drl_fast.token_interaction(text, video, pooling="softmax").sum().backward()
        drl_fast.rerank(text, video[:, None]).sum().backward()
        drl_fast.cdcr_loss(text, video, alpha_on=0.1, alpha_off=0.1).backward()
    assert called == set(backend.CHUNKED)


def test_compiled_functions_follow(calls: list[str]) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(drl_fast.token_interaction, fullgraph=True, backend="aot_eager")
    text, video = torch.randn(3, 4, 8), torch.randn(5, 6, 8)
    with use("cpp"):
        want = compiled(text, video)
        calls.clear()
        with drl_fast.backend("torch"):
            torch.testing.assert_close(compiled(text, video), want)
        assert calls
    torch._dynamo.reset()


def test_unknown_name() -> None:
    with (
        pytest.raises(ValueError, match="backend must be one of 'auto', 'torch', 'cpp', 'triton', got 'cuda'"),
        drl_fast.backend("cuda"),
    ):
        pass


def test_missing_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "EXTENSION_ERROR", "no such file")
    with (
        pytest.raises(RuntimeError, match=r"backend 'cpp' needs the C\+\+ extension.*no such file.*pip install"),
        drl_fast.backend("cpp"),
    ):
        pass
    assert dispatch.forced == "auto"


@NO_GPU
def test_triton_without_a_gpu() -> None:
    with (
        pytest.raises(RuntimeError, match=r"backend 'triton' needs a CUDA device.*TRITON_INTERPRET=1"),
        drl_fast.backend("triton"),
    ):
        pass


def test_triton_refuses_cpu_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with drl_fast.backend("triton"), pytest.raises(RuntimeError, match=r"serves CUDA tensors, got one on the CPU"):
        step()
    assert len(step()) == 2


def run(script: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_environment_variable() -> None:
    script = (
        "import drl_fast; from drl_fast.ops import dispatch; print(dispatch.forced, dispatch.implementation('cpu'))"
    )
    assert run(script, DRL_FAST_BACKEND="torch").stdout.split() == ["torch", "chunked"]
    wrong = run(script, DRL_FAST_BACKEND="fast")
    assert wrong.returncode == 1
    assert "ValueError: DRL_FAST_BACKEND must be one of 'auto', 'torch', 'cpp', 'triton', got 'fast'" in wrong.stderr


def test_an_empty_variable_is_not_set() -> None:
    script = "from drl_fast.ops import dispatch; print(dispatch.forced)"
    assert run(script, DRL_FAST_BACKEND="").stdout.split() == ["auto"]


def doctor(**environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "drl_fast.cli", "doctor"],
        env={**os.environ, "COLUMNS": "160", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_line_reports_a_wrong_variable_in_one_line() -> None:
    done = doctor(DRL_FAST_BACKEND="fast")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: DRL_FAST_BACKEND must be one of 'auto', 'torch', 'cpp', 'triton', got 'fast'; unset it"
    ]


@NO_GPU
def test_doctor_passes_nothing_that_it_did_not_check() -> None:
    done = doctor(DRL_FAST_BACKEND="triton", TRITON_INTERPRET="1")
    assert done.returncode == 1, done.stderr
    assert "NOTHING CHECKED: no device here runs with DRL_FAST_BACKEND=triton; unset it." in done.stdout
    assert "OK" not in done.stdout


def test_interpreter_serves_cpu_tensors() -> None:
    """In the block and, forced by the variable, in both passes."""
    pytest.importorskip("triton")
    script = (
        "import torch, drl_fast\n"
        "x = torch.randn(2, 3, 16, requires_grad=True)\n"
        "y = drl_fast.token_interaction(x, x)\n"
        "y.sum().backward()\n"
        "g, x.grad = x.grad, None\n"
        "with drl_fast.backend('torch'):\n"
        "    z = drl_fast.token_interaction(x, x)\n"
        "    z.sum().backward()\n"
        "torch.testing.assert_close(y, z, atol=1e-5, rtol=0)\n"
        "torch.testing.assert_close(g, x.grad, atol=1e-5, rtol=0)\n"
        "import sys; print('drl_fast.kernels.token_interaction_backward' in sys.modules)\n"
    )
    done = run(script, DRL_FAST_BACKEND="triton", TRITON_INTERPRET="1")
    assert done.stdout.strip() == "True", done.stderr


def test_doctor_shows_it() -> None:
    done = doctor(DRL_FAST_BACKEND="torch")
    assert done.returncode == 0, done.stderr
    assert "DRL_FAST_BACKEND=torch forces one implementation." in done.stdout
    assert "chunked" in done.stdout
