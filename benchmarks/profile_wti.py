"""Where a training step of the interaction spends its time, by sampling: Linux's perf on this script itself.

    python benchmarks/profile_wti.py

Writes ``<out>/<machine>/wti_profile.json``. Needs ``perf`` (Debian: linux-perf); it samples the CPU clock, so that no
hardware counters are needed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

if str(Path(__file__).resolve().parents[1]) not in sys.path:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import contestants as who
from benchmarks import harness, tables
from benchmarks.problem import Shape, make_problem

SHAPES = (Shape(256), Shape(256, lengths="real"), Shape(64, 64, 64))
SECONDS = 8.0
LINE = re.compile(r"^\s*([\d.]+)%\s+\[[.k]\]\s+(.*)$")
# Functions of csrc/ by what they do, in the order of a step. Inlined ones count as their caller.
PHASES = {
    "product (forward)": ("tile<",),
    "maxima, sums, matches (forward)": ("forward_group<", "reduce_slot<", "finish<"),
    "normalising and laying out tokens": ("load_row<", "pack_slot<", "Side<", "Lanes<", "forward<"),
    "gather of matched rows (backward)": ("gather<",),
    "lists of matches (backward)": ("sort_choosers<", "list_chosen<"),
    "gradients through the norm, and out": ("backward<", "write_item<", "accumulate_item<"),
}
REST = "everything else: Python, autograd, threads, page faults"


def step_forever(shape: Shape, seconds: float) -> float:
    """Run training steps for a while; milliseconds of one."""
    problem = make_problem(shape, train=True)
    ours = next(c for c in who.INTERACTIONS if c.name == who.OURS)
    call = who.make_call(ours, problem, "train")
    call()
    count, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        call()
        count += 1
    return (time.perf_counter() - begin) / count * 1e3


def sample(shape: Shape, threads: int) -> dict[str, Any]:
    """Shares of one shape's step by phase, in percent of all samples."""
    number = SHAPES.index(shape)
    with tempfile.TemporaryDirectory() as folder:
        data = str(Path(folder) / "perf.data")
        script = [sys.executable, __file__, "--worker", str(number), "--threads", str(threads)]
        record = ["perf", "record", "-q", "-e", "cpu-clock", "-F", "1999", "-o", data, *script]
        milliseconds = float(subprocess.run(record, check=True, capture_output=True, text=True).stdout.split()[-1])
        report = ["perf", "report", "-i", data, "--no-children", "--stdio", "-F", "overhead,symbol"]
        lines = subprocess.run(report, check=True, capture_output=True, text=True).stdout.splitlines()
    shares = dict.fromkeys(PHASES, 0.0)
    for line in lines:
        found = LINE.match(line)
        if found is None or "drl_fast::" not in found[2]:
            continue
        for phase, names in PHASES.items():
            if any(f"::{name}" in found[2] for name in names):
                shares[phase] += float(found[1])
                break
    shares[REST] = 100 - sum(shares.values())
    return {"shape": asdict(shape), "ms": milliseconds, "percent": shares}


def main(
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = torch.get_num_threads(),
    out: Annotated[Path, typer.Option(help="Results go to OUT/<machine>/.")] = Path("bench_out"),
    worker: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Sample training steps at three shapes."""
    torch.set_num_threads(threads)
    if worker is not None:
        print(step_forever(SHAPES[worker], SECONDS))
        return
    if shutil.which("perf") is None:
        raise typer.BadParameter("needs Linux's perf on the PATH; on Debian: apt-get install linux-perf")
    result = harness.record("wti_profile", "cpu", threads, {"seconds": SECONDS})
    result["profile"] = [sample(shape, threads) for shape in SHAPES]
    path = out / result["machine"]["slug"] / "wti_profile.json"
    harness.save(result, path)
    console = Console()
    console.print(tables.machine_line(result), highlight=False)
    console.print(tables.rich_table(tables.profile(harness.load(path))))
    console.print(f"wrote {path}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
