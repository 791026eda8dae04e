"""The steps of a GPU session, most important first, and the clock that decides which of them still fit.

A step is a list of cases. A case runs in another process: a worker, which answers requests (gpu_device.py), or a
command. It has an expected duration and a hard limit. A case that does not fit in the time left is not started. One
that crashes or hangs is recorded with its error, and the next one starts. ``session.json`` is complete after every
case, and a second call with the same folder continues where the first one ended. gpu_session.py starts this file.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import gpu_tables
import harness
from gpu_device import ANSWER, PEERS, Place
from problems import Shape

# The linked tree of gpu_session.py, in which drl_fast and its kernels can be imported.
TREE = Path(__file__).absolute().parents[1]
Row = dict[str, Any]


class Failed(Exception):
    """A case has no result; the message says why."""


class NotThere(Exception):
    """A case needs what is not installed."""


# --- processes --------------------------------------------------------------------------------------------------------
class Processes:
    """The processes of a session. What they print goes to a log each, except a worker's answers."""

    def __init__(self, folder: Path, worker: list[str]) -> None:
        self.folder, self.worker = folder, worker
        self.idle: list[tuple[subprocess.Popen[str], Path]] = []
        self.started: list[subprocess.Popen[str]] = []
        folder.mkdir(parents=True, exist_ok=True)

    def start(self, command: list[str], log: Path, **streams: Any) -> subprocess.Popen[str]:
        with log.open("w") as file:
            streams = {"stdout": file, "stderr": file, "stdin": subprocess.PIPE, **streams}
            process = subprocess.Popen(command, cwd=TREE, text=True, start_new_session=True, **streams)
        self.started.append(process)
        return process

    def kill(self, process: subprocess.Popen[str]) -> None:
        """End a process and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def kill_all(self) -> None:
        for process in self.started:
            if process.poll() is None:
                self.kill(process)

    def ask(self, function: str, limit: float, **arguments: Any) -> Row:
        """Return a worker's answer, from an idle one or a new one.

        Raises:
            Failed: an error, no answer within ``limit`` seconds, or the worker ended.
        """
        if self.idle:
            process, log = self.idle.pop()
        else:
            log = self.folder / f"worker-{len(self.started)}.txt"
            process = self.start(self.worker, log, stdout=subprocess.PIPE)
        late = threading.Event()
        timer = threading.Timer(limit, lambda: (late.set(), self.kill(process)))
        timer.start()
        answer: Row | None = None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps({"function": function, "arguments": arguments}) + "\n")
            process.stdin.flush()
            found = next((line for line in process.stdout if line.startswith(ANSWER)), None)
            answer = json.loads(found.removeprefix(ANSWER)) if found else None
        timer.cancel()
        if answer is not None and "error" not in answer and not late.is_set():
            self.idle.append((process, log))
            return answer
        if answer is None and not late.is_set():
            # An end by itself has an exit status; wait for it, since killing would hide it.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
        self.kill(process)
        if late.is_set():
            raise Failed(f"no answer within {limit:.0f} s, so it was stopped")
        raise Failed(answer["error"] if answer else f"ended with status {process.returncode}: {last_lines(log)}")

    def run(self, name: str, command: list[str], limit: float, text: str = "") -> tuple[int | None, Path]:
        """Run a command; return its exit status, None if it took longer than ``limit``, and the log of its output."""
        log = self.folder / f"{name}.txt"
        process = self.start(command, log)
        try:
            process.communicate(text, timeout=limit)
        except subprocess.TimeoutExpired:
            self.kill(process)
            return None, log
        return process.returncode, log


def last_lines(log: Path) -> str:
    return " | ".join(log.read_text(errors="replace").strip().splitlines()[-3:])[-500:]


# --- the session ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Case:
    """One measurement: ``run(limit)`` returns its row within ``limit`` seconds or raises."""

    name: str
    expected: float  # seconds
    run: Callable[[float], Row]
    slack: float = 3.0  # the hard limit, in expected durations


@dataclass(frozen=True)
class Step:
    name: str
    cases: list[Case]
    parallel: int = 1


class Clock:
    """The time left, in seconds."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes

    def left(self) -> float:
        return self.end - time.monotonic()

    def spend(self, seconds: float) -> None:
        """Time passes by itself."""


