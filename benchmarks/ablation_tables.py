"""The demo's comparison, and the paper's ablation on MSR-VTT, published and measured.

The ablation's measured columns come from files that ``drl-fast eval --out`` wrote: benchmarks/results/msrvtt/ROW.json
for configs/msrvtt_ROW.yaml (zero_shot.json for the row that is not trained). Nothing else fills them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.cells import NOTHING, Table
from benchmarks.harness import ROOT

FOLDER = Path("benchmarks/results/msrvtt")
DIRECTIONS = ("t2v", "v2t")


def ablation(result: dict[str, Any]) -> Table:
    """R@1 in both directions, published and measured."""
    rows = []
    for row in result["rows"]:
        stem = Path(row["config"]).stem.removeprefix("msrvtt_")
        command = f"`drl-fast {'train' if row['trained'] else 'eval'} --config {row['config']}`"
        measured = _measured(ROOT / FOLDER / f"{stem if row['trained'] else 'zero_shot'}.json", row)
        rows.append([row["name"], command, _pair(row["published"]), _pair(measured)])
    return Table("Ablation", ["row", "command", "published R@1", "measured R@1"], rows)


def _pair(metrics: dict[str, dict[str, float]] | None) -> str:
    """Text to video / video to text."""
    return NOTHING if metrics is None else " / ".join(f"{metrics[key]['R1']:.1f}" for key in DIRECTIONS)


def _measured(path: Path, row: dict[str, Any]) -> dict[str, dict[str, float]] | None:
    """An evaluation's metrics, if there is one; it must be of this row and of the whole test part.

    Raises:
        ValueError: an evaluation of something else.
    """
    if not path.exists():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    said = (found["dataset"], found["part"], found["texts"], found["videos"], found["untrained"] is None)
    if said[:4] != ("msrvtt", "test", 1000, 1000) or (row["trained"] and (found["checkpoint"] is None or not said[4])):
        raise ValueError(f"{path} must be drl-fast eval's of {row['name']} on MSR-VTT's 1,000 test pairs, got {said}")
    return found["metrics"]


def demo(result: dict[str, Any]) -> Table:
    """The demo's comparison, as it printed it."""
    rows = []
    for row in result["rows"]:
        firsts = {
            key: f"{row['metrics'][key]['R1']:.1f} [{low:.0f}, {high:.0f}]"
            for key, (low, high) in row["R1_interval_95"].items()
        }
        others = [f"{row['metrics']['t2v'][key]:.1f}" for key in ("R5", "R10", "MdR", "MnR")]
        rows.append([row["name"], firsts["t2v"], *others, firsts["v2t"]])
    blind = result["chance"]
    rows.append(["chance", *(f"{blind[key]:.2f}" for key in ("R1", "R5", "R10", "MdR", "MnR", "R1"))])
    return Table("The demo", ["", "R@1", "R@5", "R@10", "MdR", "MnR", "v2t R@1"], rows)


def demo_line(result: dict[str, Any]) -> str:
    """What was run, and what it shows and does not."""
    return (
        f"On {result['threads']} CPU threads it took {result['seconds'] / 60:.1f} minutes. "
        + " ".join(result["findings"][:-1])
        + " It is one seed; with another number of threads, which rounds otherwise, rows move by some points."
    )


TABLES = {"ablation": ablation, "demo": demo}
LINES = {"demo_line": demo_line}
