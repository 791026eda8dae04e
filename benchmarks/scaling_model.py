"""A model of ``token_contrastive_loss`` and ``cdcr_loss`` over many GPUs: compute, memory and communication a rank.

    python benchmarks/scaling_model.py                          # write results/static/scaling.json and scaling.png
    python benchmarks/scaling_model.py --check                  # measure the terms at small scale on this machine

It is a model: nothing here was measured on such machines. W ranks hold n = B / W pairs each; every rank scores its own
n texts against the videos of all ranks, which are gathered or go round a ring (drl_fast/ops/_visits.py). The terms:

- Compute, in products of n B Nt Nv D multiply-adds: forward 1, backward 3 (scores anew, gradients of both sides).
- One rank's videos as they travel: P = n Nv (D e + 4) bytes, e an element's, 4 a weight's; each part rounded up to 64.
  Their gradients, in float32: G = 4 n Nv (D + 1). Their columns' running maximum and sum: C = 8 n.
- Sent by a rank, gathered:  forward (W-1) (P + C) + (W-1) C      backward (W-1) G
- Sent by a rank, ring:      forward (W-1) P + W C + (W-1) C      backward (W-1) P + W G
  The last term of the forward gives every rank all columns' sums. Some kilobytes of headers and scalars are left out.
- Held by a rank beside its inputs: the text's gradient in float32 and, where that is another, in the input's type; a
  block of scores (constant); gathered: (W+1) P, and in the backward 3 W G (results, the same packed, what comes back);
  ring: 2 P + 4 G (three results, and what a block adds to one); one process: 2 G.
- CDCR: counts, means and scatters of four matrices are gathered, 4 (2 D + 1) numbers of float64 a rank; then two sums
  over ranks, each 2 (W-1)/W times its bytes: C's two terms (2 D numbers of float32, full form 2 D x D), and 4 D of
  float64. The backward sends nothing, and none of it grows with the batch.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

if str(Path(__file__).resolve().parents[1]) not in sys.path:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

Way = Literal["gathered", "ring"]
WAYS: tuple[Way, ...] = ("gathered", "ring")
FORWARD, BACKWARD = 1, 3  # products
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
        """Of the rank that has most."""
        return -(-self.pairs // self.ranks)


@dataclass(frozen=True)
class Machine:
    """Rates of one GPU and its links, bytes and FLOP a second; each with where it comes from."""

    name: str = "H100 SXM, 8 a node"
    flops: float = 989.4e12  # bf16 dense; NVIDIA H100 datasheet (1,979 with sparsity)
    share: float = 0.5  # of that, an assumption: the kernels' speed on a GPU is not measured
    memory: float = 80e9  # datasheet; H200: 141e9
    link: float = 450e9  # NVLink 4, one direction; datasheet: 900 GB/s both
    far: float = 50e9  # one 400 Gb/s InfiniBand port a GPU, as in DGX H100
    node: int = 8

    @property
    def rate(self) -> float:
        return self.flops * self.share

    def ring(self, ranks: int) -> float:
        """Of a neighbour's link. One hop of a node's ring crosses to the next node, and all wait for it."""
        return self.link if ranks <= self.node else min(self.link, self.far)

    def gather(self, ranks: int) -> float:
        """Of an all-gather: what enters a node comes through all its ports at once and is shared out by NVLink."""
        return self.link if ranks <= self.node else min(self.link, self.node * self.far)

    def exchange(self, ranks: int) -> float:
        """Of an all-to-all: every rank's share for other nodes leaves by its own port."""
        if ranks <= self.node:
            return self.link
        return min(self.link, self.far * (ranks - 1) / (ranks - self.node))


