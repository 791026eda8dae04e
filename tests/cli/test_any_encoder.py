"""The commands with SigLIP's form of towers, a stand-in for its tokenizer, and its own preparation of pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from drl_fast import Head, Retriever
from drl_fast.data.video import Sampling, read_video
from drl_fast.model.drl import DRL

from ..clips import noise, write_video
from ..model import forms

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")
NAME = "drl-fast-small-siglip"
SQUASH = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "interpolation": "bicubic", "resize_mode": "squash"}
SIZES = "epochs=1", "batch=4", "max_frames=3", "max_words=8", "rate=2", "workers=0", "precision=fp32", "chunk=2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Register the model; write 8 videos that are wider than high, with captions."""
    folder = tmp_path_factory.mktemp("siglip")
    source = str(forms.tokenizer_folder(folder / "tokenizer"))
    text = {**forms.FORMS["siglip"]["text_cfg"], "hf_tokenizer_name": source}
    forms.register(folder / "configs", NAME, {**forms.FORMS["siglip"], "text_cfg": text})
    videos = folder / "videos"
    videos.mkdir()
    pictures = noise(32)
    lines, words = ["video,caption"], forms.WORDS.split()
    for i in range(8):
        write_video(videos / f"{i}.mp4", [frame[:32] for frame in pictures[4 * i : 4 * i + 4]], rate=2)
        lines.append(f"{i}.mp4,{words[i]} {words[i + 1]} moves slowly")
    (videos / "captions.csv").write_text("\n".join(lines) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(open_clip.pretrained._PRETRAINED, NAME, {"webli": SQUASH})
        yield folder


def options(*more: str) -> list[str]:
    return [word for pair in (f"clip={NAME}", "pretrained=null", *SIZES, *more) for word in ("--set", pair)]


def test_train_evaluate_encode_and_search(command: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    videos, run = folder / "videos", tmp_path / "run"
    data = ["--dataset", "folder", "--videos", videos, "--annotations", videos]
    done = command("train", "--config", "wti_cdcr", *data, "--out", run, *options("loss=sigmoid"))
    assert done.exit_code == 0, done.output
    model = DRL.from_pretrained(run)
    assert model.pictures == (32, "squash", "bicubic")
    assert model.mean.flatten().tolist() == [0.5] * 3
    assert model.logit_bias is not None
    assert float(model.logit_bias) == pytest.approx(-10, abs=0.1)
    found = command("eval", "--checkpoint", run, "--workers", 0, "--out", tmp_path / "e.json")
    assert found.exit_code == 0, found.output
    again = json.loads((run / "evaluations.json").read_text())
    assert json.loads((tmp_path / "e.json").read_text())["metrics"]["t2v"]["MnR"] == again["1"]["t2v"]["MnR"]

    features, head = tmp_path / "features", tmp_path / "head"
    done = command("features", "--config", "wti", *data, "--out", features, *options("seed=3"))
    assert done.exit_code == 0, done.output
    done = command(
        "train", "--config", "wti", "--features", features, "--out", head, "--set", "epochs=1", "--set", "batch=4"
    )
    assert done.exit_code == 0, done.output
    assert Head.from_pretrained(head).sizes.max_positions == 77
    on_features = command("eval", "--checkpoint", head, "--features", features, "--out", tmp_path / "f.json")
    assert on_features.exit_code == 0, on_features.output
    on_videos = command("eval", "--checkpoint", head, *data, "--workers", 0, "--out", tmp_path / "v.json")
    assert on_videos.exit_code == 0, on_videos.output
    both = [json.loads((tmp_path / name).read_text())["metrics"]["t2v"]["MnR"] for name in ("f.json", "v.json")]
    assert both[0] == pytest.approx(both[1])

    pytest.importorskip("lancedb")
    index = tmp_path / "index"
    assert command("index", videos, "--out", index, "--model", run, "--device", "cpu").exit_code == 0
    hits = command("search", index, "a red moves", "-k", 8, "--json")
    assert len(json.loads(hits.stdout)) == 8
    best = Retriever.open(index, "cpu").search("a red moves", k=1)[0]
    assert [match.word for match in best.matches] == ["a", "red", "moves"]


@torch.no_grad()
def test_frames_are_squashed_before_the_tower(folder: Path) -> None:
    model = DRL(NAME, interaction="ti", temporal=None)
    sampling = Sampling(rate=2, max_frames=3, **model.pictures._asdict())
    frames, mask = read_video(folder / "videos" / "0.mp4", sampling)
    cropped, _ = read_video(folder / "videos" / "0.mp4", Sampling(rate=2, max_frames=3, size=32))
    assert not torch.equal(frames, cropped)
    assert model.encode_video(frames[None], mask[None]).shape == (1, 3, model.dim)


def test_bad_input(command: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    videos = folder / "videos"
    data = ["--dataset", "folder", "--videos", videos, "--annotations", videos, "--out", tmp_path / "run"]
    for more, message in (
        (["clip=ViT-B-16-SigLIP3"], "clip must be a model name that open_clip knows, got 'ViT-B-16-SigLIP3'; nearest:"),
        (["pretrained=openai"], "pretrained must be a weight file or a tag of drl-fast-small-siglip, got 'openai'"),
        (
            ["query_expansion=true", "interaction=mean_maxsim", "temporal=null"],
            "query_expansion must be False with this",
        ),
    ):
        done = command("train", "--config", "wti", *data, *options(*more))
        assert done.exit_code == 1
        assert len(done.stderr.strip().splitlines()) == 1
        assert message in done.stderr
    assert not (tmp_path / "run").exists()
