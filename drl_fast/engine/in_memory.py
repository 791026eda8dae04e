"""Training on clips or tokens in memory: a source of batches beside files; schedule, optimizer and step are shared."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.head import Head
from . import schedule
from .config import RunConfig
from .step import take_step


@dataclass(frozen=True)
class Pairs:
    """Videos and their captions, row by row."""

    video: Tensor
    """Frames (N, Nv, 3, H, W) uint8, or tokens (N, Nv, D)"""
    mask: Tensor
    """(N, Nv) bool, of the video"""
    text: Tensor
    """Token ids (N, Nt), or tokens (N, Nt, D)"""
    text_mask: Tensor | None = None
    """(N, Nt) bool, of tokens"""

    def __len__(self) -> int:
        return len(self.text)

    def batches(
        self, steps: int, batch: int, *, frames: int, together: int = 1, seed: int = 0
    ) -> Iterator[dict[str, Tensor]]:
        """Yield a batch a step, as of the model's ``forward``; the same seed gives the same batches.

        Args:
            batch: pairs a step, at most all; none comes twice, which would make a caption its own negative.
            frames: frames of a clip that one step looks at, other ones each time.
            together: this many neighbouring rows, counted from the first, share a batch; captions that differ little
                teach most.

        Raises:
            ValueError: pairs or a batch that ``together`` does not divide.
        """
        for name, value in (("pairs", len(self)), ("batch", batch)):
            if value % together:
                raise ValueError(
                    f"{name} must be a multiple of together={together}, got {value}; take "
                    f"{value - value % together or together}"
                )
        generator = torch.Generator().manual_seed(seed)
        heads = min(batch, len(self)) // together
        order = torch.empty(0, dtype=torch.int64)
        for _ in range(steps):
            if len(order) < heads:
                order = torch.randperm(len(self) // together, generator=generator)
            rows = (order[:heads, None] * together + torch.arange(together)).flatten()
            order = order[heads:]
            video, mask = some_frames(self.video[rows], self.mask[rows], frames, generator)
            texts = {"text_ids": self.text[rows]}
            if self.text_mask is not None:
                texts = {"text": self.text[rows], "text_mask": self.text_mask[rows]}
            yield {**texts, "video": video, "video_mask": mask}


def some_frames(frames: Tensor, mask: Tensor, limit: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw at most ``limit`` real frames of each clip, in order."""
    lottery = torch.rand(mask.shape, generator=generator).masked_fill(~mask, 2.0)
    chosen = lottery.argsort(dim=1)[:, :limit].sort(dim=1).values
    rows = torch.arange(len(mask))[:, None]
    return frames[rows, chosen], mask[rows, chosen]


def train(
    model: Head, pairs: Pairs, config: RunConfig, steps: int, *, frames: int = 4, together: int = 1
) -> Iterator[float]:
    """Train in place, yielding every step's loss; equal arguments give equal weights on one machine.

    Args:
        config: recipe and seed; ``steps`` counts instead of its epochs.
        frames, together: as of :meth:`Pairs.batches`.
    """
    # The published figures of the demo used this eps and the fused loop, which is faster on a CPU.
    optimizer = schedule.optimizer(model, config, eps=1e-8, fused=True)
    batches = pairs.batches(steps, config.batch, frames=frames, together=together, seed=config.seed)
    for step, batch in enumerate(batches):
        losses, _ = take_step(model, optimizer, batch, config, schedule.rate(step, steps, config.warmup))
        yield float(losses["total"])
