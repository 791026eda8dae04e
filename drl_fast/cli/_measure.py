"""Time and peak memory of one forward and backward of the interaction, each form in a process of its own.

A process of its own, because a peak cannot be told from what a process held before; ``python -m
drl_fast.cli._measure fused 256`` prints one JSON object.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import token_interaction

WORDS, FRAMES, CHANNELS = 32, 12, 512
REPEATS = 3


def dense(
    text: Tensor, video: Tensor, text_weight: Tensor, video_weight: Tensor, t_mask: Tensor, v_mask: Tensor
) -> Tensor:
    """The interaction as codebases write it eagerly: every similarity of every pair in one tensor."""
    similarity = torch.einsum("aid,bjd->abij", F.normalize(text, dim=-1), F.normalize(video, dim=-1))
    similarity = torch.einsum("abij,ai->abij", similarity, t_mask)
    similarity = torch.einsum("abij,bj->abij", similarity, v_mask)
    by_text = torch.einsum("abi,ai->ab", similarity.max(dim=3).values, text_weight)
    by_video = torch.einsum("abj,bj->ab", similarity.max(dim=2).values, video_weight)
    return (by_text + by_video) / 2


FORMS: dict[str, Callable] = {"fused": token_interaction, "dense": dense}


def inputs(batch: int) -> list[Tensor]:
    """Features, weights and masks of ``batch`` texts and videos, of uneven length."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(batch, WORDS, CHANNELS, generator=generator, requires_grad=True)
    video = torch.randn(batch, FRAMES, CHANNELS, generator=generator, requires_grad=True)
    masks = [
        (torch.arange(n) < torch.randint(n // 4, n + 1, (batch, 1), generator=generator)).float()
        for n in (WORDS, FRAMES)
    ]
    weights = [(mask / mask.sum(dim=1, keepdim=True)).requires_grad_() for mask in masks]
    return [text, video, *weights, *masks]


def measure(form: str, batch: int) -> dict[str, float | None]:
    """Seconds (median of three) and bytes above what was held before (None where the system does not tell)."""
    FORMS[form](*inputs(2)).sum().backward()
    arguments = inputs(batch)
    held, _ = resident()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    FORMS[form](*arguments).sum().backward()
    _, peak = resident()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        FORMS[form](*arguments).sum().backward()
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "bytes": peak - held if held else None}


def resident() -> tuple[int, int]:
    """Bytes of memory resident now and at the peak; zeros where there is no /proc.

    Not getrusage: its peak survives exec, so a child would start with its parent's.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0, 0
    fields = dict(line.split(":", 1) for line in lines)
    return tuple(1024 * int(fields[name].split()[0]) for name in ("VmRSS", "VmHWM"))  # type: ignore[return-value]


def measure_apart(form: str, batch: int) -> dict[str, float | None]:
    """:func:`measure` in a fresh process.

    Raises:
        RuntimeError: the process failed, e.g. for want of memory.
    """
    command = [sys.executable, "-W", "ignore", "-m", __name__, form, str(batch)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"measuring {form} at batch {batch} ended with {done.returncode}: {done.stderr[-500:]}")
    return json.loads(done.stdout)


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
