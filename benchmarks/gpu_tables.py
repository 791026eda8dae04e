"""Print the results of a GPU session: a line for each case, and tables in Markdown for README and docs/gpu.md."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]
MISSING = "not measured"
# Column -> the step of the session that has it, and the name there.
CONTESTANTS = {
    "torch.mm": ("speed", "mm"),
    "plain, max": ("speed", "max"),
    "plain, amax": ("speed", "amax"),
    "plain in a graph": ("speed", "max in a graph"),
    "plain, compiled": ("compiled", "compiled"),
    "flash-maxsim": ("peers", "flash-maxsim"),
    "late-interaction-kernels": ("peers", "late-interaction-kernels"),
    "drl-fast": ("speed", "drl_fast"),
    "drl-fast in a graph": ("speed", "drl_fast in a graph"),
    "drl-fast, torch.mm in the backward": ("speed", "drl_fast with torch.mm"),
}


def line(row: Row) -> str:
    """Describe a finished case in one line."""
    if "forward" in row:
        parts = []
        for mode in ("forward", "step"):
            found = row.get(mode, {"results": {}, "absent": {}})
            times = [f"{name} {result['ms']['median']:.3g}" for name, result in found["results"].items()]
            parts.append(f"{mode}, ms: " + ", ".join([*times, *(f"{n} {why}" for n, why in found["absent"].items())]))
        return "; ".join(parts)
    if "mb" in row:
        return ", ".join(f"{name} {mb:.0f} MB" for name, mb in row["mb"].items())
    if "kernels" in row:
        return f"{row['us']:.0f} us: " + ", ".join(f"{k['name'][:30]} {k['us']:.0f}" for k in row["kernels"][:5])
    if "batch" in row:
        return f"batch {row['batch']} in {row['gigabytes']} GB"
    if "tile" in row:
        return f"{row['tile']}; ms {[round(t, 3) for t in row['ms']]}"
    if "worst_error" in row:
        return f"largest relative error {row['worst_error']:.1e}, limit {row['limit']:.0e}"
    return row.get("summary", "ok")


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


class Measured:
    """The finished rows of a session."""

    def __init__(self, session: Row) -> None:
        self.steps = session["steps"]

    def row(self, step: str, case: str) -> Row:
        found = self.steps.get(step, {}).get(case, {})
        return found if found.get("status") == "ok" else {}

    def contestant(self, column: str, shape: str, mode: str) -> Row | str:
        """Return a contestant's result, or why there is none."""
        step, name = CONTESTANTS[column]
        row = self.row(step, f"{name} {shape}" if step == "peers" else shape).get(mode, {})
        missing = (
            self.steps.get(step, {}).get(f"{name} {shape}", {}).get("why", MISSING) if step == "peers" else MISSING
        )
        return row.get("results", {}).get(name) or row.get("absent", {}).get(name, missing)

    def cells(self, shape: str, mode: str) -> list[str]:
        """Return milliseconds of everyone, then ours against the best plain form and the rate of the product."""
        found = {column: self.contestant(column, shape, mode) for column in CONTESTANTS}
        texts = [x if isinstance(x, str) else f"{x['ms']['median']:.3g}" for x in found.values()]
        ours, product = found["drl-fast"], found["torch.mm"]
        plain = [
            x["ms"]["median"] for column, x in found.items() if column.startswith("plain,") and not isinstance(x, str)
        ]
        if isinstance(ours, str) or isinstance(product, str):
            return [*texts, MISSING, MISSING, MISSING]
        faster = f"{min(plain) / ours['ms']['median']:.2f}x" if plain else MISSING
        return [*texts, faster, f"{ours['tflops']:.0f}", f"{100 * ours['tflops'] / product['tflops']:.0f} %"]

    def memory(self, shape: str) -> list[str]:
        row = self.row("memory", shape)
        used, absent = row.get("mb", {}), row.get("absent", {})
        names = ("max", "amax", "drl_fast")
        texts = [f"{used[name]:.0f}" if name in used else absent.get(name, MISSING) for name in names]
        plain = [used[name] for name in ("max", "amax") if name in used]
        return [*texts, f"{min(plain) / used['drl_fast']:.1f}x" if plain and "drl_fast" in used else MISSING]

    def batch(self, name: str) -> str:
        row = self.row("batch", name)
        return f"{row['batch']} in {row['gigabytes']} GB" if row else MISSING


def markdown(session: Row) -> str:
    """Return the tables. What was not measured, or failed, says so.

    Raises:
        SystemExit: a rehearsal's figures mean nothing.
    """
    if session["rehearsal"]:
        raise SystemExit("this is the result of a rehearsal: nothing in it was measured")
    measured, about = Measured(session), session["machine"]
    checks = session["steps"].get("correctness", {})
    wrong = [name for name, row in checks.items() if row["status"] != "ok"]
    correct = "all passed" if checks and not wrong else f"NOT PASSED: {', '.join(wrong) or 'not run'}"
    driver = about.get("driver_version", "unknown")
    parts = [
        f"{about['gpu']}, driver {driver}, PyTorch {about['torch']}, Triton {about['triton']}, "
        f"commit {session['commit'] or 'unknown'}, code {session['code']}. Correctness checks: {correct}."
    ]
    shapes = list(dict.fromkeys(name for step in ("speed", "memory") for name in session["steps"].get(step, {})))
    extra = ["best plain / drl-fast", "TFLOP/s", "share of torch.mm's rate"]
    for mode, title in (("forward", "Forward, ms"), ("step", "Training step, ms")):
        rows = [[shape, *measured.cells(shape, mode)] for shape in shapes]
        parts.append(f"{title}\n\n" + (table(["shape", *CONTESTANTS, *extra], rows) if rows else MISSING))
    rows = [[shape, *measured.memory(shape)] for shape in shapes]
    columns = ["shape", "plain, max", "plain, amax", "drl-fast", "best plain / drl-fast"]
    parts.append(
        "Peak memory of a training step beyond its inputs, MB\n\n" + (table(columns, rows) if rows else MISSING)
    )
    batches = [["plain, max", measured.batch("max")], ["drl-fast", measured.batch("drl_fast")]]
    parts.append("Largest batch of a training step, (B, 32, 12, 512)\n\n" + table(["form", "batch"], batches))
    return "\n\n".join(parts)
