"""The operator library, and the one place that knows which implementation serves a device.

CPU tensors go to the C++ extension where it is built, CUDA tensors to the Triton kernels where those serve; every other
device, and what is left of these two, goes to chunked PyTorch.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import autocast

Operator = Callable[..., tuple[Tensor, ...]]

LIBRARY = torch.library.Library("drl_fast", "DEF")
LIBRARY.define("cpu_capability() -> str")


def _load_extension() -> str | None:
    """Load csrc's kernels; return why they are absent, or None."""
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


# The first with bfloat16 on the tensor cores and asynchronous copies.
OLDEST_CAPABILITY = (8, 0)


def triton_problem(device: torch.device | str) -> str | None:
    """Why the Triton kernels do not serve tensors on a CUDA device, or None; starts no kernel and imports no Triton."""
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
    """Whether the Triton kernels compute on this tensor; warns once a device where they ought to and cannot."""
    if x.dtype == torch.float64:
        return False
    # A CPU tensor comes here in Triton's interpreter alone.
    return _triton_works(x.device) if x.is_cuda else True


def triton_or(chunked: Operator) -> Callable[[Operator], Operator]:
    """Decorate a function that launches an operator's Triton kernels; ``chunked`` runs where they do not serve.

    That is float64, a GPU older than :data:`OLDEST_CAPABILITY`, and an installation without Triton. The first argument
    decides: it must be one of the operator's tensors.
    """

    def decorate(launch: Operator) -> Operator:
        @functools.wraps(launch)
        def serve(x: Tensor, *others: Any) -> tuple[Tensor, ...]:
            if not triton_serves(x):
                return chunked(x, *others)
            # Triton launches on the current device, and autocast must not touch what the launchers compute.
            with torch.cuda.device(x.device) if x.is_cuda else nullcontext(), autocast.off(x.device.type):
                return launch(x, *others)

        return serve

    return decorate


def implementation(device: str) -> str:
    """Name what serves tensors on ``device``: ``"cpp"``, ``"triton"`` or ``"chunked"``."""
    if device == "cpu" and EXTENSION_ERROR is None:
        return "cpp"
    if device.startswith("cuda") and torch.cuda.is_available() and triton_problem(device) is None:
        return "triton"
    return "chunked"


def cpu_capability() -> str | None:
    """The instruction set that the C++ kernels use ("avx512", "avx2", "portable"); None without them."""
    return torch.ops.drl_fast.cpu_capability() if EXTENSION_ERROR is None else None
