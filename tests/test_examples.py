"""The examples run at small sizes. (For examples/torchrun_2proc.py see tests/distributed/test_example.py.)"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from . import clips

EXAMPLES = Path(__file__).parents[1] / "examples"
if not EXAMPLES.exists():
    pytest.skip("no source tree beside the tests", allow_module_level=True)
SMALL = ["clip=drl-small", "pretrained=null", "temporal=null", "max_frames=3", "workers=0", "batch=4", "epochs=1"]


def run(*command: str, **environment: str) -> str:
    """Run an example and return its standard output."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_quickstart() -> None:
    output = run(sys.executable, str(EXAMPLES / "quickstart.py"), "--clips", "44", "--epochs", "1")
    assert "epoch 1: loss" in output
    assert "among 8 videos (chance 12.5 %)" in output
    assert "finds, first to third:" in output


def test_quickstart_with_fewer_captions_than_a_batch() -> None:
    output = run(sys.executable, str(EXAMPLES / "quickstart.py"), "--clips", "20", "--epochs", "1")
    assert "epoch 1: loss" in output


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
def test_train_msrvtt(tmp_path: Path) -> None:
    """On files in MSR-VTT's format."""
    sentences = []
    for i in range(8):
        clips.write_video(tmp_path / f"video{i}.mp4", [clips.solid((30 * i, 90, 200 - 20 * i))] * 3, rate=2)
        sentences.append({"video_id": f"video{i}", "caption": f"colour number {i}", "sen_id": i})
    videos = [{"video_id": f"video{i}"} for i in range(8)]
    (tmp_path / "MSRVTT_data.json").write_text(json.dumps({"videos": videos, "sentences": sentences}))
    (tmp_path / "MSRVTT_train.9k.csv").write_text("video_id\n" + "".join(f"video{i}\n" for i in range(5)))
    lines = ["key,vid_key,video_id,sentence", *(f"ret{i},msr{i},video{i},colour number {i}" for i in range(5, 8))]
    (tmp_path / "MSRVTT_JSFUSION_test.csv").write_text("\n".join(lines) + "\n")
    overrides = [word for option in SMALL for word in ("--set", option)]
    places = {"VIDEOS": str(tmp_path), "ANNOTATIONS": str(tmp_path), "OUT": str(tmp_path / "run")}
    output = run(str(EXAMPLES / "train_msrvtt.sh"), *overrides, **places)
    assert "msrvtt, train: 5 captions of 5 videos" in output
    assert json.loads((tmp_path / "run/test.json").read_text())["texts"] == 3


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
def test_two_processes() -> None:
    output = " ".join(run(str(EXAMPLES / "torchrun_2proc.sh"), "--set", "batch=4", "--set", "temporal=null").split())
    assert "2 processes (ddp)" in output
    assert "2 processes (fsdp)" in output
    assert output.count("two steps. The scores mean nothing") == 2
