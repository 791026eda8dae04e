"""Train a small model on two processes, each with the negatives of both. The loss curve equals a single process's.

    torchrun --standalone --nproc-per-node 2 examples/torchrun_2proc.py
    python examples/torchrun_2proc.py --single

Two linear towers and WTI's two weight heads learn to match generated captions and clips. A caption and its clip share a
few concepts, one per word and frame; all other words and frames are noise. Every process draws the same batch and keeps
its own part, the first process a larger one. ``token_contrastive_loss(process_group=...)`` scales gradients so that
DistributedDataParallel's mean over processes is the gradient of the whole batch. ``--out FILE`` writes the curve as
JSON.

The example runs in float64. In float32 the curves agree to 1e-5 for about 20 steps; then rounding changes a best match
and they drift apart.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import drl_fast

WORDS, FRAMES, CONCEPTS, CHANNELS = 8, 6, 64, 32
# Words, and frames, of a pair that are not noise.
SHARED = 3


class TwoTowers(nn.Module):
    """Compute tokens and token weights of captions and clips, and the logit scale."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.video = nn.Linear(CONCEPTS, CHANNELS), nn.Linear(CONCEPTS, CHANNELS)
        self.text_weight, self.video_weight = nn.Linear(CHANNELS, 1), nn.Linear(CHANNELS, 1)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, captions: Tensor, clips: Tensor) -> tuple[Tensor, ...]:
        text, video = self.text(captions), self.video(clips)
        text_weight = self.text_weight(text).squeeze(-1).softmax(dim=-1)
        video_weight = self.video_weight(video).squeeze(-1).softmax(dim=-1)
        return text, video, text_weight, video_weight, self.log_scale.clamp(max=math.log(100)).exp()


def batch(step: int, pairs: int) -> tuple[Tensor, Tensor]:
    """Draw captions (pairs, WORDS, CONCEPTS) and clips (pairs, FRAMES, CONCEPTS), the same in every process."""
    generator = torch.Generator().manual_seed(step)
    shapes = [(pairs, tokens, CONCEPTS) for tokens in (WORDS, FRAMES)]
    sides = [torch.randn(shape, generator=generator, dtype=torch.float64) / 4 for shape in shapes]
    concepts = torch.rand(pairs, CONCEPTS, generator=generator).argsort(dim=1)[:, :SHARED]
    for side in sides:
        places = torch.rand(side.shape[:2], generator=generator).argsort(dim=1)[:, :SHARED]
        side[torch.arange(pairs)[:, None], places, concepts] += 3
    return sides[0], sides[1]


def part(pairs: int) -> slice:
    """Return this process's rows. Without a group these are all; of two processes the first takes five eighths."""
    if not dist.is_initialized():
        return slice(0, pairs)
    edges = [round(pairs * (rank / dist.get_world_size()) ** 0.68) for rank in range(dist.get_world_size() + 1)]
    return slice(edges[dist.get_rank()], edges[dist.get_rank() + 1])


def train(steps: int, pairs: int) -> list[float]:
    """Train and return the loss of every step."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    model: nn.Module = TwoTowers()
    group = dist.group.WORLD if dist.is_initialized() else None
    if group is not None:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    curve = []
    for step in range(steps):
        captions, clips = (side[part(pairs)] for side in batch(step, pairs))
        *tokens, scale = model(captions, clips)
        loss = drl_fast.token_contrastive_loss(*tokens, logit_scale=scale, process_group=group)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--single", action="store_true", help="train on the same batches in one process")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=64, help="pairs per batch, over all processes")
    parser.add_argument("--out", type=Path, help="write the loss curve to this file, as a JSON list")
    arguments = parser.parse_args()
    if arguments.steps < 1 or arguments.pairs < 1:
        parser.error(f"--steps and --pairs must be positive, got {arguments.steps} and {arguments.pairs}")
    if not arguments.single and "RANK" not in os.environ:
        parser.error("start it with torchrun, as above, or pass --single")
    if not arguments.single:
        dist.init_process_group("gloo")
    curve = train(arguments.steps, arguments.pairs)
    if arguments.single or dist.get_rank() == 0:
        for step in range(0, len(curve), max(1, len(curve) // 10)):
            print(f"step {step:4d}  loss {curve[step]:.6f}")
        print(f"last step  loss {curve[-1]:.6f}   (chance: {math.log(arguments.pairs):.3f})")
        if arguments.out:
            arguments.out.write_text(json.dumps(curve))
    if not arguments.single:
        # DistributedDataParallel is part of a reference cycle and keeps the group and its threads alive.
        gc.collect()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
