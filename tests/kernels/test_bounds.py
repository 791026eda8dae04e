"""Every address that a kernel reads or writes lies in one of the launch's own tensors.

The interpreter computes addresses as a GPU does, but a read just beyond a tensor seldom fails: on the CPU other tensors
lie there. So compare each active address with the arguments of the launch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import drl_fast
from tests.implementations import Implementation
from tests.oracle import make, run

interpreter = pytest.importorskip("triton.runtime.interpreter")


class Checked:
    """The interpreter's memory functions, for addresses within ``ranges`` only."""

    def __init__(self, original: Any) -> None:
        self.original = original
        self.ranges: list[tuple[int, int]] = []
        self.outside = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)

    def load(self, pointers: NDArray[Any], mask: NDArray[Any], other: NDArray[Any], dtype: Any) -> Any:
        self.check(pointers, mask, np.dtype(dtype).itemsize)
        return self.original.load(pointers, mask, other, dtype)

    def store(self, pointers: NDArray[Any], value: NDArray[Any], mask: NDArray[Any]) -> Any:
        self.check(pointers, mask, value.dtype.itemsize)
        return self.original.store(pointers, value, mask)

    def check(self, pointers: NDArray[Any], mask: NDArray[Any], size: int) -> None:
        used = pointers[np.broadcast_to(mask, pointers.shape).astype(bool)]
        inside = np.zeros(used.shape, dtype=bool)
        for first, end in self.ranges:
            inside |= (used >= first) & (used + size <= end)
        self.outside += int((~inside).sum())

    def allow(self, arguments: tuple[Any, ...]) -> None:
        """Add the memory of a launch's tensors."""
        for x in arguments:
            if isinstance(x, torch.Tensor):
                self.ranges.append((x.data_ptr(), x.data_ptr() + x.numel() * x.itemsize))
            elif isinstance(x, tuple):
                self.allow(x)
            elif hasattr(x, "base"):
                self.allow((x.base,))


@pytest.fixture
def checked(impl: Implementation, monkeypatch: pytest.MonkeyPatch) -> Checked:
    if impl.name != "interpreter":
        pytest.skip("only the interpreter shows addresses")
    memory = Checked(interpreter._interpreter)
    launch = interpreter.GridExecutor.__call__

    def watch(self: Any, *arguments: Any, **options: Any) -> Any:
        memory.ranges = []
        memory.allow(arguments)
        return launch(self, *arguments, **options)

    monkeypatch.setattr(interpreter, "_interpreter", memory)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", watch)
    return memory


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(5, 9, 6, 4), (1, 130, 2, 3)], ids=str)
@pytest.mark.parametrize("pooling", ["max", "softmax"])
def test_addresses_are_inside(
    checked: Checked, impl: Implementation, pooling: str, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    p = make(shape, 70, dtype, masks=("holes", "empty"), weights=torch.float32, pooling=pooling)
    run(drl_fast.token_interaction, p.map(lambda x: x.to(impl.device)), torch.randn(p.pairs))
    assert checked.ranges
    assert checked.outside == 0
