"""The implementations of the operators. Tests run their cases through each, by the public functions.

A row has the device of its tensors, how to make the implementation serve them, and why it may be missing. Triton's
interpreter must be chosen before the kernels are imported. With TRITON_INTERPRET=1 its row is the only one;
tests/kernels/test_interpreter.py starts such a process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

from drl_fast.ops import dispatch, gpu
from drl_fast.ops.backend import CHUNKED
from drl_fast.ops.chunked import token_interaction as chunked

GPU = {name: getattr(gpu, name) for name in CHUNKED}


@dataclass(frozen=True)
class Implementation:
    """One way to compute the operators."""

    name: str
    device: str
    install: Callable[[], AbstractContextManager[object]]
    missing: Callable[[], str | None]


@contextmanager
def on_cpu(operators: dict[str, Callable]) -> Iterator[None]:
    """Replace the C++ extension's operators for CPU tensors in a ``with`` block."""
    # At the end of the scope the registration is undone, and the extension serves again.
    with torch.library._scoped_library("drl_fast", "IMPL") as library:
        for name, function in operators.items():
            library.impl(name, function, "CPU", allow_override=True)
        yield


def chunked_on_cpu(
    forward: Callable = chunked.forward, backward: Callable = chunked.backward
) -> AbstractContextManager[None]:
    return on_cpu({**CHUNKED, "token_interaction": forward, "token_interaction_backward": backward})


def _no_gpu() -> str | None:
    return None if torch.cuda.is_available() else "no CUDA device"


IMPLEMENTATIONS = {
    row.name: row
    for row in (
        Implementation("cpp", "cpu", nullcontext, lambda: dispatch.EXTENSION_ERROR),
        Implementation("chunked", "cpu", chunked_on_cpu, lambda: None),
        Implementation("cuda", "cuda", nullcontext, _no_gpu),
    )
}


if os.environ.get("TRITON_INTERPRET") == "1":
    interpreter = Implementation("interpreter", "cpu", lambda: on_cpu(GPU), lambda: None)
    IMPLEMENTATIONS = {interpreter.name: interpreter}


def must_exist(name: str) -> bool:
    """Say whether a missing implementation is a failure: CI builds the extension, so there it is."""
    return name == "cpp" and os.environ.get("CI", "").lower() in ("1", "true")
