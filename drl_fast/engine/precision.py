"""The precision of towers, in training and in evaluation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch

from .. import autocast

PRECISIONS = ("bf16", "fp32")

Autocast = Callable[[], AbstractContextManager[object]]


def autocast_for(precision: str, device: str) -> Autocast:
    """Return a maker of contexts: ``"bf16"`` autocasts to bfloat16, ``"fp32"`` turns autocast off."""
    return partial(torch.autocast, device, torch.bfloat16) if precision == "bf16" else partial(autocast.off, device)