class PlannedClock(Clock):
    """A rehearsal's clock: every case takes as long as expected, so the steps that fit are those of a real session."""

    def __init__(self, minutes: float) -> None:
        self.seconds = 60 * minutes

    def left(self) -> float:
        return self.seconds

    def spend(self, seconds: float) -> None:
        self.seconds -= seconds


class Session:
    """The rows so far, by step and case, in ``<folder>/session.json``."""

    def __init__(self, folder: Path, clock: Clock, head: Row, retry: bool = False) -> None:
        self.path, self.clock, self.retry = folder / "session.json", clock, retry
        self.begin = clock.left()
        self.lock = threading.Lock()
        self.result = {**head, "calls": [], "steps": {}}
        if self.path.exists():
            found = harness.load(self.path)
            same = all(found[key] == head[key] for key in ("code", "rehearsal"))
            if same and found["machine"]["slug"] == head["machine"]["slug"]:
                self.result |= {key: found[key] for key in ("calls", "steps")}
            else:
                aside = self.path.with_name(f"session-{found['code']}-{found['machine']['slug']}.json")
                self.path.replace(aside)
                print(f"{self.path} is of other code or another GPU; it is now {aside}")

    def save(self) -> None:
        harness.save(self.result, self.path)
        rows = self.result["steps"].get("tuning", {}).values()
        fields = ("arch", "kernel", "kind", "size", "tile", "ms")
        tiles = [{name: row[name] for name in fields} for row in rows if row["status"] == "ok"]
        if tiles:
            head = {key: self.result[key] for key in ("machine", "code", "commit", "rehearsal")}
            harness.save({"benchmark": "tuning", **head, "tiles": tiles}, self.path.with_name("tuning.json"))

    def run(self, steps: list[Step], processes: Processes) -> None:
        """Run what is not finished and fits."""
        try:
            for step in steps:
                with ThreadPoolExecutor(step.parallel) as pool:
                    try:
                        list(pool.map(functools.partial(self.run_case, step), step.cases))
                    except BaseException:
                        processes.kill_all()
                        raise
        finally:
            processes.kill_all()

    def run_case(self, step: Step, case: Case) -> None:
        with self.lock:
            rows = self.result["steps"].setdefault(step.name, {})
            status = rows.get(case.name, {}).get("status")
            if status == "ok" or (status == "failed" and not self.retry):
                return
            left = self.clock.left()
            if case.expected > left:
                self.record(step, case, {"status": "not run", "why": f"needs {case.expected:.0f} s, {left:.0f} s left"})
                return
            rows[case.name] = {"status": "running"}
            self.save()
        began = time.monotonic()
        try:
            row = {"status": "ok", **case.run(min(case.slack * case.expected, left))}
        except NotThere as error:
            row = {"status": "not run", "why": str(error)}
        except Failed as error:
            row = {"status": "failed", "error": str(error)}
        except Exception as error:
            row = {"status": "failed", "error": f"{type(error).__name__}: {error}"}
        with self.lock:
            if row["status"] != "not run":
                self.clock.spend(case.expected / step.parallel)
            self.record(step, case, {**row, "seconds": time.monotonic() - began})

    def record(self, step: Step, case: Case, row: Row) -> None:
        """Keep a row, show it and save everything."""
        self.result["steps"][step.name][case.name] = row
        self.save()
        text = gpu_tables.line(row) if row["status"] == "ok" else f"{row['status']}: {row.get('why') or row['error']}"
        print(f"{self.begin - self.clock.left():5.0f} s  {step.name:12} {case.name:34} {text}", flush=True)

    def row(self, step: str, case: str) -> Row | None:
        """Return a finished row."""
        found = self.result["steps"].get(step, {}).get(case)
        return found if found and found["status"] == "ok" else None


# --- what is measured -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Sizes:
    """The shapes of a session, most important first."""

    shapes: tuple[Shape, ...]
    large: Shape  # for the profiler and for tiles, beside the first shape
    long: Shape
    check: Shape  # what a candidate computes to be compared with float64
    search: Shape  # where the search for the largest batch starts


