"""Training and evaluation on stored tokens: the numbers of videos with a frozen CLIP, heads that become DRLs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

import drl_fast
from drl_fast import DRL
from drl_fast.cli import app
from drl_fast.data.feature_store import FeatureStore
from drl_fast.engine import evaluate as evaluation
from drl_fast.engine.config import RunConfig, build_head, build_model, read_config
from drl_fast.engine.data import StoredData
from drl_fast.engine.evaluate import evaluate_features
from drl_fast.engine.load_model import settings_of
from drl_fast.engine.processes import Processes
from drl_fast.engine.train import BEST, Run
from drl_fast.model.head import Head

from .runs import Notes, after, configured, make_folder, opened

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("videos"))


def encode(folder: Path, out: Path, dtype: str) -> Path:
    options = ["clip=toy", "pretrained=null", "max_words=12", "max_frames=3", "workers=0"]
    sets = [word for option in options for word in ("--set", option)]
    words = ["--config", "wti", "--dataset", "folder", "--videos", folder, "--out", out, "--dtype", dtype, *sets]
    result = CliRunner().invoke(app, ["features", *map(str, words)])
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="module")
def features(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return encode(folder, tmp_path_factory.mktemp("features") / "fp32", "fp32")


def on_features(folder: Path, features: Path, **options: Any) -> RunConfig:
    """Return :func:`configured`'s recipe for features."""
    return configured(folder, features=str(features), **{"skip_same_video": True, **options})


def opened_on_features(config: RunConfig, out: Path, **options: Any) -> tuple[Run, Notes]:
    assert config.features is not None
    store, notes = FeatureStore(config.features), Notes()
    data = StoredData(store, store.part("train"), store.part("val"))
    stop = options.get("stop", lambda: False)
    run = Run(config, build_head(config, store), data, out, Processes(), notes, stop)
    run.open_folder(options.get("resume", False))
    return run, notes


@pytest.mark.parametrize(
    "options",
    [
        {"interaction": "wti", "cdcr": 3, "temporal": "seqTransf"},
        {"interaction": "wti", "cdcr": 3, "temporal": "seqTransf", "captions_per_video": 2},
        {"interaction": "mlp", "cdcr": 2, "temporal": "seqLSTM"},
        {"interaction": "xti", "cdcr": 0, "temporal": None, "chunk": 2},
        {"interaction": "hi", "cdcr": 1, "temporal": "seqTransf", "skip_same_video": False},
    ],
)
def test_losses_and_scores_are_those_of_videos_with_a_frozen_clip(
    folder: Path, features: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    """20 steps, from the same new weights, which depend on the seed alone."""
    usual = {"epochs": 5, "lr": 1e-3, "skip_same_video": True, **options}
    on_videos, of_videos = opened(configured(folder, freeze="clip", **usual), tmp_path / "videos")
    stored, of_tokens = opened_on_features(on_features(folder, features, **usual), tmp_path / "tokens")
    for name, x in stored.model.state_dict().items():
        named = "clip.logit_scale" if name == "log_scale" else name
        assert torch.equal(x, on_videos.model.state_dict()[named]), name
    found, expected = (run.data.evaluate(run.model, run.config, None, None) for run in (stored, on_videos))
    torch.testing.assert_close(found.sim, expected.sim, rtol=0, atol=1e-5)
    assert found.captions == expected.captions
    assert found.names == expected.names
    assert torch.equal(found.owner, expected.owner)
    assert on_videos.train()
    assert stored.train()
    assert len(of_tokens.steps) == 20
    for ours, theirs in zip(of_tokens.steps, of_videos.steps, strict=True):
        for name in ("total", "info_nce", "cdcr", "logit_scale"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-7)
        # A sum over all parameters collects more rounding.
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


def test_a_resumed_run_on_features_equals_an_uninterrupted_one(folder: Path, features: Path, tmp_path: Path) -> None:
    config = on_features(folder, features, temporal="seqTransf")
    run, expected = opened_on_features(config, tmp_path / "whole")
    assert run.train()
    run, _ = opened_on_features(config, tmp_path / "run", stop=after(5))
    assert not run.train()
    run, notes = opened_on_features(config, tmp_path / "run", resume=True)
    assert run.train()
    assert notes.losses() == {step: loss for step, loss in expected.losses().items() if step > 5}
    ours, theirs = (tmp_path / name / "evaluations.json" for name in ("run", "whole"))
    assert ours.read_text() == theirs.read_text()
    # The folder of the features may move, and another one may not take its place.
    other = encode(folder, tmp_path / "fp16", "fp16")
    with pytest.raises(ValueError, match=r"dataset must be the one that .*last.pt was trained on"):
        opened_on_features(on_features(folder, other, temporal="seqTransf"), tmp_path / "run", resume=True)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_moves_scores_little(folder: Path, features: Path, tmp_path: Path, dtype: str) -> None:
    config = on_features(folder, features, temporal="seqTransf")
    exact = FeatureStore(features)
    head = build_head(config, exact)
    rounded = FeatureStore(encode(folder, tmp_path / dtype, dtype))
    sims = [evaluate_features(head, store, store.part("test")).sim for store in (exact, rounded)]
    assert not torch.equal(*sims)
    torch.testing.assert_close(*sims, rtol=0, atol={"fp16": 1e-3, "bf16": 1e-2}[dtype])


def test_blocks_and_drls_have_the_same_bits_and_scores(features: Path, folder: Path) -> None:
    """A DRL scores stored tokens as its head does; the size of a block changes no bit."""
    config = on_features(folder, features, temporal="seqTransf")
    store = FeatureStore(features)
    head = build_head(config, store)
    model, _ = build_model(configured(folder, temporal="seqTransf"))
    part = store.part("test")
    expected = evaluate_features(head, store, part).sim
    assert torch.equal(evaluate_features(head, store, part, block=3).sim, expected)
    assert torch.equal(evaluate_features(model, store, part).sim, expected)


def test_a_head_becomes_a_drl(folder: Path, features: Path, tmp_path: Path) -> None:
    run, _ = opened_on_features(on_features(folder, features, temporal="seqTransf"), tmp_path / "run")
    run.train()
    head = Head.from_pretrained(tmp_path / "run")
    towers, _ = build_model(configured(folder))
    model = DRL.from_head(tmp_path / "run" / BEST, towers)
    assert model.inputs == head.inputs
    assert model.clip_name == "toy"
    assert float(model.logit_scale) == float(head.logit_scale)
    videos, _ = opened(configured(folder, temporal="seqTransf"), tmp_path / "videos")
    on_videos = videos.data.evaluate(model, videos.config, None, None)
    store = FeatureStore(features)
    stored = evaluate_features(head, store, store.part("val"))
    torch.testing.assert_close(on_videos.sim, stored.sim, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path / "joined")
    again = DRL.from_pretrained(tmp_path / "joined")
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in model.state_dict().items())
    with torch.no_grad():
        towers.clip.visual.proj[0, 0] += 1
    with pytest.raises(
        ValueError, match=r"towers must be what the head was trained on, got another CLIP: the head's video"
    ):
        DRL.from_head(head, towers)
    with pytest.raises(ValueError, match=r"must hold a DRL, got a Head without a CLIP; .* DRL.from_head"):
        DRL.from_pretrained(tmp_path / "run")
    with pytest.raises(ValueError, match=r"must hold a DRL, got a Head without a CLIP; join them first: DRL.from_head"):
        model.load_weights(tmp_path / "run")
    with pytest.raises(
        ValueError, match=r"must hold a Head, got a DRL with its CLIP; read it with DRL.from_pretrained"
    ):
        Head.from_pretrained(tmp_path / "joined")


