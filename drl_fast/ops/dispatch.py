"""The operator library, and the only place that decides which implementation serves a device.

CPU tensors use the C++ extension if it is built, CUDA tensors the Triton kernels if they support the tensor. Everything
else uses chunked PyTorch.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from .. import autocast

Operator = TypeVar("Operator", bound=Callable[..., Any])

LIBRARY = torch.library.Library("drl_fast", "DEF")
LIBRARY.define("cpu_capability() -> str")


def _load_extension() -> str | None:
    """Load the C++ kernels; return None, or why they are missing."""
    try:
        importlib.import_module("drl_fast._C")  # registers the CPU kernels
    except ImportError as error:
        return str(error)
    return None


EXTENSION_ERROR = _load_extension()
if EXTENSION_ERROR is not None:
    warnings.warn(
        "drl_fast: the C++ extension is not available, so CPU tensors run on the slower chunked PyTorch path "
        f"({EXTENSION_ERROR}). Install a wheel, or build with a C++20 compiler: pip install --no-build-isolation -e .",
        RuntimeWarning,
        stacklevel=2,
    )


# The implementation that drl_fast.backend forces; see backend.py.
forced = "auto"

# Ampere: the first with bfloat16 tensor cores and asynchronous copies.
OLDEST_CAPABILITY = (8, 0)


def triton_problem(device: torch.device | str) -> str | None:
    """Return why the Triton kernels cannot serve a CUDA device, or None; import no Triton and launch no kernel."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {'.'.join(map(str, capability))} and the kernels need 8.0"
    return None


@functools.cache
def _triton_works(device: torch.device) -> bool:
    problem = triton_problem(device)
    if problem is not None:
        warnings.warn(
            "drl_fast: the Triton kernels are not available, so CUDA tensors run on the slower chunked PyTorch path "
            f"({problem}). Results are the same.",
            RuntimeWarning,
            stacklevel=2,
        )
    return problem is None


def triton_serves(x: Tensor) -> bool:
    """Say whether the Triton kernels serve this tensor; warn once per CUDA device that they cannot serve."""
    if x.dtype == torch.float64 or forced == "torch":
        return False
    # CPU tensors reach this only under Triton's interpreter, in tests.
    return _triton_works(x.device) if x.is_cuda else True


def triton_or(chunked: Callable[..., Any]) -> Callable[[Operator], Operator]:
    """Decorate a function that launches an operator's Triton kernels, with ``chunked`` as its fallback.

    ``chunked`` serves float64, GPUs older than :data:`OLDEST_CAPABILITY`, and installations without Triton. The first
    argument must be one of the operator's tensors: its device and dtype decide.
    """

    def decorate(launch: Operator) -> Operator:
        @functools.wraps(launch)
        def serve(x: Tensor, *others: Any) -> Any:
            served = triton_serves(x)
            if (forced == "triton" and not served) or (forced == "cpp" and x.is_cuda):
                raise RuntimeError(
                    f"backend {forced!r} does not serve this {x.dtype} tensor on {x.device}; use backend 'auto', or "
                    "see drl-fast doctor"
                )
            if not served:
                return chunked(x, *others)
            # Triton launches on the current device. The launchers' torch operations must not run under autocast.
            with torch.cuda.device(x.device) if x.is_cuda else nullcontext(), autocast.off(x.device.type):
                return launch(x, *others)

        return cast(Operator, serve)

    return decorate


def implementation(device: str) -> str:
    """Name the implementation for tensors on ``device``: ``"cpp"``, ``"triton"`` or ``"chunked"``."""
    if forced == "torch":
        return "chunked"
    if device == "cpu" and EXTENSION_ERROR is None:
        return "cpp"
    if device.startswith("cuda") and torch.cuda.is_available() and triton_problem(device) is None:
        return "triton"
    return "chunked"


def cpu_capability() -> str | None:
    """Name the instruction set of the C++ kernels: "avx512", "avx2" or "portable"; None without the extension."""
    return torch.ops.drl_fast.cpu_capability() if EXTENSION_ERROR is None else None
