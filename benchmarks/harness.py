"""What every benchmark shares: interleaved timing, peak memory in a fresh process, the machine, and its result's JSON.

Time: contestants take turns, one sample each a round, so that noise on the machine hits all of them. A ratio compares
two samples of one round; the median and quartiles over rounds are reported.

Memory: the peak of one call beyond what was resident before it, in a process of its own. Linux resets its high-water
mark of resident memory (VmHWM) on a write to /proc/self/clear_refs; elsewhere ``ru_maxrss`` is used, which cannot be
reset. On CUDA: ``torch.cuda.max_memory_allocated``.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import gc
import importlib
import json
import math
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

import drl_fast
from drl_fast.atomic_write import write_atomically

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MB = 1e6
# A sample shorter than this is mostly timer and dispatch jitter, so short calls are repeated within a sample. On a GPU
# a sample begins after a wait, which a training loop does not have, so it needs more calls.
SAMPLE_SECONDS, CUDA_SAMPLE_SECONDS = 2e-3, 2e-2
MAX_ROUNDS = 200
WORKER_TIMEOUT = 900

Call = Callable[[], Any]


# --- time -------------------------------------------------------------------------------------------------------------
def seconds(call: Call, number: int, device: str) -> float:
    """Return the mean time of ``number`` calls, by CUDA events on a GPU and by the wall clock elsewhere."""
    if device.startswith("cuda"):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(number):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / number
    begin = time.perf_counter()
    for _ in range(number):
        call()
    return (time.perf_counter() - begin) / number


def interleave(calls: dict[str, Call], device: str, target_seconds: float, min_rounds: int) -> dict[str, list[float]]:
    """Time warmed-up calls in rounds of one sample each, as many as fit ``target_seconds``, at least ``min_rounds``."""
    number = {}
    least = CUDA_SAMPLE_SECONDS if device.startswith("cuda") else SAMPLE_SECONDS
    for name, call in calls.items():
        once = min(seconds(call, 1, device) for _ in range(2))
        number[name] = max(1, math.ceil(least / max(once, 1e-7)))
    order, times = list(calls), {name: [] for name in calls}
    gc.collect()
    gc.disable()
    try:
        begin = time.perf_counter()
        for done in range(MAX_ROUNDS):
            if done >= min_rounds and (time.perf_counter() - begin) * (done + 1) / done > target_seconds:
                break
            for name in order:
                times[name].append(seconds(calls[name], number[name], device))
            # Rotate, so that no call always runs after the one that leaves the worst cache behind.
            order = order[1:] + order[:1]
    finally:
        gc.enable()
    return times


def spread(values: list[float]) -> dict[str, float]:
    """Return median, quartiles and minimum."""
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": median, "q1": q1, "q3": q3, "min": min(values), "rounds": len(values)}


def ratios(times: list[float], base: list[float]) -> dict[str, float]:
    """Return the spread of ratios, each taken within a round."""
    return spread([t / b for t, b in zip(times, base, strict=True)])


def summarize(times: dict[str, list[float]], yardstick: str) -> dict[str, dict[str, dict[str, float]]]:
    """Return each call's milliseconds and its ratio to the yardstick."""
    return {
        name: {"ms": spread([t * 1e3 for t in samples]), "ratio": ratios(samples, times[yardstick])}
        for name, samples in times.items()
    }


# --- memory, and whatever needs a process of its own ------------------------------------------------------------------
def resident(field: str) -> float:
    """Return VmRSS or VmHWM of this process in bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    return int(found[1]) * 1024  # type: ignore[index]


def reset_peak(device: str) -> None:
    """Start counting the peak from here.

    Raises:
        OSError: the system has no /proc/self/clear_refs.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def held_and_peak(device: str) -> tuple[float, float]:
    """Return the bytes held now, after freed memory went back to the system, and the peak since the reset."""
    peak = torch.cuda.max_memory_allocated() if device.startswith("cuda") else resident("VmHWM")
    gc.collect()
    # The allocator keeps freed pages; a call that reuses them would look free of charge.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return torch.cuda.memory_allocated() if device.startswith("cuda") else resident("VmRSS"), peak


def peak_bytes(call: Call, device: str) -> tuple[float, str]:
    """Return the peak memory of one call beyond what was held before it, and how it was measured."""
    try:
        before, _ = held_and_peak(device)
        reset_peak(device)
        result = call()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        _, peak = held_and_peak(device)
        method = "torch.cuda.max_memory_allocated" if device.startswith("cuda") else "VmHWM"
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        result = call()
        method, peak = "ru_maxrss", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    del result  # held until here: what a call returns is part of what it costs
    return peak - before, method