def test_a_head_starts_from_another_head_or_a_drl(folder: Path, features: Path, tmp_path: Path) -> None:
    config = on_features(folder, features, temporal="seqTransf")
    store = FeatureStore(features)
    torch.manual_seed(5)
    model = DRL(build_model(configured(folder))[0].clip, temporal="seqTransf", interaction="wti")
    model.clip_name = "toy"
    model.save_pretrained(tmp_path / "drl")
    for source in ("drl", "head"):
        head = build_head(on_features(folder, features, temporal="seqTransf", init_from=str(tmp_path / source)), store)
        for name, x in head.state_dict().items():
            assert torch.equal(x, model.state_dict()["clip.logit_scale" if name == "log_scale" else name]), name
        head.save_pretrained(tmp_path / "head")
    assert not torch.equal(
        build_head(config, store).interaction.text_weight_fc[0].weight, head.interaction.text_weight_fc[0].weight
    )
    with pytest.raises(
        ValueError, match=r"must hold a model of this architecture, got interaction 'wti' there and 'ti' here"
    ):
        build_head(
            on_features(
                folder, features, temporal="seqTransf", cdcr=0, interaction="ti", init_from=str(tmp_path / "drl")
            ),
            store,
        )


def test_saved_heads_of_other_widths(tmp_path: Path) -> None:
    head = Head(12, 20, 64, interaction="wti", temporal="seqLSTM", wti_arch=3, masking="exclude", max_positions=9)
    head.save_pretrained(tmp_path)
    again = Head.from_pretrained(tmp_path)
    assert again.sizes == head.sizes
    assert again.config == head.config
    assert again.encoders is None
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in head.state_dict().items())


def test_the_configuration_takes_from_the_features_what_they_say(features: Path, tmp_path: Path) -> None:
    config = read_config("wti_cdcr", features=features)
    assert (config.dataset, config.clip, config.pretrained, config.max_words, config.max_frames) == (
        "folder",
        "toy",
        None,
        12,
        3,
    )
    assert config.skip_same_video
    assert not read_config("wti", ["skip_same_video=false"], features=features).skip_same_video
    for override in ("clip=ViT-B-32", "max_frames=4", "rate=2", "dataset=msrvtt"):
        with pytest.raises(
            ValueError, match=rf"wti must agree with the features in .*; got {override.partition('=')[0]} "
        ):
            read_config("wti", [override], features=features)
    with pytest.raises(ValueError, match=r"which have dataset 'folder'; got dataset 'msvd'"):
        read_config("wti", dataset="msvd", features=features)
    with pytest.raises(ValueError, match=r"features not found: .*nowhere; check the path"):
        read_config("wti", features=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="dim must be None without features, got 64"):
        RunConfig("folder", dim=64)


def test_ranks_that_differ_in_tokens_agree_to_fail(features: Path, folder: Path) -> None:
    """Damaged tokens are an error of evaluation, too."""
    store = FeatureStore(features)
    part, head = store.part("test"), build_head(on_features(folder, features), store)
    store._sides["video"].checksum[part.videos[0]] += 1
    with pytest.raises(ValueError, match=r"video item \d+ must have the checksum"):
        evaluation.evaluate_features(head, store, part)


def test_public_names() -> None:
    assert drl_fast.Head is Head


def test_scoring_leaves_out_how_towers_were_trained(folder: Path, features: Path, tmp_path: Path) -> None:
    """A run on videos with compiled, frozen towers is scored on features."""
    config = configured(folder, freeze="clip", compile=True)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(config)))
    options = ["videos=null", "annotations=null"]
    found = settings_of(None, tmp_path / "config.yaml", options, None, features=features)
    assert (found.config.compile, found.config.freeze, found.config.features) == (False, "clip", str(features))
