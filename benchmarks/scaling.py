"""How many bytes ``token_contrastive_loss`` holds and sends over many GPUs: a model, which docs/distributed.md shows.

    python benchmarks/scaling.py                        # write results/static/scaling.json: the model, nothing measured
    python benchmarks/scaling.py --check [--quick]      # compare it with real processes on this machine

W ranks hold n = B / W pairs each. Every rank scores its own n texts against the videos of all ranks, which are gathered
or go round a ring (drl_fast/distributed/exchange.py). docs/distributed.md derives the terms; some kilobytes of headers
and scalars are left out.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import bench_cdcr
import bench_contrastive
import harness
import result_tables
from comparison import gradient_step, present
from drl_fast import functional
from drl_fast.distributed import exchange
from harness import Call, Run
from problems import Shape, make_problem

WAYS = ("gathered", "ring")
ALIGNMENT = 64
BLOCK_BYTES = 16 << 20


@dataclass(frozen=True)
class Work:
    """One step of the loss: B pairs on W ranks."""

    pairs: int
    ranks: int
    nt: int = 32
    nv: int = 12
    dim: int = 512
    itemsize: int = 2

    @property
    def rows(self) -> int:
        """Pairs of the rank that has most."""
        return -(-self.pairs // self.ranks)


# --- terms ------------------------------------------------------------------------------------------------------------
def packed(work: Work) -> int:
    """Return P: bytes of one rank's videos and their weights as they travel, each part rounded up."""
    tokens = work.rows * work.nv
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in (4 * tokens, work.itemsize * tokens * work.dim))


def gradients(work: Work) -> int:
    """Return G: bytes of the gradients of one rank's videos and their weights."""
    return 4 * work.rows * work.nv * (work.dim + 1)


def sent(work: Work, way: str) -> int:
    """Return the bytes that a rank sends in a step, of videos, their gradients, and their columns' sums (C)."""
    others, p, g, c = work.ranks - 1, packed(work), gradients(work), 8 * work.rows
    if way == "gathered":
        return others * (p + g + 2 * c)
    return 2 * others * p + work.ranks * g + (work.ranks + others) * c


def held(work: Work, way: str) -> int:
    """Return the bytes that a rank holds beside its inputs at the worst moment, gradients included."""
    # The text's gradient is float32 and, where that differs, in the input's type.
    text = (4 if work.itemsize == 4 else 4 + work.itemsize) * work.rows * work.nt * (work.dim + 1)
    videos, results = {"gathered": (work.ranks + 1, 3 * work.ranks), "ring": (2, 4)}[way]
    sums = 8 * (work.rows + work.pairs)
    return text + videos * packed(work) + results * gradients(work) + sums + BLOCK_BYTES


def cdcr_sent(work: Work, full: bool) -> int:
    """Return the bytes that a rank sends for ``cdcr_loss``; a sum's pieces are padded to one size."""
    gathered = 4 * (2 * work.dim + 1) * 8
    terms, sums = (2 * work.dim**2 if full else 2 * work.dim), 4 * work.dim
    pieces = 4 * -(-terms // work.ranks) + 8 * -(-sums // work.ranks)
    return (work.ranks - 1) * (gathered + 2 * pieces)


# --- the plan: what docs/distributed.md shows -------------------------------------------------------------------------
SIZES = ((16, 8), (16, 64), (64, 64), (256, 64), (1024, 64), (1024, 1024))  # thousands of pairs, ranks
PLAN = tuple(Work(pairs << 10, ranks) for pairs, ranks in SIZES)


def plan() -> dict[str, Any]:
    """Return the model's bytes at six sizes."""
    rows = [
        {"work": asdict(work), "ways": {way: {"held": held(work, way), "sent": sent(work, way)} for way in WAYS}}
        for work in PLAN
    ]
    return {"benchmark": "scaling", "plan": rows}


# --- the check --------------------------------------------------------------------------------------------------------
GROUPS = (Work(2048, 2, 16, 8, 128, 4), Work(2048, 4, 16, 8, 128, 4), Work(1022, 4, 16, 8, 128, 4))
CDCR = {"CDCR, diagonal": bench_cdcr.DIAGONAL, "CDCR, full": bench_cdcr.FULL_FORM}


def rank_step(rank: int, kind: str, work: dict[str, Any], folder: str) -> None:
    """Run one process of a group: a warm-up, then one step whose bytes and memory are measured."""
    torch.set_num_threads(1)
    whole = Work(**work)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=whole.ranks)
    rows = [len(part) for part in torch.arange(whole.pairs).tensor_split(whole.ranks)][rank]

    def step(count: int) -> Call:
        tokens = make_problem(Shape(count, whole.nt, whole.nv, whole.dim)).leaves()  # no masks: all are real

        def forward() -> torch.Tensor:
            if kind in CDCR:
                return functional.cdcr_loss(*tokens, **CDCR[kind], process_group=dist.group.WORLD)
            scale = bench_contrastive.SCALE
            return functional.token_contrastive_loss(*tokens, logit_scale=scale, process_group=dist.group.WORLD)

        return gradient_step(forward, tokens)

    with mock.patch.object(exchange, "GATHER_BYTES", 0 if kind == "ring" else 1 << 62):
        step(2)()
        call = step(rows)
        dist.barrier()
        # What this process hands to the kernel to write: gloo writes its sockets so.
        before = psutil.Process().io_counters().write_chars
        peak, _ = harness.peak_bytes(call, "cpu")
        written = psutil.Process().io_counters().write_chars - before
    Path(folder, f"{rank}.json").write_text(json.dumps({"sent": written, "held": peak}))
    dist.destroy_process_group()


def group(work: Work, kind: str) -> dict[str, Any]:
    """Compare rank 0, which has most pairs, with the model: of a way of the contrastive loss, or a form of CDCR."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(rank_step, (kind, asdict(work), folder), nprocs=work.ranks)
        found = json.loads(Path(folder, "0.json").read_text())
    if kind in CDCR:
        predicted = {"sent": cdcr_sent(work, kind == "CDCR, full")}
    else:
        predicted = {"sent": sent(work, kind), "held": held(work, kind)}
    pairs = {what: {"predicted": size, "measured": found[what]} for what, size in predicted.items()}
    return {"work": asdict(work), "kind": kind, **pairs}


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--check", action="store_true", help="measure the model's bytes on this machine")
    options = parser.parse_args()
    if options.check:
        run = Run("scaling_check", options, 1)
        for work in GROUPS[:1] if options.size == "quick" else GROUPS:
            for kind in (*WAYS, *CDCR):
                row = group(work, kind)
                text = f"{work.pairs} on {work.ranks}  {kind:16}"
                run.row("groups", row, f"{text}{row['sent']['measured'] / harness.MB:.2f} MB sent")
        present(run)
        return
    print("scaling: expected duration under a second; a model, nothing is measured")
    path = harness.RESULTS / "static" / "scaling.json"
    harness.save(plan(), path)
    result_tables.show(harness.load(path))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
