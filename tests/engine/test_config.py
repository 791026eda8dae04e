"""Configurations: all files of the repository, and errors in configurations."""

from __future__ import annotations

import dataclasses
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from drl_fast.data.datasets import DATASETS
from drl_fast.data.feature_store import Side
from drl_fast.data.video import Sampling
from drl_fast.engine.config import ALIASES, RunConfig, read_config
from drl_fast.model.config import Config, Inputs, Sizes

# The values that differ between rows, and the chunk of each data set.
ROWS = {
    "dp": {"interaction": "dp", "temporal": None},
    "dp_cdcr": {"interaction": "dp", "temporal": "seqTransf", "cdcr": 1, "cdcr_alpha_on": 0.14},
    "dp_seqtransf": {"interaction": "dp", "temporal": "seqTransf"},
    "hi": {"interaction": "hi", "temporal": "seqTransf"},
    "mlp": {"interaction": "mlp", "temporal": "seqTransf"},
    "ti": {"interaction": "ti", "temporal": "seqTransf"},
    "ti_cdcr": {"interaction": "ti", "temporal": "seqTransf", "cdcr": 2, "cdcr_alpha_on": 0.16},
    "video_colbert": {"interaction": "mean_maxsim", "temporal": None, "query_expansion": True, "loss": "sigmoid"},
    "wti": {"interaction": "wti", "temporal": "seqTransf", "wti_arch": 2},
    "wti_cdcr": {"interaction": "wti", "temporal": "seqTransf", "wti_arch": 2, "cdcr": 3, "cdcr_alpha_on": 0.14},
    "xti": {"interaction": "xti", "temporal": None},
    "xti_seqtransf": {"interaction": "xti", "temporal": "seqTransf"},
}
CHUNKS = {"msrvtt": 0, "msvd": 0, "lsmdc": 0, "vatex": 0, "activitynet": 16, "didemo": 16, "folder": 0}


def test_there_is_one_file_per_row() -> None:
    files = [file.name for file in resources.files("drl_fast.configs").iterdir()]
    assert {name for name in files if name.endswith(".yaml")} == {f"{row}.yaml" for row in ROWS}
    assert set(CHUNKS) == set(DATASETS)