def measure_apart(factory: str, **arguments: Any) -> dict[str, Any]:
    """Measure what ``factory`` ("module:function") makes in a fresh process.

    The factory returns a warm-up, and a call that returns what it measured. The warm-up must run the same code on a
    tiny problem, so that libraries, thread pools and compiled code exist before; the inputs are made before too. The
    answer is the call's, with a ``status``: "ok" or what went wrong.
    """
    command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), factory, json.dumps(arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.get("threads", torch.get_num_threads()))}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=WORKER_TIMEOUT)
    except subprocess.TimeoutExpired:
        return {"status": f"timed out after {WORKER_TIMEOUT} s"}
    if done.returncode == 0:
        return {"status": "ok", **json.loads(done.stdout.splitlines()[-1])}
    if done.returncode < 0:
        return {"status": f"killed by signal {-done.returncode} (out of memory?)"}
    return {"status": "failed: " + (done.stderr.strip().splitlines() or ["no message"])[-1]}


def worker(factory: str, arguments: str) -> None:
    """Run in the fresh process and print the answer of :func:`measure_apart`."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # if the machine runs out, this process goes first
    module, function = factory.split(":")
    warm_up, call = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    warm_up()
    print(json.dumps(call()))


def available_bytes(device: str) -> float:
    """Return the memory that can still be allocated."""
    return torch.cuda.mem_get_info()[0] if device.startswith("cuda") else psutil.virtual_memory().available


# --- the machine ------------------------------------------------------------------------------------------------------
def machine(device: str, threads: int) -> dict[str, Any]:
    """Describe what the numbers are measured on."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
        cpu = found[1].strip() if found else cpu
    gpu = torch.cuda.get_device_name(device) if device.startswith("cuda") else None
    return {
        "slug": re.sub(r"[^a-z0-9]+", "-", (gpu or f"{cpu} {threads}t").lower()).strip("-"),
        "cpu": cpu,
        "gpu": gpu,
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": platform.system(),
    }


def git_commit() -> str | None:
    """Return the commit, with a + where files that a benchmark runs differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "drl_fast", "csrc", "kernels", "benchmarks/*.py", "setup.py")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


# --- a run and its result ---------------------------------------------------------------------------------------------
def parser(about: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark has."""
    options = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = options.add_mutually_exclusive_group()
    size.add_argument("--quick", dest="size", action="store_const", const="quick", help="a few rows, about a minute")
    size.add_argument("--full", dest="size", action="store_const", const="full", help="the whole grid")
    options.set_defaults(size="default")
    options.add_argument("--device", default="cpu", help="cpu, or cuda where there is one")
    options.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    options.add_argument("--out", type=Path, default=Path("bench_out"), help="results go to OUT/<machine>/")
    return options


class Run:
    """One run of a benchmark. It prints each row as it finishes and saves all rows so far.

    Rows so far are in ``<out>/<machine>/<name>.partial.json``, which becomes ``<name>.json`` at the end. A quick run
    writes ``<name>_quick.json`` instead, so it never replaces a longer one's result.

    Raises:
        SystemExit: ``<name>.json`` is the result of a full run, and this run is shorter.
    """

    def __init__(self, name: str, options: argparse.Namespace, minutes: float, **settings: Any) -> None:
        torch.set_num_threads(options.threads)
        size = options.size
        self.result: dict[str, Any] = {
            "benchmark": name,
            "machine": machine(options.device, options.threads),
            "versions": {
                "drl_fast": drl_fast.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
                "commit": git_commit(),
            },
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
            "device": options.device,
            "threads": options.threads,
            "settings": {"full": size == "full", "quick": size == "quick", **settings},
        }
        folder = options.out / self.result["machine"]["slug"]
        self.path = folder / (f"{name}_quick.json" if size == "quick" else f"{name}.json")
        self.partial = self.path.with_suffix(".partial.json")
        if size == "default" and self.path.exists() and load(self.path)["settings"].get("full"):
            raise SystemExit(f"{self.path} is a full run's result: add --full, or choose another folder with --out")
        self.begin = time.perf_counter()
        print(f"{name}, {size}: expected duration {minutes:g} min on an idle machine; writes {self.path}", flush=True)

    def row(self, section: str, row: dict[str, Any], text: str) -> None:
        """Add a row, show it and save what there is."""
        self.result.setdefault(section, []).append(row)
        print(f"{time.perf_counter() - self.begin:6.0f} s  {section:8}{text}", flush=True)
        save(self.result, self.partial)

    def finish(self) -> dict[str, Any]:
        """Save the complete result and return it as it was saved."""
        self.result["seconds"] = time.perf_counter() - self.begin
        save(self.result, self.path)
        self.partial.unlink(missing_ok=True)
        print(f"wrote {self.path} after {self.result['seconds']:.0f} s", flush=True)
        return load(self.path)


def save(result: Any, path: Path) -> None:
    """Write JSON whole or not at all. Floats keep four significant digits, since more is noise in every diff."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rounded = json.loads(json.dumps(result), parse_float=lambda digits: float(f"{float(digits):.4g}"))
    text = json.dumps(rounded, indent=1) + "\n"
    write_atomically(path, lambda name: Path(name).write_text(text))


def load(path: Path) -> Any:
    """Read a result."""
    return json.loads(path.read_text())


if __name__ == "__main__":
    worker(*sys.argv[1:])
