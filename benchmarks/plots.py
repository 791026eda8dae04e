"""Pictures of a result: time and memory of a training step against the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, NullLocator, StrMethodFormatter

from problems import Shape

Series = dict[str, dict[int, float]]  # contestant -> batch -> value
# Colours are safe for the colour-blind (Okabe & Ito); a contestant has one in every picture.
STYLES = {
    "drl_fast": ("#0072B2", "o", "-"),
    "eager": ("#D55E00", "s", "-"),
    "compile": ("#E69F00", "^", "-"),
    "mm": ("#555555", ".", "--"),
    "fused": ("#0072B2", "o", "-"),
    "two_steps": ("#009E73", "D", "-"),
    "full": ("#0072B2", "o", "-"),
    "diagonal": ("#56B4E9", "v", "-"),
    "eager_full": ("#D55E00", "s", "-"),
    "eager_diagonal": ("#E69F00", "^", "-"),
    "outer": ("#CC79A7", "X", "-"),
    "products": ("#555555", ".", "--"),
}
# Benchmark -> (what is measured, the mode of its training step, the contestants drawn).
DRAWN = {
    "wti": ("the interaction", "train", ("drl_fast", "eager", "compile", "mm")),
    "contrastive": ("the contrastive loss", "train", ("fused", "two_steps", "eager")),
    "cdcr": ("cdcr_loss", "pairs", ("full", "diagonal", "eager_full", "eager_diagonal", "outer", "products")),
}


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw a benchmark's pictures beside its result's ``path``, where it has any."""
    if result["benchmark"] not in DRAWN or not result.get("memory"):
        return
    what, mode, names = DRAWN[result["benchmark"]]
    family = Shape(**result["memory"][0]["shape"]).family()
    time, memory = ({name: {} for name in names} for _ in range(2))
    for row in result["time"]:
        shape = Shape(**row["shape"])
        if row["mode"] == mode and shape.family() == family:
            for name in set(names) & set(row["results"]):
                time[name][shape.batch] = row["results"][name]["ms"]["median"]
    for row in result["memory"]:
        shape = Shape(**row["shape"])
        if row["status"] == "ok" and shape.family() == family:
            memory[row["contestant"]][shape.batch] = row["mb"]
    axis = f"batch ({family.nt} words x {family.nv} frames x {family.dim} channels, {family.dtype})"
    title = f"Time of one training step of {what}"
    _picture(result, time, path.with_name(f"{path.stem}_time.png"), title, "milliseconds", axis)
    title = f"Memory that one training step of {what} adds to its inputs"
    _picture(result, memory, path.with_name(f"{path.stem}_memory.png"), title, "MB", axis)


def draw_search(result: dict[str, Any], path: Path) -> None:
    """Draw a query's median time against the number of windows, beside its result's ``path``."""
    series: dict[str, list[tuple[int, float]]] = {}
    found = {
        section: [r for r in result[section] if r["status"] == "ok"] for section in ("windows", "vectors", "tokens")
    }
    series["drl-fast search, first query"] = [(row["windows"], row["first_ms"]) for row in found["windows"]]
    for section, label in (("windows", "drl-fast search"), ("vectors", "candidates by pooled vectors")):
        series[label] = [(row["windows"], row["ms"]["p50"]) for row in found[section]]
    for row in result["memory"]:
        if row["status"] == "ok":
            label = "drl_fast.topk" if row["form"] == "drl-fast" else row["form"]
            series.setdefault(f"{label}, from memory", []).append((row["windows"], row["ms"]["p50"]))
    series["LanceDB's multivectors"] = [(row["windows"], row["ms"]["p50"]) for row in found["tokens"]]
    figure, axes = plt.subplots(figsize=(8, 4.4), layout="constrained")
    colours = ("#56B4E9", "#0072B2", "#009E73", "#D55E00", "#E69F00", "#CC79A7", "#000000", "#999999")
    for (label, points), colour in zip(series.items(), colours, strict=False):
        if points:
            axes.plot(
                *zip(*sorted(points), strict=True), color=colour, marker="o", linewidth=2, markersize=5, label=label
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    for scale in (axes.xaxis, axes.yaxis):
        scale.set_major_formatter(StrMethodFormatter("{x:,.9g}"))
    axes.grid(True, which="major", color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set_xlabel("windows in the index (12 tokens of 512 channels each)")
    axes.set_ylabel("milliseconds a query, median")
    figure.suptitle("Time of a search without encoding the query", x=0.01, ha="left", fontsize=12, fontweight="bold")
    axes.set_title(f"{result['machine']['cpu']}, {result['threads']} threads", loc="left", fontsize=8, color="#777777")
    picture = path.with_name(f"{path.stem}.png")
    figure.savefig(picture, dpi=150)
    plt.close(figure)
    print(f"wrote {picture}")


def _picture(result: dict[str, Any], series: Series, path: Path, title: str, unit: str, axis: str) -> None:
    where = result["machine"]["gpu"] or f"{result['machine']['cpu']}, {result['threads']} threads"
    figure, axes = plt.subplots(figsize=(8, 4.4), layout="constrained")
    for name in ordered(series):
        colour, marker, line = STYLES[name]
        batches, values = zip(*sorted(series[name].items()), strict=True)
        label = "torch.mm alone (forward)" if name == "mm" else result["contestants"][name]["label"]
        axes.plot(batches, values, color=colour, marker=marker, linestyle=line, linewidth=2, markersize=5, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sorted({batch for points in series.values() for batch in points})))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    for scale in (axes.xaxis, axes.yaxis):
        scale.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.grid(True, which="major", color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    # Beside the axes it covers no curve.
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set_xlabel(axis)
    axes.set_ylabel(unit)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    axes.set_title(f"{where}; torch {result['versions']['torch']}", loc="left", fontsize=8, color="#777777")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"wrote {path}")


def ordered(series: Series) -> list[str]:
    """Return the contestants that have points, highest curve first: the legend's order.

    Curves end at different batches. One that ends before the largest is extended as the square of the batch.
    """

    def height(name: str) -> float:
        last = max(series[name])
        return series[name][last] / last**2

    return sorted((name for name in series if series[name]), key=height, reverse=True)