@pytest.mark.parametrize("dataset", CHUNKS)
@pytest.mark.parametrize("row", ROWS)
def test_row_and_dataset_give_the_configuration(row: str, dataset: str) -> None:
    config = read_config(row, dataset=dataset)
    assert config == RunConfig(dataset, **ROWS[row], chunk=CHUNKS[dataset])
    assert (config.epochs, config.batch, config.lr, config.clip_lr) == (5, 128, 1e-4, 1e-7)
    assert (config.pretrained, config.clip, config.precision) == ("openai", "ViT-B-32", "bf16")
    assert not config.skip_same_video
    sizes = (64, 64) if dataset in ("activitynet", "didemo") else (32, 12)
    assert (config.words, config.sampling(224).max_frames) == sizes


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def test_values_are_read_and_overridden(tmp_path: Path) -> None:
    path = write(tmp_path, "dataset: folder\nlr: 1e-4\ntemporal: null\nbatch: 4\n")
    assert read_config(path) == RunConfig("folder", lr=1e-4, temporal=None, batch=4)
    found = read_config(path, ["batch=8", "temporal=seqLSTM", "batch=16", "pretrained=None", "freeze=none", "lr=2e-3"])
    assert found == RunConfig("folder", lr=2e-3, temporal="seqLSTM", batch=16, pretrained=None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dataset: msrvt", "dataset must be .* got 'msrvt'"),
        ("dataset: folder\nbatchsize: 4", "unknown key 'batchsize' in .*run.yaml; did you mean batch\\?"),
        ("dataset: folder\nbatch: many", "batch must be int, got 'many'"),
        ("dataset: folder\nbatch: 4.5", "batch must be int, got 4.5"),
        ("dataset: folder\nbatch: true", "batch must be int, got True"),
        ("dataset: folder\nlr: fast", "lr must be float, got 'fast'"),
        ("dataset: folder\nmax_words: long", "max_words must be int or null, got 'long'"),
        ("dataset: folder\nskip_same_video: 1", "skip_same_video must be bool, got 1"),
        ("dataset: folder\nbatch: 0", "batch must be a positive integer, got 0; the paper's recipe has 128"),
        (
            "dataset: folder\nmax_frames: 0",
            "max_frames must be a positive integer, got 0; leave it out for the data set's own",
        ),
        ("dataset: folder\nlora: -1", "lora must be .*, got -1; leave it out to train the towers as usual"),
        ("dataset: folder\nlora: true", "lora must be int, got True"),
        ("dataset: folder\nfreeze_layers: -1", "freeze_layers must be .*, got -1; leave it out"),
        ("dataset: folder\ncompile: 1", "compile must be bool, got 1"),
        ("dataset: folder\nlora_rank: 8", "unknown key 'lora_rank' in .*; did you mean lora\\?"),
        ("dataset: folder\nlora: 8\nfreeze: clip", "lora must be left out with freeze='clip', .* got 8; drop one"),
        ("dataset: folder\nfreeze_layers: 0\nfreeze: clip", "freeze_layers must be left out with freeze='clip'"),
        ("dataset: folder\ncheckpoint_towers: true\nfreeze: clip", "checkpoint_towers must be left out with freeze"),
        ("dataset: folder\nlora: 8\nfreeze_layers: 2", "freeze_layers must be left out with lora=8, .* got 2; drop"),
        ("dataset: folder\nlr: .nan", "lr must be positive and finite, got nan"),
        ("dataset: folder\nclip_lr: -1", "clip_lr must be finite and >= 0, got -1"),
        ("dataset: folder\nwarmup: 2", r"warmup must be in \[0, 1\], got 2"),
        ("dataset: folder\nprecision: fp8", "precision must be .* got 'fp8'"),
        ("dataset: folder\nparallel: tp", "parallel must be .* got 'tp'"),
        ("dataset: folder\ninteraction: dpp", "interaction must be .* got 'dpp'"),
        ("dataset: folder\ninteraction: ti\ncdcr: 3", "cdcr must be 0, 1 or 2 with interaction='ti', got 3"),
        ("dataset: folder\nmasking: dlr", "masking must be .* got 'dlr'"),
        ("dataset: folder\ninteraction: dp\nmasking: none", "masking must be left out with interaction='dp'"),
        ("batch: many\nbatchsize: 4", "unknown key 'batchsize'"),
        ("batch: 4", "no data set given, and .*run.yaml names none; add --dataset with one of msrvtt"),
        ("- a\n- b", "must map names to values, got list"),
        ("", "must map names to values, got NoneType"),
        ("a: [1", "must be YAML, got"),
        ("dataset: folder\nlr: " + "9" * 400, "lr must be float, got 999"),
        ("dataset: " + "[" * 5000, "nested too deeply"),
        ("dataset: folder\nlr: &a [x]\nclip_lr: [*a, *a]", r"must be YAML without aliases \(\*name\)"),
    ],
)
def test_wrong_configurations(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_config(write(tmp_path, text))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lora": 8}, "lora must be left out on features, .* got lora=8; add --set lora=0, or train on videos"),
        ({"freeze_layers": 0}, "freeze_layers must be .* got freeze_layers=0; add --set freeze_layers=null, or"),
        ({"compile": True}, "compile must be .* got compile=True; add --set compile=false, or"),
        (
            {"checkpoint_towers": True, "lora": 8},
            "lora and checkpoint_towers must be .*; add --set lora=0 --set checkpoint_towers=false, or",
        ),
    ],
)
def test_features_have_no_towers_to_change(options: dict[str, Any], words: str) -> None:
    """A run's configuration serves its features with the options that the error names."""
    with pytest.raises(ValueError, match=words) as raised:
        RunConfig("folder", features="features", **options)
    remedies = dict(re.findall(r"--set (\w+)=(\w+)", str(raised.value)))
    assert remedies.keys() == options.keys()
    RunConfig("folder", features="features", **{name: yaml.safe_load(value) for name, value in remedies.items()})


