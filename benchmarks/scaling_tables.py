"""Tables of the scaling model (static/scaling.json) and of its check (scaling_check.json)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.cells import NOTHING, Table


def _time(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{_short(seconds * factor)} {unit}"
    return f"{_short(seconds * 1e6)} us"


def _bytes(size: float) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if size >= factor:
            return f"{_short(size / factor)} {unit}"
    return f"{_short(size / 1e3)} kB"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def _pairs(count: int) -> str:
    return f"{count / 2**20:.0f}M" if count >= 2**20 else f"{count // 1024}k"


def _plan(nt: int) -> Callable[[dict[str, Any]], Table]:
    def table(result: dict[str, Any]) -> Table:
        rows = []
        for row in result["plan"]:
            work, ways = row["work"], row["ways"]
            if work["nt"] != nt:
                continue
            ring, gathered = ways["ring"], ways["gathered"]
            rows.append(
                [
                    f"{_pairs(work['pairs'])} on {work['ranks']}",
                    _time(ring["compute"]),
                    _bytes(gathered["held"]),
                    _time(gathered["network"]),
                    _time(gathered["step"]),
                    gathered["bound"],
                    _bytes(ring["held"]),
                    _time(ring["network"]),
                    _time(ring["step"]),
                    ring["bound"],
                ]
            )
        heads = [
            "pairs on GPUs",
            "compute",
            *(f"{way}: {what}" for way in ("gathered", "ring") for what in ("held", "network", "step", "bound by")),
        ]
        return Table("A step of the contrastive loss by the model", heads, rows)

    return table


def limits(result: dict[str, Any]) -> Table:
    """Where the ring's hops hide, how large a batch fits, and what CDCR adds."""
    rows = []
    for row in result["limits"]:
        work = row["work"]
        most = [f"{row['most'][way]:,}" for way in ("gathered", "ring")]
        adds = [_bytes(row["cdcr"][form]) for form in ("diagonal", "full")]
        label = f"({work['nt']}, {work['nv']}, {work['dim']}) on {work['ranks']}"
        rows.append([label, f"{row['hiding_rows']:.0f}", *most, *adds])
    heads = [
        "words, frames, channels on GPUs",
        "pairs a GPU that hide a hop",
        "most pairs, gathered",
        "most pairs, ring",
        "CDCR sends, diagonal",
        "CDCR sends, full",
    ]
    return Table("Limits by the model", heads, rows)


def hardware(result: dict[str, Any]) -> str:
    machine = result["machine"]
    return (
        f"{machine['name']}: {machine['flops'] / 1e12:.1f} TFLOP/s bf16, of which {machine['share']:.0%} is assumed to "
        f"be reached; {machine['memory'] / 1e9:.0f} GB, of which the loss may take {result['budget'] / 1e9:.0f} GB; "
        f"{machine['link'] / 1e9:.0f} GB/s a direction within a node of {machine['node']}, "
        f"{machine['far'] / 1e9:.0f} GB/s a GPU between nodes."
    )


# --- the check --------------------------------------------------------------------------------------------------------
def check_alone(result: dict[str, Any]) -> Table:
    rows = []
    for time, memory in zip(result["compute"], result["memory"], strict=True):
        rows.append(
            [
                str(time["pairs"]),
                f"{time['predicted']:.0f} ms",
                f"{time['measured']:.0f} ms",
                _off(time),
                f"{memory['predicted']:.0f} MB",
                _measured(memory),
                _off(memory),
            ]
        )
    heads = ["pairs", "time, predicted", "measured", "off by", "memory, predicted", "measured", "off by"]
    return Table("One process: a step at (16, 8, 128), float32", heads, rows)


def check_group(result: dict[str, Any]) -> Table:
    rows = []
    for row in result["groups"]:
        cells = [f"{row['work']['pairs']} on {row['work']['ranks']}", row["kind"]]
        for what in ("sent", "held"):
            if what not in row:
                cells += [NOTHING] * 3
                continue
            cells += [f"{row[what][key] / 1e6:.2f} MB" for key in ("predicted", "measured")] + [_off(row[what])]
        rows.append(cells)
    heads = [
        "pairs on ranks",
        "way or form",
        "sent, predicted",
        "measured",
        "off by",
        "held, predicted",
        "measured",
        "off by",
    ]
    return Table("A gloo group, rank 0: a step at (16, 8, 128), float32", heads, rows)


def _off(row: dict[str, Any]) -> str:
    """How far the prediction is from what was measured."""
    if row["measured"] is None:
        return NOTHING
    return f"{100 * (row['predicted'] / row['measured'] - 1):+.1f} %"


def _measured(row: dict[str, Any]) -> str:
    return row["status"] if row["measured"] is None else f"{row['measured']:.0f} MB"


CHECKS = {"check_alone": check_alone, "check_group": check_group}
TABLES = {"plan_short": _plan(32), "plan_long": _plan(64), "limits": limits, **CHECKS}
LINES = {"hardware": hardware}
