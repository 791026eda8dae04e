"""Frozen towers in small: the tokens of one trained model, and heads that train on them from several seeds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich import box
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from ..data.moving_shapes import ARRANGEMENTS
from ..engine.config import RunConfig
from ..engine.in_memory import Pairs, train
from ..metrics import retrieval_metrics
from ..model.drl import DRL
from ..model.head import Head
from .comparison import RECIPE, ROWS, Row

NAMES = ("DP", "TI", "WTI")
SEEDS = 3
# Without one, DP and TI would have nothing to train but the temperature.
TEMPORAL = "seqTransf"
# Rows that the towers take at a time.
CHUNK = 64


@dataclass(frozen=True)
class Frozen:
    """What training on tokens found."""

    encoding: float
    """Seconds to encode all clips and captions once."""
    recalls: dict[str, list[float]]
    """R@1, text to video, in percent, of each row's seeds."""
    seconds: dict[str, list[float]]
    """Of each training."""

    def as_json(self) -> dict[str, Any]:
        return {
            "encoding_seconds": round(self.encoding, 1),
            "temporal": TEMPORAL,
            "R1": self.recalls,
            "seconds": {name: [round(x, 1) for x in values] for name, values in self.seconds.items()},
            "findings": findings(self),
        }


def train_frozen(model: DRL, training: Pairs, test: Pairs, steps: int, seed: int, bars: Progress) -> Frozen:
    """Encode both parts with a model's towers, then train each row from every seed; the recipe is the demo's.

    Args:
        model: its towers encode; it has no temporal module.
        training, test: frames and token ids.
    """
    start = time.perf_counter()
    parts = [_encode(model, pairs) for pairs in (training, test)]
    encoding = time.perf_counter() - start
    recalls: dict[str, list[float]] = {name: [] for name in NAMES}
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    task = bars.add_task("on frozen towers", total=SEEDS * len(NAMES) * steps, note="")
    for number in range(SEEDS):
        for name in NAMES:
            options = {**ROWS[name], "temporal": TEMPORAL}
            config = RunConfig("folder", pretrained=None, seed=seed + number, **RECIPE, **options)
            torch.manual_seed(config.seed)
            head = Head(model.dim, **options)
            head.init_from_clip(model.clip.positional_embedding, model.clip.transformer.resblocks.state_dict())
            # Heads on a store of CLIP's features start with CLIP's temperature, too.
            head.stored_scale.data.copy_(model.stored_scale.detach())
            start = time.perf_counter()
            for loss in train(head, parts[0], config, steps, together=ARRANGEMENTS):
                bars.update(task, advance=1, note=f"{name}, seed {config.seed}, loss {loss:.2f}")
            seconds[name].append(time.perf_counter() - start)
            recalls[name].append(retrieval_metrics(_score(head, parts[1]))["t2v"]["R1"])
    return Frozen(encoding, recalls, seconds)


@torch.no_grad()
def _encode(model: DRL, pairs: Pairs) -> Pairs:
    model.eval()
    text, text_mask, video = [], [], []
    for ids, frames, mask in zip(*(x.split(CHUNK) for x in (pairs.text, pairs.video, pairs.mask)), strict=True):
        tokens, real = model.encode_text(ids)
        text.append(tokens)
        text_mask.append(real)
        video.append(model.encode_video(frames, mask))
    return Pairs(torch.cat(video), pairs.mask, torch.cat(text), torch.cat(text_mask))


@torch.no_grad()
def _score(head: Head, pairs: Pairs) -> Tensor:
    head.eval()
    assert pairs.text_mask is not None
    sides = {"text": pairs.text, "text_mask": pairs.text_mask, "video": pairs.video, "video_mask": pairs.mask}
    encoded = head.encode(sides)
    return head.similarity(encoded.text, encoded.video, encoded.text_mask, encoded.video_mask)


def table(found: Frozen, rows: Sequence[Row]) -> Table:
    """Make a table of both ways to train: R@1 and seconds."""
    end_to_end = {row.name: row for row in rows}
    title = f"On frozen towers: R@1, text to video, mean of {SEEDS} seeds and their range; seconds of one training"
    made = Table("", title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    for name in ("R@1", "lowest to highest", "seconds", "end to end: R@1", "its seconds"):
        made.add_column(name, justify="right", no_wrap=True)
    for name, values in found.recalls.items():
        row, taken = end_to_end[name], found.seconds[name]
        span = f"{min(values):.1f} to {max(values):.1f}"
        means = (f"{sum(x) / len(x):.1f}" for x in (values, taken))
        made.add_row(name, next(means), span, next(means), f"{row.recall:.1f}", f"{row.seconds:.1f}")
    return made


def findings(found: Frozen) -> list[str]:
    """Say what the numbers show and what they do not."""
    said = []
    for one, other in (("WTI", "DP"), ("WTI", "TI")):
        ours, theirs = found.recalls[one], found.recalls[other]
        apart = sum(ours) / len(ours) - sum(theirs) / len(theirs)
        clear = min(ours) > max(theirs) or max(ours) < min(theirs)
        verdict = "the ranges are apart" if clear else "the ranges of the seeds overlap, this run does not order them"
        said.append(f"On frozen towers {one} against {other}: {apart:+.1f} points; {verdict}.")
    said.append(
        "These rows have a temporal module and the rows trained end to end have none, so this table does not compare "
        "frozen towers with end-to-end training."
    )
    said.append(
        f"The ranges are of {SEEDS} seeds on generated clips. The towers were trained with DP, which may favour DP, "
        "and longer than those the end-to-end rows started from."
    )
    return said