HALF = Shape(128, dtype="bfloat16")
LARGE, LONG = replace(HALF, batch=1024), replace(HALF, batch=1024, nt=64, nv=64)
FULL = (HALF, LARGE, replace(HALF, batch=4096), LONG)
REAL = tuple(replace(shape, lengths="real") for shape in FULL)
SHAPES = (HALF, LARGE, REAL[1], REAL[0], FULL[2], LONG, REAL[2], REAL[3])
SIZES = Sizes(SHAPES, LARGE, LONG, replace(REAL[0], batch=48), HALF)
TINY = replace(HALF, batch=16, dim=64)
REHEARSAL = Sizes((TINY, replace(TINY, lengths="real")), TINY, TINY, TINY, replace(TINY, batch=4))
GIGABYTES = 8
DTYPES = ("bfloat16", "float16", "float32")
QUICK_TESTS = ["tests/kernels/test_gpu.py", "-k", "small or graph or bits or tf32"]
CUDA_TESTS = ["tests/kernels", "tests/ops", "tests/functional", "-k", "cuda or gpu"]
if all(importlib.util.find_spec(package) for package in ("av", "open_clip")):
    CUDA_TESTS.insert(0, "tests/cli")  # without these packages pytest ends when it is given this folder
# (kernel, kind, size) -> changes of the present entry of kernels/tuning.py, which takes part unchanged.
Candidates = dict[Place, list[Row]]
CANDIDATES: Candidates = {
    ("forward", "keyed", "large"): [
        {"stages": 4},
        {"m": 64, "stages": 4},
        {"m": 64, "warps": 4, "stages": 4, "programs": 2},
        {"n": 64, "stages": 4},
        {"m": 64, "n": 64, "programs": 2},
        {"m": 64, "n": 64, "warps": 4, "programs": 3},
    ],
    ("forward", "keyed", "small"): [{"stages": 3, "programs": 3}, {"stages": 3}, {"n": 32}, {"tma": True}],
    ("product", "half", "large"): [{"n": 128, "stages": 4}, {"m": 256, "n": 128}, {"m": 64, "n": 256, "stages": 4}],
    ("product", "half", "small"): [{"stages": 4}, {"n": 64}, {"m": 128, "warps": 8, "stages": 3}],
    ("forward", "exact", "large"): [{"n": 64, "stages": 4}, {"n": 64, "warps": 4}],
    ("forward", "tf32", "large"): [{"n": 64, "stages": 4}, {"n": 64, "warps": 4}],
    ("forward", "fp32", "large"): [{"stages": 3}, {"m": 32}],
}
REHEARSED: Candidates = {("forward", "keyed", "large"): [{"n": 64, "stages": 4}], ("product", "half", "small"): []}


