"""Configurations: the repository's own, all of them, and what is said of wrong ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from drl_fast.data.datasets import DATASETS
from drl_fast.engine.config import RunConfig, read_config

CONFIGS = Path(__file__).parents[2] / "configs"
ROWS = ["dp", "dp_cdcr", "dp_seqtransf", "hi", "mlp", "ti", "ti_cdcr", "wti", "wti_cdcr", "xti", "xti_seqtransf"]
if not CONFIGS.exists():
    pytest.skip("no source tree beside the tests", allow_module_level=True)


def test_every_dataset_has_every_row() -> None:
    assert {path.name for path in CONFIGS.glob("*.yaml")} == {f"{name}_{row}.yaml" for name in DATASETS for row in ROWS}


@pytest.mark.parametrize("row", ROWS)
def test_a_row_is_the_same_on_every_dataset(row: str) -> None:
    found = {name: read_config(CONFIGS / f"{name}_{row}.yaml") for name in DATASETS}
    assert {config.dataset for config in found.values()} == set(DATASETS)
    assert len({dataclasses.replace(config, dataset="folder", chunk=0) for config in found.values()}) == 1
    assert {name for name, config in found.items() if config.chunk} == {"activitynet", "didemo"}
    config = found["msrvtt"]
    assert (config.epochs, config.batch, config.lr, config.clip_lr) == (5, 128, 1e-4, 1e-7)
    assert (config.pretrained, config.clip, config.precision, config.skip_same_video) == (
        "openai",
        "ViT-B-32",
        "bf16",
        False,
    )
    assert config.interaction == row.partition("_")[0]
    assert (config.cdcr > 0) == row.endswith("cdcr")
    sizes = {name: (config.words, config.sampling(224).max_frames) for name, config in found.items()}
    assert sizes["msrvtt"] == sizes["msvd"] == sizes["lsmdc"] == sizes["vatex"] == (32, 12)
    assert sizes["activitynet"] == sizes["didemo"] == (64, 64)


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def test_values_are_read_and_overridden(tmp_path: Path) -> None:
    path = write(tmp_path, "dataset: folder\nlr: 1e-4\ntemporal: null\nbatch: 4\n")
    assert read_config(path) == RunConfig("folder", lr=1e-4, temporal=None, batch=4)
    found = read_config(path, ["batch=8", "temporal=seqLSTM", "batch=16", "pretrained=None", "lr=2e-3"])
    assert found == RunConfig("folder", lr=2e-3, temporal="seqLSTM", batch=16, pretrained=None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dataset: msrvt", "dataset must be .* got 'msrvt'"),
        ("dataset: folder\nbatchsize: 4", "must hold known names, got 'batchsize'; nearest: batch"),
        ("dataset: folder\nbatch: many", "batch must be int, got 'many'"),
        ("dataset: folder\nbatch: 4.5", "batch must be int, got 4.5"),
        ("dataset: folder\nbatch: true", "batch must be int, got True"),
        ("dataset: folder\nlr: fast", "lr must be float, got 'fast'"),
        ("dataset: folder\nmax_words: long", "max_words must be int or null, got 'long'"),
        ("dataset: folder\nskip_same_video: 1", "skip_same_video must be bool, got 1"),
        ("dataset: folder\nbatch: 0", "batch must be positive, got 0; the paper's recipe has 128"),
        ("dataset: folder\nmax_frames: 0", "max_frames must be positive, got 0; leave it out for the data set's own"),
        ("dataset: folder\nlr: .nan", "lr must be positive, got nan"),
        ("dataset: folder\nclip_lr: -1", "clip_lr must not be negative, got -1"),
        ("dataset: folder\nwarmup: 2", "warmup must be a share of the steps in 0..1, got 2"),
        ("dataset: folder\nprecision: fp8", "precision must be .* got 'fp8'"),
        ("dataset: folder\nparallel: tp", "parallel must be .* got 'tp'"),
        ("dataset: folder\ninteraction: dpp", "interaction must be .* got 'dpp'"),
        ("dataset: folder\ninteraction: ti\ncdcr: 3", "cdcr must be 0, 1 or 2 with interaction='ti', got 3"),
        ("batch: 4", "must name its dataset, got none; one of msrvtt"),
        ("- a\n- b", "must map names to values, got list"),
        ("", "must map names to values, got NoneType"),
        ("a: [1", "must be YAML, got"),
    ],
)
def test_wrong_configurations_are_told(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_config(write(tmp_path, text))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("batch", "set must be key=value, got 'batch'"),
        ("=4", "set must be key=value"),
        ("a=[1", "set must be key=value in YAML"),
        ("bath=4", "must hold known names, got 'bath'; nearest: batch"),
    ],
)
def test_wrong_overrides_are_told(tmp_path: Path, override: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_config(write(tmp_path, "dataset: folder"), [override])


def test_a_row_goes_by_its_bare_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_config("msrvtt_wti") == read_config(CONFIGS / "msrvtt_wti.yaml")
    (tmp_path / "msrvtt_wti").write_text("dataset: folder")
    assert read_config("msrvtt_wti") == RunConfig("folder")


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got .*msrvtt_wit.yaml, which is neither; nearest: msrvtt_wti, "):
        read_config(CONFIGS / "msrvtt_wit.yaml")
    with pytest.raises(ValueError, match="which is neither; msrvtt_wti, for instance"):
        read_config(tmp_path / "0.yaml")
