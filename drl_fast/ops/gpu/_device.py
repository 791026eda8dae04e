"""Where the kernels' launchers run."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack

import torch
from torch import Tensor

from ... import autocast


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device; autocast must not touch what the launchers compute."""
    stack = ExitStack()
    if x.is_cuda:
        stack.enter_context(torch.cuda.device(x.device))
    stack.enter_context(autocast.off(x.device.type))
    return stack
