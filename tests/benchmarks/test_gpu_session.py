"""A GPU session without a GPU: its clock, what it keeps, and a rehearsal of the whole program in a bare source tree."""

from __future__ import annotations

import ast
import inspect
import multiprocessing
import operator
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import Any

import pytest
import torch
from drl_fast.kernels import tuning
from drl_fast.kernels.tuning import Tile

import gpu_device
import gpu_steps
import gpu_tables
import harness
from gpu_steps import Case, Failed, NotThere, PlannedClock, Processes, Session, Step

HEAD = {"machine": {"slug": "some-gpu", "memory_gb": 85.17654}, "code": "c0de", "commit": None, "rehearsal": False}


class NoProcesses:
    def kill_all(self) -> None:
        pass


def session(folder: Path, minutes: float = 1, **options: Any) -> Session:
    return Session(folder, PlannedClock(minutes), HEAD, **options)


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    return harness.load(folder / "session.json")["steps"]


def returns(**row: Any) -> Any:
    return lambda limit: row


def must_not_run(limit: float) -> Any:
    pytest.fail("this case must not run")


# --- the clock and the result -----------------------------------------------------------------------------------------
def test_a_case_that_does_not_fit_is_skipped_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limits = []
    cases = [
        Case("first", 40, lambda limit: limits.append(limit) or {}),
        Case("long", 21, must_not_run),
        Case("short", 15, lambda limit: limits.append(limit) or {}),
    ]
    session(tmp_path).run([Step("speed", cases), Step("tests", [Case("all", 6, must_not_run)])], NoProcesses())
    found = rows(tmp_path)
    assert [row["status"] for row in found["speed"].values()] == ["ok", "not run", "ok"]
    assert found["speed"]["long"]["why"] == "needs 21 s, 20 s left"
    assert found["tests"] == {"all": {"status": "not run", "why": "needs 6 s, 5 s left"}}
    # A limit never reaches beyond the end of the session.
    assert limits == [60, 20]
    assert "long" in capsys.readouterr().out


def test_a_case_that_fails_is_recorded_and_the_others_run(tmp_path: Path) -> None:
    def fail(error: Exception) -> Any:
        def run(limit: float) -> Any:
            raise error

        return run

    cases = [Case("crash", 1, fail(Failed("died"))), Case("bug", 1, fail(KeyError("x"))), Case("good", 1, returns(x=2))]
    absent = Case("absent", 1, fail(NotThere("ncu is not installed")))
    session(tmp_path).run([Step("speed", [*cases, absent])], NoProcesses())
    found = rows(tmp_path)["speed"]
    assert (found["crash"]["status"], found["crash"]["error"]) == ("failed", "died")
    assert (found["bug"]["status"], found["bug"]["error"]) == ("failed", "KeyError: 'x'")
    assert (found["good"]["status"], found["good"]["x"]) == ("ok", 2)
    assert (found["absent"]["status"], found["absent"]["why"]) == ("not run", "ncu is not installed")


def test_the_file_is_complete_before_the_next_case(tmp_path: Path) -> None:
    def look(limit: float) -> Any:
        found = rows(tmp_path)
        assert found["speed"]["first"]["x"] == 1
        assert found["speed"]["second"] == {"status": "running"}
        return {}

    session(tmp_path).run([Step("speed", [Case("first", 1, returns(x=1)), Case("second", 1, look)])], NoProcesses())
    assert rows(tmp_path)["speed"]["second"]["status"] == "ok"


def be_killed(folder: Path) -> None:
    def die(limit: float) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    session(folder).run([Step("speed", [Case("done", 1, returns(x=1)), Case("killed", 1, die)])], NoProcesses())


def test_it_continues_after_a_kill(tmp_path: Path) -> None:
    killed = multiprocessing.get_context("fork").Process(target=be_killed, args=(tmp_path,))
    killed.start()
    killed.join(30)
    assert killed.exitcode == -signal.SIGKILL
    assert rows(tmp_path)["speed"]["killed"] == {"status": "running"}
    cases = [Case("done", 1, must_not_run), Case("killed", 1, returns(x=2)), Case("new", 1, returns(x=3))]
    session(tmp_path).run([Step("speed", cases)], NoProcesses())
    assert [row["x"] for row in rows(tmp_path)["speed"].values()] == [1, 2, 3]


