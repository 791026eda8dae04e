"""The paper's recipe as functions of a step's number: the order of pairs, learning rates, seeds."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..model.drl import DRL
from .config import RunConfig


def seed_of(*numbers: int) -> int:
    """Return a seed for a tuple of numbers. Every step has its own, so a resumed run has no generator to restore."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest(), "big")


def batches(count: int, config: RunConfig) -> list[list[int]]:
    """Return every step's captions, over all epochs. Batches are full; an epoch uses a caption at most once."""
    batch = min(config.batch, count)
    found: list[list[int]] = []
    for epoch in range(config.epochs):
        generator = torch.Generator().manual_seed(seed_of(config.seed, epoch))
        order = torch.randperm(count, generator=generator)
        found += order[: count // batch * batch].view(-1, batch).tolist()
    return found


def warmup_steps(steps: int, warmup: float) -> int:
    """Steps in which the learning rate rises: at least one."""
    return max(round(warmup * steps), 1)


def rate(step: int, steps: int, warmup: float = 0.1) -> float:
    """Return the learning rate's factor for step ``step`` (from 0) of ``steps``: linear warm-up, then half a cosine."""
    rising = warmup_steps(steps, warmup)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(steps - rising, 1)))


def by_decay(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Split parameters into optimizer groups: weight decay on matrices, none on biases, norms and the temperature."""
    own = list(parameters)
    matrices, rest = ([p for p in own if (p.ndim >= 2) == wide] for wide in (True, False))
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def optimizer(model: DRL, config: RunConfig, *, eps: float = 1e-6, fused: bool | None = None) -> torch.optim.AdamW:
    """Build AdamW with up to four groups: CLIP's and new parameters, each with and without weight decay."""
    groups = []
    for of_clip, lr in ((True, config.clip_lr), (False, config.lr)):
        own = [p for name, p in model.named_parameters() if name.startswith("clip.") == of_clip]
        groups += [{**group, "lr": lr, "peak": lr} for group in by_decay(own, config.weight_decay)]
    return torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.98), eps=eps, fused=fused)


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's learning rate to its peak times ``factor``."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
