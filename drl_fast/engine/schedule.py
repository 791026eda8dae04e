"""The paper's recipe as functions of a step's number: the order of pairs, learning rates, seeds."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..model.head import Head
from .config import RunConfig


def seed_of(*numbers: int) -> int:
    """Return a seed for a tuple of numbers. Every step has its own, so a resumed run has no generator to restore."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest(), "big")


def batches(owner: Sequence[int], config: RunConfig) -> list[list[int]]:
    """Return every step's captions, over all epochs. Batches are full; an epoch uses a caption at most once.

    With ``captions_per_video``, captions of one video that share a batch stand next to each other.

    Args:
        owner: each caption's video.
    """
    count = len(owner)
    batch = min(config.batch, count)
    found: list[list[int]] = []
    for epoch in range(config.epochs):
        generator = torch.Generator().manual_seed(seed_of(config.seed, epoch))
        order = torch.randperm(count, generator=generator)
        if config.captions_per_video:
            order = _by_video(order, torch.tensor(owner), config.captions_per_video, generator)
        found += order[: count // batch * batch].view(-1, batch).tolist()
    return found


def _by_video(order: Tensor, owner: Tensor, captions: int, generator: torch.Generator) -> Tensor:
    """Put captions in groups of up to ``captions`` of one video, and the groups in a random order.

    The end of a batch may cut a group in two. Two groups of one video are apart by chance alone; in one batch they are
    one video all the same.
    """
    # The captions of one video, in the random order, are numbered 0, 1, 2, ...; each run of `captions` is a group.
    owners = owner[order]
    rows = owners.argsort(stable=True)
    starts = torch.searchsorted(owners[rows].contiguous(), owners[rows].contiguous())
    number = torch.empty_like(rows)
    number[rows] = torch.arange(len(rows)) - starts
    group = owners * (int(number.max()) // captions + 1) + number // captions
    groups, member = group.unique(return_inverse=True)
    place = torch.randperm(len(groups), generator=generator)[member]
    return order[place.argsort(stable=True)]


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


def optimizer(model: Head, config: RunConfig, *, eps: float = 1e-6, fused: bool | None = None) -> torch.optim.AdamW:
    """Build AdamW with up to four groups: CLIP's and new parameters, each with and without weight decay.

    Where CLIP is frozen, its temperature and adapters are among the new parameters.
    """
    groups = []
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    frozen = config.freeze == "clip" or config.lora > 0
    for of_clip, lr in ((True, config.clip_lr), (False, config.lr)):
        own = [p for name, p in trained.items() if (name.startswith("clip.") and not frozen) == of_clip]
        groups += [{**group, "lr": lr, "peak": lr} for group in by_decay(own, config.weight_decay)]
    return torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.98), eps=eps, fused=fused)


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's learning rate to its peak times ``factor``."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
