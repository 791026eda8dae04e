"""``drl-fast eval``: every kind of checkpoint, videos that are left out, and one-line errors."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from drl_fast.cli import app
from drl_fast.data.datasets import load_split
from drl_fast.data.video import Sampling
from drl_fast.engine import evaluate as evaluation
from drl_fast.engine import features
from drl_fast.engine.config import build_model, read_config
from drl_fast.engine.evaluate import evaluate
from drl_fast.model.clip import build_clip, clip_from_state_dict
from drl_fast.model.drl import DRL
from tests.clips import cut, greys, noise, write_video

Eval = Callable[..., Any]
CONFIG = """
dataset: folder
clip: drl-small
pretrained: null
precision: fp32
workers: 0
rate: 8
max_frames: 3
max_words: 16
"""
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def drl_eval(command: Eval) -> Eval:
    """Run ``drl-fast eval`` with options."""
    return partial(command, "eval")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write six clips with two captions each, one of them broken, and a caption of a missing video."""
    folder = tmp_path_factory.mktemp("videos [mine]")
    lines = ["video,caption"]
    for number in range(6):
        write_video(folder / f"clip{number}.mp4", greys(4) if number % 2 else noise(2 + number))
        lines += [f"clip{number}.mp4,number {number} of [six]", f"clip{number}.mp4,{'grey ' * number}again"]
    cut(folder / "clip4.mp4", 0.4)
    (folder / "captions.csv").write_text("\n".join([*lines, "gone.mp4,not here"]))
    return folder


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return path


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_the_configured_model(drl_eval: Eval, videos: Path, config: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "eval.json"
    result = drl_eval("--config", config, "--videos", videos, "--out", out, "--post", "--set", "interaction=ti")
    assert result.exit_code == 0, result.output
    report = read(out)
    assert [path.name for path in out.parent.iterdir()] == ["eval.json"]

    settings = read_config(config, ["interaction=ti"])
    torch.manual_seed(settings.seed)
    model, tokenizer = build_model(settings)
    split = load_split("folder", "test", videos=videos, annotations=videos)
    found = evaluate(model, split, tokenizer, settings.sampling(model.picture_size[0]), max_words=16)
    assert report["metrics"] == found.metrics
    assert (report["texts"], report["videos"]) == found.sim.shape == (10, 5)
    assert report["missing"] == ["gone.mp4"]
    assert [video["name"] for video in report["unreadable"]] == ["clip4.mp4"]
    for key, (low, high) in report["R1_interval_95"].items():
        assert 0 <= low <= report["metrics"][key]["R1"] <= high <= 100
    assert report["chance"]["R1"] == 20
    assert report["model"]["interaction"] == report["config"]["interaction"] == "ti"
    assert report["config"]["videos"] == str(videos)
    assert report["checkpoint"] is None
    assert set(report["seconds"]) == {"videos", "texts", "scores"}

    for words in (
        "folder, test: 10 captions against 5 videos",
        "1 of 7 videos listed have no file: gone.mp4",
        "unreadable, left out: clip4.mp4",
        "Untrained: all weights are random",
        f"written to {out}",
    ):
        assert words in result.flat
    first, second = result.flat.split("Post-processing by dual softmax, not comparable with the table above")
    for table, metrics in ((first, report["metrics"]), (second, report["dual_softmax"])):
        for name, key in (("text to video", "t2v"), ("video to text", "v2t")):
            row = table.split(name)[1].split("video")[0]
            assert f"{metrics[key]['R5']:.1f} {metrics[key]['R10']:.1f} {metrics[key]['MdR']:.1f}" in row


def test_no_second_table_unless_asked_for(drl_eval: Eval, videos: Path, config: Path) -> None:
    result = drl_eval("--config", config, "--videos", videos)
    assert result.exit_code == 0
    assert "softmax" not in result.stdout
    assert "written" not in result.stdout


def small_clip(name: str = "drl-small") -> torch.nn.Module:
    """Build a CLIP of OpenAI's form: heads of width 64, QuickGELU."""
    torch.manual_seed(3)
    return clip_from_state_dict(build_clip(name).state_dict())


def test_every_kind_of_checkpoint(drl_eval: Eval, videos: Path, config: Path, tmp_path: Path) -> None:
    """A run folder, a folder of save_pretrained and a public checkpoint of the same model give equal results."""
    model = DRL(small_clip(), interaction="wti", temporal="seqTransf")
    run = tmp_path / "run"
    model.save_pretrained(run / "best")
    (run / "config.yaml").write_text(CONFIG + f"videos: {videos}\n")
    torch.save(model.to_upstream(), tmp_path / "upstream.bin")
    found = []
    for options in (
        ["--checkpoint", run],
        ["--checkpoint", run / "best"],
        ["--checkpoint", run / "best", "--config", config, "--videos", videos],
        ["--checkpoint", tmp_path / "upstream.bin", "--config", config, "--videos", videos, "--set", "max_words=16"],
    ):
        out = tmp_path / "eval.json"
        result = drl_eval(*options, "--out", out)
        assert result.exit_code == 0, result.output
        assert "Untrained" not in result.stdout
        assert f"from {options[1]}" in result.flat
        found.append(read(out))
    split = load_split("folder", "test", videos=videos, annotations=videos)
    settings = read_config(config)
    tokenizer = build_model(settings)[1]
    truth = evaluate(model, split, tokenizer, settings.sampling(64), max_words=16)
    assert all(report["metrics"] == truth.metrics for report in found)
    assert found[0]["checkpoint"] == str(run)
    assert found[0]["model"]["temporal"] == "seqTransf"


def test_the_configuration_names_the_interaction_of_a_public_file(
    drl_eval: Eval, videos: Path, config: Path, tmp_path: Path
) -> None:
    """DP and TI have no weights, so a public file fits both; the configuration chooses."""
    model = DRL(small_clip(), interaction="ti", temporal=None)
    torch.save(model.to_upstream(), tmp_path / "ti.bin")
    common = ["--checkpoint", tmp_path / "ti.bin", "--videos", videos, "--out", tmp_path / "e.json"]
    common += ["--save-scores", tmp_path / "s.npy", "--config", config]
    sims = {}
    for name in ("ti", "dp"):
        result = drl_eval(*common, "--set", f"interaction={name}")
        assert result.exit_code == 0, result.output
        assert f"interaction {name}" in result.flat
        sims[name] = np.load(tmp_path / "s.npy")
    split = load_split("folder", "test", videos=videos, annotations=videos)
    settings = read_config(config)
    truth = evaluate(model, split, model.tokenizer(), settings.sampling(64), max_words=16)
    assert np.array_equal(sims["ti"], truth.sim.numpy())
    assert not np.allclose(sims["dp"], sims["ti"])
    result = drl_eval(*common)
    assert result.exit_code == 1
    assert "interaction must be named" in result.stderr


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_checkpoint_of_another_model_than_the_configuration_names(
    kind: str, drl_eval: Eval, videos: Path, tmp_path: Path
) -> None:
    model = DRL(small_clip(), interaction="wti", temporal=None)
    checkpoint = tmp_path / "wti.bin"
    if kind == "file":
        torch.save(model.to_upstream(), checkpoint)
    else:
        model.save_pretrained(checkpoint)
    data = ["--checkpoint", checkpoint, "--dataset", "folder", "--videos", videos, "--set", "workers=0"]
    result = drl_eval(*data, "--config", "ti")
    assert result.exit_code == 1
    assert "interaction 'wti' there and 'ti' here; temporal None there and 'seqTransf' here" in result.stderr
    result = drl_eval(*data, "--config", "wti")
    assert result.exit_code == 1
    assert (
        "temporal None there and 'seqTransf' here; take the checkpoint's row, or add --set temporal=null"
        in result.stderr
    )
    assert drl_eval(*data, "--config", "wti", "--set", "temporal=null").exit_code == 0


def test_the_best_model_of_a_run_needs_nothing_else(drl_eval: Eval, videos: Path, config: Path, tmp_path: Path) -> None:
    """``best/`` contains rate, frames and words, so it works without the rest of the run."""
    model, tokenizer = build_model(read_config(config, ["interaction=ti", "temporal=null"]))
    model.save_pretrained(tmp_path / "moved")
    result = drl_eval(
        *["--checkpoint", tmp_path / "moved", "--dataset", "folder", "--videos", videos],
        *["--set", "workers=0", "--save-scores", tmp_path / "s.npy", "--out", tmp_path / "e.json"],
    )
    assert result.exit_code == 0, result.output
    assert "frames: 8 per second, at most 3 per video" in result.flat
    again = DRL.from_pretrained(tmp_path / "moved")
    split = load_split("folder", "test", videos=videos, annotations=videos)
    assert again.inputs is not None
    sampling = Sampling(again.inputs.rate, again.inputs.max_frames, again.picture_size[0], again.inputs.seconds)
    truth = evaluate(model, split, tokenizer, sampling, max_words=again.inputs.max_words)
    assert np.array_equal(np.load(tmp_path / "s.npy"), truth.sim.numpy())
    report = read(tmp_path / "e.json")
    assert report["config"]["interaction"] == "ti"
    assert report["scores"]["captions"] == truth.captions
    assert report["scores"]["videos"] == [f"clip{i}.mp4" for i in (0, 1, 2, 3, 5)]


def test_scores_are_in_float32_by_default(drl_eval: Eval, videos: Path, config: Path, tmp_path: Path) -> None:
    common = ["--config", config, "--videos", videos, "--set", "interaction=ti"]
    config.write_text(CONFIG.replace("precision: fp32", "precision: bf16"))
    sims = {}
    for name, options in {"default": [], "fp32": ["--precision", "fp32"], "bf16": ["--precision", "bf16"]}.items():
        out = tmp_path / f"{name}.json"
        assert drl_eval(*common, *options, "--save-scores", tmp_path / f"{name}.npy", "--out", out).exit_code == 0
        sims[name] = np.load(tmp_path / f"{name}.npy")
        assert read(out)["precision"] == ("bf16" if name == "bf16" else "fp32")
    assert sims["default"].dtype == np.float32
    assert sims["default"].shape == (10, 5)
    assert np.array_equal(sims["default"], sims["fp32"])
    assert not np.array_equal(sims["default"], sims["bf16"])


def test_where_a_configuration_is_silent_the_model_knows(
    drl_eval: Eval, videos: Path, config: Path, tmp_path: Path
) -> None:
    """A row names neither frames nor words: those of the training are used. What it names wins, and is said."""
    model, _ = build_model(read_config(config, ["interaction=ti"]))
    model.save_pretrained(tmp_path / "model")
    options = ["--checkpoint", tmp_path / "model", "--config", "ti", "--dataset", "folder", "--videos", videos]
    options += ["--set", "workers=0", "--out", tmp_path / "e.json"]
    result = drl_eval(*options)
    assert result.exit_code == 0, result.output
    assert "frames: 8 per second, at most 3 per video" in result.flat
    assert "was trained with" not in result.flat
    report = read(tmp_path / "e.json")
    assert {key: report["config"][key] for key in ("clip", "max_words", "max_frames", "rate")} == {
        "clip": "drl-small",
        "max_words": 16,
        "max_frames": 3,
        "rate": 8.0,
    }
    result = drl_eval(*options, "--set", "max_frames=2")
    assert "frames: 8 per second, at most 2 per video" in result.flat
    assert "the model was trained with 8 frames per second, at most 3 per video, and 16 words" in result.flat


def test_another_clip_is_another_model(drl_eval: Eval, videos: Path, config: Path, tmp_path: Path) -> None:
    model, _ = build_model(read_config(config, ["interaction=ti"]))
    model.save_pretrained(tmp_path / "model")
    torch.save(DRL(small_clip(), interaction="ti", temporal=None).to_upstream(), tmp_path / "public.bin")
    config.write_text(CONFIG.replace("drl-small", "ViT-B-32") + "interaction: ti\n")
    for name, words in (
        ("model", "clip 'drl-small' there and 'ViT-B-32' here"),
        ("public.bin", "width 128 there and 512 of ViT-B-32; patch size 16 there and 32 of ViT-B-32"),
    ):
        result = drl_eval("--checkpoint", tmp_path / name, "--config", config, "--videos", videos)
        assert result.exit_code == 1
        assert words in result.stderr


def test_errors_name_what_disagrees(drl_eval: Eval, videos: Path, config: Path, tmp_path: Path) -> None:
    """An option is named as such, and a file that may be DP or TI is not called DP."""
    run = tmp_path / "run"
    DRL(small_clip(), interaction="ti", temporal=None).save_pretrained(run / "best")
    (run / "config.yaml").write_text(CONFIG + f"interaction: ti\ntemporal: null\nvideos: {videos}\n")
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("clip: drl-small\n", ""))
    result = drl_eval("--checkpoint", run, "--set", "masking=exclude")
    assert f"--set masking=exclude disagrees with {run}, which has 'drl'; drop it" in result.stderr
    torch.save(DRL.from_pretrained(run).to_upstream(), tmp_path / "public.bin")
    options = ["--checkpoint", tmp_path / "public.bin", "--dataset", "folder", "--videos", videos]
    result = drl_eval(*options, "--config", "wti", "--set", "temporal=null")
    assert result.exit_code == 1
    assert "interaction 'dp' or 'ti' (the file does not say which) there and 'wti' here" in result.stderr
    assert "add --set interaction=dp or =ti" in result.stderr


