"""In which precision towers run, in training and in evaluation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch

from .. import autocast

PRECISIONS = ("bf16", "fp32")

Autocast = Callable[[], AbstractContextManager[object]]


def autocast_for(precision: str, device: str) -> Autocast:
    """Make contexts, on a device type: ``"bf16"`` autocasts to bfloat16, ``"fp32"`` not at all."""
    return partial(torch.autocast, device, torch.bfloat16) if precision == "bf16" else partial(autocast.off, device)
