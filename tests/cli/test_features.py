"""``drl-fast features``: from videos or other encoders' tokens to scores, without the towers; one-line errors."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from drl_fast.data.feature_store import FeatureStore
from tests.engine.runs import make_folder

Command = Callable[..., Any]
pytestmark = pytest.mark.usefixtures("one_thread")
# The toy CLIP of tests/engine/runs.py, with random weights.
TOY = [word for option in ("clip=toy", "pretrained=null", "max_words=12", "workers=0") for word in ("--set", option)]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve clips, one of them broken, and a caption of a missing one."""
    folder = make_folder(tmp_path_factory.mktemp("videos"))
    (folder / "clip3.mp4").write_bytes(b"no video")
    with (folder / "captions.csv").open("a") as file:
        file.write("gone.mp4,not here\n")
    return folder


def encode(command: Command, videos: Path, out: Path, *more: object) -> Any:
    return command("features", "--config", "wti", "--dataset", "folder", "--videos", videos, "--out", out, *TOY, *more)


def scores(command: Command, out: Path, *words: object) -> tuple[dict[str, Any], np.ndarray]:
    result = command("eval", *words, "--out", out / "e.json", "--save-scores", out / "s.npy")
    assert result.exit_code == 0, result.output
    return json.loads((out / "e.json").read_text()), np.load(out / "s.npy")


def test_from_videos_to_scores(command: Command, videos: Path, tmp_path: Path) -> None:
    result = encode(command, videos, tmp_path / "f")
    assert result.exit_code == 0, result.output
    assert "left out: 1 of 13 videos listed have no file: gone.mp4" in result.flat
    assert "unreadable, left out: clip3.mp4" in result.stderr
    assert "CLIP's weights are random, and the features mean nothing" in result.flat
    assert "train on them with drl-fast train --config wti --features" in result.flat
    assert encode(command, videos, tmp_path / "sigmoid", "--set", "loss=sigmoid").exit_code == 0
    factors = [FeatureStore(tmp_path / name).start()["logit_scale"] for name in ("f", "sigmoid")]
    assert [float(factor) for factor in factors] == pytest.approx([math.log(1 / 0.07)] * 2)
    result = encode(command, videos, tmp_path / "strict", "--strict")
    assert "videos must hold all the videos that folder's train part lists" in result.stderr
    run = tmp_path / "run"
    recipe = ("--set", "epochs=2", "--set", "batch=4", "--set", "captions_per_video=2", "--set", "precision=fp32")
    result = command("train", "--config", "wti_cdcr", "--features", tmp_path / "f", "--out", run, *recipe)
    assert result.exit_code == 0, result.output
    assert "captions by toy, width 32; frames by toy, width 32" in result.flat
    # The run knows its features, and its best model finds its CLIP again.
    stored, sim = scores(command, tmp_path, "--checkpoint", run)
    assert (stored["texts"], stored["videos"], stored["missing"]) == (16, 11, ["gone.mp4"])
    assert [video["name"] for video in stored["unreadable"]] == ["clip3.mp4"]
    of_videos, same = scores(command, tmp_path, "--checkpoint", run, "--videos", videos, "--set", "workers=0")
    np.testing.assert_allclose(sim, same, atol=1e-3)  # the stored tokens are fp16
    assert of_videos["scores"]["captions"] == stored["scores"]["captions"]
    assert of_videos["scores"]["videos"] == stored["scores"]["videos"]
    shutil.move(tmp_path / "f", tmp_path / "moved")
    moved = ("--features", tmp_path / "moved", "--out", run, "--resume")
    result = command("train", "--config", "wti_cdcr", *moved, *recipe)
    assert result.exit_code == 0, result.output
    assert "unreadable, left out: clip3.mp4" in result.flat
    shutil.move(run / "best", tmp_path / "best")
    _, again = scores(command, tmp_path, "--checkpoint", tmp_path / "best", "--features", tmp_path / "moved")
    assert np.array_equal(sim, again)
    result = encode(command, videos, tmp_path / "other", "--set", "seed=1", "--split", "test")
    assert result.exit_code == 0, result.output
    result = command("eval", "--checkpoint", tmp_path / "best", "--features", tmp_path / "other")
    assert result.exit_code == 1
    assert "features must be of the text encoder that" in result.stderr
    assert "tokens by toy of width 32 and other weights" in result.stderr
    result = command("train", "--config", "wti", "--features", tmp_path / "other", "--out", tmp_path / "none")
    assert "split must be one of test, which" in result.stderr
    assert not (tmp_path / "none").exists()