def test_truncated_captions_are_counted(drl_eval: Eval, videos: Path, config: Path) -> None:
    """With start and end, the six captions "number 0 of [six]" and one other have 8 tokens, and none has more."""
    for words, expected in ((8, None), (7, "7 of 12")):
        result = drl_eval("--config", config, "--videos", videos, "--set", f"max_words={words}")
        assert result.exit_code == 0
        found = re.search(
            r"(\d+ of \d+) captions are longer than (\d+) tokens and are cut there; max_words up to 77", result.flat
        )
        assert (found and found[1]) == expected, result.flat


def test_a_named_clip_comes_back_with_its_tokenizer(drl_eval: Eval, videos: Path, config: Path, tmp_path: Path) -> None:
    settings = read_config(config, ["interaction=dp", "temporal=null"])
    model, _ = build_model(settings)
    model.save_pretrained(tmp_path / "model")
    result = drl_eval("--checkpoint", tmp_path / "model", "--config", config, "--videos", videos)
    assert result.exit_code == 0, result.output
    assert "drl-small, interaction dp, temporal module None" in result.flat


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["interaction=wti", "temporal=seqTransf"],
            "CLIP has no weights for the interaction wti and the temporal module seqTransf.",
        ),
        (["interaction=dp", "temporal=seqLSTM"], "CLIP has no weights for the temporal module seqLSTM."),
        (["interaction=xti", "temporal=null"], "CLIP has no weights for the interaction xti."),
        (["interaction=ti", "temporal=null"], None),
    ],
)
def test_parts_without_pretrained_weights_are_named(
    drl_eval: Eval, videos: Path, config: Path, tmp_path: Path, overrides: list[str], words: str | None
) -> None:
    weights = tmp_path / "clip.pt"
    torch.save(build_clip("drl-small").state_dict(), weights)
    options = [x for override in (*overrides, f"pretrained={weights}") for x in ("--set", override)]
    result = drl_eval("--config", config, "--videos", videos, *options)
    assert result.exit_code == 0, result.output
    assert words in result.flat if words else "Untrained" not in result.flat


