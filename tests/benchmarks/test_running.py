"""Every benchmark prints its duration, shows rows, saves complete files, and keeps longer results."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

import bench_cdcr
import bench_contrastive
import bench_model
import bench_wti
import comparison
import harness
import scaling
from comparison import Plan
from problems import Shape

TINY = Shape(3, 4, 2, 8)
PAIR = (TINY, Shape(4, 4, 2, 8))
TINY_PLANS: dict[str, Plan] = {
    "bench_wti": Plan(
        1,
        dict.fromkeys(("forward", "train", "maxsim"), PAIR),
        {"drl_fast": PAIR, "eager": PAIR[:1]},
        only={"compile": ()},
        seconds=0.01,
        rounds=2,
    ),
    "bench_contrastive": Plan(1, {"train": PAIR}, {"fused": PAIR, "eager": PAIR[:1]}, seconds=0.01, rounds=2),
    "bench_cdcr": Plan(
        1,
        {"rows": PAIR[:1], "pairs": PAIR},
        {"diagonal": PAIR, "outer": PAIR[:1]},
        only={"outer": PAIR[:1]},
        seconds=0.01,
        rounds=2,
    ),
}
RESULTS = {"bench_wti": bench_wti, "bench_contrastive": bench_contrastive, "bench_cdcr": bench_cdcr}


def run_main(module: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> Path:
    """Run a benchmark's command line; return the folder of its results."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", "--out", str(folder), "--threads", "1", *options])
    if module.main is comparison.main:
        comparison.main(module.COMPARISON, module.PLANS, module.__doc__)
    else:
        module.main()
    (machine,) = folder.iterdir()
    return machine


@pytest.mark.parametrize("name", RESULTS)
def test_a_run_shows_saves_and_draws(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, plan = RESULTS[name], TINY_PLANS[name]
    monkeypatch.setattr(module, "PLANS", {"quick": plan})
    folder = run_main(module, tmp_path, monkeypatch, "--quick")
    stem = f"{module.COMPARISON.name}_quick"
    assert {path.name for path in folder.iterdir()} == {f"{stem}.json", f"{stem}_time.png", f"{stem}_memory.png"}
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in folder.glob("*.png"))

    first, *shown = capsys.readouterr().out.splitlines()
    assert "quick: expected duration 1 min" in first
    rows = sum(len(shapes) for shapes in (*plan.times.values(), *plan.memory.values()))
    assert sum(bool(re.match(r" *\d+ s  (time|memory) ", line)) for line in shown) == rows
    assert any("relative" in line or "/ eager" in line for line in shown), "tables at the end"

    result = harness.load(folder / f"{stem}.json")
    assert result["settings"]["quick"]
    assert [(row["mode"], Shape(**row["shape"])) for row in result["time"]] == [
        (mode, shape) for mode, shapes in plan.times.items() for shape in shapes
    ]
    assert all(times["ms"]["median"] > 0 for row in result["time"] for times in row["results"].values())
    assert {row["status"] for row in result["memory"]} == {"ok"}


def test_the_measured_contestants(tmp_path: Path) -> None:
    def names(module: Any, mode: str, shape: Shape) -> set[str]:
        row = module.COMPARISON.time(mode, shape, TINY_PLANS[module.__name__], "cpu")
        return set(row["results"])

    assert {"mm", "drl_fast", "eager"} == names(bench_wti, "train", TINY)
    everyone = {"products", "full", "diagonal", "eager_full", "eager_diagonal", "outer"}
    assert names(bench_cdcr, "pairs", PAIR[0]) == everyone
    assert names(bench_cdcr, "pairs", PAIR[1]) == everyone - {"outer"}
    row = bench_contrastive.COMPARISON.time("train", TINY, TINY_PLANS["bench_contrastive"], "cpu")
    assert set(row["results"]) == {"mm", "fused", "two_steps", "eager"}
    assert set(row["against"]) == {"eager", "two_steps"}


def test_a_stopped_run_saves_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_contrastive, "PLANS", {"default": TINY_PLANS["bench_contrastive"]})
    monkeypatch.setattr(comparison.Comparison, "memory", stop)
    with pytest.raises(KeyboardInterrupt):
        run_main(bench_contrastive, tmp_path, monkeypatch)
    (saved,) = tmp_path.glob("*/*")
    assert saved.name == "contrastive.partial.json"
    partial = harness.load(saved)
    assert len(partial["time"]) == len(PAIR)
    assert partial["machine"]["cpu"]


def options(folder: Path, size: str) -> Namespace:
    return Namespace(size=size, device="cpu", threads=1, out=folder)


def finished(folder: Path, size: str) -> Path:
    run = harness.Run("wti", options(folder, size), 1)
    run.row("time", {"of": size}, "")
    run.finish()
    return run.path


def test_a_short_run_does_not_overwrite_a_full_result(tmp_path: Path) -> None:
    full = finished(tmp_path, "full")
    before = full.read_bytes()
    with pytest.raises(SystemExit, match=r"is a full run's result: add --full, or choose another folder with --out"):
        finished(tmp_path, "default")
    quick = finished(tmp_path, "quick")
    assert (full.name, quick.name) == ("wti.json", "wti_quick.json")
    assert full.read_bytes() == before
    assert finished(tmp_path, "full") == full, "a full run may replace a full one"


def test_a_result_is_written_completely_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    harness.save({"pi": 3.14159265}, path)
    assert json.loads(path.read_text()) == {"pi": 3.142}

    def full_disk(self: Path, text: str) -> int:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="no space"):
        harness.save({"pi": 3}, path)
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]
    assert json.loads(path.read_text()) == {"pi": 3.142}


def test_a_script_runs_by_path_from_anywhere(tmp_path: Path) -> None:
    command = [sys.executable, str(harness.ROOT / "benchmarks" / "bench_wti.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--quick" in done.stdout


@pytest.mark.parametrize("module", [*RESULTS.values(), bench_model, scaling], ids=lambda module: module.__name__)
def test_every_script_has_the_options(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_main(module, tmp_path, monkeypatch, "--help")
    assert {"[--quick", "--full]", "[--out"} <= set(capsys.readouterr().out.split())


def test_every_size_of_every_benchmark_says_how_long_it_takes() -> None:
    plans = [*bench_wti.PLANS.values(), *bench_wti.GPU_PLANS.values(), *bench_contrastive.PLANS.values()]
    plans += [*bench_cdcr.PLANS.values(), *(steps.loss for steps in bench_model.PLANS.values())]
    for module in (bench_wti, bench_contrastive, bench_cdcr, bench_model):
        assert set(module.PLANS) == {"quick", "default", "full"}
    assert all(plan.minutes >= 1 for plan in plans)
    assert all(plans["quick"].minutes == 1 for plans in (bench_wti.PLANS, bench_cdcr.PLANS, bench_contrastive.PLANS))
    assert scaling.PLAN


def test_no_script_edits_the_search_path() -> None:
    for script in (harness.ROOT / "benchmarks").glob("*.py"):
        found = [
            ast.unparse(node) for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Attribute)
        ]
        assert "sys.path" not in found, script


def test_ratios_are_taken_within_a_round() -> None:
    found = harness.summarize({"mm": [1.0, 10.0, 1.0], "x": [2.0, 20.0, 2.0]}, "mm")["x"]
    assert found["ratio"] == {"median": 2.0, "q1": 2.0, "q3": 2.0, "min": 2.0, "rounds": 3}
