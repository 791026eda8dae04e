"""Tables of model.json: where a whole training step's time and memory go."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.cells import NOTHING, Table, budget, milliseconds

TOWERS = ("text", "image", "temporal")
NAMES = {
    "text": "text tower",
    "image": "image tower",
    "temporal": "temporal transformer",
    "ours": "weights, interaction, losses: drl-fast",
    "dense": "weights, interaction, losses: dense",
    "adam": "Adam",
}


def model_time(result: dict[str, Any]) -> Table:
    """Milliseconds, and the share of the step that has this part."""
    rows = []
    for part in (*TOWERS, "adam", "ours", "dense"):
        whole = "step_dense" if part == "dense" else "step"
        cells = [
            f"{_ms(record, part)} ({_percent(record['ms'][part]['median'] / record['ms'][whole]['median'])})"
            for record in result["time"]
        ]
        rows.append([NAMES[part], *cells])
    for whole, name in (("step", "whole step, drl-fast"), ("step_dense", "whole step, dense")):
        rows.append([name, *(_ms(record, whole) for record in result["time"])])
    rows.append(["dense / drl-fast, loss alone", *(_times(record["dense_over_ours"]) for record in result["time"])])
    return Table("Time of a training step", _heads(result["time"]), rows)


def model_memory(result: dict[str, Any]) -> Table:
    """What towers hold for the backward, what the loss adds to it at its peak, and the step's peak."""
    measured = [record for record in result["phases"] if record["status"] == "ok"]
    columns = [_memory(record["result"]) for record in measured]
    rows = [[name, *(f"{column[name]:.0f} MB" for column in columns)] for name in (columns[0] if columns else ())]
    return Table("Memory of a training step beyond weights and Adam's state", _heads(measured), rows)


def model_budget(result: dict[str, Any]) -> Table:
    return replace(budget(result), title="Largest batch whose loss alone adds at most so much to its inputs")


def _memory(laps: list[dict[str, Any]]) -> dict[str, float]:
    found: dict[str, float] = {}
    before = laps[0]["held_mb"]
    for lap in laps[1:]:
        phase = lap["phase"]
        if phase in TOWERS and f"held by the {NAMES[phase]}" not in found:
            found[f"held by the {NAMES[phase]}"] = lap["held_mb"] - before
        elif phase in ("ours", "dense"):
            found[f"added by {NAMES[phase]}"] = lap["peak_mb"] - before
        elif phase in TOWERS:
            continue
        before = lap["held_mb"]
    found["peak of the whole step"] = max(lap["peak_mb"] for lap in laps if lap["phase"] != "dense")
    return found


def _heads(records: list[dict[str, Any]]) -> list[str]:
    return ["part", *(f"batch {record['batch']}" for record in records)]


def _ms(record: dict[str, Any], part: str) -> str:
    return milliseconds({"ms": record["ms"][part]})


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.99 else f"{100 * share:.3g} %"


def _times(spread: dict[str, float]) -> str:
    return f"{spread['median']:.1f} ({spread['q1']:.1f} to {spread['q3']:.1f})"


def model_line(result: dict[str, Any]) -> str:
    """What it buys end to end, in one sentence."""
    record = result["time"][-1]
    ms = {name: values["median"] for name, values in record["ms"].items()}
    towers = sum(ms[name] for name in TOWERS) / ms["step"]
    saved = 1 - ms["step"] / ms["step_dense"]
    fits = {row["contestant"]: row["fits"] for row in result["budget"]}
    budgets = [row["budget_mb"] for row in result["budget"]]
    text = (
        f"At batch {record['batch']} on {result['threads']} CPU threads the towers take {_percent(towers)} of a "
        f"training step of {result['settings']['clip']} ({ms['step'] / 1e3:.1f} s), the interaction and its losses "
        f"{_percent(ms['ours'] / ms['step'])} (dense: {_percent(ms['dense'] / ms['step_dense'])}): end to end it saves "
        f"{_percent(saved)} of the time."
    )
    if budgets and all(fits.values()):
        text += (
            f" What it buys there is the batch: {budgets[-1]} MB hold the loss of {fits['ours']['batch']} pairs "
            f"instead of {fits['dense']['batch']}, which counts where towers run in chunks."
        )
    return text


def model_note(result: dict[str, Any]) -> str:
    note, skipped = result["settings"]["note"], result["skipped"]
    lines = [note] if note else []
    lines += [f"Left out for lack of memory: batch {', '.join(map(str, skipped))}."] if skipped else []
    return " ".join(lines) or NOTHING


TABLES = {"model_time": model_time, "model_memory": model_memory, "model_budget": model_budget}
LINES = {"model_line": model_line, "model_note": model_note}
