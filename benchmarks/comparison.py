"""Contestants side by side on problems of given shapes: time, peak memory, and the largest batch in a budget.

A :class:`Comparison` has contestants by mode ("forward", "train", ...) and one plan for each size of run. Every
contestant turns a problem into a call, which is what is timed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import harness
import plots
import result_tables
from harness import Call, Run
from problems import Problem, Shape, make_problem

YARDSTICK = "mm"
# Share of the available memory that a contestant may be expected to need. It only refuses what cannot fit.
SAFE_SHARE = 0.55


# --- contestants ------------------------------------------------------------------------------------------------------
def similarities(count: int) -> Callable[[Shape], float]:
    """Return a function from a shape to the bytes of ``count`` A x B x Nt x Nv tensors."""
    return lambda shape: count * shape.batch**2 * shape.nt * shape.nv * getattr(torch, shape.dtype).itemsize


@dataclass(frozen=True)
class Contestant:
    """Someone who is measured: ``make(problem)`` returns the call."""

    name: str
    label: str
    make: Callable[[Problem], Call]
    note: str = ""
    needs: Callable[[Shape], float] | None = None  # bytes
    peer: bool = False  # a package of that name on PyPI
    devices: tuple[str, ...] = ("cpu", "cuda")
    once: bool = False  # so slow that one call after the others, without a warm-up, has to do
    shaped: bool = False  # compiled for one shape, so warmed up at that shape

    def refusal(self, shape: Shape, device: str) -> str | None:
        """Return why it does not take part, or None."""
        if self.peer and not self.importable():
            return "not installed"
        if device.split(":")[0] not in self.devices:
            return f"needs {' or '.join(self.devices)}"
        needed = self.needs(shape) if self.needs else 0.0
        if needed and needed > SAFE_SHARE * harness.available_bytes(device):
            return f"skipped: needs about {needed / 1e9:.0f} GB"
        return None

    def describe(self) -> dict[str, Any]:
        about: dict[str, Any] = {"label": self.label, "note": self.note}
        if self.peer:
            about["version"] = importlib.metadata.version(self.name) if self.importable() else None
        return about

    def importable(self) -> bool:
        return importlib.util.find_spec(self.name.replace("-", "_")) is not None


def dense_product(problem: Problem) -> Call:
    """Return the yardstick: one product of all padded tokens."""
    words, frames = problem.rows()
    return lambda: torch.mm(words, frames.T)


PRODUCT = Contestant(YARDSTICK, "torch.mm", dense_product, "one dense product of all padded tokens, nothing else")


def gradient_step(forward: Call, leaves: tuple[Tensor, ...], grad: Tensor | None = None) -> Call:
    """Return a training step: the result, a loss if no ``grad`` of it is given, and the gradients of the leaves."""

    def step() -> tuple[Tensor, ...]:
        result = forward()
        return result.detach(), *torch.autograd.grad(result, leaves, None if grad is None else grad.to(result.dtype))

    return step


def loss_step(forward: Callable[[Problem], Tensor]) -> Callable[[Problem], Call]:
    """Return a maker of a loss's training steps."""
    return lambda problem: gradient_step(lambda: forward(problem), problem.leaves())


# --- plans ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Plan:
    """What one run measures. ``minutes`` is how long it takes on two idle CPU cores."""

    minutes: float
    times: Mapping[str, tuple[Shape, ...]] = field(default_factory=dict)  # by mode
    memory: Mapping[str, tuple[Shape, ...]] = field(default_factory=dict)  # by contestant
    budgets: tuple[tuple[Shape, int], ...] = ()  # (family of shapes, megabytes)
    only: Mapping[str, tuple[Shape, ...]] = field(default_factory=dict)  # where a slow contestant is timed
    seconds: float = 1.0  # of timing for one shape and mode
    rounds: int = 3  # at least


