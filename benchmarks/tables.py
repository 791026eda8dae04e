"""Tables from a result: for the terminal, and for README.md, whose tables stand between marks that name their source.

python -m benchmarks.tables            # write the tables into README.md and docs/*.md again
python -m benchmarks.tables --check    # exit with 1 where they differ from the committed results
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import rich.table

from benchmarks import ablation_tables, harness, loss_tables, model_tables, scaling_tables
from benchmarks.cells import NOTHING, Table, budget, label, machine_line, memory, milliseconds, notes, ratio
from benchmarks.problem import Shape

PAGES = ("README.md", "docs/performance.md", "docs/gpu.md", "docs/scaling.md")
MARK = re.compile(r"(<!-- table (?P<name>\w+) of (?P<file>\S+) -->\n).*?(?P<end><!-- end of table -->)", re.S)
# (column title, contestant) of the interaction's tables, and of the one-way table.
INTERACTIONS = (
    ("mm, out=", "mm_out"),
    ("drl-fast", "drl_fast"),
    ("eager", "eager"),
    ("torch.compile", "compile"),
)
MAXSIMS = (
    ("drl-fast", "drl_fast"),
    ("eager", "eager"),
    ("maxsim-cpu", "maxsim-cpu"),
    ("NumKong", "numkong"),
    ("late-interaction-kernels", "late-interaction-kernels"),
    ("flash-maxsim", "flash-maxsim"),
)


# --- what is in them --------------------------------------------------------------------------------------------------
def forward(result: dict[str, Any]) -> Table:
    return _times(result, "forward", "Forward, as a multiple of one dense torch.mm of all tokens", INTERACTIONS)


def train(result: dict[str, Any]) -> Table:
    title = "Forward + backward, as a multiple of one dense torch.mm of all tokens"
    return _times(result, "train", title, INTERACTIONS[1:])


def maxsim(result: dict[str, Any]) -> Table:
    title = "One direction only (ColBERT's max-sim), forward, as a multiple of torch.mm"
    return _times(result, "maxsim", title, MAXSIMS)


def _times(result: dict[str, Any], mode: str, title: str, columns: tuple[tuple[str, str], ...]) -> Table:
    rows = []
    records = [record for record in result["time"] if record["mode"] == mode]
    taking_part = [(head, name) for head, name in columns if any(name in r["results"] for r in records)]
    for record in records:
        times = record["results"]
        cells = [ratio(times[name]) if name in times else NOTHING for _, name in taking_part]
        gain = _gain(times) if "eager" in times else None
        rows.append(
            [
                label(record["shape"]),
                milliseconds(times["mm"]),
                *cells,
                f"{gain:.1f}x" if gain else NOTHING,
            ]
        )
    heads = ["batch, words, frames", "torch.mm", *(head for head, _ in taking_part), "gain over eager"]
    return Table(title, heads, rows)


def _gain(times: dict[str, Any]) -> float:
    """How many times faster than eager code. Of ratios, not of milliseconds: each was taken within a round."""
    return times["eager"]["ratio"]["median"] / times["drl_fast"]["ratio"]["median"]


def summary(result: dict[str, Any]) -> Table:
    """Training steps in milliseconds, at the shapes that people train with."""
    rows = []
    for record in result["time"]:
        shape, times = record["shape"], record["results"]
        if record["mode"] != "train" or shape["batch"] < 64 or shape["dim"] != 512 or shape["dtype"] != "float32":
            continue
        cells = [milliseconds(times[name]) for name in ("eager", "drl_fast")]
        rows.append([label(shape), *cells, f"{_gain(times):.1f}x"])
    return Table("Training steps", ["batch, words, frames", "eager", "drl-fast", "gain"], rows)


def profile(result: dict[str, Any]) -> Table:
    shapes = result["profile"]
    heads = [f"{label(row['shape'])}: {row['ms']:.3g} ms" for row in shapes]
    rows = [[phase, *(f"{row['percent'][phase]:.0f} %" for row in shapes)] for phase in shapes[0]["percent"]]
    return Table("Where a training step goes, in percent of samples", ["phase", *heads], rows)


# Of the static report's rows one form of each kernel and precision, at 512 channels; the file has the others.
SHOWN = (
    ("bf16", "keyed scores, 32 words"),
    ("bf16", "keyed matches, 32 words"),
    ("bf16", "keyed weights, 32 words"),
    ("bf16", "half, D = 512"),
    ("bf16", "half, D = 512, later block"),
    ("fp16", "keyed matches, 16 words"),
    ("fp16", "half, D = 512"),
    ("fp32", "tf32 matches, 16 words"),
    ("fp32", "tf32, D = 512"),
    ("fp32", "fp32 matches, 16 words"),
    ("fp32", "fp32, D = 512"),
)


def static(result: list[dict[str, Any]]) -> Table:
    """What the main kernels compile to, and the cost model's share of the chip's rate: nothing in it was measured."""
    rows = []
    for row in result:
        if (row["dtype"], row["what"]) in SHOWN:
            config = row["config"]
            rows.append(
                [
                    row["kernel"].removeprefix("interaction_").replace("_", " "),
                    row["arch"],
                    row["dtype"],
                    row["what"],
                    f"{config['BM']} x {config['BN']} x {config['BK']}, {config['num_warps']}",
                    str(row["registers"]),
                    str(row["spill_bytes"]),
                    f"{row['shared_bytes'] / 1024:.0f} KB",
                    row["tensor_core"] or NOTHING,
                    f"{100 * row['predicted_share']:.0f} %",
                ]
            )
    heads = [
        "kernel",
        "GPU",
        "tokens",
        "form",
        "tile, warps",
        "registers",
        "bytes spilled",
        "shared",
        "tensor cores",
        "predicted share",
    ]
    return Table("Static prediction, not measured", heads, rows)


PAGE_ONLY: dict[str, Callable[[Any], Table]] = {
    "summary": summary,
    "profile": profile,
    "static": static,
    **ablation_tables.TABLES,
    **loss_tables.CDCR,
    **loss_tables.CONTRASTIVE,
    **model_tables.TABLES,
    **scaling_tables.TABLES,
}
# What bench_wti.py prints.
ALL: dict[str, Callable[[dict[str, Any]], Table]] = {
    "forward": forward,
    "train": train,
    "maxsim": maxsim,
    "memory": memory,
    "budget": budget,
}


def headline(result: dict[str, Any]) -> str:
    """The claim in one sentence."""
    gains, used = {}, {}
    for record in result["time"]:
        if record["mode"] == "train" and record["shape"] in (asdict(Shape(256)), asdict(Shape(256, lengths="real"))):
            gains[record["shape"]["lengths"]] = _gain(record["results"])
    for row in result["memory"]:
        if row["shape"]["batch"] == 256:
            used[row["contestant"]] = row["mb"]
    return (
        f"**On {result['threads']} CPU threads a training step of the interaction at batch 256 runs "
        f"{gains['full']:.1f}x faster than the eager form, {gains['real']:.0f}x at MSR-VTT's caption lengths, and adds "
        f"{used['drl_fast']:.0f} MB to its inputs instead of {used['eager']:.0f} MB.**"
    )


def yardstick_line(result: dict[str, Any]) -> str:
    """What another library's matrix product makes of the yardstick."""
    found = result["yardstick"]
    mm, other = (found["products"][by]["ms"]["median"] for by in ("mm", "numpy"))
    name = (
        f"numpy's {found['blas'].get('internal_api', 'BLAS')} ({found['blas'].get('architecture', 'unknown')} kernels)"
    )
    return f"The product of {label(found['shape'])} alone: torch.mm {mm:.3g} ms, {name} {other:.3g} ms."