def test_a_second_run_decodes_nothing(
    drl_eval: Eval, videos: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--config", config, "--videos", videos, "--cache", tmp_path / "cache", "--out"]
    assert drl_eval(*options, tmp_path / "first.json").exit_code == 0
    asked: list[Path] = []
    loader = features.video_loader
    monkeypatch.setattr(features, "video_loader", lambda paths, *a, **b: asked.extend(paths) or loader(paths, *a, **b))
    assert drl_eval(*options, tmp_path / "second.json", "--workers", 1, "--block", 3).exit_code == 0
    assert [path.name for path in asked] == ["clip4.mp4"]
    assert read(tmp_path / "first.json")["metrics"] == read(tmp_path / "second.json")["metrics"]


def test_strict(drl_eval: Eval, videos: Path, config: Path, tmp_path: Path) -> None:
    result = drl_eval("--config", config, "--videos", videos, "--strict")
    assert result.exit_code == 1
    assert "gone.mp4" in result.stderr
    (tmp_path / "captions.csv").write_text("video,caption\nclip4.mp4,broken\nclip1.mp4,whole\n")
    options = ["--config", config, "--videos", videos, "--annotations", tmp_path]
    result = drl_eval(*options, "--strict")
    assert result.exit_code == 1
    assert "error: split must hold readable videos alone, as strict asks, got 1 unreadable of 2: clip4" in result.stderr
    assert drl_eval(*options).exit_code == 0


def test_options_reach_the_evaluation(
    drl_eval: Eval, videos: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(evaluation, "evaluate", lambda *_, **options: seen.update(options) or evaluate(*_, **options))
    result = drl_eval("--config", config, "--videos", videos, "--precision", "bf16", "--block", 3)
    assert result.exit_code == 0
    assert "bf16 on cpu" in result.flat
    passed = {name: seen[name] for name in ("precision", "block", "workers", "max_words", "cache", "strict")}
    assert passed == {"precision": "bf16", "block": 3, "workers": 0, "max_words": 16, "cache": None, "strict": False}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "config must be a row or a YAML file, got none; for instance --config wti --dataset msrvtt"),
        (["--checkpoint", "TMP/no"], "checkpoint not found: TMP/no"),
        (["--config", "CONFIG"], "videos must name a folder, got none; pass --videos or set it in the configuration"),
        (["--config", "CONFIG", "--videos", "TMP/no"], "TMP/no"),
        (["--config", "CONFIG", "--set", "dataset=msvd", "--videos", "VIDEOS"], "annotations must name a folder"),
        (["--config", "CONFIG", "--dataset", "msvd"], "dataset must be the configuration's own, folder, got msvd"),
        (["--config", "wti", "--videos", "VIDEOS"], "no data set given, and wti names none; add --dataset"),
        (["--config", "CONFIG", "--videos", "VIDEOS", "--split", "tets"], "split must be one of"),
        (["--config", "CONFIG", "--set", "block"], "set must be key=value, got 'block'"),
        (
            ["--config", "CONFIG", "--checkpoint", "TMP", "--set", "clip=ViT-B-32"],
            "set must leave clip as the checkpoint has it, got clip=ViT-B-32",
        ),
        (
            ["--config", "CONFIG", "--videos", "VIDEOS", "--checkpoint", "LAST"],
            "must be a model, got the checkpoint of a run; name the run's folder",
        ),
        (["--config", "CONFIG", "--set", "precision=bf16"], "got precision=bf16; use --precision"),
        (["--config", "CONFIG", "--precision", "fp16"], "precision must be one of"),
        (["--config", "CONFIG", "--videos", "VIDEOS", "--save-scores", "TMP"], "save-scores must be a file, got TMP"),
        (
            ["--config", "CONFIG", "--videos", "VIDEOS", "--checkpoint", "TMP"],
            "as a run of drl-fast train does after its first epoch; found neither",
        ),
        (
            ["--config", "CONFIG", "--videos", "VIDEOS", "--checkpoint", "TMP/no.bin"],
            "checkpoint not found: TMP/no.bin",
        ),
        (["--config", "CONFIG", "--videos", "VIDEOS", "--checkpoint", "CONFIG"], "CONFIG must hold tensors alone"),
        (
            ["--config", "CONFIG", "--videos", "VIDEOS", "--checkpoint", "TMP/x.safetensors"],
            "got safetensors; name the folder that holds it",
        ),
        (["--config", "CONFIG", "--videos", "VIDEOS", "--out", "TMP"], "out must be a file, got TMP, a folder"),
        (["--config", "CONFIG", "--videos", "VIDEOS", "--out", "CONFIG/x.json"], "check that the path can be read"),
    ],
)
def test_mistakes(drl_eval: Eval, videos: Path, config: Path, tmp_path: Path, options: list[str], words: str) -> None:
    places = {"CONFIG": config, "VIDEOS": videos, "TMP": tmp_path, "LAST": tmp_path / "last.pt"}
    (tmp_path / "x.safetensors").write_bytes(b"")
    torch.save({"format": "drl-fast run 2", "model": {}}, tmp_path / "last.pt")

    def put(text: str) -> str:
        return re.sub("|".join(places), lambda name: str(places[name[0]]), text)

    result = drl_eval(*map(put, options))
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert put(words) in result.stderr


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_result(
    step: str, drl_eval: Eval, videos: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out" / "eval.json"
    out.parent.mkdir()
    out.write_text("before")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os if step == "fsync" else Path, step, full)
    result = drl_eval("--config", config, "--videos", videos, "--out", out)
    assert result.exit_code == 1
    assert f"the result could not be written to {out}, got: No space left on device" in result.stderr
    assert "text to video" in result.stdout
    assert [path.read_text() for path in out.parent.iterdir()] == ["before"]


