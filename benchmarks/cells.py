"""What tables of different benchmarks share: how a figure is written, and the tables that every result can have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.problem import Shape

NOTHING = "-"


@dataclass(frozen=True)
class Table:
    title: str
    columns: list[str]
    rows: list[list[str]]


# --- figures ----------------------------------------------------------------------------------------------------------
def milliseconds(times: dict[str, Any]) -> str:
    median = times["ms"]["median"]
    return f"{median:.0f} ms" if median >= 100 else f"{median:.3g} ms"


def ratio(times: dict[str, Any]) -> str:
    """The median, and the quartiles where they are wider than the digits shown."""
    median, q1, q3 = (f"{times['ratio'][key]:.2f}" for key in ("median", "q1", "q3"))
    return median if q1 == q3 else f"{median} ({q1} to {q3})"


def head(result: dict[str, Any], name: str) -> str:
    return result["contestants"][name]["label"]


def megabytes(row: dict[str, Any] | None) -> str:
    if row is None:
        return NOTHING
    return f"{row['mb']:.0f} MB" if row["status"] == "ok" else row["status"]


def label(shape: dict[str, Any]) -> str:
    return Shape(**shape).label()


def family(shape: dict[str, Any]) -> dict[str, Any]:
    """A shape but for its batch."""
    return {**shape, "batch": 0}


# --- tables -----------------------------------------------------------------------------------------------------------
def memory(result: dict[str, Any]) -> Table:
    """Rows are batches where all shapes are otherwise alike, else shapes."""
    names = list(dict.fromkeys(row["contestant"] for row in result["memory"]))
    shapes = {tuple(row["shape"].values()): row["shape"] for row in result["memory"]}
    alike = len({tuple(family(shape).values()) for shape in shapes.values()}) == 1
    found = {(row["contestant"], tuple(row["shape"].values())): row for row in result["memory"]}
    rows = []
    for key, shape in sorted(shapes.items(), key=lambda item: (*item[0][1:4], item[0])):
        cells = [found.get((name, key)) for name in names]
        rows.append([str(shape["batch"]) if alike else label(shape), *(megabytes(cell) for cell in cells)])
    title = "Peak memory of a training step beyond its inputs"
    if alike:
        one = result["memory"][0]["shape"]
        title += f", batch x ({one['nt']} words, {one['nv']} frames), D = {one['dim']}, {one['dtype']}"
    return Table(title, ["batch" if alike else "batch, words, frames", *(head(result, name) for name in names)], rows)


def budget(result: dict[str, Any]) -> Table:
    names = list(dict.fromkeys(row["contestant"] for row in result["budget"]))
    rows = []
    for size in sorted({row["budget_mb"] for row in result["budget"]}):
        fits = {r["contestant"]: r["fits"] for r in result["budget"] if r["budget_mb"] == size}
        rows.append([f"{size} MB", *(str(fits[name]["batch"]) if fits.get(name) else NOTHING for name in names)])
    title = "Largest batch whose training step adds at most so much to its inputs"
    return Table(title, ["budget", *(head(result, name) for name in names)], rows)


# --- lines ------------------------------------------------------------------------------------------------------------
def notes(result: dict[str, Any]) -> str:
    """What each contestant is and how it was called, one a line."""
    names = dict.fromkeys(name for record in result["time"] for name in record["results"])
    lines = []
    for name in names:
        about = result["contestants"][name]
        version = f" {about['version']}" if about.get("version") else ""
        lines.append(f"- {about['label']}{version}: {about['note']}")
    absent = dict.fromkeys(
        (name, reason)
        for record in result["time"]
        for name, reason in record["absent"].items()
        if not any(name in other["results"] for other in result["time"])
    )
    lines += [f"- {result['contestants'][name]['label']}: not measured, {reason}" for name, reason in absent]
    return "\n".join(lines)


def machine_line(result: dict[str, Any]) -> str:
    """What was measured where, by which command."""
    machine, versions = result["machine"], result["versions"]
    name = machine["gpu"] or f"{machine['cpu']}, {result['threads']} threads"
    return (
        f"{name}; torch {versions['torch']}, Python {versions['python']}, drl-fast {versions['drl_fast']} "
        f"({versions['commit']}), {result['date'][:10]}; `{result['command']}`"
    )