def test_failed_cases_are_repeated_only_if_asked(tmp_path: Path) -> None:
    def fail(limit: float) -> Any:
        raise Failed("once")

    session(tmp_path).run([Step("speed", [Case("a", 1, fail)])], NoProcesses())
    session(tmp_path).run([Step("speed", [Case("a", 1, must_not_run)])], NoProcesses())
    session(tmp_path, retry=True).run([Step("speed", [Case("a", 1, returns(x=1))])], NoProcesses())
    assert rows(tmp_path)["speed"]["a"]["x"] == 1


def test_results_of_other_code_are_set_aside(tmp_path: Path) -> None:
    steps = [Step("speed", [Case("a", 1, returns(x=1))])]
    session(tmp_path).run(steps, NoProcesses())
    changed = Session(tmp_path, PlannedClock(1), {**HEAD, "code": "0ther"})
    assert changed.result["steps"] == {}
    assert harness.load(tmp_path / "session-c0de-some-gpu.json")["steps"]["speed"]["a"]["x"] == 1


# --- processes --------------------------------------------------------------------------------------------------------
WORKER = """
import json, os, sys, time
for line in sys.stdin:
    request = json.loads(line)
    name = request["function"]
    print("noise")
    if name == "crash":
        print("the last words", file=sys.stderr)
        sys.exit(3)
    if name == "hang":
        time.sleep(60)
    answer = {"error": "ValueError: wrong results"} if name == "fail" else {"pid": os.getpid(), **request["arguments"]}
    print("ANSWER " + json.dumps(answer), flush=True)
"""


def test_workers_answer_crash_and_hang(tmp_path: Path) -> None:
    processes = Processes(tmp_path, [sys.executable, "-S", "-c", WORKER])
    try:
        first = processes.ask("echo", 30, x=1)
        assert first["x"] == 1
        assert processes.ask("echo", 30, x=2) == {"pid": first["pid"], "x": 2}
        with pytest.raises(Failed, match="ended with status 3: the last words"):
            processes.ask("crash", 30)
        second = processes.ask("echo", 30)["pid"]
        with pytest.raises(Failed, match=r"no answer within 0 s, so it was stopped"):
            processes.ask("hang", 0.2)
        with pytest.raises(Failed, match="ValueError: wrong results"):
            processes.ask("fail", 30)
        assert len({first["pid"], second, processes.ask("echo", 30)["pid"]}) == 3
    finally:
        processes.kill_all()
    assert all(process.poll() is not None for process in processes.started)


def test_a_command_that_hangs_is_stopped_with_what_it_started(tmp_path: Path) -> None:
    processes = Processes(tmp_path, [])
    status, log = processes.run("ends", ["sh", "-c", "echo out; echo err >&2; cat; exit 5"], 30, text="in\n")
    assert (status, sorted(log.read_text().split())) == (5, ["err", "in", "out"])
    status, log = processes.run("hangs", ["sh", "-c", "sleep 60 & echo $!; wait"], 0.5)
    assert status is None
    # Its parent is gone, so whoever reaps it may take a moment.
    child = Path("/proc", log.read_text().strip(), "stat")
    for _ in range(100):
        if not child.exists() or child.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("what the command started still runs")


PYTEST = """
[gw1] [ 25%] PASSED tests/kernels/test_gpu.py::test_a[cuda]
[gw0] [ 50%] FAILED tests/kernels/test_gpu.py::test_b[100%]
[gw0] [ 75%] SKIPPED tests/kernels/test_gpu.py::test_c
tests/kernels/test_gpu.py::test_d PASSED          [100%]
FAILED tests/kernels/test_gpu.py::test_b[100%] - assert 1 == 2
"""


@pytest.mark.parametrize(
    ("status", "output", "message"),
    [
        (None, PYTEST, "stopped after 30 s; so far 2 passed, 1 failed, 0 error, 1 skipped"),
        (1, PYTEST, "2 passed, 1 failed, 0 error, 1 skipped; .*assert 1 == 2"),
        (0, "[gw0] [100%] SKIPPED tests/a.py::test_c\n", "0 passed, 0 failed, 0 error, 1 skipped"),
    ],
)
def test_what_pytest_says(status: int | None, output: str, message: str, tmp_path: Path) -> None:
    class Ran(NoProcesses):
        def run(self, name: str, command: list[str], limit: float) -> tuple[int | None, Path]:
            log = tmp_path / "log"
            log.write_text(output)
            return status, log

    plan = gpu_steps.Plan(session(tmp_path), Ran(), rehearse=False)
    with pytest.raises(Failed, match=message):
        plan.pytest("tests", [], 30)


