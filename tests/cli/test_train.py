"""``drl-fast train`` from the command line."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import open_clip
import pytest
import torch
from typer.testing import CliRunner, Result

from drl_fast import DRL
from drl_fast.cli import app
from drl_fast.engine.config import read_config
from drl_fast.engine.logs import read_log
from drl_fast.model.clip import build_clip, clip_from_state_dict

from ..engine.runs import make_folder

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["clip=toy", "temporal=null", "max_words=12", "max_frames=3", "workers=0", "pretrained=null", "precision=fp32"]
RUN = ["epochs=2", "batch=4", "checkpoint_every=2"]


def train(*arguments: str, small: list[str] = SMALL) -> Result:
    overrides = [word for option in small for word in ("--set", option)]
    return CliRunner().invoke(app, ["train", *arguments, *overrides])


def words(text: str) -> str:
    """Remove line breaks and frames, which depend on the terminal's width."""
    return " ".join(re.sub(r"[│╭╰─╮╯]", " ", text).split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("videos"))


def test_a_run_from_config_to_best_model(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = ["--config", "wti_cdcr", "--dataset", "folder", "--videos", str(folder), "--out", str(out)]
    done = train(*config, small=SMALL + RUN)
    assert done.exit_code == 0, done.output
    shown = words(done.output)
    assert "folder, train: 18 captions of 12 videos" in shown
    assert "epoch 1: text to video R@1" in shown
    assert "tokens and are cut there" not in shown
    assert f"drl-fast eval --checkpoint {out} scores it on the test part" in shown
    assert (out / "best/model.safetensors").exists()
    again = train(*config, small=SMALL + RUN)
    assert again.exit_code == 1
    assert "holds a run; add --resume to go on with it" in words(again.output)
    resumed = train(*config, "--resume", small=SMALL + RUN)
    assert resumed.exit_code == 0, resumed.output
    assert "continuing after step 8 of 8" in words(resumed.output)
    table = "folder, val: after epoch"
    assert resumed.output.partition(table)[2] == done.output.partition(table)[2], "with intervals and chance"
    assert "chance" in resumed.output
    scored = CliRunner().invoke(app, ["eval", "--checkpoint", str(out), "--split", "val"])
    assert scored.exit_code == 0, scored.output


@pytest.mark.parametrize("row", ["dp_cdcr", "hi", "mlp", "xti", "ti_cdcr", "wti_cdcr", "video_colbert"])
def test_a_dry_run_of_every_interaction(row: str) -> None:
    done = train("--config", row, "--dataset", "msrvtt", "--dry-run")
    assert done.exit_code == 0, done.output
    assert "two steps. The scores mean nothing" in words(done.output)
    assert "folder, val: 16 captions of 16 videos" in words(done.output)


def test_captions_that_are_cut_are_counted() -> None:
    done = train("--config", "ti", "--dataset", "msrvtt", "--dry-run", small=[*SMALL, "max_words=5"])
    assert done.exit_code == 0, done.output
    assert (
        words(done.output).count("16 of 16 captions are longer than 5 tokens and are cut there; max_words up to ") == 2
    )


def test_options_of_the_towers_are_named_with_what_trains() -> None:
    small = [*SMALL, "lora=8", "checkpoint_towers=true"]
    done = train("--config", "ti", "--dataset", "msrvtt", "--dry-run", small=small)
    assert done.exit_code == 0, done.output
    assert "lora 8, checkpoint_towers: 0.00819 M of 1.64 M tower parameters train" in words(done.output)


def test_a_dry_run_takes_the_data_sets_sizes_and_the_temporal_module() -> None:
    small = [option for option in SMALL if not option.startswith(("max_", "temporal"))] + ["clip=drl-small"]
    done = train("--config", "ti", "--dataset", "didemo", "--dry-run", small=small)
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["--config", "nowhere.yaml"],
            "got nowhere.yaml, which is neither",
        ),
        (["--config", "wti", "--dataset", "msrvtt"], "videos must name a folder, got none; pass --videos"),
        (["--config", "wti", "--dataset", "msrvtt", "--videos", "x"], "annotations must name a folder, got none"),
        (["--config", "wti", "--dataset", "folder", "--videos", "no_such_folder"], "no_such_folder"),
        (["--config", "wti"], "no data set given, and wti names none; add --dataset with one of msrvtt, "),
        (
            ["--config", "wti", "--dataset", "msrvtt", "--set", "dataset=msvd"],
            "the configuration's own, msvd, got msrvtt",
        ),
        (["--config", "msrvtt_wti"], "write --config wti --dataset msrvtt"),
        (
            ["--config", "wti", "--dataset", "msrvtt", "--set", "learning_rate=1"],
            "unknown key 'learning_rate' in --set; did you mean lr?",
        ),
    ],
)
def test_mistakes(arguments: list[str], expected: str) -> None:
    done = train(*arguments)
    assert done.exit_code == 1
    assert expected in words(done.output)
    assert "Traceback" not in done.output