def test_ctrl_c(drl_eval: Eval, videos: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(features, "video_loader", interrupted)
    result = drl_eval("--config", config, "--videos", videos, "--out", tmp_path / "out" / "eval.json")
    assert result.exit_code == 130
    assert "stopped by Ctrl-C" in result.stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_two_processes(drl_eval: Eval, videos: Path, config: Path, tmp_path: Path) -> None:
    """With torchrun only the first process prints and writes, and the results are those of one process."""
    options = ["--config", config, "--videos", videos, "--set", "interaction=dp", "--out"]
    assert drl_eval(*options, tmp_path / "one.json").exit_code == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    command = [*launcher, sys.executable, "-c", "from drl_fast.cli import app; app()", "eval"]
    two = tmp_path / "two.json"
    done = subprocess.run([*command, *map(str, options), str(two)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("text to video") == 1
    assert done.stdout.count("written to") == done.stdout.count("Model as built") == 1
    assert read(two)["processes"] == 2
    assert read(two)["metrics"] == read(tmp_path / "one.json")["metrics"]


def test_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "240")
    result = CliRunner().invoke(app, ["eval", "--help"])
    assert result.exit_code == 0
    for option in (
        "--checkpoint",
        "--config",
        "--dataset",
        "--split",
        "--videos",
        "--annotations",
        "--set",
        "--out",
        "--cache",
        "--workers",
        "--block",
        "--strict",
        "--post",
    ):
        assert option in result.stdout
