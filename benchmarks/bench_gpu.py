"""The token interaction on this machine's GPU against what people use today, and against the product it contains.

    python benchmarks/bench_gpu.py            # a few shapes
    python benchmarks/bench_gpu.py --full     # the whole grid, about an hour

Forward, training step, peak memory and the largest batch that fits, in bfloat16. Writes ``<out>/<gpu>/gpu.json``,
``gpu.md`` and ``gpu.png``. The yardstick is one bfloat16 product of the padded tokens, measured beside everything else:
TFLOP/s count that product's FLOP (a training step's three times), so that work saved on padding shows as speed.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

if str(Path(__file__).resolve().parents[1]) not in sys.path:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import contestants as who
from benchmarks import harness
from benchmarks.contestants import Contestant
from benchmarks.harness import Call
from benchmarks.problem import Problem, Shape, make_problem
from benchmarks.session import take_part

LENGTHS = ((32, 12), (64, 64), (77, 20))
FULL = tuple(
    Shape(b, nt, nv, dim, lengths, "bfloat16")
    for b in (128, 256, 512, 1024, 2048, 4096)
    for nt, nv in LENGTHS
    for dim in (512, 768)
    for lengths in ("full", "real")
)
QUICK = tuple(s for s in FULL if s.batch in (128, 1024) and s.dim == 512)
SECONDS, ROUNDS = 1.0, 5
LARGEST = 1 << 16


def premasked(problem: Problem) -> Call:
    """The best of plain PyTorch: padding multiplied away once, one product, two reductions, no mask of pairs."""
    text, video, wt, wv, t_mask, v_mask = problem.inputs()

    def call() -> Tensor:
        words = torch.nn.functional.normalize(text, dim=-1) * t_mask[..., None]
        frames = torch.nn.functional.normalize(video, dim=-1) * v_mask[..., None]
        s = (words.flatten(0, 1) @ frames.flatten(0, 1).T).view(*text.shape[:2], *video.shape[:2])
        by_text = (s.amax(3) * wt[:, :, None]).sum(1)
        return (by_text + (s.amax(1) * wv).sum(2)) / 2

    return call


def both_ways(name: str) -> Any:
    """A max-sim library called once a direction, forward only; weights are beyond it."""
    peer = next(c for c in who.MAXSIMS if c.name == name)

    def make(problem: Problem) -> Call:
        swapped = replace(
            problem,
            text=problem.video,
            video=problem.text,
            text_mask=problem.video_mask,
            video_mask=problem.text_mask,
            _unit=None,
        )
        there, back = peer.make(problem), peer.make(swapped)
        return lambda: (there() + back().T) / 2

    return make


CONTESTANTS = (
    *(c for c in who.INTERACTIONS if c.name in (who.YARDSTICK, who.OURS, "eager", "compile")),
    Contestant(
        "premasked",
        "pre-masked product + reductions",
        premasked,
        "the best of plain PyTorch",
        needs=who.similarities(2, 5),
    ),
)
PEERS = tuple(
    replace(c, label=f"{c.label}, once a direction", make=both_ways(c.name), devices=("cuda",))
    for c in who.MAXSIMS
    if c.name in ("late-interaction-kernels", "flash-maxsim")
)


def time_shape(shape: Shape, mode: str) -> dict[str, Any]:
    """Everyone at one shape, side by side, with TFLOP/s and the share of the yardstick's."""
    problem = make_problem(shape, "cuda", train=True)
    calls, absent = take_part(
        CONTESTANTS if mode == "train" else (*CONTESTANTS, *PEERS),
        lambda c: who.make_call(c, problem, mode),
        lambda c: c.refusal(shape, "cuda", mode),
        warm_up=3,
    )
    results: dict[str, Any] = harness.summarize(harness.interleave(calls, "cuda", SECONDS, ROUNDS), who.YARDSTICK)
    flop = 2.0 * shape.batch**2 * shape.nt * shape.nv * shape.dim
    products = 3 if mode == "train" else 1
    for name, row in results.items():
        row["tflops"] = flop * (1 if name == who.YARDSTICK else products) / (row["ms"]["median"] * 1e9)
        row["share"] = row["tflops"] / results[who.YARDSTICK]["tflops"]
    return {"shape": shape.as_dict(), "mode": mode, "results": results, "absent": absent}