def write_tokens(folder: Path, count: int = 6) -> Path:
    """Tokens of ``count`` videos, 20 wide, and of two captions each, 12 wide."""
    rng = np.random.default_rng(0)
    for name in ("v", "t"):
        (folder / name).mkdir(parents=True)
    rows = [("video", "caption", "id")]
    for video in range(count):
        np.save(folder / "v" / f"clip{video}.npy", rng.standard_normal((1 + video, 20)).astype(np.float32))
        for which in range(2):
            np.save(folder / "t" / f"c{video}-{which}.npy", rng.standard_normal((3 + which, 12)).astype(np.float32))
            rows.append((f"clip{video}.mp4", f"caption {which} of {video}", f"c{video}-{which}"))
    with (folder / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


def import_tokens(command: Command, folder: Path, out: Path, *more: object) -> Any:
    paths = ("--from", folder / "v", "--captions", folder / "captions.csv", "--text-from", folder / "t")
    return command("features", *paths, "--out", out, *more)


def test_imported_tokens(command: Command, tmp_path: Path) -> None:
    folder = write_tokens(tmp_path / "tokens")
    (folder / "t" / "c5-1.npy").unlink()
    (folder / "v" / "clip4.npy").unlink()
    result = import_tokens(command, folder, tmp_path / "f", "--dtype", "fp32")
    assert result.exit_code == 0, result.output
    assert "left out: 1 captions have no tokens" in result.flat
    assert "left out: 1 of 6 videos listed have no file: clip4.mp4" in result.flat
    store = FeatureStore(tmp_path / "f")
    assert (store.about.text.encoder, store.about.video.encoder, store.about.inputs) == (None, None, None)
    part = store.part("train")
    assert part.split.captions[2] == "caption 0 of 1"
    tokens, mask = store.read("text", part.texts[[2]])
    assert np.array_equal(tokens[0][mask[0]], np.load(folder / "t" / "c1-0.npy"))
    tokens, mask = store.read("video", part.videos[[-1]])
    assert np.array_equal(tokens[0][mask[0]], np.load(folder / "v" / "clip5.npy"))
    recipe = ("--set", "epochs=1", "--set", "batch=4", "--set", "dim=64", "--set", "precision=fp32")
    result = command("train", "--config", "wti", "--features", tmp_path / "f", "--out", tmp_path / "run", *recipe)
    assert result.exit_code == 0, result.output
    assert "captions imported, width 12; frames imported, width 20" in result.flat
    report, _ = scores(command, tmp_path, "--checkpoint", tmp_path / "run")
    assert (report["texts"], report["videos"]) == (9, 5)
    assert report["model"]["sizes"] == {"text_dim": 12, "video_dim": 20, "dim": 64, "max_positions": 77}
    assert report["config"]["clip"] is None
    result = command("eval", "--checkpoint", tmp_path / "run", "--videos", tmp_path)
    assert "was trained on imported tokens, not on a CLIP's; score it with --features" in result.stderr
    result = import_tokens(command, folder, tmp_path / "g", "--strict")
    assert result.exit_code == 1
    assert "must hold tokens of all videos, got none of clip4.mp4; add them, or drop --strict" in result.stderr
    assert not (tmp_path / "g").exists()


def write_captions(folder: Path, rows: list[tuple[str, ...]]) -> None:
    with (folder / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("clip0.mp4", "one", "c0-0"), ("clip1.mp4", "two", "c0-0")], "got 'c0-0' twice; correct it"),
        ([("clip0.mp4", "one", "c0-0"), ("clip1.mp4", "two", "")], "got none for caption 2; correct it"),
        ([("clip0.mp4", "one", "c0-0"), ("clip1.mp4", "one", "c1-0")], "different ones for c0-0 and c1-0 ('one')"),
    ],
)
def test_ids_of_captions(command: Command, tmp_path: Path, rows: list[tuple[str, ...]], message: str) -> None:
    folder = write_tokens(tmp_path / "tokens")
    write_captions(folder, [("video", "caption", "id"), *rows])
    result = import_tokens(command, folder, tmp_path / "f")
    assert result.exit_code == 1
    assert message in result.stderr


