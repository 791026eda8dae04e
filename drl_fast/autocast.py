"""torch's autocast, on devices that have none as well."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor


def available(device: str) -> bool:
    """Say whether torch has an autocast for this device type at all; without one, asking if it is on raises."""
    # torch.compile of torch 2.11 cannot trace the question; of what it compiles for, only meta has none.
    return device != "meta" if torch.compiler.is_compiling() else torch.amp.is_autocast_available(device)


def cast(x: Tensor) -> Tensor:
    """Cast to the active autocast dtype, by torch's own rule: float64 and inactive devices are left alone."""
    device = x.device.type
    if x.dtype == torch.float64 or not is_on(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


def is_on(device: str) -> bool:
    return available(device) and torch.is_autocast_enabled(device)


def off(device: str) -> AbstractContextManager[object]:
    """Compute in the dtypes that tensors have: inside autocast a product would silently run in half precision."""
    return torch.autocast(device, enabled=False) if available(device) else nullcontext()


def same(device: str) -> Callable[[], AbstractContextManager[object]]:
    """Make contexts like the present one: a backward pass, which runs outside, computes in the same dtypes by them."""
    if not available(device):
        return nullcontext
    dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    return partial(torch.autocast, device, dtype=dtype, enabled=enabled)
