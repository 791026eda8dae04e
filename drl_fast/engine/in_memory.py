"""Contrastive training of a two-tower model on frames held in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.drl import DRL
from .schedule import by_decay, rate


@dataclass(frozen=True)
class Pairs:
    """Videos and their captions, row by row."""

    frames: Tensor
    """(N, Nv, 3, H, W) uint8"""
    mask: Tensor
    """(N, Nv) bool"""
    ids: Tensor
    """(N, Nt) token ids"""

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice | Tensor) -> Pairs:
        return Pairs(self.frames[rows], self.mask[rows], self.ids[rows])


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train: AdamW, linear warm-up over a tenth of the steps, then half a cosine."""

    steps: int
    batch: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.1
    frames: int = 4
    """Frames a clip that one step looks at, drawn anew each time; it needs all of them only to be scored."""
    together: int = 1
    """So many neighbouring rows, counted from the first, share a batch: captions that differ little teach most."""
    seed: int = 0


def train(
    model: DRL, pairs: Pairs, schedule: Schedule, on_step: Callable[[int, float], None] | None = None
) -> list[float]:
    """Train in place; the same schedule on the same machine gives the same weights.

    Args:
        on_step: called after every step with its number (from 1) and loss.

    Returns:
        Every step's loss.

    Raises:
        ValueError: pairs or a batch that ``together`` does not divide.
    """
    for name, value in (("pairs", len(pairs)), ("batch", schedule.batch)):
        if value % schedule.together:
            raise ValueError(
                f"{name} must be a multiple of together={schedule.together}, got {value}; take "
                f"{value - value % schedule.together or schedule.together}"
            )
    generator = torch.Generator().manual_seed(schedule.seed)
    optimizer = torch.optim.AdamW(
        by_decay(model.parameters(), schedule.weight_decay), lr=schedule.lr, betas=(0.9, 0.98), fused=True
    )
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, schedule.steps))
    model.train()
    losses = []
    for step, rows in enumerate(_batches(len(pairs), schedule, generator), start=1):
        batch = pairs[rows]
        frames, mask = _some_frames(batch.frames, batch.mask, schedule.frames, generator)
        loss = model({"text_ids": batch.ids, "video": frames, "video_mask": mask})["total"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.limit_logit_scale()
        rates.step()
        losses.append(loss.item())
        if on_step is not None:
            on_step(step, losses[-1])
    return losses


def _batches(count: int, schedule: Schedule, generator: torch.Generator) -> Iterator[Tensor]:
    """``steps`` rows of indices; a row holds no pair twice, for its caption would be its own negative."""
    together = schedule.together
    batch = min(schedule.batch, count) // together
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(schedule.steps):
        if len(order) < batch:
            order = torch.randperm(count // together, generator=generator)
        yield (order[:batch, None] * together + torch.arange(together)).flatten()
        order = order[batch:]


def _some_frames(frames: Tensor, mask: Tensor, limit: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """At most ``limit`` real frames of each clip, at random, in order."""
    lottery = torch.rand(mask.shape, generator=generator).masked_fill(~mask, 2.0)
    chosen = lottery.argsort(dim=1)[:, :limit].sort(dim=1).values
    rows = torch.arange(len(mask))[:, None]
    return frames[rows, chosen], mask[rows, chosen]
