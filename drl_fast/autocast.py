"""torch's autocast, also for device types that do not support it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor


def available(device: str) -> bool:
    """Say whether torch has autocast for this device type; otherwise ``is_autocast_enabled`` raises."""
    # torch.compile cannot trace is_autocast_available (torch 2.11). Among its device types only meta has no autocast.
    return device != "meta" if torch.compiler.is_compiling() else torch.amp.is_autocast_available(device)


def cast(x: Tensor) -> Tensor:
    """Cast to the active autocast dtype; as in torch, float64 and devices without autocast stay unchanged."""
    device = x.device.type
    if x.dtype == torch.float64 or not is_on(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


def is_on(device: str) -> bool:
    """Say whether autocast is active for this device type."""
    return available(device) and torch.is_autocast_enabled(device)


def off(device: str) -> AbstractContextManager[object]:
    """Disable autocast in a ``with`` block, so that products run in their inputs' dtype and not in half precision."""
    return torch.autocast(device, enabled=False) if available(device) else nullcontext()


def same(device: str) -> Callable[[], AbstractContextManager[object]]:
    """Return a factory of contexts with the present autocast state, for a backward pass, which runs outside of it."""
    if not available(device):
        return nullcontext
    dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    return partial(torch.autocast, device, dtype=dtype, enabled=enabled)
