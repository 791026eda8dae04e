"""Warnings of a run that learns nothing, or whose scores say little: each one line with what to do, or None."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

# Steps whose mean loss is compared with log(batch), in two halves, and by what share it may differ.
WINDOW, TOLERANCE = 50, 0.01
FEW_CAPTIONS = 50


def few_pairs(pairs: int, batch: int) -> str | None:
    """Warn where all training pairs together are fewer than a batch."""
    if pairs >= batch:
        return None
    return f"only {pairs} training pairs for a batch of {batch}: every step takes them all; set batch={pairs} or less"


def few_captions(captions: int) -> str | None:
    """Warn where the val part is too small to compare models."""
    if captions >= FEW_CAPTIONS:
        return None
    return (
        f"val has only {captions} captions: one of them is {100 / captions:.1f} points of R@1, and intervals are wide; "
        f"use at least {FEW_CAPTIONS}"
    )


def loss_at_chance(info_nce: Sequence[float], batch: int) -> str | None:
    """Warn where both halves of the last ``WINDOW`` losses have a mean within 1 % of log(batch).

    One half alone may be a falling loss that passes.

    Args:
        info_nce: the InfoNCE of each step after the warm-up.
    """
    if len(info_nce) < WINDOW or batch < 2:
        return None
    chance, half = math.log(batch), WINDOW // 2
    means = [sum(part) / half for part in (info_nce[-WINDOW:-half], info_nce[-half:])]
    if any(not abs(mean / chance - 1) <= TOLERANCE for mean in means):
        return None
    return (
        f"InfoNCE has stood at log(batch) = {chance:.2f}, the loss of guessing, for {WINDOW} steps: check that "
        "captions belong to their videos, start from pretrained weights, or raise lr and clip_lr"
    )


def recall_at_chance(best: Mapping[str, Mapping[str, float]]) -> str | None:
    """Warn where the 95 % interval of the best text-to-video R@1, in percent, reaches down to chance.

    Args:
        best: as :meth:`drl_fast.engine.evaluate.Evaluation.with_intervals` returns it.
    """
    found = best["t2v"]
    chance = 100 / found["candidates"]
    if found["R1_low"] > chance:
        return None
    return (
        f"the best text-to-video R@1 does not beat chance: its interval [{found['R1_low']:.1f}, "
        f"{found['R1_high']:.1f}] is not above {chance:.2g} %; train longer, start from pretrained weights, or "
        "evaluate on more videos"
    )


def equal_scores(sim: Tensor) -> str | None:
    """Warn where all scores are equal, so that nothing can be learned or found."""
    if sim.numel() < 2 or bool((sim != sim.flatten()[0]).any()):
        return None
    return (
        f"all scores are equal ({float(sim.flatten()[0]):g}): under masking=drl the 0 of padding wins every match; try "
        "--set masking=exclude, see docs/troubleshooting.md"
    )
