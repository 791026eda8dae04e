"""The ablation's table: published numbers as published, measured ones from evaluations alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import ablation_tables, harness
from drl_fast.engine.config import read_config

PUBLISHED = harness.load(harness.ROOT / ablation_tables.FOLDER / "published.json")
EVALUATION: dict[str, Any] = {
    "dataset": "msrvtt",
    "part": "test",
    "texts": 1000,
    "videos": 1000,
    "checkpoint": "runs/msrvtt_wti",
    "untrained": None,
    "metrics": {"t2v": {"R1": 46.04}, "v2t": {"R1": 44.96}},
}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(ablation_tables, "ROOT", tmp_path)
    folder = tmp_path / ablation_tables.FOLDER
    folder.mkdir(parents=True)
    return folder


def test_every_row_is_a_configuration_of_that_name() -> None:
    for row in PUBLISHED["rows"]:
        config = read_config(harness.ROOT / row["config"])
        name = row["name"].partition(",")[0]
        assert config.dataset == "msrvtt"
        assert ("seqTransf" in name) == (config.temporal == "seqTransf")
        assert ("CDCR" in name) == (config.cdcr > 0)
        assert config.interaction.upper() == (name.split()[0] if row["trained"] else "DP")
    configs = sorted(path.name for path in (harness.ROOT / "configs").glob("msrvtt_*.yaml"))
    assert sorted({Path(row["config"]).name for row in PUBLISHED["rows"]}) == configs


def test_nothing_is_measured_without_an_evaluation(results: Path) -> None:
    rows = ablation_tables.ablation(PUBLISHED).rows
    assert [row[-1] for row in rows] == ["-"] * len(rows)
    found = {row[0]: row[2] for row in rows}
    assert found["WTI + seqTransf + CDCR"] == "47.6 / 45.1"
    assert found["CLIP, zero-shot"] == "31.1 / 26.5"
    assert found["HI + seqTransf"] == "-"


def test_an_evaluation_fills_its_row(results: Path) -> None:
    (results / "wti.json").write_text(json.dumps(EVALUATION))
    (results / "zero_shot.json").write_text(json.dumps({**EVALUATION, "checkpoint": None}))
    measured = {row[0]: row[-1] for row in ablation_tables.ablation(PUBLISHED).rows if row[-1] != "-"}
    assert measured == {"WTI + seqTransf": "46.0 / 45.0", "CLIP, zero-shot": "46.0 / 45.0"}


@pytest.mark.parametrize(
    "other",
    [{"dataset": "msvd"}, {"part": "val"}, {"texts": 999}, {"checkpoint": None}, {"untrained": "all of it"}],
    ids=lambda other: next(iter(other)),
)
def test_another_evaluation_is_refused(results: Path, other: dict[str, Any]) -> None:
    (results / "wti.json").write_text(json.dumps({**EVALUATION, **other}))
    with pytest.raises(ValueError, match=r"must be drl-fast eval's of WTI \+ seqTransf on MSR-VTT's 1,000 test pairs"):
        ablation_tables.ablation(PUBLISHED)
