"""The scaling model's terms against what one machine shows at small scale: predicted beside measured, how far off.

Compute: the rate of the largest batch predicts the others. Memory: peak of a step, in one process and on each rank of a
gloo group. Communication: what each rank's process hands to the kernel to write while the step runs (``wchar`` of
/proc/self/io: gloo writes its sockets so), and nothing is estimated.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console

from benchmarks import bench_cdcr, bench_contrastive, harness, scaling_tables, tables
from benchmarks import contestants as who
from benchmarks.bench_contrastive import BY_NAME, SCALE, training_call
from benchmarks.problem import Shape, make_problem
from benchmarks.scaling_model import WAYS, Way, Work, cdcr_sent, flop, held, sent
from benchmarks.session import memory_apart
from drl_fast import functional
from drl_fast.distributed import exchange

FAMILY = Work(0, 1, 16, 8, 128, 4)
BATCHES = (512, 1024, 2048, 4096)
GROUPS = (Work(2048, 2, 16, 8, 128, 4), Work(2048, 4, 16, 8, 128, 4), Work(1022, 4, 16, 8, 128, 4))
CDCR = {"CDCR, diagonal": bench_cdcr.DIAGONAL, "CDCR, full": bench_cdcr.FULL_FORM}


def written_bytes() -> int:
    """What this process has handed to the kernel to write, sockets included."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["wchar"])


def shape_of(work: Work, rows: int) -> Shape:
    return Shape(rows, work.nt, work.nv, work.dim)


# --- one process ------------------------------------------------------------------------------------------------------
def compute(threads: int, batches: tuple[int, ...] = BATCHES) -> list[dict[str, Any]]:
    """Milliseconds of a step; those of all batches but the last are predicted from its rate."""
    torch.set_num_threads(threads)
    works = [replace(FAMILY, pairs=batch) for batch in batches]
    calls = {
        str(work.pairs): training_call(BY_NAME["fused"], make_problem(shape_of(work, work.pairs), train=True))
        for work in works
    }
    for call in calls.values():
        call()
    found = harness.interleave(calls, "cpu", 1.0, 5)
    times = {name: harness.spread([1e3 * t for t in samples])["median"] for name, samples in found.items()}
    rate = flop(works[-1]) / times[str(works[-1].pairs)]
    return [{"pairs": work.pairs, "predicted": flop(work) / rate, "measured": times[str(work.pairs)]} for work in works]


def memory(threads: int, batches: tuple[int, ...] = BATCHES) -> list[dict[str, Any]]:
    """Megabytes that a step in one process adds to its inputs."""
    rows = []
    for batch in batches:
        work = replace(FAMILY, pairs=batch)
        factory = "benchmarks.bench_contrastive:memory_step"
        found = memory_apart(factory, BY_NAME["fused"], shape_of(work, batch), "cpu", threads)
        predicted = sum(held(work, "ring").values()) / harness.MB
        rows.append({"pairs": batch, "predicted": predicted, "measured": found.get("mb"), "status": found["status"]})
    return rows


# --- a group ----------------------------------------------------------------------------------------------------------
def rank_step(rank: int, kind: str, work: dict[str, Any], folder: str) -> None:
    """One process of a group: a warm-up, then one step of which bytes and memory are taken."""

    torch.set_num_threads(1)
    whole = Work(**work)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=whole.ranks)
    rows = [len(part) for part in torch.arange(whole.pairs).tensor_split(whole.ranks)][rank]

    def step(count: int) -> harness.Call:
        problem = make_problem(shape_of(whole, count), train=True)
        tokens = problem.leaves()  # no masks: all are real

        def forward() -> torch.Tensor:
            if kind in CDCR:
                return functional.cdcr_loss(*tokens, **CDCR[kind], process_group=dist.group.WORLD)
            return functional.token_contrastive_loss(*tokens, logit_scale=SCALE, process_group=dist.group.WORLD)

        return who.loss_step(forward, tokens)

    with mock.patch.object(exchange, "GATHER_BYTES", 0 if kind == "ring" else 1 << 62):
        step(2)()
        call = step(rows)
        dist.barrier()
        before = written_bytes()
        peak, _ = harness.peak_bytes(call, "cpu")
        written = written_bytes() - before
    Path(folder, f"{rank}.json").write_text(json.dumps({"sent": written, "held": peak}))
    dist.destroy_process_group()


def group(work: Work, kind: str) -> dict[str, Any]:
    """Rank 0's bytes sent and held, of a way of the contrastive loss or a form of CDCR. Rank 0 has most pairs."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(rank_step, (kind, asdict(work), folder), nprocs=work.ranks)
        found = json.loads(Path(folder, "0.json").read_text())
    row: dict[str, Any] = {"work": asdict(work), "kind": kind}
    if kind in CDCR:
        predicted = cdcr_sent(work, kind == "CDCR, full")
        return {**row, "sent": {"predicted": predicted, "measured": found["sent"]}}
    way: Way = "ring" if kind == "ring" else "gathered"
    return {
        **row,
        "sent": {"predicted": sum(sent(work, way).values()), "measured": found["sent"]},
        "held": {"predicted": sum(held(work, way).values()), "measured": found["held"]},
    }


def conduct(out: Path) -> None:
    """Measure everything and write ``<out>/<machine>/scaling_check.json``."""
    threads = torch.get_num_threads()
    result = harness.record("scaling_check", "cpu", threads, {"family": asdict(FAMILY)})
    result["contestants"] = {c.name: c.describe() for c in bench_contrastive.CONTESTANTS}
    result["compute"], result["memory"] = compute(threads), memory(threads)
    result["groups"] = [group(work, kind) for work in GROUPS for kind in (*WAYS, *CDCR)]
    path = out / result["machine"]["slug"] / "scaling_check.json"
    harness.save(result, path)
    console = Console()
    console.print(tables.machine_line(result), highlight=False)
    for table in scaling_tables.CHECKS.values():
        console.print(tables.rich_table(table(harness.load(path))))
    console.print(f"wrote {path}", highlight=False)
