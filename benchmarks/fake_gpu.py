"""Compile and "launch" the Triton kernels for a GPU that is not there.

``install`` replaces Triton's driver. CPU tensors then reach the real launchers, Triton specialises and compiles each
kernel exactly as on that GPU, and the launch itself does nothing. So registers, spills and machine code are those that
training meets, and the host's share of a call can be timed. Outputs hold garbage. One process can pretend one GPU after
the other.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from drl_fast.kernels import token_interaction_backward as backward
from drl_fast.kernels import tuning
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler.errors import CompilationError
from triton.runtime import driver

from drl_fast import validation
from drl_fast.ops import gpu
from drl_fast.ops import token_interaction as operator

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
OPERATORS = (
    "token_interaction",
    "token_interaction_backward",
    "soft_token_interaction",
    "soft_token_interaction_backward",
    "rerank",
    "cdcr_statistics",
    "cdcr_correlation",
    "cdcr_gradient",
)
# Streaming multiprocessors of an A100, H100 and B200.
PROCESSORS = {80: 108, 90: 132, 100: 148}
SHARED_MEMORY = {80: 166912, 90: 232448, 100: 232448}


class Utilities:
    """What Triton asks of a GPU's driver."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": SHARED_MEMORY[self.capability],
            "multiprocessor_count": PROCESSORS[self.capability],
            "max_num_regs": 65536,
            "warpSize": 32,
            "sm_clock_rate": 1,
            "mem_clock_rate": 1,
            "mem_bus_width": 1,
        }

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[Any, ...]:
        registers, stack = resource_usage(cubin)
        return 1, name, registers, stack, 1024

    def unload_module(self, module: Any) -> None:
        pass


class Driver:
    """A CUDA driver whose launches do nothing but count."""

    def __init__(self, capability: int) -> None:
        self.capability, self.launches = capability, 0
        self.utils = Utilities(capability)

        class Launcher:
            def __init__(self, source: Any, metadata: Any) -> None:
                pass

            def __call__(launcher, *arguments: Any) -> None:
                self.launches += 1

        self.launcher_cls = Launcher

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        # Triton keeps compiled kernels by device, so each GPU is a device of its own.
        return self.capability

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    @staticmethod
    def is_active() -> bool:
        return True


def install(capability: int = 90) -> Driver:
    """Let CPU tensors reach the kernels' launchers as on a GPU of this compute capability, for this whole process."""
    fake = Driver(capability)
    driver.set_active(fake)
    tuning.architecture = lambda device: f"sm_{capability}"
    tuning.processors = lambda device: PROCESSORS[capability]
    return fake


@contextmanager
def serving_cpu_tensors() -> Iterator[None]:
    """Treat CPU tensors like a GPU's in a ``with`` block.

    The Triton launchers serve the operators, a GPU's budget limits the matches, and nobody looks at a mask's values.
    """
    budget = operator.MATCH_BUDGET
    with (
        torch.library._scoped_library("drl_fast", "IMPL") as library,
        mock.patch.dict(budget, cpu=budget["cuda"]),
        mock.patch.object(validation, "values_are_visible", return_value=False),
        mock.patch.object(validation, "private_copy", lambda x: x),
    ):
        for name in OPERATORS:
            library.impl(name, getattr(gpu, name), "CPU", allow_override=True)
        yield


class Launch(NamedTuple):
    """One launch."""

    kernel: str  # its name
    grid: tuple[int, ...]
    compiled: Any  # Triton's compiled kernel; None if it was skipped or does not compile


@contextmanager
def compiled_kernels(
    wanted: Callable[[str], bool] = lambda name: True, failures: list[tuple[str, str]] | None = None
) -> Iterator[list[Launch]]:
    """Collect the launches of a ``with`` block.

    Kernels whose name is not ``wanted`` are skipped, not compiled. With a list of ``failures`` a kernel that does not
    compile adds its name and the error instead of raising.
    """
    found: list[Launch] = []
    run: Callable[..., Any] = triton.runtime.jit.JITFunction.run

    def record(self: Any, *arguments: Any, **options: Any) -> Any:
        kernel = None
        if wanted(self.__name__):
            try:
                kernel = run(self, *arguments, **options)
            except (CompilationError, RuntimeError) as error:
                if failures is None:
                    raise
                failures.append((self.__name__, _cause(error)))
        found.append(Launch(self.__name__, options["grid"], kernel))
        return kernel

    triton.runtime.jit.JITFunction.run = record
    try:
        yield found
    finally:
        triton.runtime.jit.JITFunction.run = run


def _cause(error: BaseException) -> str:
    """Name the innermost error, and the line of the kernel that it comes from."""
    where = ""
    while isinstance(error, CompilationError) and (inner := error.__cause__ or error.__context__) is not None:
        lines = str(error).splitlines()
        marks = [i for i, line in enumerate(lines) if line.strip() == "^"]
        where = f"{lines[marks[-1] - 1].strip()}: " if marks else where
        error = inner
    return f"{where}{type(error).__name__}: {str(error).strip().splitlines()[-1]}"


class Product(NamedTuple):
    """One matrix product by the library: a (m, k) times b (k, n), float32."""

    m: int
    k: int
    n: int
    accumulate: bool


@contextmanager
def library_products() -> Iterator[list[Product]]:
    """Collect the library's matrix products in a ``with`` block, and compute none of them."""
    found: list[Product] = []

    def record(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
        found.append(Product(*a.shape, b.shape[1], accumulate))

    with mock.patch.object(backward, "library_product", record, create=True):
        yield found


def _tool(*command: str) -> str:
    done = subprocess.run([str(TOOLS / command[0]), *command[1:]], capture_output=True, text=True)
    return done.stdout + done.stderr if done.returncode == 0 else ""


@contextmanager
def _file(cubin: bytes) -> Iterator[str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        yield file.name


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """Return registers per thread and bytes of stack per thread."""
    with _file(cubin) as name:
        usage = _tool("cuobjdump", "-res-usage", name)
    registers, stack = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))  # type: ignore[index]
    return registers, stack


def machine_code(cubin: bytes) -> str:
    """Disassemble, with the tools in Triton's wheel."""
    with _file(cubin) as name:
        # Without the analysis of data flow it is faster, and the code is the same.
        return _tool("nvdisasm", "-c", "-ndf", name) or _tool("cuobjdump", "-sass", name)