# --- terms ------------------------------------------------------------------------------------------------------------
def _extent(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def packed(work: Work, masked: bool = False) -> int:
    """P: bytes of one rank's videos as they travel."""
    tokens = work.rows * work.nv
    parts = [4 * tokens, work.itemsize * tokens * work.dim, *([tokens] if masked else [])]
    return sum(map(_extent, parts))


def gradients(work: Work) -> int:
    """G: bytes of the gradients of one rank's videos and their weights."""
    return 4 * work.rows * work.nv * (work.dim + 1)


def columns(work: Work) -> int:
    """C: bytes of the running maxima and sums of one rank's columns."""
    return 8 * work.rows


def flop(work: Work) -> float:
    """FLOP of one product of a rank's texts with all videos."""
    return 2.0 * work.rows * work.pairs * work.nt * work.nv * work.dim


def sent(work: Work, way: Way, masked: bool = False) -> dict[str, int]:
    """Bytes that a rank sends in a step, by term."""
    others = work.ranks - 1
    p, g, c = packed(work, masked), gradients(work), columns(work)
    if not others:
        return {"videos": 0, "column_sums": 0, "gradients": 0}
    if way == "gathered":
        return {"videos": others * p, "column_sums": 2 * others * c, "gradients": others * g}
    return {"videos": 2 * others * p, "column_sums": (work.ranks + others) * c, "gradients": work.ranks * g}


def held(work: Work, way: Way) -> dict[str, int]:
    """Bytes that a rank holds beside its inputs at the worst moment, gradients included, by term."""
    text = work.rows * work.nt * (work.dim + 1)
    p, g = packed(work), gradients(work)
    videos, results = {"gathered": (work.ranks + 1, 3 * work.ranks), "ring": (2, 4)}[way]
    if work.ranks == 1:
        videos, results = 0, 2
    return {
        "text_gradient": (4 if work.itemsize == 4 else 4 + work.itemsize) * text,
        "videos": videos * p,
        "results": results * g,
        "sums": 8 * (work.rows + work.pairs),
        "block": BLOCK_BYTES,
    }


def seconds(work: Work, way: Way, machine: Machine) -> dict[str, float]:
    """Compute, communication, and the step. Gathered: one after the other. Ring: each hop behind a block's products."""
    w = work.ranks
    one = flop(work) / machine.rate
    compute = (FORWARD + BACKWARD) * one
    p, g, c = packed(work), gradients(work), columns(work)
    if w == 1:
        return {"compute": compute, "network": 0.0, "step": compute}
    if way == "gathered":
        network = (w - 1) * ((p + c) / machine.gather(w) + (c + g) / machine.exchange(w))
        return {"compute": compute, "network": network, "step": compute + network}
    speed = machine.ring(w)
    hops = {FORWARD: p + c, BACKWARD: p + g}
    network = sum(sent(work, "ring").values()) / speed
    step = sum((w - 1) * max(hop / speed, products * one / w) + products * one / w for products, hop in hops.items())
    # The last result's way home hides behind nothing; nor does the exchange of the columns' sums.
    return {"compute": compute, "network": network, "step": step + g / speed + w * c / speed}


def hiding_rows(work: Work, machine: Machine) -> float:
    """Pairs a rank from which a ring's hops take no longer than the products they hide behind, in both passes.

    P / speed <= 2 n^2 Nt Nv D / rate: the frames and channels cancel, but for the weights' 4 bytes.
    """
    speed = machine.ring(work.ranks)
    per_pair = {FORWARD: work.nv * (work.dim * work.itemsize + 4) + 8}
    per_pair[BACKWARD] = work.nv * (work.dim * work.itemsize + 4) + 4 * work.nv * (work.dim + 1)
    products = 2.0 * work.nt * work.nv * work.dim / machine.rate
    return max(size / speed / (count * products) for count, size in per_pair.items())


def most_pairs(work: Work, way: Way, budget: float) -> int:
    """The largest B, a multiple of W, whose loss holds at most ``budget`` bytes a rank."""
    low, high = 0, 1 << 24
    while low < high:
        middle = (low + high + 1) // 2
        fits = sum(held(replace(work, pairs=middle * work.ranks), way).values()) <= budget
        low, high = (middle, high) if fits else (low, middle - 1)
    return low * work.ranks


def bound(work: Work, way: Way, machine: Machine, budget: float) -> str:
    """What limits a step: memory where it does not fit, else the slower of compute and network."""
    if sum(held(work, way).values()) > budget:
        return "memory"
    found = seconds(work, way, machine)
    hidden = way == "ring" and work.rows >= hiding_rows(work, machine)
    return "compute" if hidden or found["compute"] >= found["network"] else "network"


def cdcr_sent(work: Work, full: bool) -> int:
    """Bytes that a rank sends for ``cdcr_loss``; a sum's pieces are padded to one size."""
    others = work.ranks - 1
    gathered = 4 * (2 * work.dim + 1) * 8
    terms, sums = (2 * work.dim**2 if full else 2 * work.dim), 4 * work.dim
    pieces = 4 * -(-terms // work.ranks) + 8 * -(-sums // work.ranks)
    return others * (gathered + 2 * pieces)


# --- the plan ---------------------------------------------------------------------------------------------------------
SHAPES = (Work(0, 0, 32, 12, 512), Work(0, 0, 64, 64, 512))
PAIRS = tuple(1 << k for k in (12, 14, 16, 18, 20))
RANKS = (8, 64, 1024)
# Of a GPU's memory, what the loss may take: the towers, their activations and the optimiser have the rest.
LOSS_SHARE = 0.25


def plan(machine: Machine) -> dict[str, Any]:
    """Everything docs/scaling.md shows."""
    budget = LOSS_SHARE * machine.memory
    rows = []
    for shape in SHAPES:
        for pairs in PAIRS:
            for ranks in RANKS:
                work = replace(shape, pairs=pairs, ranks=ranks)
                ways = {
                    way: {
                        "held": sum(held(work, way).values()),
                        "sent": sum(sent(work, way).values()),
                        **seconds(work, way, machine),
                        "bound": bound(work, way, machine, budget),
                    }
                    for way in WAYS
                }
                rows.append({"work": asdict(work), "ways": ways})
    limits = [
        {
            "work": asdict(work),
            "hiding_rows": hiding_rows(work, machine),
            "most": {way: most_pairs(work, way, budget) for way in WAYS},
            "cdcr": {"diagonal": cdcr_sent(work, False), "full": cdcr_sent(work, True)},
        }
        for shape in SHAPES
        for ranks in RANKS
        for work in (replace(shape, ranks=ranks, pairs=ranks),)
    ]
    return {"benchmark": "scaling", "machine": asdict(machine), "budget": budget, "plan": rows, "limits": limits}


def main(
    check: Annotated[bool, typer.Option("--check", help="Measure the terms at small scale on this machine.")] = False,
    out: Annotated[Path | None, typer.Option(help="Where results go: OUT/static, or OUT/<machine> of a check.")] = None,
    share: Annotated[float, typer.Option(help="Achieved share of the peak rate.")] = Machine.share,
    flops: Annotated[float, typer.Option(help="Peak FLOP/s of a GPU.")] = Machine.flops,
    memory: Annotated[float, typer.Option(help="Bytes of a GPU's memory.")] = Machine.memory,
    link: Annotated[float, typer.Option(help="Bytes/s within a node, one direction, a GPU.")] = Machine.link,
    far: Annotated[float, typer.Option(help="Bytes/s between nodes, one direction, a GPU.")] = Machine.far,
    node: Annotated[int, typer.Option(help="GPUs a node.")] = Machine.node,
    name: Annotated[str, typer.Option(help="What to call the machine.")] = Machine.name,
) -> None:
    """Write the plan for a machine, or check the model's terms on this one."""
    from benchmarks import harness, plots, scaling_check

    folder = out or harness.RESULTS
    if check:
        scaling_check.conduct(folder)
        return
    machine = Machine(name, flops, share, memory, link, far, node)
    harness.save(plan(machine), folder / "static" / "scaling.json")
    plots.draw_scaling(harness.load(folder / "static" / "scaling.json"), folder / "static")
    print(f"wrote {folder / 'static'}/scaling.json and scaling.png")


if __name__ == "__main__":
    typer.run(main)