class Plan:
    """Make the steps of a session."""

    def __init__(self, session: Session, processes: Processes, rehearse: bool) -> None:
        self.session, self.processes, self.rehearse = session, processes, rehearse
        self.sizes, self.candidates = (REHEARSAL, REHEARSED) if rehearse else (SIZES, CANDIDATES)

    def steps(self) -> list[Step]:
        # Durations on an H100 with 16 CPU cores, rounded up.
        shapes = self.sizes.shapes
        doctors = [self.asked(f"doctor {dtype}", 150, "doctor", dtype=dtype) for dtype in DTYPES]
        quick = Case("quick", 130, functools.partial(self.pytest, "tests-quick", QUICK_TESTS))
        speed = [self.asked(s.label(), 10, "speed", shape=asdict(s), rival="plain") for s in shapes]
        peers = [
            Case(f"{name} {s.label()}", 5, functools.partial(self.peer, name, s)) for s in shapes for name in PEERS
        ]
        # The compiled form does not depend on lengths, so real ones find it in the compiler's cache. They come late.
        compiled = {
            lengths: [
                Case(s.label(), seconds, functools.partial(self.compiled, s)) for s in shapes if s.lengths == lengths
            ]
            for lengths, seconds in (("full", 25), ("real", 10))
        }
        memory = [self.asked(s.label(), 5, "memory", shape=asdict(s)) for s in shapes]
        search = {"shape": asdict(self.sizes.search), "gigabytes": GIGABYTES}
        batches = [self.asked(name, 15, "largest_batch", form=name, **search) for name in ("drl_fast", "max")]
        profiled = dict.fromkeys((self.sizes.shapes[0], self.sizes.large))
        pooling = [self.asked(s.label(), 12, "speed", shape=asdict(s), rival="softmax") for s in profiled]
        kernels = [self.asked(s.label(), 8, "kernels", shape=asdict(s)) for s in profiled]
        side_by_side = 1 if self.rehearse else min(8, os.cpu_count() or 1)
        tiles = []
        for place, changes in self.candidates.items():
            checks = [self.check(place, change) for change in ({}, *changes)]
            tiles += [
                Step("candidates", checks, parallel=side_by_side),
                Step("tuning", [Case(" ".join(place), 8, functools.partial(self.tune, place))]),
            ]
        tools = [
            self.tool("memcheck", self.sizes.check, "compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"),
            self.tool(
                "racecheck", self.sizes.check, "compute-sanitizer", "--tool", "racecheck", "--error-exitcode", "9"
            ),
        ]
        # One launch of each kernel that takes long; the kernels that draw and check the problem are torch's.
        which = ["--kernel-name", "regex:interaction|expand|multiply", "--launch-count", "4"]
        sections = ["--set", "full", "--print-details", "all"]
        ncu = self.tool("ncu", self.sizes.large, "ncu", "--clock-control", "none", *sections, *which)
        return [
            Step("correctness", doctors, parallel=1 if self.rehearse else len(doctors)),
            Step("speed", speed),
            Step("kernels", kernels),
            Step("memory", memory),
            Step("batch", batches),
            Step("pooling", pooling),
            Step("compiled", compiled["full"]),
            Step("peers", peers),
            *tiles,
            # Its limit is all the time left: a part of the tests is better than none.
            Step("tests", [quick, Case("all", 60, functools.partial(self.pytest, "tests-all", CUDA_TESTS), slack=10)]),
            Step("counters", [ncu]),
            Step("tools", tools),
            Step("compiled", compiled["real"]),
        ]

    def asked(self, name: str, expected: float, function: str, **arguments: Any) -> Case:
        """Return a case that is one request to a worker."""
        return Case(name, expected, lambda limit: self.processes.ask(function, limit, **arguments))

    def compiled(self, shape: Shape, limit: float) -> Row:
        """Compile the plain form whose step was faster at this shape."""
        row = self.session.row("speed", shape.label())
        times = row["step"]["results"] if row else {}
        form = min(("max", "amax"), key=lambda name: times[name]["ms"]["median"] if name in times else float("inf"))
        found = self.processes.ask("speed", limit, shape=asdict(shape), rival=f"compiled {form}")
        return {"form": form, **found}

    def peer(self, name: str, shape: Shape, limit: float) -> Row:
        if importlib.util.find_spec(name.replace("-", "_")) is None:
            raise NotThere("not installed")
        return self.processes.ask("speed", limit, shape=asdict(shape), rival=name)

    def pytest(self, name: str, selection: list[str], limit: float) -> Row:
        """Run tests; in a rehearsal only collect them."""
        command = [sys.executable, "-m", "pytest", *selection, "-vv", "-p", "no:cacheprovider"]
        command.append("--continue-on-collection-errors")
        if self.rehearse:
            command.append("--collect-only")
        elif importlib.util.find_spec("xdist"):
            command += ["-n", str(min(12, os.cpu_count() or 1))]
        status, log = self.processes.run(name, command, limit)
        output = log.read_text(errors="replace")
        if self.rehearse and status == 0:
            return {"summary": output.strip().splitlines()[-1]}
        # A line is "tests/... PASSED [ 1%]", or "[gw0] [ 1%] PASSED tests/..." from several processes.
        line = r"^(?:\[gw\d+\] \[ *\d+%\] WORD |.* WORD(?: \(.*\))? +\[ *\d+%\]$)"
        words = ("PASSED", "FAILED", "ERROR", "SKIPPED")
        counts = {word.lower(): len(re.findall(line.replace("WORD", word), output, re.M)) for word in words}
        summary = ", ".join(f"{count} {word}" for word, count in counts.items())
        if status is None:
            raise Failed(f"stopped after {limit:.0f} s; so far {summary}")
        if status or not counts["passed"]:
            raise Failed(f"{summary}; {last_lines(log)}")
        return {**counts, "summary": summary}

    def tool(self, name: str, shape: Shape, *command: str) -> Case:
        """Return a case that runs one training step under a tool."""

        def run(limit: float) -> Row:
            found = shutil.which(command[0], path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
            if found is None:
                raise NotThere(f"{command[0]} is not installed")
            request = json.dumps({"function": "one_step", "arguments": {"shape": asdict(shape)}})
            full = [found, *command[1:], *self.processes.worker]
            status, log = self.processes.run(name, full, limit, text=request + "\n")
            if status != 0:
                raise Failed(f"status {status}: {last_lines(log)}")
            return {"summary": last_lines(log)}

        return Case(name, 40, run, slack=4)

    def shapes_of(self, place: Place) -> list[Row]:
        """Return the shapes at which the tiles of one entry are timed."""
        _, kind, size = place
        small, large, long = self.sizes.shapes[0], self.sizes.large, self.sizes.long
        shapes = (small,) if size == "small" else (large, replace(large, lengths="real"), long)
        dtype = "float32" if kind in ("tf32", "fp32") else "bfloat16"
        return [asdict(replace(shape, dtype=dtype)) for shape in dict.fromkeys(shapes)]

    def check(self, place: Place, change: Row) -> Case:
        shapes = self.shapes_of(place)
        small = {**asdict(self.sizes.check), "dtype": shapes[0]["dtype"]}
        arguments = {"place": place, "change": change, "check": small, "shapes": shapes}
        return self.asked(candidate(place, change), 20, "check_tile", **arguments)

    def tune(self, place: Place, limit: float) -> Row:
        """Time the candidates that passed."""
        passed = [c for c in ({}, *self.candidates[place]) if self.session.row("candidates", candidate(place, c))]
        if not passed:
            raise Failed("no candidate has passed its check")
        return self.processes.ask("time_tiles", limit, place=place, changes=passed, shapes=self.shapes_of(place))


def candidate(place: Place, change: Row) -> str:
    changes = [f"{name}={value}" for name, value in change.items()]
    return " ".join([*place, *(changes or ["unchanged"])])


# --- the command line -------------------------------------------------------------------------------------------------
def code_hash() -> str:
    """Return a hash of the code that is measured."""
    files = sorted(path for folder in ("drl_fast", "kernels") for path in (harness.ROOT / folder).rglob("*.py"))
    text = b"".join(str(path.relative_to(harness.ROOT)).encode() + path.read_bytes() for path in files)
    return hashlib.sha256(text).hexdigest()[:12]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9, help="start nothing that would end later; default 9")
    parser.add_argument("--out", type=Path, help="folder of the results; default benchmarks/results/<gpu>")
    parser.add_argument("--retry", action="store_true", help="repeat cases that failed")
    parser.add_argument("--only", metavar="STEPS", help="run these steps, separated by commas: speed,kernels,tuning")
    parser.add_argument("--rehearse", action="store_true", help="run without a GPU; no figure means anything")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print the tables of a session.json")
    options = parser.parse_args()
    if options.show:
        print(gpu_tables.markdown(harness.load(options.show)))
        return
    clock = (PlannedClock if options.rehearse else Clock)(options.minutes)
    worker = [sys.executable, str(TREE / "benchmarks" / "gpu_device.py"), *(["--rehearse"] if options.rehearse else [])]
    logs = options.out or Path("bench_out", "gpu_session")
    processes = Processes(logs / "logs", worker)
    try:
        about = processes.ask("describe", 120)
    except Failed as error:
        raise SystemExit(f"no GPU answers ({error}); --rehearse needs none") from None
    changing = {name: about.pop(name) for name in list(about) if name.startswith(("clocks", "temperature"))}
    head = {
        "benchmark": "gpu_session",
        "machine": about,
        "code": code_hash(),
        "commit": harness.git_commit(),
        "rehearsal": options.rehearse,
    }
    session = Session(options.out or harness.RESULTS / about["slug"], clock, head, options.retry)
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    session.result["calls"].append({"date": date, "minutes": options.minutes, **changing})
    print(f"{about['gpu']}: at most {options.minutes:g} min; writes {session.path}", flush=True)
    steps = Plan(session, processes, options.rehearse).steps()
    if options.only:
        wanted = options.only.split(",")
        known = list(dict.fromkeys(step.name for step in steps))
        if unknown := [name for name in wanted if name not in known]:
            raise SystemExit(f"--only: no step is called {unknown[0]!r}; the steps: {', '.join(known)}")
        steps = [step for name in wanted for step in steps if step.name == name]
    session.run(steps, processes)
    session.save()


if __name__ == "__main__":
    main()