# --- measurements -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("most", [0, 5, 128, 200, 1000, 1500])
def test_the_largest_batch_is_found_to_three_percent(most: int) -> None:
    tried: list[int] = []

    def fits(batch: int) -> bool:
        tried.append(batch)
        return batch <= most

    found = gpu_device.search(fits, 128)
    assert found <= most
    assert most - found <= max(64, most / 32)
    assert len(tried) < 15


def test_torch_has_what_the_device_asks_for() -> None:
    """No test here runs the code for a real GPU, so a misspelt name would show only there."""
    nodes = ast.walk(ast.parse(inspect.getsource(gpu_device)))
    names = {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}
    names = {name for name in names if re.fullmatch(r"torch(\.\w+)+", name)}
    assert len(names) > 15
    for name in names:
        operator.attrgetter(name.removeprefix("torch."))(torch)


SLOW, EVEN, UNEVEN = (Tile(size, 64, 64, 8, 2, False) for size in (64, 128, 256))


def test_the_best_tile_is_chosen_over_all_shapes() -> None:
    times = {SLOW: [3.0, 3.0], EVEN: [1.1, 1.1], UNEVEN: [1.0, 2.0]}
    assert gpu_device.best(times) == EVEN
    assert gpu_device.best({SLOW: [3.0, 3.0], UNEVEN: [1.0, 2.0]}) == UNEVEN


def test_every_candidate_is_an_entry_of_the_tables() -> None:
    for (kernel, kind, size), changes in gpu_steps.CANDIDATES.items():
        table = tuning.FORWARD["sm_90"][kind] if kernel == "forward" else tuning.PRODUCT["sm_90"]
        tiles = [table[size], *(table[size]._replace(**change) for change in changes)]
        assert len(set(tiles)) == len(tiles), (kernel, kind, size)


# --- tables -----------------------------------------------------------------------------------------------------------
def measured(**times: float) -> dict[str, Any]:
    results = {name: {"ms": {"median": ms}, "tflops": 100 / ms} for name, ms in times.items()}
    return {"results": results, "absent": {"amax": "out of memory"}}


def test_tables_refuse_what_was_not_measured() -> None:
    machine = {"gpu": "Some GPU", "torch": "2.11", "triton": "3.6"}
    empty = {**HEAD, "machine": machine, "steps": {}}
    text = gpu_tables.markdown(empty)
    assert "Correctness checks: NOT PASSED: not run" in text
    assert text.count("not measured") == 5, "two tables of times, one of memory, and two batches"
    row = {"status": "ok", "forward": measured(mm=1.0, drl_fast=2.0, max=6.0), "step": measured(mm=1.0, max=9.0)}
    failed = {"status": "failed", "error": "x", "forward": measured(drl_fast=0.1)}
    steps = {
        "correctness": {"doctor": {"status": "ok"}, "tests": {"status": "failed", "error": "1 failed"}},
        "speed": {"(128)": row, "(1024)": failed},
        "peers": {"flash-maxsim (128)": {"status": "not run", "why": "not installed"}},
        "memory": {"(128)": {"status": "ok", "mb": {"drl_fast": 10.0, "max": 155.0}, "absent": {}}},
        "batch": {"max": {"status": "ok", "batch": 512, "gigabytes": 8}, "drl_fast": {"status": "running"}},
    }
    text = gpu_tables.markdown({**empty, "steps": steps})
    assert "Correctness checks: NOT PASSED: tests" in text
    forward, step = (table.splitlines()[4:6] for table in text.split("ms\n")[1:])
    cells = [cell.strip() for cell in text[text.index("| (128) |") :].splitlines()[0].strip("|").split("|")]
    assert cells == [
        "(128)",
        "1",
        "6",
        "out of memory",
        *["not measured"] * 2,
        "not installed",
        "not measured",
        "2",
        *["not measured"] * 2,
        "3.00x",
        "50",
        "50 %",
    ]
    assert "0.1" not in forward[1], "a failed case has no figure"
    assert "3.00x" not in step[0]
    assert "| (128) | 155 | not measured | 10 | 15.5x |" in text
    assert "| plain, max | 512 in 8 GB |\n| drl-fast | not measured |" in text