def test_numbers_as_ids(command: Command, tmp_path: Path) -> None:
    """An id of 0 is an id, and equal captions with equal tokens are stored once."""
    folder = write_tokens(tmp_path / "tokens")
    for number in range(3):
        np.save(folder / "t" / f"{number}.npy", np.full((2, 12), max(number, 1), np.float32))
    lines = [{"video": f"clip{n}.mp4", "caption": "b" if n else "a", "id": n} for n in (2, 1, 0)]
    lines[0]["caption"] = "c"
    (folder / "captions.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    (folder / "captions.csv").unlink()
    paths = ("--from", folder / "v", "--captions", folder, "--text-from", folder / "t", "--out", tmp_path / "f")
    assert command("features", *paths).exit_code == 0
    store = FeatureStore(tmp_path / "f")
    part = store.part("train")
    assert part.split.captions == ("c", "b", "a")
    assert store.read("text", part.texts)[0][:, 0, 0].tolist() == [2, 1, 1]


def test_a_stopped_import_takes_no_other_files(command: Command, tmp_path: Path) -> None:
    folder = write_tokens(tmp_path / "tokens")
    np.save(folder / "v" / "clip5.npy", np.full((2, 20), np.nan, np.float32))
    assert import_tokens(command, folder, tmp_path / "f").exit_code == 1
    np.save(folder / "v" / "clip5.npy", np.ones((2, 20), np.float32))
    result = import_tokens(command, folder, tmp_path / "f")
    assert "with other or changed files of videos; name another" in result.stderr


def test_imported_videos_with_captions_by_clip(command: Command, tmp_path: Path) -> None:
    folder = write_tokens(tmp_path / "tokens")
    paths = ("--from", folder / "v", "--captions", folder / "captions.csv")
    result = command("features", *paths, "--out", tmp_path / "f", *TOY)
    assert result.exit_code == 0, result.output
    about = FeatureStore(tmp_path / "f").about
    assert (about.text.width, about.video.width, about.video.encoder) == (32, 20, None)
    assert about.text.encoder is not None
    assert about.text.encoder["clip"] == "toy"
    result = command("eval", "--features", tmp_path / "f", "--config", "ti", "--set", "temporal=null")
    assert result.exit_code == 0, result.output


def test_a_stopped_encoding_continues(
    command: Command, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from drl_fast.engine import encode as engine

    monkeypatch.setattr(engine, "VIDEOS", 4)
    whole = encode(command, videos, tmp_path / "whole")
    assert whole.exit_code == 0, whole.output
    encoded = engine.encode_frames

    def stopped(*arguments: Any) -> Any:
        for number, found in enumerate(encoded(*arguments)):
            if number == 6:
                raise KeyboardInterrupt
            yield found

    with monkeypatch.context() as patch:
        patch.setattr(engine, "encode_frames", stopped)
        assert encode(command, videos, tmp_path / "f").exit_code == 130
    result = command("eval", "--features", tmp_path / "f", "--config", "ti")
    assert "features must be finished, got" in result.stderr
    result = encode(command, videos, tmp_path / "f", "--dtype", "fp32")
    assert "with dtype 'fp16' then and 'fp32' now; name another" in result.stderr
    result = encode(command, videos, tmp_path / "f")
    assert result.exit_code == 0, result.output
    assert "clip3.mp4" not in result.stderr  # found before the stop
    assert "continuing: 4 of 12 videos are there already" in result.flat
    assert "left out: 1 of 12 videos could not be decoded" in result.flat
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "f" / path.name).read_bytes(), path.name
    result = encode(command, videos, tmp_path / "f")
    assert result.exit_code == 0, result.output
    assert "continuing: 12 of 12 videos are there already" in result.flat


def test_strict_rejects_unreadable_videos(command: Command, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "videos", 2)
    (folder / "clip1.mp4").write_bytes(b"no video")
    result = encode(command, folder, tmp_path / "f", "--strict")
    assert result.exit_code == 1
    assert "clip1.mp4 cannot be read, and --strict wants all of them: " in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dataset", "folder"], "config must be a row or a YAML file, got none; for instance --config wti"),
        (["--config", "wti", "--captions", "c.csv"], "captions goes with --from, got c.csv without it; add --from DIR"),
        (["--config", "wti", "--text-from", "t"], "text-from goes with --from, got t without it; add --from DIR"),
        (["--from", "v", "--videos", "w"], "from goes without --dataset, --videos and --annotations"),
        (["--config", "wti", "--split", "all"], "split must be one of 'train', 'val', 'test', got 'all'"),
        (["--config", "wti", "--dtype", "int8"], "dtype must be one of 'fp16', 'bf16', 'fp32', got 'int8'"),
        (["--config", "wti", "--dataset", "folder"], "videos must name a folder, got none; pass --videos"),
        (["--from", "v", "--workers", "1"], "workers decode videos, got 1 beside --from; drop it"),
        (["--from", "v", "--text-from", "t", "--config", "wti"], "text-from goes without --config, --set and --precis"),
        (["--from", "nowhere"], "tokens folder or file not found: nowhere; check the path"),
    ],
)
def test_mistakes(command: Command, tmp_path: Path, words: list[str], message: str) -> None:
    result = command("features", "--out", tmp_path / "f", *words)
    assert result.exit_code == 1
    assert message in result.stderr
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda f: np.save(f / "v/clip1.npy", np.full((2, 20), np.nan)), "clip1.npy must be finite, got 40 NaN"),
        (lambda f: np.save(f / "v/clip1.npy", np.full((2, 20), 1e6)), "clip1.mp4 must have tokens that fp16 can hold"),
        (lambda f: np.save(f / "v/clip1.npy", np.ones(20)), "clip1.npy must hold tokens (N, D), got shape (20,)"),
        (
            lambda f: np.save(f / "v/clip1.npy", np.ones((2, 21))),
            "clip1.mp4 must have tokens of shape (count, 20) like",
        ),
        (lambda f: np.save(f / "v/clip1.npy", np.ones((0, 20))), "clip1.npy must hold at least one token and one"),
        (lambda f: np.save(f / "v/clip1.npy", np.array([None])), "clip1.npy must hold an array of tokens"),
        (lambda f: np.savez(f / "v/clip1.npz", np.ones((2, 20))), "clip1"),
        (
            lambda f: (f / "captions.csv").write_text("video,caption\nother.mp4,a dog\n"),
            "text-from must hold tokens of",
        ),
    ],
)
def test_bad_tokens(command: Command, tmp_path: Path, edit: Callable[[Path], object], message: str) -> None:
    folder = write_tokens(tmp_path / "tokens")
    edit(folder)
    result = import_tokens(command, folder, tmp_path / "f")
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_more_frames_than_positions(command: Command, tmp_path: Path) -> None:
    """A model has a position for every frame of the data that it was trained on, and at least 77."""
    folder = write_tokens(tmp_path / "tokens")
    assert import_tokens(command, folder, tmp_path / "f").exit_code == 0
    recipe = ("--set", "epochs=1", "--set", "batch=4", "--set", "dim=64", "--set", "precision=fp32")
    run = ("--config", "wti", "--features", tmp_path / "f", "--out", tmp_path / "run")
    assert command("train", *run, *recipe).exit_code == 0
    np.save(folder / "v" / "clip1.npy", np.ones((78, 20), np.float32))
    assert import_tokens(command, folder, tmp_path / "long").exit_code == 0
    result = command("eval", "--checkpoint", tmp_path / "run", "--features", tmp_path / "long")
    assert "clip1.mp4 in" in result.stderr
    assert "must have at most 77 tokens, the model's positions, got 78; encode fewer frames" in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--config", "wti", "--videos", "v"], "videos goes without features, got v beside"),
        (["train", "--config", "wti", "--set", "max_frames=2"], "wti must agree with the features in"),
        (["eval", "--config", "wti", "--cache", "c"], "cache goes without features, got c beside"),
        (["eval", "--config", "wti", "--split", "val"], "split must be one of test, which"),
    ],
)
def test_options_that_features_exclude(command: Command, tmp_path: Path, words: list[str], message: str) -> None:
    folder = write_tokens(tmp_path / "tokens", count=1)
    assert import_tokens(command, folder, tmp_path / "f", "--split", "test").exit_code == 0
    result = command(*words, "--features", tmp_path / "f")
    assert result.exit_code == 1
    assert message in result.stderr