@dataclass(frozen=True)
class Comparison:
    """One benchmark, ``COMPARISON`` of the module bench_<name>, where worker processes find it."""

    name: str
    modes: Mapping[str, tuple[Contestant, ...]]
    yardstick: str = YARDSTICK
    step: str = "train"  # the mode whose memory is measured
    against: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # ratios to others, within a round

    def contestant(self, name: str) -> Contestant:
        """Return a contestant of the mode whose memory is measured."""
        return next(c for c in self.modes[self.step] if c.name == name)

    def measure(self, run: Run, plan: Plan) -> None:
        """Measure everything a plan names, row by row."""
        device, threads = run.result["device"], run.result["threads"]
        run.result["contestants"] = {c.name: c.describe() for mode in self.modes.values() for c in mode}
        for mode, shapes in plan.times.items():
            for shape in shapes:
                row = self.time(mode, shape, plan, device)
                times = (f"{name} {found['ms']['median']:.3g} ms" for name, found in row["results"].items())
                run.row("time", row, f"{mode:8} {shape.label():32} {'  '.join(times)}")
        for name, shapes in plan.memory.items():
            for shape in shapes:
                row = self.memory(name, shape, device, threads)
                run.row("memory", row, f"{name:8} {shape.label():32} {result_tables.megabytes(row)}")
        for family, budget in plan.budgets:
            for name in plan.memory:
                rows = [row for row in run.result["memory"] if row["contestant"] == name and row["status"] == "ok"]
                measured = {Shape(**row["shape"]): row["mb"] for row in rows}
                known = {shape.batch: mb for shape, mb in measured.items() if shape.family() == family}
                if len(known) < 2:
                    continue
                found = largest_batch(
                    lambda b, n=name, f=family: self.memory(n, replace(f, batch=b), device, threads), budget, known
                )
                most = found["fits"]["batch"] if found["fits"] else "none"
                row = {"contestant": name, "budget_mb": budget, **found}
                run.row("budget", row, f"{name:8} {budget} MB: largest batch {most}")

    def time(self, mode: str, shape: Shape, plan: Plan, device: str) -> dict[str, Any]:
        """Time all contestants of one mode at one shape, side by side."""
        problem = make_problem(shape, device)
        calls: dict[str, Call] = {}
        slow: dict[str, Call] = {}
        absent: dict[str, str] = {}
        for contestant in self.modes[mode]:
            left_out = contestant.name in plan.only and shape not in plan.only[contestant.name]
            reason = "too slow to be timed at every shape" if left_out else contestant.refusal(shape, device)
            if reason is not None:
                absent[contestant.name] = reason
                continue
            try:
                call = contestant.make(problem)
                for _ in range(0 if contestant.once else 1 if device == "cpu" else 3):
                    call()
            except Exception as error:  # a peer that breaks must not end the run, nor go unmentioned
                absent[contestant.name] = f"failed: {type(error).__name__}: {error}".splitlines()[0][:200]
            else:
                (slow if contestant.once else calls)[contestant.name] = call
        times = harness.interleave(calls, device, plan.seconds, plan.rounds)
        results = harness.summarize(times, self.yardstick)
        for name, call in slow.items():
            once = harness.seconds(call, 1, device)
            base = results[self.yardstick]["ms"]["median"] / 1e3
            results[name] = harness.summarize({"base": [base], name: [once]}, "base")[name]
        if device.startswith("cuda"):
            torch.cuda.empty_cache()  # the processes that measure memory share the GPU with this one
        row = {"shape": asdict(shape), "mode": mode, "results": results, "absent": absent}
        for ours, others in self.against.items():
            measured = [other for other in others if {ours, other} <= set(times)]
            row.setdefault("against", {}).update(
                {other: harness.ratios(times[ours], times[other]) for other in measured}
            )
        return row

    def memory(self, name: str, shape: Shape, device: str, threads: int) -> dict[str, Any]:
        """Measure the peak of one training step beyond its inputs, in a process of its own."""
        job = {"name": name, "shape": asdict(shape), "device": device, "threads": threads}
        found: dict[str, Any] = {"status": self.contestant(name).refusal(shape, device)}
        if found["status"] is None:
            found = harness.measure_apart("comparison:memory_step", benchmark=self.name, **job)
        return {"contestant": name, "shape": asdict(shape), **found}


def memory_step(benchmark: str, name: str, shape: dict[str, Any], device: str, threads: int) -> tuple[Call, Call]:
    """Make a tiny training step and the measurement of a full one, for :func:`harness.measure_apart`."""
    torch.set_num_threads(threads)
    contestant = importlib.import_module(f"bench_{benchmark}").COMPARISON.contestant(name)
    full = Shape(**shape)
    call = contestant.make(make_problem(full, device))
    warm_up = call if contestant.shaped else contestant.make(make_problem(replace(full, batch=4), device))

    def measure() -> dict[str, Any]:
        used, method = harness.peak_bytes(call, device)
        return {"mb": used / harness.MB, "method": method}

    return warm_up, measure


# --- the largest batch ------------------------------------------------------------------------------------------------
def largest_batch(measure: Callable[[int], dict[str, Any]], budget: int, known: dict[int, float]) -> dict[str, Any]:
    """Find the largest batch, to about two percent, whose training step adds at most ``budget`` MB to its inputs.

    Two measured points predict where memory meets the budget. From there strides double until one batch fits and
    another does not; then the gap is halved. ``measure(batch)`` returns ``status`` and ``mb``.
    """
    guess = _predict(budget, known)
    step = 8 * max(1, round(guess / 400))
    batch, stride = step * max(1, int(guess / step)), step
    fits: dict[str, Any] | None = None
    fails: dict[str, Any] | None = None
    while not (fits and fails and fails["batch"] - fits["batch"] <= step) and not (fails and fails["batch"] == step):
        answer = measure(batch)
        found = {"batch": batch, "status": answer["status"], "mb": answer.get("mb")}
        if found["status"] == "ok" and found["mb"] <= budget:
            fits = found
        else:
            fails = found
        if fits and fails:
            batch = (fits["batch"] + fails["batch"]) // (2 * step) * step
        else:
            batch = max(batch + (stride if fits else -stride), step)
            stride *= 2
    return {"fits": fits, "fails": fails}


def _predict(budget: float, known: dict[int, float]) -> float:
    """Return the batch at which memory meets the budget: by a quadratic without constant, or a line for slow growth."""
    (b1, m1), (b2, m2) = sorted(known.items())[-2:]
    square = (m2 / b2 - m1 / b1) / (b2 - b1)
    linear = m1 / b1 - square * b1
    if square > 0:
        return (-linear + math.sqrt(linear * linear + 4 * square * budget)) / (2 * square)
    # Noise alone could make it fall.
    slope = max((m2 - m1) / (b2 - b1), m2 / b2 / 10)
    return max(b2 + (budget - m2) / slope, 1.0)


def present(run: Run) -> None:
    """Finish a run, print its tables and draw its pictures."""
    result = run.finish()
    result_tables.show(result)
    plots.draw(result, run.path)


def main(
    comparison: Comparison,
    plans: Mapping[str, Plan],
    about: str | None,
    gpu_plans: Mapping[str, Plan] | None = None,
    **settings: Any,
) -> None:
    """Run a benchmark from the command line."""
    parser = harness.parser(about)
    options = parser.parse_args()
    on_gpu = options.device.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA device; leave --device out to measure the CPU")
    plan = (gpu_plans if on_gpu and gpu_plans else plans)[options.size]
    run = Run(comparison.name, options, plan.minutes, **settings)
    comparison.measure(run, plan)
    present(run)