def step_memory(contestant: str, shape: dict[str, Any]) -> tuple[Call, Call, str]:
    """Factory for the harness' worker: a training step, and a tiny one to warm up with."""
    chosen, full = next(c for c in CONTESTANTS if c.name == contestant), Shape(**shape)
    call = who.make_call(chosen, make_problem(full, "cuda", train=True), "train")
    tiny = make_problem(replace(full, batch=4), "cuda", train=True)
    return call if contestant == "compile" else who.make_call(chosen, tiny, "train"), call, "cuda"


def memory(contestant: str, shape: Shape) -> dict[str, Any]:
    found = harness.measure_apart(
        "memory", "benchmarks.bench_gpu:step_memory", contestant=contestant, shape=asdict(shape)
    )
    return {"contestant": contestant, "shape": shape.as_dict(), **found}


def largest(contestant: str, shape: Shape) -> dict[str, Any]:
    """The largest batch, a power of two, whose training step fits this GPU."""
    fits, batch = 0, shape.batch
    while batch <= LARGEST and memory(contestant, replace(shape, batch=batch))["status"] == "ok":
        fits, batch = batch, 2 * batch
    return {"contestant": contestant, "shape": replace(shape, batch=fits).as_dict()}


def table(result: dict[str, Any]) -> str:
    """Markdown: milliseconds, and for this library TFLOP/s and the share of the product's."""
    names = [c.name for c in (*CONTESTANTS, *PEERS)]
    labels = {c.name: c.label for c in (*CONTESTANTS, *PEERS)}
    lines = [f"| shape | pass | {' | '.join(labels[n] for n in names)} | TFLOP/s | share of the product's |"]
    lines.append("|---" * (len(names) + 4) + "|")
    for row in result["times"]:
        found = row["results"]
        cells = [f"{found[n]['ms']['median']:.3g} ms" if n in found else row["absent"].get(n, "-") for n in names]
        ours = found.get(who.OURS)
        rate = [f"{ours['tflops']:.0f}", f"{ours['share']:.0%}"] if ours else ["-", "-"]
        lines.append(f"| {' | '.join([Shape(**row['shape']).label(), row['mode'], *cells, *rate])} |")
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any], file: Path) -> None:
    """Training time over the batch at full lengths (32, 12, 512)."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(6, 4), layout="constrained")).add_subplot()
    for contestant in CONTESTANTS:
        points = [
            (row["shape"]["batch"], row["results"][contestant.name]["ms"]["median"])
            for row in result["times"]
            if contestant.name in row["results"]
            and row["mode"] == "train"
            and Shape(**{**row["shape"], "batch": 0}) == Shape(0, dtype="bfloat16")
        ]
        if points:
            axes.loglog(*zip(*sorted(points), strict=True), marker="o", label=contestant.label)
    axes.set(xlabel="batch", ylabel="ms a training step", title=result["machine"]["gpu"])
    axes.legend()
    figure.savefig(file, dpi=150)


def main(
    full: Annotated[bool, typer.Option("--full", help="the whole grid")] = False,
    out: Annotated[Path, typer.Option(help="where results go")] = harness.RESULTS,
) -> None:
    if not torch.cuda.is_available():
        raise typer.BadParameter("this benchmark needs a CUDA device; benchmarks/bench_wti.py measures the CPU")
    shapes = FULL if full else QUICK
    result = harness.record("gpu", "cuda", torch.get_num_threads(), {"seconds": SECONDS, "rounds": ROUNDS})
    result["contestants"] = {c.name: c.describe() for c in (*CONTESTANTS, *PEERS)}
    result["times"], result["memory"] = [], []
    for shape in shapes:
        for mode in ("forward", "train"):
            print(shape.label(), mode, flush=True)
            result["times"].append(time_shape(shape, mode))
            torch.cuda.empty_cache()
    names = [c.name for c in CONTESTANTS if c.name != who.YARDSTICK]
    wide = [s for s in shapes if s.dim == 512 and s.batch in (1024, 4096)]
    result["memory"] = [memory(n, s) for s in wide for n in names if _named(n).refusal(s, "cuda", "train") is None]
    result["largest"] = [largest(n, Shape(1024, dtype="bfloat16")) for n in names]
    folder = out / result["machine"]["slug"]
    harness.save(result, folder / "gpu.json")
    (folder / "gpu.md").write_text(table(result))
    plot(result, folder / "gpu.png")
    print(table(result), f"written to {folder}", sep="\n")


def _named(name: str) -> Contestant:
    return next(c for c in CONTESTANTS if c.name == name)


if __name__ == "__main__":
    typer.run(main)
