"""The operator library, and the one place that knows which implementation serves a device.

CPU tensors go to the C++ extension where it is built; every other device, and a CPU without the extension, goes to
chunked PyTorch. Kernels for further devices register themselves for their dispatch key in the operator's own file.
"""

from __future__ import annotations

import importlib
import warnings

import torch

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
        f"({EXTENSION_ERROR}). Install a wheel, or build with a C++17 compiler: pip install --no-build-isolation -e .",
        RuntimeWarning,
        stacklevel=2,
    )


def implementation(device: str) -> str:
    """Name what serves tensors on ``device``: ``"cpp"`` or ``"chunked"``."""
    return "cpp" if device == "cpu" and EXTENSION_ERROR is None else "chunked"


def cpu_capability() -> str | None:
    """The instruction set that the C++ kernels use ("avx512", "avx2", "portable"); None without them."""
    return torch.ops.drl_fast.cpu_capability() if EXTENSION_ERROR is None else None