def test_two_processes_write_what_one_writes(
    command: Command, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from drl_fast.engine import encode as engine
    from tests.distributed.ranks import on_ranks

    monkeypatch.setattr(engine, "VIDEOS", 4)
    assert encode(command, videos, tmp_path / "one").exit_code == 0
    (tmp_path / "ranks").mkdir()
    on_ranks(2, encode_on_ranks, tmp_path / "ranks", videos, tmp_path / "two")
    one, two = FeatureStore(tmp_path / "one"), FeatureStore(tmp_path / "two")
    assert one.about == two.about
    assert (tmp_path / "two" / "video-1.tokens").stat().st_size > 0
    for side in ("text", "video"):
        items = np.arange(one.about.side(side).items)
        assert all(torch.equal(x, y) for x, y in zip(one.read(side, items), two.read(side, items), strict=True))


def encode_on_ranks(rank: int, size: int, videos: Path, out: Path) -> int:
    """Run the command's work on one of several processes."""
    import torch.distributed as dist

    from drl_fast.cli import features as module
    from drl_fast.engine import encode as engine
    from drl_fast.engine.config import read_config
    from drl_fast.engine.processes import Processes

    engine.VIDEOS = 4
    group = dist.group.WORLD
    settings = read_config("wti", [word for word in TOY if word != "--set"], "folder")
    here = Processes(rank, size, group=group)
    console = module.Console(quiet=True)
    module._Encoding(settings, "wti", ("train", "val", "test"), "fp16", "fp32", False, here, console).encode(
        out, videos, videos
    )
    return rank
