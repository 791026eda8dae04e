"""Pictures of a result: time and memory of a training step against the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from benchmarks.problem import Shape

# Colour-blind safe (Okabe & Ito), one a contestant in every picture.
STYLES = {
    "drl_fast": ("#0072B2", "o", "-"),
    "eager": ("#D55E00", "s", "-"),
    "compile": ("#E69F00", "^", "-"),
    "mm": ("#555555", "", "--"),
}
LABELS = {"mm": "torch.mm alone (forward)"}


def draw(result: dict[str, Any], folder: Path) -> list[Path]:
    """Write ``wti_time.png`` and ``wti_memory.png``; returns their paths."""
    where = result["machine"]["gpu"] or f"{result['machine']['cpu']}, {result['threads']} threads"
    return [
        _picture(
            result, _time_series(result), folder / "wti_time.png",
            "Time of one training step of the interaction", "milliseconds", where,
        ),
        _picture(
            result, _memory_series(result), folder / "wti_memory.png",
            "Memory that one training step adds to its inputs", "MB", where,
        ),
    ]  # fmt: skip


def _time_series(result: dict[str, Any]) -> dict[str, dict[int, float]]:
    """{contestant: {batch: ms}} at the default shape."""
    series: dict[str, dict[int, float]] = {name: {} for name in STYLES}
    for record in result["time"]:
        batch = record["shape"]["batch"]
        if record["mode"] != "train" or record["shape"] != Shape(batch).as_dict():
            continue
        for name, points in series.items():
            if name in record["results"]:
                points[batch] = record["results"][name]["ms"]["median"]
    return series


def _memory_series(result: dict[str, Any]) -> dict[str, dict[int, float]]:
    series: dict[str, dict[int, float]] = {name: {} for name in STYLES}
    for row in result["memory"]:
        if row["status"] == "ok":
            series[row["contestant"]][row["shape"]["batch"]] = row["mb"]
    return series


def _picture(
    result: dict[str, Any], series: dict[str, dict[int, float]], path: Path, title: str, unit: str, where: str
) -> Path:
    figure, axes = plt.subplots(figsize=(7, 4.4), layout="constrained")
    # The legend's order is that of the lines' right ends, as the eye meets them.
    drawn = sorted((n for n in series if series[n]), key=lambda n: -series[n][max(series[n])] / max(series[n]) ** 2)
    for name in drawn:
        colour, marker, line = STYLES[name]
        batches = sorted(series[name])
        label = LABELS.get(name, result["contestants"][name]["label"])
        values = [series[name][batch] for batch in batches]
        axes.plot(batches, values, color=colour, marker=marker, linestyle=line, linewidth=2, markersize=5, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sorted({batch for name in drawn for batch in series[name]})))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.grid(True, which="major", color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left")
    axes.set_xlabel("batch (texts = videos; 32 words x 12 frames x 512 channels, float32)")
    axes.set_ylabel(unit)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    axes.set_title(f"{where}; torch {result['versions']['torch']}", loc="left", fontsize=8, color="#777777")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
