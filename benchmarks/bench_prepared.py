"""Searching prepared videos on a CPU: the time of a call beside that of the matrix product with all tokens.

    python benchmarks/bench_prepared.py [--quick | --full]

Queries of 12 words against 20,000 videos of 12 frames with 512 channels, normalised random numbers, both directions
with given weights. The yardstick is ``q @ flat.T``: all words times all frames, without maxima, weights and sums. It
writes every similarity; the interaction never stores them. ``read`` sums all the videos' numbers, and so reads each
once. Also the time of ``prepare`` and the error of 16-bit storage. Writes ``<out>/<machine>/prepared.json``.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import drl_fast
import harness
from comparison import present
from harness import Call, Run
from problems import SEED

TOKENS, DIM, K = 12, 512, 10
STORAGE = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Plan:
    """What one run measures."""

    minutes: float
    videos: int
    queries: tuple[int, ...]
    seconds: float = 4.0  # of each row, at least `rounds` of them
    rounds: int = 3


PLANS = {
    "quick": Plan(0.3, 2_000, (1, 16), seconds=1.0),
    "default": Plan(1, 20_000, (1, 16), seconds=6.0, rounds=5),
    "full": Plan(1.5, 20_000, (1, 4, 16, 256), seconds=3.0, rounds=1),
}


class Problem:
    """Videos, prepared in every dtype, and queries."""

    def __init__(self, videos: int) -> None:
        generator = torch.Generator().manual_seed(SEED)
        self.video = torch.nn.functional.normalize(torch.randn(videos, TOKENS, DIM, generator=generator), dim=-1)
        self.video_weight = torch.rand(videos, TOKENS, generator=generator).softmax(1)
        self.prepared: dict[str, drl_fast.PreparedVideos] = {}
        self.generator = generator

    def prepare(self, name: str) -> float:
        """Prepare the videos in one dtype; return the seconds that it took."""
        begin = time.perf_counter()
        self.prepared[name] = drl_fast.prepare(self.video, self.video_weight, dtype=STORAGE[name])
        return time.perf_counter() - begin

    def queries(self, count: int) -> tuple[Tensor, Tensor]:
        """Draw queries and their weights."""
        text = torch.randn(count, TOKENS, DIM, generator=self.generator)
        return torch.nn.functional.normalize(text, dim=-1), torch.rand(count, TOKENS).softmax(1)

    def calls(self, text: Tensor, weight: Tensor) -> dict[str, Call]:
        """Return what is timed, by name."""
        words, flat = text.flatten(0, 1), self.video.flatten(0, 1)
        calls: dict[str, Call] = {"product": lambda: words @ flat.T, "read": self.video.sum}
        for name, prepared in self.prepared.items():
            calls[name] = lambda prepared=prepared: drl_fast.token_interaction(text, prepared, weight)
        calls["topk"] = lambda: drl_fast.topk(text, self.prepared["float32"], K, weight)
        calls["unprepared"] = lambda: drl_fast.token_interaction(text, self.video, weight, self.video_weight)
        return calls


def measure(run: Run, plan: Plan) -> None:
    """Measure everything a plan names."""
    problem = Problem(plan.videos)
    for name in STORAGE:
        seconds = problem.prepare(name)
        size = problem.prepared[name].nbytes
        text = f"{name}: {seconds * 1e3:.0f} ms, {size / harness.MB:.0f} MB"
        run.row("prepare", {"dtype": name, "seconds": seconds, "bytes": size}, text)
    for queries in plan.queries:
        text, weight = problem.queries(queries)
        times = harness.interleave(problem.calls(text, weight), "cpu", plan.seconds, plan.rounds)
        results: dict[str, Any] = harness.summarize(times, "product")
        for name, found in results.items():
            found["of_read"] = harness.ratios(times[name], times["read"])
        row = {"queries": queries, "videos": plan.videos, "results": results}
        shown = "  ".join(f"{name} {results[name]['ratio']['median']:.2f}" for name in (*STORAGE, "topk", "unprepared"))
        run.row("time", row, f"{queries} queries, relative to the product: {shown}")
    exact = drl_fast.token_interaction(text, problem.prepared["float32"], weight)
    for name in list(STORAGE)[1:]:
        moved = drl_fast.token_interaction(text, problem.prepared[name], weight) - exact
        row = {"dtype": name, "largest": float(moved.abs().max()), "rms": float(moved.square().mean().sqrt())}
        run.row("error", row, f"{name}: scores moved by at most {row['largest']:.1e}")


def main() -> None:
    parser = harness.parser(__doc__)
    options = parser.parse_args()
    if options.device != "cpu":
        parser.error("--device must be cpu: only the CPU's kernels keep a layout of prepared videos")
    plan = PLANS[options.size]
    settings = asdict(plan)
    run = Run("prepared", options, settings.pop("minutes"), **settings)
    with torch.no_grad():
        measure(run, plan)
    present(run)


if __name__ == "__main__":
    main()
