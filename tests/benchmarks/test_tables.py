"""The tables in the pages match the committed results."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import harness
import plots
import result_tables as tables
from drl_fast.data.datasets import DATASETS
from drl_fast.engine.config import read_config
from problems import Shape

RESULTS = sorted(harness.RESULTS.glob("*/wti.json"))
MEASURED = [
    path
    for name in ("wti", "contrastive", "cdcr", "model", "pooling", "prepared")
    for path in sorted(harness.RESULTS.glob(f"*/{name}.json"))
]


def test_pages_match_the_results(capsys: pytest.CaptureFixture[str]) -> None:
    assert tables.main(["--check"]) == 0, capsys.readouterr().out


def test_every_page_has_marked_tables() -> None:
    """No page has a table twice, and pages that show results have marked tables."""
    found = {}
    for page in tables.PAGES:
        text = (harness.ROOT / page).read_text(encoding="utf-8")
        found[page] = [(mark["name"], mark["file"]) for mark in tables.MARK.finditer(text)]
        assert len(found[page]) == len(set(found[page])) == text.count("<!-- table "), page
    for page in ("README.md", "docs/performance.md", "docs/distributed.md"):
        assert found[page], page


def test_the_gpu_page_matches_the_static_report() -> None:
    """Its tables are those of the JSON (test_pages_match_the_results); the page says which of them nobody measured."""
    folder = harness.RESULTS / "static"
    page = (harness.ROOT / "docs/gpu.md").read_text(encoding="utf-8")
    found = {(mark["name"], Path(mark["file"]).name) for mark in tables.MARK.finditer(page)}
    old = "kernels_triton_3.6.json"
    assert found == {
        ("static", "kernels.json"),
        ("spills", "kernels.json"),
        ("spills", old),
        ("predicted", "predicted.json"),
        ("launches", "launches.json"),
        *((name, "session.json") for name in ("gpu_forward", "gpu_step", "gpu_memory")),
        *((name, "studies.json") for name in ("gpu_blocks", "gpu_products")),
    }
    assert "predictions of a cost model, not measurements" in page
    report = harness.load(folder / "kernels.json")
    assert {row["arch"] for row in report} == set(tables.ARCHS)
    # The page says so in words.
    assert not [row for row in report if "error" in row or row["serialised"] or row["missing_barriers"]]
    assert len(tables.static(report).rows) == len({row["kernel"] for row in report})
    assert len(tables.spills(report).rows) == len([row for row in report if row["spill_bytes"]])
    troubled = harness.load(folder / old)
    assert len(tables.spills(troubled).rows) == len(troubled)


def test_an_edited_figure_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = harness.ROOT / "README.md"
    text = page.read_text(encoding="utf-8")
    body = tables.markdown(tables.summary(harness.load(RESULTS[0])))
    figure = body.splitlines()[2].split(" | ")[2]
    (tmp_path / "README.md").write_text(text.replace(f" {figure} |", " 0.01 |", 1), encoding="utf-8")
    monkeypatch.setattr(tables, "PAGES", (str(tmp_path / "README.md"),))
    assert tables.main(["--check"]) == 1
    assert tables.main([]) == 0
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == text


@pytest.mark.parametrize("path", MEASURED, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_results_say_where_they_come_from(path: Path) -> None:
    result = harness.load(path)
    assert result["machine"]["cpu"]
    assert set(result["versions"]) >= {"torch", "python", "drl_fast", "commit"}
    # A + marks uncommitted changes, which others could not reproduce.
    assert not result["versions"]["commit"].endswith("+")
    assert result["command"].startswith("python benchmarks/")
    for what in ("time", "memory") if path.stem in plots.DRAWN else ():
        assert (path.parent / f"{path.stem}_{what}.png").is_file()


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.parent.name)
def test_never_slower_than_eager(path: Path) -> None:
    """In the committed results; nothing is timed here."""
    for record in harness.load(path)["time"]:
        times = record["results"]
        if "eager" in times:
            ours, eager = (times[name]["ratio"]["median"] for name in ("drl_fast", "eager"))
            assert ours <= eager, (record["shape"], record["mode"])


@pytest.mark.parametrize("path", sorted(harness.RESULTS.glob("*/contrastive.json")), ids=lambda p: p.parent.name)
def test_limits_of_the_contrastive_loss(path: Path) -> None:
    result = harness.load(path)
    for record in result["time"]:
        assert record["against"]["eager"]["median"] <= 1.35, record["shape"]
        assert record["against"]["two_steps"]["median"] <= 1.8, record["shape"]
    used = {
        row["shape"]["batch"]: row["mb"]
        for row in result["memory"]
        if row["contestant"] == "fused" and row["shape"]["dim"] == 128
    }
    assert used[4096] <= 300
    assert used[4096] < 2.2 * used[2048], "memory must grow linearly"


@pytest.mark.parametrize("path", sorted(harness.RESULTS.glob("*/cdcr.json")), ids=lambda p: p.parent.name)
def test_limits_of_the_cross_correlation_loss(path: Path) -> None:
    (record,) = (r for r in harness.load(path)["time"] if r["mode"] == "rows")
    assert record["results"]["full"]["ratio"]["median"] <= 1.6
    assert record["results"]["diagonal"]["ratio"]["median"] <= 0.6


def test_times_are_relative_to_eager() -> None:
    def row(**ratios: float) -> dict[str, Any]:
        results = {name: {"ms": {"median": 10 * r}, "ratio": {"median": r}} for name, r in ratios.items()}
        return {"shape": asdict(Shape(8)), "mode": "train", "results": results}

    labels = {"drl_fast": "drl-fast", "mm": "torch.mm"}
    result = {
        "time": [row(mm=1.0, drl_fast=0.5, eager=2.0), row(mm=1.0, drl_fast=0.5)],
        "contestants": {name: {"label": label} for name, label in labels.items()},
    }
    table = tables.train(result)
    assert table.columns == ["batch, words, frames", "eager", "drl-fast", "drl-fast / eager", "torch.mm / eager"]
    assert table.rows == [["(8, 32, 12)", "20 ms", "5 ms", "0.25", "0.50"], ["(8, 32, 12)", "-", "5 ms", "-", "-"]]


def test_the_legend_has_the_curves_order() -> None:
    series = {"eager": {8: 4.0, 16: 16.0}, "drl_fast": {8: 1.0, 16: 2.0, 32: 8.0}, "compile": {}, "mm": {8: 9.0}}
    assert plots.ordered(series) == ["mm", "eager", "drl_fast"]


# --- the ablation -----------------------------------------------------------------------------------------------------
PUBLISHED = harness.load(harness.ROOT / tables.MSRVTT / "published.json")
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
def evaluations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    folder = tmp_path / tables.MSRVTT
    folder.mkdir(parents=True)
    return folder


def test_every_row_is_a_configuration_of_that_name() -> None:
    folder = harness.ROOT / "drl_fast" / "configs"
    for row in PUBLISHED["rows"]:
        path = folder / f"{row['config']}.yaml"
        path = path if path.exists() else folder / f"msrvtt_{row['config']}.yaml"
        config = read_config(path, ["dataset=msrvtt"])
        name = row["name"].partition(",")[0]
        assert ("seqTransf" in name) == (config.temporal == "seqTransf")
        assert ("CDCR" in name) == (config.cdcr > 0)
        assert config.interaction.upper() == (name.split()[0] if row["trained"] else "DP")
    shipped = {path.stem.removeprefix("msrvtt_") for path in folder.glob("*.yaml")}
    shipped = {stem for stem in shipped if stem.partition("_")[0] not in DATASETS}
    # Video-ColBERT is another paper's model.
    assert {row["config"] for row in PUBLISHED["rows"]} == shipped - {"video_colbert"}


def test_nothing_is_measured_without_an_evaluation(evaluations: Path) -> None:
    rows = tables.ablation(PUBLISHED).rows
    assert [row[-1] for row in rows] == ["-"] * len(rows)
    found = {row[0]: row[2] for row in rows}
    assert found["WTI + seqTransf + CDCR"] == "47.6 / 45.1"
    assert found["CLIP, zero-shot"] == "31.1 / 26.5"
    assert found["HI + seqTransf"] == "-"


def test_an_evaluation_fills_its_row(evaluations: Path) -> None:
    (evaluations / "wti.json").write_text(json.dumps(EVALUATION))
    (evaluations / "zero_shot.json").write_text(json.dumps({**EVALUATION, "checkpoint": None}))
    measured = {row[0]: row[-1] for row in tables.ablation(PUBLISHED).rows if row[-1] != "-"}
    assert measured == {"WTI + seqTransf": "46.0 / 45.0", "CLIP, zero-shot": "46.0 / 45.0"}


@pytest.mark.parametrize(
    "other",
    [{"dataset": "msvd"}, {"part": "val"}, {"texts": 999}, {"checkpoint": None}, {"untrained": "all of it"}],
    ids=lambda other: next(iter(other)),
)
def test_another_evaluation_is_an_error(evaluations: Path, other: dict[str, Any]) -> None:
    (evaluations / "wti.json").write_text(json.dumps({**EVALUATION, **other}))
    expected = r"must be what drl-fast eval wrote for WTI \+ seqTransf on MSR-VTT's 1,000 test pairs"
    with pytest.raises(ValueError, match=expected):
        tables.ablation(PUBLISHED)