def test_a_frozen_clip_has_no_towers_to_change(tmp_path: Path) -> None:
    """Of two options the first is named, whatever the order of a set is."""
    path = write(tmp_path, "dataset: folder\nfreeze: clip\ncompile: true")
    assert read_config(path).compile
    with pytest.raises(ValueError, match=r"^lora must be left out with freeze='clip'"):
        read_config(path, ["checkpoint_towers=true", "lora=4"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("batch", "set must be key=value, got 'batch'"),
        ("=4", "set must be key=value"),
        ("batch=[1", r"the value in --set batch=\[1 must be YAML, got while parsing a flow sequence"),
        ("bath=4", r"unknown key 'bath' in --set; did you mean batch\?"),
        ("learning_rate=1", r"unknown key 'learning_rate' in --set; did you mean lr\?$"),
        ("batch_size=[1", r"unknown key 'batch_size' in --set; did you mean batch\?$"),
        ("num_epochs=1", r"did you mean epochs\?$"),
        ("num_frames=8", r"did you mean max_frames\?$"),
    ],
)
def test_wrong_overrides(tmp_path: Path, override: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_config(write(tmp_path, "dataset: folder"), [override])


def test_numpy_numbers_and_paths_are_recorded_as_plain_values(tmp_path: Path) -> None:
    given = RunConfig("msrvtt", videos=tmp_path, batch=np.int64(3), lr=np.float32(0.5), skip_same_video=np.bool_(True))
    plain = RunConfig("msrvtt", videos=str(tmp_path), batch=3, lr=0.5, skip_same_video=True)
    assert yaml.safe_dump(dataclasses.asdict(given)) == yaml.safe_dump(dataclasses.asdict(plain))


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (Config, {"cdcr": np.int64(1), "cdcr_weight": np.float32(0.5), "query_expansion": np.bool_(False)}),
        (Inputs, {"max_words": np.int32(8), "rate": np.float64(2), "max_frames": np.int64(4)}),
        (Sizes, dict.fromkeys(("text_dim", "video_dim", "dim", "max_positions"), np.int64(8))),
        (Sampling, {"rate": np.longdouble(2), "size": np.int64(32)}),
        (Side, {"items": np.int64(3), "width": np.int64(8), "chunk": np.uint8(2), "length": None, "encoder": None}),
    ],
)
def test_numpy_numbers_become_plain(kind: Any, values: dict[str, Any]) -> None:
    plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in values.items()}
    plain = {name: float(value) if isinstance(value, np.longdouble) else value for name, value in plain.items()}
    assert json.dumps(dataclasses.asdict(kind(**values))) == json.dumps(dataclasses.asdict(kind(**plain)))


@pytest.mark.parametrize("name", ALIASES)
def test_every_alias_names_a_key(name: str) -> None:
    keys = {field.name for field in dataclasses.fields(RunConfig)}
    assert ALIASES[name] in keys
    assert name not in keys


def test_a_row_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_config("wti", dataset="msvd").dataset == "msvd"
    assert read_config("wti", ["dataset=msvd"]) == read_config("wti", dataset="msvd")
    (tmp_path / "wti").write_text("dataset: folder")
    assert read_config("wti") == RunConfig("folder")


def test_a_file_may_name_its_dataset(tmp_path: Path) -> None:
    path = write(tmp_path, "dataset: didemo")
    assert read_config(path) == read_config(path, dataset="didemo") == RunConfig("didemo", chunk=16)
    assert read_config(path, ["chunk=0"]).chunk == 0
    assert read_config(path, ["dataset=msvd"]).dataset == "msvd"
    for overrides, named in (([], "didemo"), (["dataset=msvd"], "msvd")):
        with pytest.raises(ValueError, match=f"dataset must be the configuration's own, {named}, got lsmdc; leave"):
            read_config(path, overrides, "lsmdc")
    with pytest.raises(ValueError, match=r"dataset must be one of .* got 'msrvt'"):
        read_config("wti", dataset="msrvt")


@pytest.mark.parametrize("old", ["msrvtt_wti_cdcr", "configs/activitynet_dp.yaml"])
def test_an_old_name_is_an_error_with_the_new_one(old: str) -> None:
    dataset, _, row = Path(old).stem.partition("_")
    message = f"config must be a YAML file or a row, got {old}; write --config {row} --dataset {dataset}"
    with pytest.raises(ValueError, match=re.escape(message)):
        read_config(old)


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got .*wit_cdcr.yaml, which is neither; nearest: wti_cdcr, "):
        read_config(tmp_path / "wit_cdcr.yaml")
    with pytest.raises(ValueError, match=r"a row \(dp, .*xti_seqtransf\), got .*0.yaml, which is neither$"):
        read_config(tmp_path / "0.yaml")
