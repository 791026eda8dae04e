"""``drl-fast train`` as a user types it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from drl_fast.cli import app
from drl_fast.engine.logs import read_log

from ..engine.runs import make_folder

CONFIGS = Path(__file__).parents[2] / "configs"
if not CONFIGS.exists():
    pytest.skip("no source tree beside the tests", allow_module_level=True)
pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["clip=toy", "temporal=null", "max_words=12", "max_frames=3", "workers=0", "pretrained=null", "precision=fp32"]
RUN = ["epochs=2", "batch=4", "checkpoint_every=2"]


def train(*arguments: str, small: list[str] = SMALL) -> Result:
    overrides = [word for option in small for word in ("--set", option)]
    return CliRunner().invoke(app, ["train", *arguments, *overrides])


def words(text: str) -> str:
    """Without line breaks and frames, which follow the terminal's width."""
    return " ".join(re.sub(r"[│╭╰─╮╯]", " ", text).split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("videos"))


def test_a_run_from_config_to_best_model(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = str(CONFIGS / "folder_wti_cdcr.yaml")
    done = train("--config", config, "--videos", str(folder), "--out", str(out), small=SMALL + RUN)
    assert done.exit_code == 0, done.output
    told = words(done.output)
    assert "folder, train: 18 captions of 12 videos" in told
    assert "epoch 1: text to video R@1" in told
    assert f"drl-fast eval --checkpoint {out} scores it on the test part" in told
    assert (out / "best/model.safetensors").exists()
    again = train("--config", config, "--videos", str(folder), "--out", str(out), small=SMALL + RUN)
    assert again.exit_code == 1
    assert "holds a run; add --resume to go on with it" in words(again.output)
    resumed = train("--config", config, "--videos", str(folder), "--out", str(out), "--resume", small=SMALL + RUN)
    assert resumed.exit_code == 0, resumed.output
    assert "going on after step 8 of 8" in words(resumed.output)
    scored = CliRunner().invoke(app, ["eval", "--checkpoint", str(out), "--split", "val"])
    assert scored.exit_code == 0, scored.output


@pytest.mark.parametrize("row", ["dp_cdcr", "hi", "mlp", "xti", "ti_cdcr", "wti_cdcr"])
def test_a_dry_run_of_every_interaction(row: str) -> None:
    done = train("--config", str(CONFIGS / f"msrvtt_{row}.yaml"), "--dry-run")
    assert done.exit_code == 0, done.output
    assert "two steps. The scores mean nothing" in words(done.output)
    assert "folder, val: 16 captions of 16 videos" in words(done.output)


def test_a_dry_run_takes_the_data_sets_sizes_and_the_temporal_module() -> None:
    small = [option for option in SMALL if not option.startswith(("max_", "temporal"))] + ["clip=drl-small"]
    done = train("--config", str(CONFIGS / "didemo_ti.yaml"), "--dry-run", small=small)
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["--config", "nowhere.yaml"],
            "the name of a row that is shipped, got nowhere.yaml",
        ),
        (["--config", str(CONFIGS / "msrvtt_wti.yaml")], "videos must name a folder, got none; pass --videos"),
        (["--config", str(CONFIGS / "msrvtt_wti.yaml"), "--videos", "x"], "annotations must name a folder, got none"),
        (["--config", str(CONFIGS / "folder_wti.yaml"), "--videos", "no_such_folder"], "no_such_folder"),
    ],
)
def test_what_is_missing_is_told(arguments: list[str], expected: str) -> None:
    done = train(*arguments)
    assert done.exit_code == 1
    assert expected in words(done.output)
    assert "Traceback" not in done.output


def test_missing_videos_are_counted_or_refused(folder: Path, tmp_path: Path) -> None:
    lines = (folder / "captions.csv").read_text() + "gone.mp4,a film that is not there\n"
    videos = tmp_path / "videos"
    videos.mkdir()
    for path in folder.glob("*.mp4"):
        (videos / path.name).symlink_to(path)
    (videos / "captions.csv").write_text(lines)
    config = ["--config", str(CONFIGS / "folder_dp.yaml"), "--videos", str(videos)]
    done = train(*config, "--out", str(tmp_path / "run"), small=[*SMALL, "epochs=1", "batch=9"])
    assert done.exit_code == 0, done.output
    assert "1 of 13 videos listed have no file: gone.mp4" in words(done.output)
    strict = train(*config, "--out", str(tmp_path / "strict"), "--strict")
    assert strict.exit_code == 1
    assert "gone.mp4" in words(strict.output)
    assert not (tmp_path / "strict").exists()


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_what_was_done(folder: Path, tmp_path: Path, number: signal.Signals) -> None:
    """To all processes of the job, decoding ones too, as terminals and schedulers send it."""
    out = tmp_path / "run"
    small = [*SMALL, "clip=drl-small", "epochs=200", "batch=4", "checkpoint_every=1000000", "workers=1"]
    overrides = [word for option in small for word in ("--set", option)]
    command = ["-W", "ignore", "-m", "drl_fast.cli", "train", "--config", str(CONFIGS / "folder_wti.yaml")]
    command += ["--videos", str(folder), "--out", str(out), *overrides]
    with subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        while process.poll() is None and not (out / "log.csv").exists():
            time.sleep(0.05)
        while process.poll() is None and len(read_log(out / "log.csv")) < 2:
            time.sleep(0.05)
        os.killpg(process.pid, number)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    done = len(read_log(out / "log.csv"))
    assert f"stopped after step {done} of 800; the same command with --resume goes on" in words(output)
    assert "Traceback" not in output
    assert (out / "last.pt").exists()
