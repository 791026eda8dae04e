"""The paper's ablation in small: every interaction trained by one recipe, on the same clips from the same towers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import open_clip
import torch
from rich import box
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from ..data.moving_shapes import ARRANGEMENTS, SIZE
from ..engine.evaluate import encode_texts, encode_videos
from ..engine.in_memory import Pairs, Schedule, train
from ..metrics import ranks, recall_interval, retrieval_metrics
from ..model.drl import DRL
from ..model.small import small_model
from ._tables import DIRECTIONS, chance

CONTEXT = 16
CDCR = "WTI + CDCR"
ROWS: dict[str, dict[str, Any]] = {
    "DP": {"interaction": "dp"},
    "HI": {"interaction": "hi"},
    "MLP": {"interaction": "mlp"},
    "XTI": {"interaction": "xti"},
    "TI": {"interaction": "ti"},
    "WTI": {"interaction": "wti"},
    CDCR: {"interaction": "wti", "cdcr": 3},
}
# What the paper says is better than what.
CLAIMS = (("WTI", "DP"), (CDCR, "WTI"))

Interval = tuple[float, float]


@dataclass(frozen=True)
class Row:
    """One interaction's training and what came of it."""

    name: str
    losses: list[float]
    """Every step's."""
    sim: Tensor
    """(B, B) similarities of the held-out captions and clips."""

    @cached_property
    def metrics(self) -> dict[str, dict[str, float]]:
        return retrieval_metrics(self.sim)

    @property
    def recall(self) -> float:
        """Text to video, R@1."""
        return self.metrics["t2v"]["R1"]

    def interval(self, direction: str = "t2v") -> Interval:
        """95 % bootstrap interval of R@1."""
        return self._intervals[direction]

    @cached_property
    def _intervals(self) -> dict[str, Interval]:
        return {"t2v": self._interval(self.sim), "v2t": self._interval(self.sim.T)}

    @staticmethod
    def _interval(sim: Tensor) -> Interval:
        """Of the queries in rows.

        Fours are drawn whole: clips of the same words are missed together, so that there are fewer chances than clips.
        """
        found = ranks(sim, torch.arange(len(sim))) == 1
        every, four = torch.arange(len(found)), torch.arange(len(found)) // ARRANGEMENTS
        # recall_interval draws videos with all their captions: here a video is a four, and each of the four finds it
        # or does not.
        told = (~found).float()[:, None].repeat(1, len(found) // ARRANGEMENTS)
        told[every, four] = found.float()
        return recall_interval(told, four)

    def arranged(self) -> float | None:
        """Of the captions whose first answer is a clip of their own four, percent where it is the right one."""
        best, every = self.sim.argmax(dim=1), torch.arange(len(self.sim))
        near = best // ARRANGEMENTS == every // ARRANGEMENTS
        return 100 * float((best == every)[near].float().mean()) if bool(near.any()) else None


def tokenizer() -> open_clip.SimpleTokenizer:
    return open_clip.SimpleTokenizer(context_length=CONTEXT)


def compare(training: Pairs, test: Pairs, schedule: Schedule, bars: Progress) -> tuple[list[Row], DRL]:
    """Train and score a model for each of ``ROWS``: the same towers at first, the same batches, no row tuned.

    Returns:
        the rows, and the last one's model.

    The towers learn first, as CLIP's do: by end token and mean frame. XTI and MLP learn nothing in so few steps when
    towers and network are both new.
    """

    def trained(name: str, model: DRL) -> list[float]:
        task = bars.add_task(name, total=schedule.steps, note="")
        return train(
            model, training, schedule, lambda step, loss: bars.update(task, completed=step, note=f"loss {loss:.2f}")
        )

    towers, _ = small_model(SIZE, CONTEXT, schedule.seed, interaction="dp")
    trained("towers", towers)
    rows = []
    for name, config in ROWS.items():
        model, _ = small_model(SIZE, CONTEXT, schedule.seed, towers.clip, **config)
        losses = trained(name, model)
        rows.append(Row(name, losses, score(model, test)))
    return rows, model


@torch.no_grad()
def score(model: DRL, pairs: Pairs) -> Tensor:
    """Similarities (texts, videos)."""
    text, text_mask = encode_texts(model, pairs.ids)
    return model.similarity(text, encode_videos(model, pairs.frames, pairs.mask), text_mask, pairs.mask)


def table(rows: list[Row]) -> Table:
    """The shape of the paper's table, and chance."""
    candidates = len(rows[0].sim)
    title = f"Search among {candidates} held-out clips: text to video, and R@1 of video to text; recalls in percent"
    table = Table("", title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    for name in ("R@1", "R@5", "R@10", "MdR", "MnR", "v2t R@1"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        firsts = [
            f"{row.metrics[key]['R1']:.1f} \\[{low:.0f}, {high:.0f}]"
            for key in ("t2v", "v2t")
            for low, high in (row.interval(key),)
        ]
        values = row.metrics["t2v"]
        table.add_row(row.name, firsts[0], *(f"{values[key]:.1f}" for key in ("R5", "R10", "MdR", "MnR")), firsts[1])
    blind = chance(candidates)
    table.add_section()
    table.add_row("chance", *(f"{blind[key]:.1f}" for key in ("R1", "R5", "R10", "MdR", "MnR", "R1")))
    return table


def findings(rows: list[Row]) -> list[str]:
    """What the table shows and what it does not, in sentences that follow from its numbers."""
    blind = chance(len(rows[0].sim))["R1"]
    interval = {row.name: row.interval() for row in rows}
    best = max(rows, key=lambda row: row.recall)
    others = [row.name for row in rows if row is not best]
    level = [name for name in others if overlap(interval[name], interval[best.name])]
    below = [name for name in others if name not in level]
    told = [f"Highest R@1, text to video: {best.name}, {best.recall:.1f}."]
    if level:
        told.append(f"Its interval overlaps {_list(level)}: this run does not order them.")
    if below:
        told.append(f"It lies above {_list(below)}.")
    by_name = {row.name: row for row in rows}
    for better, worse in CLAIMS:
        apart = by_name[better].recall - by_name[worse].recall
        verdict = (
            "the intervals overlap, this run does not order them"
            if overlap(interval[better], interval[worse])
            else "the intervals are apart"
        )
        told.append(f"{better} against {worse}: {apart:+.1f} points; {verdict}.")
    lost = [name for name, (low, _) in interval.items() if low <= blind]
    if lost:
        told.append(f"Not above chance by their intervals: {_list(lost)}.")
    arranged = [f"{row.name} {value:.0f} %" for row in rows if (value := row.arranged()) is not None]
    if arranged:
        told.append(
            f"Where the first answer is one of the caption's four, it is the right one (chance: "
            f"{100 / ARRANGEMENTS:.0f} %): {_list(arranged)}."
        )
    return told


def as_json(rows: list[Row]) -> dict[str, Any]:
    """What table and findings are made of."""
    return {
        "held_out": len(rows[0].sim),
        "chance": chance(len(rows[0].sim)),
        "rows": [
            {"name": row.name, "metrics": row.metrics, "R1_interval_95": {key: row.interval(key) for key in DIRECTIONS}}
            for row in rows
        ],
        "findings": findings(rows),
    }


def overlap(one: Interval, other: Interval) -> bool:
    return one[0] <= other[1] and other[0] <= one[1]


def _list(names: list[str]) -> str:
    return ", ".join(names[:-1]) + f" and {names[-1]}" if len(names) > 1 else names[0]
