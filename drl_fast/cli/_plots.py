"""Pictures of the demo's comparison: loss against steps, and recall with its intervals."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..atomic_write import write_atomically
from ._comparison import ROWS, Row
from ._tables import DIRECTIONS, chance

# Colour-blind safe (Okabe & Ito), and another line for each as well.
COLOURS = ("#000000", "#E69F00", "#999999", "#CC79A7", "#56B4E9", "#0072B2", "#D55E00")
LINES = ("-", "-.", ":", (0, (1, 1)), "--", "-", "-")
STYLES = dict(zip(ROWS, zip(COLOURS, LINES, strict=True), strict=True))
MARKERS = {"t2v": ("#0072B2", "o"), "v2t": ("#E69F00", "s")}
GREY = "#777777"
# Steps that a plotted loss is the mean of, as a share of all.
SMOOTHED = 1 / 30


def draw(rows: list[Row], batch: int, folder: Path) -> list[Path]:
    """Write ``loss.png`` and ``recall.png``; a file there is always a whole one."""
    figures = {"loss.png": _losses(rows, batch), "recall.png": _recalls(rows)}
    for name, figure in figures.items():
        write_atomically(folder / name, partial(figure.savefig, format="png"))
    return [folder / name for name in figures]


def _losses(rows: list[Row], batch: int) -> Figure:
    figure, axes = _figure("Training from the same towers, one recipe for all")
    window = max(1, round(SMOOTHED * len(rows[0].losses)))
    for row in rows:
        colour, line = STYLES[row.name]
        losses = torch.tensor(row.losses, dtype=torch.float64).unfold(0, window, 1).mean(dim=1).tolist()
        steps = range(window, len(row.losses) + 1)
        axes.plot(steps, losses, color=colour, linestyle=line, linewidth=1.8, label=row.name)
    blind = math.log(batch)
    axes.axhline(blind, color=GREY, linewidth=1)
    axes.annotate("chance", (len(rows[0].losses), blind), (0, 3), textcoords="offset points", ha="right", color=GREY)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step")
    axes.set_ylabel(f"loss on {batch} pairs" + (f", mean of {window} steps" if window > 1 else ""))
    axes.grid(True, color="#e5e5e5", linewidth=0.8)
    # Beside, so that no line passes under it, and in the order of the lines' right ends.
    handles, names = axes.get_legend_handles_labels()
    order = sorted(range(len(rows)), key=lambda i: -handles[i].get_ydata()[-1])
    axes.legend(
        [handles[i] for i in order],
        [names[i] for i in order],
        frameon=False,
        loc="center left",
        bbox_to_anchor=(1, 0.5),
        handlelength=3,
    )
    return figure


def _recalls(rows: list[Row]) -> Figure:
    candidates = len(rows[0].sim)
    figure, axes = _figure(f"R@1 among {candidates} held-out clips, with 95 % intervals")
    for offset, (key, (colour, marker)) in zip((-0.14, 0.14), MARKERS.items(), strict=True):
        values = [row.metrics[key]["R1"] for row in rows]
        intervals = [row.interval(key) for row in rows]
        # A percentile interval need not hold the value itself.
        reach = [
            [max(0.0, value - low) for value, (low, _) in zip(values, intervals, strict=True)],
            [max(0.0, high - value) for value, (_, high) in zip(values, intervals, strict=True)],
        ]
        axes.errorbar(
            values,
            [place + offset for place in range(len(rows))],
            xerr=reach,
            fmt=marker,
            color=colour,
            markersize=6,
            capsize=3,
            linewidth=1.6,
            label=DIRECTIONS[key],
        )
    blind = chance(candidates)["R1"]
    axes.axvline(blind, color=GREY, linestyle="--", linewidth=1.2, label=f"chance, {blind:.3g} %")
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(-2, 102)
    axes.set_xlabel("R@1 in percent")
    axes.grid(True, axis="x", color="#e5e5e5", linewidth=0.8)
    axes.tick_params(axis="y", length=0)
    # Points before chance's line, which matplotlib puts first.
    (line, *points), (chance_name, *names) = axes.get_legend_handles_labels()
    figure.legend([*points, line], [*names, chance_name], frameon=False, loc="outside lower center", ncols=3)
    return figure


def _figure(title: str):  # type: ignore[no-untyped-def]
    figure = Figure(figsize=(7, 4.4), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure, axes
