"""Tables of the losses' results: cdcr.json and contrastive.json."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.cells import NOTHING, Table, budget, head, label, memory, milliseconds, ratio

LOSSES = ("full", "eager_full", "outer", "diagonal", "eager_diagonal")


# --- cdcr.json --------------------------------------------------------------------------------------------------------
def cdcr(result: dict[str, Any]) -> Table:
    """Milliseconds of ``cdcr_loss``, forward and backward."""
    rows = []
    for record in _records(result, "pairs"):
        times = record["results"]
        rows.append([label(record["shape"]), *(milliseconds(times[n]) if n in times else NOTHING for n in LOSSES)])
    title = "cdcr_loss, forward + backward"
    return Table(title, ["pairs, words, frames", *(head(result, name) for name in LOSSES)], rows)


def cdcr_ratios(result: dict[str, Any]) -> Table:
    title = "cdcr_loss, forward + backward, as a multiple of the bare products of both sides"
    return _ratios(result, "pairs", title, "pairs, words, frames", label)


def cross_correlation(result: dict[str, Any]) -> Table:
    title = "cross_correlation_loss, forward + backward, as a multiple of its three bare products"
    return _ratios(result, "rows", title, "rows x channels", lambda s: f"{s['batch'] * s['nt']} x {s['dim']}")


def _ratios(
    result: dict[str, Any], mode: str, title: str, first: str, name_of: Callable[[dict[str, Any]], str]
) -> Table:
    rows = []
    for record in _records(result, mode):
        times = record["results"]
        cells = [ratio(times[name]) if name in times else NOTHING for name in LOSSES]
        rows.append([name_of(record["shape"]), milliseconds(times["products"]), *cells])
    return Table(title, [first, "bare products", *(head(result, name) for name in LOSSES)], rows)


def _records(result: dict[str, Any], mode: str) -> list[dict[str, Any]]:
    found = [record for record in result["time"] if record["mode"] == mode]
    return sorted(found, key=lambda record: (record["shape"]["lengths"], record["shape"]["batch"]))


def cdcr_line(result: dict[str, Any]) -> str:
    """The claim in one sentence."""
    times = {record["mode"]: record for record in result["time"] if record["shape"]["batch"] == 48}
    rows, pairs = times["rows"]["results"], times["pairs"]["results"]
    used = {row["contestant"]: row["mb"] for row in result["memory"] if row["shape"]["batch"] == 48}
    full, diagonal = (rows[form]["ratio"]["median"] for form in ("full", "diagonal"))
    return (
        f"At 48 pairs of 32 words and 12 frames, D = 512, a step of `cdcr_loss` takes "
        f"{milliseconds(pairs['diagonal'])} ({used['diagonal']:.0f} MB) in the published diagonal form and "
        f"{milliseconds(pairs['full'])} ({used['full']:.0f} MB) in the full one; the public code's form takes "
        f"{pairs['outer']['ms']['median'] / 1e3:.1f} s and {used['outer'] / 1e3:.1f} GB. `cross_correlation_loss` "
        f"costs {full:.2f} of its three bare products, {diagonal:.2f} in the diagonal form."
    )


# --- contrastive.json -------------------------------------------------------------------------------------------------
def contrastive(result: dict[str, Any]) -> Table:
    """Milliseconds, and the two ratios that matter, within a round."""
    names = ("eager", "two_steps", "fused")
    rows = []
    for record in result["time"]:
        times, against = record["results"], record["against"]
        cells = [milliseconds(times[name]) if name in times else NOTHING for name in names]
        shares = [ratio({"ratio": against[n]}) if n in against else NOTHING for n in ("eager", "two_steps")]
        rows.append([label(record["shape"]), *cells, *shares])
    heads = ["batch, words, frames", *(head(result, name) for name in names), "of eager", "of two steps"]
    return Table("A training step of the contrastive loss where all fit", heads, rows)


CDCR = {
    "cdcr": cdcr,
    "cdcr_ratios": cdcr_ratios,
    "cross_correlation": cross_correlation,
    "cdcr_memory": memory,
}
CONTRASTIVE = {
    "contrastive": contrastive,
    "contrastive_memory": memory,
    "contrastive_budget": budget,
}
LINES = {"cdcr_line": cdcr_line}
