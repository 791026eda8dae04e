"""Tables in the pages are those of the committed results."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import harness, tables

RESULTS = sorted(harness.RESULTS.glob("*/wti.json"))
MEASURED = [
    path for name in ("wti", "contrastive", "cdcr", "model") for path in sorted(harness.RESULTS.glob(f"*/{name}.json"))
]


def test_pages_show_what_the_results_hold(capsys: pytest.CaptureFixture[str]) -> None:
    assert tables.main(["--check"]) == 0, capsys.readouterr().out


def test_every_page_has_marked_tables() -> None:
    for page in tables.PAGES:
        assert tables.MARK.search((harness.ROOT / page).read_text(encoding="utf-8")), page


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
    # A + marks a working tree that nobody else can have.
    assert not result["versions"]["commit"].endswith("+")
    assert result["command"].startswith("python benchmarks/")
    for what in ("time", "memory") if path.stem != "model" else ():
        assert (path.parent / f"{path.stem}_{what}.png").is_file()


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.parent.name)
def test_never_slower_than_eager(path: Path) -> None:
    """In what was measured and committed; nothing is timed here."""
    for record in harness.load(path)["time"]:
        times = record["results"]
        if "eager" in times:
            ours, eager = (times[name]["ratio"]["median"] for name in ("drl_fast", "eager"))
            assert ours <= eager, (record["shape"], record["mode"])


@pytest.mark.parametrize("path", sorted(harness.RESULTS.glob("*/contrastive.json")), ids=lambda p: p.parent.name)
def test_the_contrastive_loss_costs_what_it_may(path: Path) -> None:
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
    assert used[4096] < 2.2 * used[2048], "memory is to grow linearly"


@pytest.mark.parametrize("path", sorted(harness.RESULTS.glob("*/cdcr.json")), ids=lambda p: p.parent.name)
def test_cross_correlation_costs_what_it_may(path: Path) -> None:
    (record,) = (r for r in harness.load(path)["time"] if r["mode"] == "rows")
    assert record["results"]["full"]["ratio"]["median"] <= 1.6
    assert record["results"]["diagonal"]["ratio"]["median"] <= 0.6