LINES = {
    "headline": headline,
    "machine": machine_line,
    "yardstick": yardstick_line,
    "notes": notes,
    **ablation_tables.LINES,
    **loss_tables.LINES,
    **model_tables.LINES,
    **scaling_tables.LINES,
}


# --- how they are shown -----------------------------------------------------------------------------------------------
def rich_table(table: Table) -> rich.table.Table:
    shown = rich.table.Table(title=table.title, title_justify="left")
    for number, column in enumerate(table.columns):
        shown.add_column(column, justify="right" if number else "left", no_wrap=not number)
    for row in table.rows:
        shown.add_row(*row)
    return shown


def markdown(table: Table) -> str:
    lines = [
        " | ".join(["", *table.columns, ""]).strip(),
        "|" + "---|" + "---:|" * (len(table.columns) - 1),
        *(" | ".join(["", *row, ""]).strip() for row in table.rows),
    ]
    return "\n".join(lines) + "\n"


def render(text: str) -> str:
    """A page with every marked table written anew from the result file its mark names."""

    def fill(match: re.Match[str]) -> str:
        result = harness.load(harness.ROOT / match["file"])
        line = LINES.get(match["name"])
        body = line(result) + "\n" if line else markdown({**ALL, **PAGE_ONLY}[match["name"]](result))
        return f"{match[1]}\n{body}\n{match['end']}"

    return MARK.sub(fill, text)


def main(arguments: list[str]) -> int:
    stale = []
    for name in PAGES:
        page = harness.ROOT / name
        text = page.read_text(encoding="utf-8")
        if render(text) != text:
            stale.append(name)
            if "--check" not in arguments:
                page.write_text(render(text), encoding="utf-8")
    for name in stale:
        print(f"{name}: tables " + ("differ from the results" if "--check" in arguments else "written"))
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
