"""The process of a GPU session that uses the GPU: it answers one request a line on stdin with one line on stdout.

    {"function": "speed", "arguments": {...}}  ->  ANSWER {...}

``Device`` is the only code that asks something of a real GPU. ``Rehearsal`` takes its place where there is none: CPU
tensors reach the real launchers, kernels are compiled as for an H100 and not run (fake_gpu.py), so every figure that it
returns is invented and every result is garbage.
"""

from __future__ import annotations

import functools
import json
import shutil
import statistics
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from drl_fast.kernels import tuning
from drl_fast.kernels.tuning import Tile
from torch import Tensor

import bench_wti
import drl_fast
import eager
import fake_gpu
import harness
from comparison import dense_product, gradient_step
from drl_fast.cli import device_check
from harness import Call
from problems import Problem, Shape, make_problem

ANSWER = "ANSWER "
Row = dict[str, Any]
SMI = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"


# --- the GPU ----------------------------------------------------------------------------------------------------------
class Device:
    """Torch's only CUDA device."""

    name = "cuda"

    def describe(self) -> Row:
        about = {**harness.machine("cuda", torch.get_num_threads()), "memory_gb": self.total() / 1e9}
        if shutil.which("nvidia-smi"):
            command = ["nvidia-smi", f"--query-gpu={SMI}", "--format=csv,noheader"]
            answer = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.splitlines()
            about |= dict(zip(SMI.split(","), answer[0].split(", "), strict=False)) if answer else {}
        return about

    def total(self) -> int:
        return torch.cuda.get_device_properties(0).total_memory

    def worst_error(self, dtype: torch.dtype) -> float:
        return device_check.worst_error("cuda", dtype)

    def errors(self, ours: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> list[float]:
        """Return the error of the logits by the doctor's rule, and of each gradient by its norm.

        Where two candidates nearly tie, either choice is right, but it changes single entries of a gradient.
        """
        gradients = [(x.double() - y).norm() / y.norm() for x, y in zip(ours[1:], truth[1:], strict=True)]
        return [float(x) for x in (*device_check.relative(ours[:1], [truth[0].cpu()]), *gradients)]

    def interleave(self, calls: dict[str, Call]) -> dict[str, list[float]]:
        """Return seconds of warmed-up calls by CUDA events, in rounds of one sample each."""
        return harness.interleave(calls, "cuda", target_seconds=0.6, min_rounds=7)

    def in_graph(self, call: Call) -> Call:
        """Capture a warmed-up call in a CUDA graph and return its replay."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()
        return lambda: (graph.replay(), result)  # the result is where the graph writes, so it must live as long

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        torch._dynamo.reset()
        return torch.compile(function, dynamic=False)

    def peak(self, call: Call) -> float:
        """Return the megabytes that one call needs beyond what is held before it."""
        return harness.peak_bytes(call, "cuda")[0] / harness.MB

    def fits(self, run: Call, gigabytes: float) -> bool:
        """Say whether ``run`` ends without an allocation error if this process may allocate so much."""
        self.release()
        torch.cuda.set_per_process_memory_fraction(gigabytes * 1e9 / self.total())
        try:
            run()
            torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            return False
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return True

    def kernels(self, call: Call, times: int) -> list[Row]:
        """Return name, launches a call and microseconds a call of every kernel of a warmed-up call."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(times):
                call()
            torch.cuda.synchronize()
        found: dict[str, Row] = {}
        for event in profile.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                row = found.setdefault(event.name, {"name": event.name, "calls": 0.0, "us": 0.0})
                row["calls"] += 1 / times
                row["us"] += event.time_range.elapsed_us() / times
        if not found:
            raise ValueError("the profiler saw no kernel")
        return sorted(found.values(), key=lambda row: -row["us"])

    def release(self) -> None:
        """Wait, so that a broken context shows here, and give cached memory back."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


class Rehearsal(Device):
    """A GPU that is not there. Its times and errors are constants, and it has memory for a batch of 20."""

    name = "cpu"

    def __init__(self) -> None:
        fake_gpu.install(90)
        self.serving = fake_gpu.serving_cpu_tensors()
        self.serving.__enter__()

    def describe(self) -> Row:
        return {"slug": "rehearsal", "gpu": "none: a rehearsal"}

    def worst_error(self, dtype: torch.dtype) -> float:
        return 0.0

    def errors(self, ours: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> list[float]:
        return [0.0]

    def interleave(self, calls: dict[str, Call]) -> dict[str, list[float]]:
        for call in calls.values():
            call()
        return {name: [1e-3 * (1 + place)] * 3 for place, name in enumerate(calls)}

    def in_graph(self, call: Call) -> Call:
        return call

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return function

    def peak(self, call: Call) -> float:
        call()
        return 1.0

    def fits(self, run: Call, gigabytes: float) -> bool:
        return len(run()[0]) <= 20

    def kernels(self, call: Call, times: int) -> list[Row]:
        with fake_gpu.compiled_kernels() as launched:
            call()
        return [{"name": name, "calls": 1.0, "us": 1.0} for name, _, _ in launched]

    def release(self) -> None:
        pass


# --- who is measured --------------------------------------------------------------------------------------------------
Make = Callable[[Problem], Call]
Place = tuple[str, str, str]  # of a tile in kernels/tuning.py: kernel, kind, size
OURS, YARDSTICK, IN_GRAPH = "drl_fast", "mm", " in a graph"
WITH_LIBRARY = "drl_fast with torch.mm"  # in the backward
PLAIN = {"max": eager.premasked, "amax": functools.partial(eager.premasked, largest=torch.amax)}
FUNCTIONS = {OURS: drl_fast.token_interaction, **PLAIN}
TEMPERATURE = 0.05
SOFTMAX = functools.partial(drl_fast.token_interaction, pooling="softmax", temperature=TEMPERATURE)
PLAIN_SOFTMAX = functools.partial(eager.premasked, largest=lambda x, dim: ((x / TEMPERATURE).softmax(dim) * x).sum(dim))
# Beyond this batch launches take no visible part of the time, and a graph of plain PyTorch would keep its memory.
LARGEST_GRAPH = 1024


def both_directions(make: Make) -> Make:
    """Return a maker that scores both directions with a library that knows one, by two calls."""

    def make_both(p: Problem) -> Call:
        swapped = Problem(p.shape, p.video, p.text, p.video_weight, p.text_weight, p.video_mask, p.text_mask)
        by_text, by_video = make(p), make(swapped)
        return lambda: (by_text(), by_video())

    return make_both


PEERS = {
    "flash-maxsim": both_directions(bench_wti.flash_maxsim_scores),
    "late-interaction-kernels": both_directions(bench_wti.late_interaction_scores),
}


def contestants(device: Device, rival: str) -> dict[str, Make]:
    """Return the yardstick, ours and its rival: "plain" for both plain forms, "compiled <form>", or a peer.

    "softmax" is softmax pooling, ours and the plain form.
    """
    function = SOFTMAX if rival == "softmax" else drl_fast.token_interaction
    if rival == "plain":
        rivals = {name: bench_wti.on_tokens(function) for name, function in PLAIN.items()}
    elif rival == "softmax":
        rivals = {rival: bench_wti.on_tokens(PLAIN_SOFTMAX)}
    elif rival.startswith("compiled "):
        rivals = {"compiled": bench_wti.on_tokens(device.compile(PLAIN[rival.removeprefix("compiled ")]))}
    else:
        rivals = {rival: PEERS[rival]}
    return {YARDSTICK: dense_product, OURS: bench_wti.on_tokens(function), **rivals}


def training_step(problem: Problem, function: Callable[..., Any]) -> Call:
    """Return the logits and the gradients of features and weights."""
    return gradient_step(lambda: function(*problem.inputs()), problem.leaves(), problem.grad)


# --- what a session asks ----------------------------------------------------------------------------------------------
def describe(device: Device) -> Row:
    return {**device.describe(), "torch": torch.__version__, "triton": triton.__version__, "python": sys.version}


def doctor(device: Device, dtype: str) -> Row:
    """Run the doctor's checks of one dtype."""
    error, limit = device.worst_error(getattr(torch, dtype)), device_check.limit(getattr(torch, dtype))
    if not error <= limit:  # NaN is not
        raise ValueError(f"wrong results: the largest relative error is {error:.2e}, the limit is {limit:.0e}")
    return {"worst_error": error, "limit": limit}


def speed(device: Device, shape: Row, rival: str) -> Row:
    """Time one shape's forward, and its step: forward and backward.

    A row has milliseconds, their ratio to the yardstick (one product of all padded tokens) within a round, and TFLOP/s.
    These count one product of the real tokens in the forward and three in the step; the yardstick's count all tokens.
    """
    problem = make_problem(Shape(**shape), device.name)
    (a, nt, dim), (b, nv, _) = problem.text.shape, problem.video.shape
    words, frames = (float(mask.sum(dtype=torch.float64)) for mask in (problem.text_mask, problem.video_mask))
    padded, real = 2.0 * a * nt * b * nv * dim, 2.0 * words * frames * dim
    row: Row = {"padded_gflop": padded / 1e9, "real_gflop": real / 1e9}
    for mode, products in (("forward", 1),) if rival in PEERS else (("forward", 1), ("step", 3)):
        calls, absent = warmed_up(device, problem, mode, rival)
        results: Row = harness.summarize(device.interleave(calls), YARDSTICK)
        for name, found in results.items():
            found["tflops"] = (padded if name == YARDSTICK else products * real) / found["ms"]["median"] / 1e9
        row[mode] = {"results": results, "absent": absent}
    return row


def with_library_products(call: Call) -> Call:
    """Return a step whose backward multiplies by torch.mm although the texts have masks."""

    def run() -> Any:
        before, tuning.library_products = tuning.library_products, lambda dtype, masked: True
        try:
            return call()
        finally:
            tuning.library_products = before

    return run


def warmed_up(device: Device, problem: Problem, mode: str, rival: str) -> tuple[dict[str, Call], dict[str, str]]:
    """Return everyone's calls, and why the others have none."""
    calls: dict[str, Call] = {}
    absent = {}
    makers = contestants(device, rival)
    if rival == "plain" and mode == "step":
        makers[WITH_LIBRARY] = makers[OURS]
    for name, make in makers.items():
        call = torch.no_grad()(make(problem))
        if mode == "step" and name != YARDSTICK:
            call = gradient_step(make(problem), problem.leaves(), problem.grad)
        if name == WITH_LIBRARY:
            call = with_library_products(call)
        try:
            for _ in range(3):
                call()
            calls[name] = call
            device.release()
        except torch.OutOfMemoryError:
            absent[name] = "out of memory"
    if rival == "plain" and problem.shape.batch <= LARGEST_GRAPH:
        calls |= {name + IN_GRAPH: device.in_graph(calls[name]) for name in (OURS, "max") if name in calls}
    return calls, absent


def memory(device: Device, shape: Row) -> Row:
    """Measure the peak of a training step beyond its inputs."""
    problem = make_problem(Shape(**shape), device.name)
    row: Row = {"mb": {}, "absent": {}}
    for name, function in FUNCTIONS.items():
        step = training_step(problem, function)
        try:
            step()
            device.release()
            row["mb"][name] = device.peak(step)
        except torch.OutOfMemoryError:
            row["absent"][name] = "out of memory"
    return row


def drawn_there(shape: Shape, device: str) -> Problem:
    """Draw a problem on the device: a CPU takes seconds for the numbers of a large one."""

    def leaf(*size: int) -> Tensor:
        return torch.randn(size, dtype=getattr(torch, shape.dtype), device=device).requires_grad_()

    b, nt, nv, dim = shape.batch, shape.nt, shape.nv, shape.dim
    features, weights = (leaf(b, nt, dim), leaf(b, nv, dim)), (leaf(b, nt), leaf(b, nv))
    problem = Problem(shape, *features, *weights, *(torch.ones_like(w, requires_grad=False) for w in weights))
    problem.grad = torch.randn(b, b, device=device)
    return problem


def largest_batch(device: Device, shape: Row, form: str, gigabytes: float) -> Row:
    """Find the largest batch whose training step fits, inputs included. The search starts at the shape's batch."""

    def fits(batch: int) -> bool:
        family = Shape(**{**shape, "batch": batch})
        return device.fits(lambda: training_step(drawn_there(family, device.name), FUNCTIONS[form])(), gigabytes)

    return {"batch": search(fits, shape["batch"]), "gigabytes": gigabytes}


def search(fits: Callable[[int], bool], start: int) -> int:
    """Return the largest batch that fits, to about three percent: double it, then halve the gap; 0 if none fits."""
    fit, fail = 0, start
    while fits(fail):
        fit, fail = fail, 2 * fail
    grain = min(64, start)
    while fail - fit > max(grain, fit // 32):
        middle = (fit + fail) // 2 // grain * grain
        fit, fail = (middle, fail) if fits(middle) else (fit, middle)
    return fit


def kernels(device: Device, shape: Row) -> Row:
    """Return the time of each kernel of a training step."""
    problem = make_problem(Shape(**shape), device.name)
    step = training_step(problem, drl_fast.token_interaction)
    for _ in range(3):
        step()
    rows = device.kernels(step, 5)
    return {"kernels": rows, "us": sum(row["us"] for row in rows)}


def one_step(device: Device, shape: Row) -> Row:
    """Run one training step, for tools that watch it."""
    training_step(make_problem(Shape(**shape), device.name), drl_fast.token_interaction)()
    return {}


# --- tiles ------------------------------------------------------------------------------------------------------------
# The kernel that uses a table's tiles.
KERNELS = {"forward": "interaction_forward", "product": "multiply_tiles"}


def table_of(device: Device, place: Place) -> dict[str, Tile]:
    """Return the table that holds a tile; its key there is the size."""
    arch = tuning.architecture(torch.device(device.name))
    kernel, kind, _ = place
    return tuning.FORWARD[arch][kind] if kernel == "forward" else tuning.PRODUCT[arch]


def tuned_call(device: Device, place: Place, shape: Row) -> Call:
    """Return the forward of training, or the whole step for a kernel of the backward."""
    kernel, kind, _ = place
    problem = make_problem(Shape(**shape), device.name)
    function = functools.partial(drl_fast.token_interaction, normalize=kind != "exact")
    return (lambda: function(*problem.inputs())) if kernel == "forward" else training_step(problem, function)


@contextmanager
def precision(kind: str) -> Iterator[None]:
    """Let float32 products use TF32 for the kind "tf32" only."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if kind == "tf32" else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@contextmanager
def in_table(table: dict[str, Tile], tiles: dict[str, Tile]) -> Iterator[None]:
    before = dict(table)
    table.update(tiles)
    try:
        yield
    finally:
        table.update(before)


def check_tile(device: Device, place: Place, change: Row, check: Row, shapes: list[Row]) -> Row:
    """Compile a candidate for all shapes that it will be timed at, and compare its results at ``check`` with float64.

    Processes that do this side by side fill Triton's cache on the disk, so that timing compiles nothing.

    Raises:
        ValueError: wrong results, or a candidate other than the present entry spills registers.
    """
    table, (kernel, kind, size) = table_of(device, place), place
    tile = table[size]._replace(**change)
    problem = make_problem(Shape(**check), device.name)
    exact = in_float64(problem)
    function = functools.partial(drl_fast.token_interaction, normalize=kind != "exact")
    # The small problem of the check must use the candidate, whatever its size says.
    with precision(kind), in_table(table, dict.fromkeys(table, tile)), fake_gpu.compiled_kernels() as launched:
        ours, truth = (training_step(p, function)() for p in (problem, exact))
        for shape in shapes:
            tuned_call(device, place, shape)()
    # A few near ties may change single entries of a gradient.
    coarse, fine = 3e-2, device_check.limit(problem.text.dtype)
    limits = [coarse if kind == "tf32" else fine, *[coarse] * 4]
    errors = device.errors(ours, truth)
    if not all(error <= limit for error, limit in zip(errors, limits, strict=False)):
        raise ValueError(f"wrong results: relative errors {[f'{error:.1e}' for error in errors]}")
    spills = max(compiled.n_spills for name, _, compiled in launched if name == KERNELS[kernel])
    if spills and change:
        raise ValueError(f"spills registers ({spills})")
    return {"spills": spills, "errors": errors}


def in_float64(problem: Problem) -> Problem:
    """Return the problem in float64, which chunked PyTorch computes."""
    leaves = (x.detach().double().requires_grad_() for x in problem.leaves())
    exact = Problem(problem.shape, *leaves, problem.text_mask, problem.video_mask)
    exact.grad = problem.grad.double()
    return exact


def time_tiles(device: Device, place: Place, changes: list[Row], shapes: list[Row]) -> Row:
    """Time candidates side by side, without the host's time, and return the best as an entry of kernels/tuning.py."""
    table, (kernel, kind, size) = table_of(device, place), place
    tiles = [table[size]._replace(**change) for change in changes]
    times: dict[Tile, list[float]] = {tile: [] for tile in tiles}

    def with_tile(tile: Tile, call: Call) -> Call:
        def run() -> None:
            table[size] = tile
            call()

        return run

    with precision(kind), in_table(table, {}):
        for shape in shapes:
            call = tuned_call(device, place, shape)
            calls = {str(nth): device.in_graph(with_tile(tile, call)) for nth, tile in enumerate(tiles)}
            for nth, samples in device.interleave(calls).items():
                times[tiles[int(nth)]].append(1e3 * statistics.median(samples))
    winner = best(times)
    return {
        "arch": tuning.architecture(torch.device(device.name)),
        "kernel": kernel,
        "kind": kind,
        "size": size,
        "tile": winner._replace(source=f"measured on {device.describe()['gpu']}")._asdict(),
        "ms": times[winner],
        "candidates": [{**change, "ms": times[tile]} for change, tile in zip(changes, tiles, strict=True)],
    }


def best(times: dict[Tile, list[float]]) -> Tile:
    """Return the tile with the smallest sum of times relative to the fastest at each shape."""
    fastest = [min(column) for column in zip(*times.values(), strict=True)]
    return min(times, key=lambda tile: sum(t / f for t, f in zip(times[tile], fastest, strict=True)))


REQUESTS = (describe, doctor, speed, memory, largest_batch, kernels, one_step, check_tile, time_tiles)


def main() -> None:
    """Answer until stdin ends or a request fails: an error may have broken the CUDA context, so start a new process."""
    device = Rehearsal() if "--rehearse" in sys.argv else Device()
    functions = {function.__name__: function for function in REQUESTS}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = functions[request["function"]](device, **request["arguments"])
            device.release()
        except Exception as error:
            traceback.print_exc()
            # A compiler's message begins with the source and ends with what is wrong.
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
            message = lines[0] if len(lines) == 1 else f"{lines[0]} ... {lines[-1]}"
            answer = {"error": f"{type(error).__name__}: {message}"[:500]}
        print(ANSWER + json.dumps(answer), flush=True)
        if "error" in answer:
            sys.exit(1)


if __name__ == "__main__":
    main()
