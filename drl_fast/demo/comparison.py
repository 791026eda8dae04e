"""The paper's ablation in small: every interaction trained by one recipe, on the same clips from the same towers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import open_clip
import torch
from rich import box
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from ..console import chance
from ..data.moving_shapes import ARRANGEMENTS, SIZE
from ..data.split import Split
from ..data.video import Sampling
from ..engine import plots
from ..engine.config import RunConfig
from ..engine.evaluate import evaluate
from ..engine.in_memory import Pairs, train
from ..metrics import DIRECTIONS, ranks, recall_interval, retrieval_metrics
from ..model.drl import DRL
from ..model.small import small_model

RECIPE: dict[str, Any] = {"batch": 64, "lr": 1e-3, "clip_lr": 1e-3, "weight_decay": 0.1, "precision": "fp32"}
CONTEXT = 16
SAMPLING = Sampling(rate=4, max_frames=8, size=SIZE)
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
# The paper finds the first better than the second.
CLAIMS = (("WTI", "DP"), (CDCR, "WTI"))

Interval = tuple[float, float]


@dataclass(frozen=True)
class Row:
    """One interaction's training and its scores."""

    name: str
    losses: list[float]
    """One per step."""
    sim: Tensor
    """(B, B) similarities of the held-out captions and clips."""
    seconds: float = 0.0
    """Of the training."""

    @cached_property
    def metrics(self) -> dict[str, dict[str, float]]:
        return retrieval_metrics(self.sim)

    @property
    def recall(self) -> float:
        """Text to video, R@1."""
        return self.metrics["t2v"]["R1"]

    @cached_property
    def intervals(self) -> dict[str, Interval]:
        """95 % bootstrap interval of R@1, by direction."""
        return {"t2v": _interval(self.sim), "v2t": _interval(self.sim.T)}

    def arranged(self) -> float | None:
        """Among captions whose top answer is in their own group of four: percent that find their own clip."""
        best, every = self.sim.argmax(dim=1), torch.arange(len(self.sim))
        near = best // ARRANGEMENTS == every // ARRANGEMENTS
        return 100 * float((best == every)[near].float().mean()) if bool(near.any()) else None


