"""examples/torchrun_2proc.py: two processes have the losses of one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples/torchrun_2proc.py"
if not EXAMPLE.exists():
    pytest.skip("no source tree beside the tests", allow_module_level=True)

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "ignore", *arguments], capture_output=True, text=True, check=False)


def test_two_processes_have_the_curve_of_one(tmp_path: Path) -> None:
    curves = []
    for name, start in {"two": [*TORCHRUN, str(EXAMPLE)], "one": [str(EXAMPLE), "--single"]}.items():
        done = run(*start, "--steps", "60", "--pairs", "21", "--out", str(tmp_path / name))
        assert done.returncode == 0, done.stderr
        assert "last step  loss" in done.stdout
        curves.append(json.loads((tmp_path / name).read_text()))
    assert len(curves[0]) == 60
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)
    assert curves[0][-1] < 0.8 * curves[0][0]


def test_without_torchrun_it_says_how_to_start_it() -> None:
    done = run(str(EXAMPLE))
    assert done.returncode == 2
    assert "start it with torchrun, as above, or pass --single" in done.stderr
