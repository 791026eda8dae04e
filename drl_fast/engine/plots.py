"""Plots of training and of recall, for runs and for the demo."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..atomic_write import write_atomically
from ..metrics import DIRECTIONS

# Colour-blind safe (Okabe & Ito), each with its own line style.
COLOURS = ("#000000", "#E69F00", "#999999", "#CC79A7", "#56B4E9", "#0072B2", "#D55E00")
LINES = ("-", "-.", ":", (0, (1, 1)), "--", "-", "-")
MARKERS = {"t2v": ("#0072B2", "o"), "v2t": ("#E69F00", "s")}
GREY = "#777777"
# A plotted loss is the mean over this share of all steps.
SMOOTHED = 1 / 30
# Curves of at most so many points show each of them.
FEW = 12


class Point(NamedTuple):
    """A recall in percent and its interval."""

    value: float
    interval: tuple[float, float]


def save(figure: Figure, path: Path) -> None:
    """Write a PNG; a file at ``path`` is always a whole one.

    Raises:
        OSError: a full disk, or a folder that cannot be written to.
    """
    write_atomically(path, partial(figure.savefig, format="png"))


def loss_plot(losses: Mapping[str, Sequence[float]], batch: int, title: str, *, chance: bool = True) -> Figure:
    """Plot every step's losses, smoothed, and with ``chance`` log(batch), the loss of guessing with InfoNCE."""
    steps = max(map(len, losses.values()))
    window = max(1, round(SMOOTHED * steps))
    curves = {}
    for name, values in losses.items():
        means = torch.tensor(values, dtype=torch.float64).unfold(0, window, 1).mean(dim=1).tolist()
        curves[name] = (range(window, len(values) + 1), means)
    guessing = math.log(batch)
    line = (f"log({batch}) = {guessing:.2f}, chance", guessing) if chance else None
    figure, axes = _curves(curves, title, line)
    axes.set_xlabel("step")
    axes.set_ylabel(f"loss in nats, {batch} pairs" + (f", mean of {window} steps" if window > 1 else ""))
    return figure


def recall_plot(evaluations: Mapping[int, Mapping[str, Mapping[str, float]]], title: str) -> Figure:
    """Plot the recalls of both directions, evaluation by evaluation."""
    epochs = sorted(evaluations)
    curves = {
        f"{direction}, R@{k}": (epochs, [evaluations[epoch][key][f"R{k}"] for epoch in epochs])
        for key, direction in DIRECTIONS.items()
        for k in (1, 5, 10)
    }
    figure, axes = _curves(curves, title)
    axes.set_xlabel("epoch")
    axes.set_ylabel("recall in percent")
    return figure


def interval_plot(points: Mapping[str, Mapping[str, Point]], chance: float, title: str) -> Figure:
    """Plot recalls with their intervals: a line per name, a marker per direction."""
    figure, axes = _figure(title)
    for offset, (key, (colour, marker)) in zip((-0.14, 0.14), MARKERS.items(), strict=True):
        shown = [named[key] for named in points.values()]
        # A percentile interval need not contain the value itself.
        lower = [max(0.0, point.value - point.interval[0]) for point in shown]
        upper = [max(0.0, point.interval[1] - point.value) for point in shown]
        axes.errorbar(
            [point.value for point in shown],
            [place + offset for place in range(len(shown))],
            xerr=[lower, upper],
            fmt=marker,
            color=colour,
            markersize=6,
            capsize=3,
            linewidth=1.6,
            label=DIRECTIONS[key],
        )
    axes.axvline(chance, color=GREY, linestyle="--", linewidth=1.2, label=f"chance, {chance:.3g} %")
    axes.set_yticks(range(len(points)), list(points))
    axes.invert_yaxis()
    axes.set_xlabel("R@1 in percent")
    axes.grid(True, axis="x", color="#e5e5e5", linewidth=0.8)
    axes.tick_params(axis="y", length=0)
    # matplotlib puts chance's line first.
    (line, *markers), (chance_name, *names) = axes.get_legend_handles_labels()
    figure.legend([*markers, line], [*names, chance_name], frameon=False, loc="outside lower center", ncols=3)
    return figure


def _curves(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    title: str,
    reference: tuple[str, float] | None = None,
) -> tuple[Figure, Axes]:
    """Draw curves and a thin horizontal reference, with the legend beside them in the order of their right ends."""
    figure, axes = _figure(title)
    handles = []
    for colour, line, (name, (x, y)) in zip(COLOURS, LINES, curves.items(), strict=False):
        marker = "o" if len(x) <= FEW else ""
        drawn = axes.plot(x, y, color=colour, linestyle=line, linewidth=1.8, marker=marker, markersize=4, label=name)
        handles.append((y[-1], drawn[0]))
    if reference is not None:
        name, height = reference
        handles.append((height, axes.axhline(height, color=GREY, linewidth=0.8, label=name)))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(True, color="#e5e5e5", linewidth=0.8)
    ordered = [line for _, line in sorted(handles, key=lambda handle: -handle[0])]
    axes.legend(handles=ordered, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), handlelength=3)
    return figure, axes


def _figure(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, 4.4), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure, axes