def test_tables_refuse_a_rehearsal() -> None:
    with pytest.raises(SystemExit, match="nothing in it was measured"):
        gpu_tables.markdown({**HEAD, "rehearsal": True, "steps": {}})


# --- the whole program ------------------------------------------------------------------------------------------------
# A machine with a GPU may have PyTorch and pytest and nothing that decodes videos, trains or makes towers.
ABSENT = (
    "drl_fast",
    "__editable__",
    "open_clip",
    "av",
    "torchvision",
    "h5py",
    "tensorboard",
    "yaml",
    "safetensors",
    "timm",
)


def bare_python(folder: Path) -> Path:
    """Make an interpreter that has this one's packages except those."""
    venv.create(folder / "venv", symlinks=True)
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    for source in [Path(path) for path in sys.path if path.endswith("site-packages")]:
        for path in source.iterdir():
            if not path.name.startswith(ABSENT) and path.suffix != ".pth" and not (packages / path.name).exists():
                (packages / path.name).symlink_to(path)
    return folder / "venv" / "bin" / "python"


def files(tree: Path) -> list[Path]:
    return sorted(path for path in tree.rglob("*") if "__pycache__" not in path.parts)


def test_a_rehearsal_in_a_bare_source_tree(tmp_path: Path) -> None:
    """No installation, no extension; everything runs, and nothing is left in the tree or beside it."""
    # Compiled Python files come along, only to save time.
    ignore = shutil.ignore_patterns(".*", "build", "dist", "bench_out", "runs", "demo_out", "*.so", "results")
    tree = shutil.copytree(harness.ROOT, tmp_path / "tree", ignore=ignore)
    before = files(tree)
    (tmp_path / "tmp").mkdir()
    python = bare_python(tmp_path)
    dropped = ("PYTHONPATH", "PYTEST_XDIST_WORKER")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    environment["TMPDIR"] = str(tmp_path / "tmp")

    def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([python, *command], cwd=folder, env=environment, capture_output=True, text=True)

    assert "No module named 'drl_fast'" in run(tmp_path, "-c", "import drl_fast").stderr
    done = run(tree, "benchmarks/gpu_session.py", "--rehearse", "--minutes", "18", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    found = rows(tmp_path / "out")
    bad = {(step, name): row for step, cases in found.items() for name, row in cases.items() if row["status"] != "ok"}
    assert {step for step, _ in bad} <= {"peers", "counters", "tools"}, bad
    assert {row["why"].partition(" ")[2] or row["why"] for row in bad.values()} <= {"is not installed", "installed"}, (
        bad
    )
    assert list(found) == [
        *("correctness", "speed", "kernels", "memory", "batch", "pooling", "compiled", "peers"),
        *("candidates", "tuning", "tests", "counters", "tools"),
    ]
    for tests in found["tests"].values():
        assert int(tests["summary"].strip("= ").split("/")[0]) > 20, "tests that -k selects"
    assert {k["name"] for row in found["kernels"].values() for k in row["kernels"]} > {"interaction_forward"}
    assert found["batch"]["drl_fast"]["batch"] == found["batch"]["max"]["batch"] == 20
    tiles = harness.load(tmp_path / "out" / "tuning.json")["tiles"]
    assert [(row["kernel"], row["kind"], row["size"]) for row in tiles] == list(gpu_steps.REHEARSED)
    for row in tiles:
        assert (row["arch"], Tile(**row["tile"]).source) == ("sm_90", "measured on none: a rehearsal")
    assert "the C++ extension is not available" in (tmp_path / "out" / "logs" / "worker-0.txt").read_text()
    some = ["--rehearse", "--out", str(tmp_path / "some"), "--only"]
    assert run(tree, "benchmarks/gpu_session.py", *some, "kernels,speed").returncode == 0
    assert list(rows(tmp_path / "some")) == ["kernels", "speed"]
    assert (
        "no step is called 'sped'; the steps: correctness, "
        in run(tree, "benchmarks/gpu_session.py", *some, "sped").stderr
    )
    shown = run(tree, "benchmarks/gpu_session.py", "--show", str(tmp_path / "out" / "session.json"))
    assert "nothing in it was measured" in shown.stderr
    assert files(tree) == before
    assert not list((tmp_path / "tmp").glob("drl-fast-*"))
