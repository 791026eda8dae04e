"""What every benchmark shares: interleaved timing, peak memory in a fresh process, machine facts, JSON results.

Timing: contestants take turns, one sample each a round, so that a noisy machine is noisy for all of them; a ratio is
taken within a round, and the median and quartiles over rounds are reported.

Memory: the peak of one call beyond what was resident before it, in a process of its own. On Linux the kernel's
high-water mark of resident memory (VmHWM) is reset just before the call through /proc/self/clear_refs, so that it
sees every page, whoever allocated it, and nothing that came before. Where that file cannot be written, the difference
of ``ru_maxrss`` is used, which cannot be reset. On CUDA: ``torch.cuda.max_memory_allocated``.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import gc
import importlib
import importlib.metadata
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

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MB = 1e6
# A sample shorter than this is mostly timer and dispatch jitter, so short calls are repeated within a sample.
SAMPLE_SECONDS = 2e-3
MAX_ROUNDS = 200
WORKER_TIMEOUT = 900

Call = Callable[[], Any]


# --- timing -----------------------------------------------------------------------------------------------------------
def seconds(call: Call, number: int, device: str) -> float:
    """Mean time of one of ``number`` calls: CUDA events on a GPU, the wall clock elsewhere."""
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
    """Time warmed-up calls side by side: rounds of one sample each, the order rotating from round to round.

    There are as many rounds as fit ``target_seconds``, at least ``min_rounds``.
    """
    number = {}
    for name, call in calls.items():
        once = min(seconds(call, 1, device) for _ in range(2))
        number[name] = max(1, math.ceil(SAMPLE_SECONDS / max(once, 1e-7)))
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
            # Rotated, so that nobody always runs after the one that leaves the worst cache behind.
            order = order[1:] + order[:1]
    finally:
        gc.enable()
    return times


def spread(values: list[float]) -> dict[str, float]:
    """Median, quartiles and minimum."""
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": median, "q1": q1, "q3": q3, "min": min(values), "rounds": len(values)}


def summarize(times: dict[str, list[float]], yardstick: str) -> dict[str, dict[str, dict[str, float]]]:
    """Milliseconds, and ratios to the yardstick's sample of the same round."""
    base = times[yardstick]
    return {
        name: {
            "ms": spread([t * 1e3 for t in samples]),
            "ratio": spread([t / b for t, b in zip(samples, base, strict=True)]),
        }
        for name, samples in times.items()
    }


# --- memory, and whatever wants a process of its own ------------------------------------------------------------------
def resident(field: str) -> float:
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{field}:\s+(\d+) kB", text, re.M)[1]) * 1024  # type: ignore[index]


def give_back() -> None:
    """Return freed heap to the system: pages that a call only reuses would not show up as its own."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def peak_bytes(call: Call, device: str) -> tuple[float, str]:
    """Peak memory of one call beyond what was held before it, and how it was measured."""
    give_back()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, "torch.cuda.max_memory_allocated"
    try:
        Path("/proc/self/clear_refs").write_text("5")  # 5: reset the peak resident set size
        before = resident("VmRSS")
        result = call()
        method, after = "VmHWM", resident("VmHWM")
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        result = call()
        method, after = "ru_maxrss", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    del result  # held until now: what a call returns is part of what it costs
    return after - before, method


def measure_apart(what: str, factory: str, **arguments: Any) -> dict[str, Any]:
    """Measure "memory" or "time" of what ``factory`` ("module:function") makes, or "call" it, in a process of its own.

    See :func:`worker` for what the factory returns. The answer has a ``status``, "ok" or what went wrong.
    """
    job = json.dumps({"what": what, "factory": factory, "arguments": arguments})
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.harness", job]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=WORKER_TIMEOUT
        )
    except subprocess.TimeoutExpired:
        return {"status": f"timed out after {WORKER_TIMEOUT} s"}
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if done.returncode < 0:
        return {"status": f"killed by signal {-done.returncode} (out of memory?)"}
    return {"status": "failed: " + (done.stderr.strip().splitlines() or ["no message"])[-1]}


def worker(job: dict[str, Any]) -> dict[str, Any]:
    """The fresh process: the factory gives (warm-up, call, device); only ``call`` is measured.

    The warm-up must run the same code on a tiny problem, so that libraries, thread pools and compiled code are there
    before; inputs are the factory's and so do not count either. Time: 25 calls, in milliseconds. "call": the call
    measures itself, and its result, which JSON must hold, is handed on.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # if the machine runs out, this process goes first
    module, function = job["factory"].split(":")
    warm_up, call, device = getattr(importlib.import_module(module), function)(**job["arguments"])
    warm_up()
    if job["what"] == "time":
        call()
        return {"status": "ok", "ms": spread([seconds(call, 1, device) * 1e3 for _ in range(25)])}
    if job["what"] == "call":
        return {"status": "ok", "result": call()}
    used, method = peak_bytes(call, device)
    return {"status": "ok", "mb": used / MB, "method": method}


def available_bytes(device: str) -> float:
    """Memory that can still be had."""
    return torch.cuda.mem_get_info()[0] if device.startswith("cuda") else psutil.virtual_memory().available


# --- machine and results ----------------------------------------------------------------------------------------------
def cpu_model() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def machine(device: str, threads: int) -> dict[str, Any]:
    """What the numbers were measured on."""
    gpu = torch.cuda.get_device_name(device) if device.startswith("cuda") else None
    name = gpu or f"{cpu_model()} {threads}t"
    return {
        "slug": re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"),
        "cpu": cpu_model(),
        "gpu": gpu,
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": platform.system(),
    }


def installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    import drl_fast

    return {
        "drl_fast": drl_fast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": git_commit(),
    }


def git_commit() -> str | None:
    """The commit, with a + where the package's own files differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "drl_fast", "csrc", "kernels", "benchmarks/*.py", "setup.py")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def record(benchmark: str, device: str, threads: int, settings: dict[str, Any]) -> dict[str, Any]:
    """The head of a result: everything but the measurements."""
    return {
        "benchmark": benchmark,
        "machine": machine(device, threads),
        "versions": versions(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "device": device,
        "threads": threads,
        "settings": settings,
    }


def save(result: dict[str, Any], path: Path) -> None:
    """Write JSON, floats cut to four significant digits: more is noise, and makes diffs unreadable."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_rounded(result), indent=1) + "\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


if __name__ == "__main__":
    print(json.dumps(worker(json.loads(sys.argv[1]))))