def _interval(sim: Tensor) -> Interval:
    """95 % bootstrap interval of R@1 of the queries in rows.

    Groups of four are drawn whole: clips with the same words are confused with each other and are not independent.
    """
    found = ranks(sim, torch.arange(len(sim))) == 1
    every, four = torch.arange(len(found)), torch.arange(len(found)) // ARRANGEMENTS
    # recall_interval draws videos with all their captions. Here a "video" is a four, and its captions are hits or not.
    hits = (~found).float()[:, None].repeat(1, len(found) // ARRANGEMENTS)
    hits[every, four] = found.float()
    return recall_interval(hits, four)


def tokenizer() -> open_clip.SimpleTokenizer:
    return open_clip.SimpleTokenizer(context_length=CONTEXT)


def compare(
    training: Pairs, test: Split, decoded: Sequence[Tensor], steps: int, seed: int, bars: Progress
) -> tuple[list[Row], dict[str, DRL]]:
    """Train and score a model for each of ``ROWS``: the same towers at first, the same batches, no row tuned.

    The towers train first, by DP as CLIP does: XTI and MLP learn nothing in so few steps when towers and network are
    both new.

    Args:
        decoded: the real frames of each of ``test``'s clips.

    Returns:
        the rows, and their models by name.
    """
    towers, rows, models = None, [], {}
    for name, options in {"towers": ROWS["DP"], **ROWS}.items():
        model, _ = small_model(SIZE, CONTEXT, seed, towers, **options)
        config = RunConfig("folder", pretrained=None, temporal=None, seed=seed, **RECIPE, **options)
        task = bars.add_task(name, total=steps, note="")
        losses: list[float] = []
        start = time.perf_counter()
        for loss in train(model, training, config, steps, together=ARRANGEMENTS):
            losses.append(loss)
            bars.update(task, completed=len(losses), note=f"loss {loss:.2f}")
        if towers is None:
            towers = model.clip
            continue
        seconds = time.perf_counter() - start
        found = evaluate(model, test, tokenizer(), SAMPLING, max_words=CONTEXT, decoded=decoded)
        rows.append(Row(name, losses, found.sim, seconds))
        models[name] = model
    return rows, models


def draw(rows: list[Row], batch: int, folder: Path) -> list[Path]:
    """Write ``loss.png`` and ``recall.png``."""
    candidates = len(rows[0].sim)
    points = {
        row.name: {key: plots.Point(row.metrics[key]["R1"], row.intervals[key]) for key in DIRECTIONS} for row in rows
    }
    figures = {
        "loss.png": plots.loss_plot(
            {row.name: row.losses for row in rows}, batch, "Training from the same towers, one recipe for all"
        ),
        "recall.png": plots.interval_plot(
            points, chance(candidates)["R1"], f"R@1 among {candidates} held-out clips, with 95 % intervals"
        ),
    }
    for name, figure in figures.items():
        plots.save(figure, folder / name)
    return [folder / name for name in figures]


def table(rows: list[Row]) -> Table:
    """Make a table like the paper's, with chance."""
    candidates = len(rows[0].sim)
    title = f"Search among {candidates} held-out clips: text to video, and R@1 of video to text; recalls in percent"
    table = Table("", title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    for name in ("R@1", "R@5", "R@10", "MdR", "MnR", "v2t R@1"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        firsts = [
            f"{row.metrics[key]['R1']:.1f} \\[{low:.0f}, {high:.0f}]" for key, (low, high) in row.intervals.items()
        ]
        values = row.metrics["t2v"]
        table.add_row(row.name, firsts[0], *(f"{values[key]:.1f}" for key in ("R5", "R10", "MdR", "MnR")), firsts[1])
    blind = chance(candidates)
    table.add_section()
    table.add_row("chance", *(f"{blind[key]:.1f}" for key in ("R1", "R5", "R10", "MdR", "MnR", "R1")))
    return table


def findings(rows: list[Row]) -> list[str]:
    """Say in sentences what the table's numbers show and what they do not."""
    blind = chance(len(rows[0].sim))["R1"]
    interval = {row.name: row.intervals["t2v"] for row in rows}
    best = max(rows, key=lambda row: row.recall)
    others = [row.name for row in rows if row is not best]
    level = [name for name in others if overlap(interval[name], interval[best.name])]
    below = [name for name in others if name not in level]
    found = [f"Highest R@1, text to video: {best.name}, {best.recall:.1f}."]
    if level:
        found.append(f"Its interval overlaps {_list(level)}: this run does not order them.")
    if below:
        found.append(f"It lies above {_list(below)}.")
    by_name = {row.name: row for row in rows}
    for better, worse in CLAIMS:
        apart = by_name[better].recall - by_name[worse].recall
        verdict = (
            "the intervals overlap, this run does not order them"
            if overlap(interval[better], interval[worse])
            else "the intervals are apart"
        )
        found.append(f"{better} against {worse}: {apart:+.1f} points; {verdict}.")
    lost = [name for name, (low, _) in interval.items() if low <= blind]
    if lost:
        found.append(f"Not above chance by their intervals: {_list(lost)}.")
    arranged = [f"{row.name} {value:.0f} %" for row in rows if (value := row.arranged()) is not None]
    if arranged:
        found.append(
            f"Where the first answer is one of the caption's four, it is the right one (chance: "
            f"{100 / ARRANGEMENTS:.0f} %): {_list(arranged)}."
        )
    return found


def as_json(rows: list[Row]) -> dict[str, Any]:
    """The numbers of table and findings."""
    return {
        "held_out": len(rows[0].sim),
        "chance": chance(len(rows[0].sim)),
        "rows": [
            {
                "name": row.name,
                "metrics": row.metrics,
                "R1_interval_95": row.intervals,
                "seconds": round(row.seconds, 1),
            }
            for row in rows
        ],
        "findings": findings(rows),
    }


def overlap(one: Interval, other: Interval) -> bool:
    return one[0] <= other[1] and other[0] <= one[1]


def _list(names: list[str]) -> str:
    return ", ".join(names[:-1]) + f" and {names[-1]}" if len(names) > 1 else names[0]