def weights(path: Path) -> dict[str, torch.Tensor]:
    return DRL.from_pretrained(path).state_dict()


def test_a_run_starts_from_another(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the source's weights and a new optimizer from step 0; --resume does not need the source again."""
    monkeypatch.chdir(tmp_path)
    data = ["--dataset", "folder", "--videos", str(folder)]
    still = [*SMALL, "epochs=1", "batch=9", "lr=1e-30", "clip_lr=0", "weight_decay=0"]
    first = train("--config", "wti_cdcr", *data, "--out", "first", small=SMALL + RUN)
    assert first.exit_code == 0, first.output
    # The steps are too small to change a float32, so the new run's best model equals the source.
    second = train("--config", "wti", *data, "--out", "second", "--init-from", "first", small=still)
    assert second.exit_code == 0, second.output
    assert f"weights from {tmp_path / 'first'}, interaction wti" in words(second.output)
    assert [row["step"] for row in read_log(tmp_path / "second/log.csv")] == ["1", "2"]
    old, new = weights(tmp_path / "first"), weights(tmp_path / "second/best")
    assert all(torch.equal(x, new[name]) for name, x in old.items())
    reports = []
    for run in ("first", "second"):
        CliRunner().invoke(app, ["eval", "--checkpoint", run, "--split", "val", "--out", f"{run}.json"])
        reports.append(json.loads((tmp_path / f"{run}.json").read_text()))
    assert reports[0]["metrics"] == reports[1]["metrics"]
    assert read_config(tmp_path / "second/config.yaml").init_from == str(tmp_path / "first")

    shutil.rmtree(tmp_path / "first")
    resumed = train("--config", "wti", *data, "--out", "second", "--resume", small=still)
    assert resumed.exit_code == 0, resumed.output
    assert "continuing after step 2 of 2" in words(resumed.output)
    (tmp_path / "second/last.pt").unlink()
    restarted = train("--config", "wti", *data, "--out", "second", "--resume", small=still)
    assert restarted.exit_code == 1
    assert f"not found: {tmp_path / 'first'}" in words(restarted.output)


def test_two_runs_from_one_source_are_equal(folder: Path, tmp_path: Path) -> None:
    """With the same seed they have the same losses."""
    data = ["--config", "dp", "--dataset", "folder", "--videos", str(folder)]
    train(*data, "--out", str(tmp_path / "first"), small=SMALL + RUN)
    logs = []
    for name in ("a", "b"):
        source = ["--init-from", str(tmp_path / "first/best")]
        done = train(*data, "--out", str(tmp_path / name), *source, small=[*SMALL, *RUN, "seed=1"])
        assert done.exit_code == 0, done.output
        logs.append([row["total"] for row in read_log(tmp_path / name / "log.csv")])
    assert logs[0] == logs[1]
    assert logs[0] != [row["total"] for row in read_log(tmp_path / "first/log.csv")]


def test_a_run_starts_from_a_public_checkpoint(tmp_path: Path) -> None:
    clip = clip_from_state_dict(build_clip("drl-small").state_dict())
    torch.save(DRL(clip, interaction="wti", temporal="seqTransf").to_upstream(), tmp_path / "public.bin")
    register_quick_gelu(tmp_path)
    small = [option for option in SMALL if not option.startswith("temporal")]
    data = ["--config", "wti", "--dataset", "folder", "--dry-run", "--init-from", str(tmp_path / "public.bin")]
    done = train(*data, small=[*small, "clip=drl-small-openai"])
    assert done.exit_code == 0, done.output
    refused = train(*data, small=[*SMALL, "clip=drl-small-openai", "interaction=dp"])
    assert refused.exit_code == 1
    assert "got interaction 'wti' there and 'dp' here; temporal 'seqTransf' there and None here" in words(
        refused.output
    )


def register_quick_gelu(folder: Path) -> None:
    """Register drl-small in open_clip in OpenAI's form: heads of width 64, QuickGELU."""
    config = open_clip.get_model_config("drl-small")
    config = {
        **config,
        "quick_gelu": True,
        "vision_cfg": {**config["vision_cfg"], "head_width": 64},
        "text_cfg": {**config["text_cfg"], "heads": 2},
    }
    (folder / "models").mkdir()
    (folder / "models/drl-small-openai.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "models")


def test_a_dry_run_is_not_resumed() -> None:
    done = train("--config", "ti", "--dataset", "msrvtt", "--dry-run", "--resume")
    assert done.exit_code == 1
    assert "dry-run keeps nothing to go on with, got --resume too; drop one of them" in words(done.output)


def test_frozen_towers_with_random_weights_are_warned_of(folder: Path, tmp_path: Path) -> None:
    """Without it the loss stands still, and nothing says why."""
    config = ["--config", "ti", "--dataset", "folder", "--videos", str(folder), "--out", str(tmp_path / "run")]
    for option, warns in (("freeze=clip", True), ("freeze_layers=0", True), ("clip_lr=0", False)):
        shown = words(train(*config, small=[*SMALL, option, "epochs=1", "batch=64"]).output)
        assert ("the towers' weights are random, and the frozen ones stay so" in shown) == warns
        shutil.rmtree(tmp_path / "run")


def test_init_from_and_resume_exclude_each_other(tmp_path: Path) -> None:
    done = train("--config", "wti", "--dataset", "folder", "--init-from", str(tmp_path), "--resume")
    assert done.exit_code == 1
    assert "init-from must be left out with --resume" in words(done.output)


def test_missing_videos_are_counted_or_refused(folder: Path, tmp_path: Path) -> None:
    lines = (folder / "captions.csv").read_text() + "gone.mp4,a film that is not there\n"
    videos = tmp_path / "videos"
    videos.mkdir()
    for path in folder.glob("*.mp4"):
        (videos / path.name).symlink_to(path)
    (videos / "captions.csv").write_text(lines)
    config = ["--config", "dp", "--dataset", "folder", "--videos", str(videos)]
    done = train(*config, "--out", str(tmp_path / "run"), small=[*SMALL, "epochs=1", "batch=9"])
    assert done.exit_code == 0, done.output
    assert "1 of 13 videos listed have no file: gone.mp4" in words(done.output)
    strict = train(*config, "--out", str(tmp_path / "strict"), "--strict")
    assert strict.exit_code == 1
    assert "gone.mp4" in words(strict.output)
    assert not (tmp_path / "strict").exists()


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_the_steps_so_far(folder: Path, tmp_path: Path, number: signal.Signals) -> None:
    """The signal goes to all processes of the job, decoding ones too, as from terminals and schedulers."""
    out = tmp_path / "run"
    small = [*SMALL, "clip=drl-small", "epochs=200", "batch=4", "checkpoint_every=1000000", "workers=1"]
    overrides = [word for option in small for word in ("--set", option)]
    command = ["-W", "ignore", "-m", "drl_fast.cli", "train", "--config", "wti", "--dataset", "folder"]
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
    assert f"stopped after step {done} of 800; the same command with --resume continues" in words(output)
    assert "Traceback" not in output
    assert (out / "last.pt").exists()
