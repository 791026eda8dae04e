"""The switch that forces one implementation, for debugging.

Implementations are registered with torch's dispatcher. For CPU tensors the switch registers another one on top and
removes it afterwards; for CUDA tensors the functions of :mod:`.gpu` ask :data:`.dispatch.forced`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from .. import validation
from . import cdcr, dispatch, gpu
from .chunked import prepared as chunked_prepared
from .chunked import rerank as chunked_rerank
from .chunked import soft_token_interaction as chunked_soft
from .chunked import token_interaction as chunked

CHUNKED: dict[str, Callable[..., Any]] = {
    "token_interaction": chunked.forward,
    "token_interaction_backward": chunked.backward,
    "soft_token_interaction": chunked_soft.forward,
    "soft_token_interaction_backward": chunked_soft.backward,
    **chunked_prepared.CHUNKED,
    "rerank": chunked_rerank.forward,
    "rerank_backward": chunked_rerank.backward,
    **cdcr.CHUNKED,
}
BACKENDS = ("auto", "torch", "cpp", "triton")
VARIABLE = "DRL_FAST_BACKEND"

# The registration for CPU tensors that is on top of the extension's.
_on_cpu = ExitStack()
# The environment's choice, then that of every block that has not ended; the last one holds.
_active: dict[object, str] = {None: "auto"}
_lock = threading.Lock()


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force one implementation of all operators in a ``with`` block, for debugging and comparisons.

    >>> with drl_fast.backend("torch"):
    ...     logits = drl_fast.token_interaction(text, video)

    It holds for the whole process, all threads included, and also for backward passes that run in the block. If blocks
    overlap, the one that started last holds. The environment variable ``DRL_FAST_BACKEND`` sets it from the start.
    ``drl-fast doctor`` shows it. A call outside of ``with`` changes nothing.

    Args:
        name: ``"auto"``: the best for each tensor. ``"torch"``: chunked PyTorch, on every device. ``"cpp"``: the C++
            extension. ``"triton"``: the Triton kernels; with ``TRITON_INTERPRET=1`` Triton's interpreter, on CPU
            tensors.

    Raises:
        ValueError: an unknown name.
        RuntimeError: at the start, an implementation that is missing here; in the block, a CPU or CUDA tensor that
            ``"cpp"`` or ``"triton"`` does not serve. Neither falls back to another.
    """
    validation.option("backend", name, BACKENDS)
    block = object()
    with _lock:
        _force(name)
        _active[block] = name
    try:
        yield
    finally:
        with _lock:
            # Blocks of several threads may end in any order.
            del _active[block]
            _force(next(reversed(_active.values())))


def _force(name: str) -> None:
    interpreter = os.environ.get("TRITON_INTERPRET") == "1"
    if name == "cpp" and dispatch.EXTENSION_ERROR is not None:
        raise RuntimeError(
            f"backend 'cpp' needs the C++ extension, which is not available ({dispatch.EXTENSION_ERROR}); install a "
            "wheel, or build it with: pip install --no-build-isolation -e ."
        )
    if name == "triton" and not interpreter and not torch.cuda.is_available():
        raise RuntimeError(
            "backend 'triton' needs a CUDA device, and torch sees none; set TRITON_INTERPRET=1 before Python starts to "
            "run the kernels in Triton's interpreter"
        )
    _on_cpu.close()
    dispatch.forced = name
    if name in ("torch", "triton"):
        # The extension's kernels serve again once this scope is closed.
        library = _on_cpu.enter_context(torch.library._scoped_library("drl_fast", "IMPL"))
        for operator, chunked_operator in CHUNKED.items():
            launch = getattr(gpu, operator) if interpreter else _no_cpu_tensors
            library.impl(operator, chunked_operator if name == "torch" else launch, "CPU", allow_override=True)


def _no_cpu_tensors(*_: object) -> None:
    raise RuntimeError("backend 'triton' serves CUDA tensors, got one on the CPU; move it, or use backend 'auto'")


def force_from_environment() -> None:
    """Apply ``DRL_FAST_BACKEND``, if it is set and not empty.

    Raises:
        ValueError, RuntimeError: as :func:`backend`, with the variable's name.
    """
    name = os.environ.get(VARIABLE) or "auto"
    if name not in BACKENDS:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}; unset it")
    if name != "auto":
        try:
            _force(name)
        except RuntimeError as error:
            raise RuntimeError(f"{VARIABLE}={name}: {error}") from None
        _active[None] = name
