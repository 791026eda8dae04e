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
    "fused": ("#0072B2", "o", "-"),
    "two_steps": ("#009E73", "D", "-"),
    "full": ("#0072B2", "o", "-"),
    "diagonal": ("#56B4E9", "v", "-"),
    "eager_full": ("#D55E00", "s", "-"),
    "eager_diagonal": ("#E69F00", "^", "-"),
    "outer": ("#CC79A7", "X", "-"),
    "products": ("#555555", "", "--"),
}
WTI = ("drl_fast", "eager", "compile", "mm")
CONTRASTIVE = ("fused", "two_steps", "eager")
CDCR = ("full", "diagonal", "eager_full", "eager_diagonal", "outer", "products")
LABELS = {"mm": "torch.mm alone (forward)"}


def draw(result: dict[str, Any], folder: Path) -> list[Path]:
    """Write ``wti_time.png`` and ``wti_memory.png``; returns their paths."""
    return _pair(result, folder, "wti", "the interaction", WTI, Shape(0), "batch (texts = videos; {})")


def draw_contrastive(result: dict[str, Any], folder: Path) -> list[Path]:
    """Write ``contrastive_time.png`` and ``contrastive_memory.png``."""
    family = Shape(**{**result["memory"][0]["shape"], "batch": 0})
    return _pair(result, folder, "contrastive", "the contrastive loss", CONTRASTIVE, family, "batch (pairs; {})")


def draw_cdcr(result: dict[str, Any], folder: Path) -> list[Path]:
    """Write ``cdcr_time.png`` and ``cdcr_memory.png``."""
    pairs = {**result, "time": [{**r, "mode": "train"} for r in result["time"] if r["mode"] == "pairs"]}
    family = Shape(**{**result["memory"][0]["shape"], "batch": 0})
    return _pair(pairs, folder, "cdcr", "cdcr_loss", CDCR, family, "pairs ({})")


def _pair(
    result: dict[str, Any], folder: Path, name: str, what: str, names: tuple[str, ...], family: Shape, axis: str
) -> list[Path]:
    """Time and memory of a training step against the batch, at shapes that differ from ``family`` in it alone."""
    axis = axis.format(f"{family.nt} words x {family.nv} frames x {family.dim} channels, {family.dtype}")
    return [
        _picture(
            result,
            _time_series(result, names, family),
            folder / f"{name}_time.png",
            f"Time of one training step of {what}",
            "milliseconds",
            axis,
        ),
        _picture(
            result,
            _memory_series(result, names, family),
            folder / f"{name}_memory.png",
            f"Memory that one training step of {what} adds to its inputs",
            "MB",
            axis,
        ),
    ]


def _time_series(result: dict[str, Any], names: tuple[str, ...], family: Shape) -> dict[str, dict[int, float]]:
    """{contestant: {batch: ms}}"""
    series: dict[str, dict[int, float]] = {name: {} for name in names}
    for record in result["time"]:
        if record["mode"] != "train" or not _is_of(record["shape"], family):
            continue
        for name, points in series.items():
            if name in record["results"]:
                points[record["shape"]["batch"]] = record["results"][name]["ms"]["median"]
    return series


def _memory_series(result: dict[str, Any], names: tuple[str, ...], family: Shape) -> dict[str, dict[int, float]]:
    series: dict[str, dict[int, float]] = {name: {} for name in names}
    for row in result["memory"]:
        if row["status"] == "ok" and _is_of(row["shape"], family):
            series[row["contestant"]][row["shape"]["batch"]] = row["mb"]
    return series


def _is_of(shape: dict[str, Any], family: Shape) -> bool:
    return {**shape, "batch": family.batch} == family.as_dict()


def _picture(
    result: dict[str, Any], series: dict[str, dict[int, float]], path: Path, title: str, unit: str, axis: str
) -> Path:
    where = result["machine"]["gpu"] or f"{result['machine']['cpu']}, {result['threads']} threads"
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
    beside = len(drawn) > 4  # so many that some line would pass under them
    axes.legend(
        frameon=False, loc="center left" if beside else "upper left", bbox_to_anchor=(1, 0.5) if beside else None
    )
    axes.set_xlabel(axis)
    axes.set_ylabel(unit)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    axes.set_title(f"{where}; torch {result['versions']['torch']}", loc="left", fontsize=8, color="#777777")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def draw_scaling(result: dict[str, Any], folder: Path) -> Path:
    """Write ``scaling.png``: memory and time of a step against the batch, by the model."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    colours = {8: "#E69F00", 64: "#0072B2", 1024: "#009E73"}
    lines = {"gathered": "--", "ring": "-"}
    plan = [row for row in result["plan"] if row["work"]["nt"] == 32]
    for ranks, colour in colours.items():
        rows = [row for row in plan if row["work"]["ranks"] == ranks]
        pairs = [row["work"]["pairs"] for row in rows]
        for way, line in lines.items():
            for axes, key, scale in ((panels[0], "held", 1e-9), (panels[1], "step", 1.0)):
                values = [row["ways"][way][key] * scale for row in rows]
                axes.plot(pairs, values, color=colour, linestyle=line, linewidth=2, label=f"{way}, {ranks} GPUs")
    panels[0].axhline(result["budget"] / 1e9, color="#555555", linewidth=1)
    panels[0].text(pairs[0], result["budget"] / 1e9 * 1.15, "what the loss may take", fontsize=8, color="#555555")
    for axes, title in zip(panels, ("GB a GPU beside its inputs", "seconds a step"), strict=True):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("pairs in the batch")
        axes.set_title(title, loc="left", fontsize=10)
        axes.xaxis.set_major_locator(FixedLocator(pairs))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1024:.0f}k" if x < 2**20 else f"{x / 2**20:.0f}M")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.grid(True, which="major", color="#dddddd", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[1].legend(frameon=False, fontsize=8)
    figure.suptitle(
        "A model, not a measurement: the contrastive loss over many GPUs",
        x=0.01,
        ha="left",
        fontsize=12,
        fontweight="bold",
    )
    figure.savefig(folder / "scaling.png", dpi=150)
    plt.close(figure)
    return folder / "scaling.png"
