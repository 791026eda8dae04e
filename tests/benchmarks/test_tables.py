"""Tables in the pages are those of the committed results."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import harness, tables

RESULTS = sorted(harness.RESULTS.glob("*/wti.json"))


def test_pages_show_what_the_results_hold(capsys: pytest.CaptureFixture[str]) -> None:
    assert tables.main(["--check"]) == 0, capsys.readouterr().out


def test_every_page_has_marked_tables() -> None:
    for page in tables.PAGES:
        assert tables.MARK.search((harness.ROOT / page).read_text(encoding="utf-8")), page


def test_an_edited_figure_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = harness.ROOT / "README.md"
    text = page.read_text(encoding="utf-8")
    body = tables.markdown(tables.train(harness.load(RESULTS[0])))
    figure = body.splitlines()[2].split(" | ")[2]
    (tmp_path / "README.md").write_text(text.replace(f" {figure} |", " 0.01 |", 1), encoding="utf-8")
    monkeypatch.setattr(tables, "PAGES", (str(tmp_path / "README.md"),))
    assert tables.main(["--check"]) == 1
    assert tables.main([]) == 0
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == text


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.parent.name)
def test_results_say_where_they_come_from(path: Path) -> None:
    result = harness.load(path)
    assert result["machine"]["cpu"]
    assert set(result["versions"]) >= {"torch", "python", "drl_fast", "commit"}
    # A + marks a working tree that nobody else can have.
    assert not result["versions"]["commit"].endswith("+")
    assert result["command"].startswith("python benchmarks/")
    for name in ("wti_time.png", "wti_memory.png"):
        assert (path.parent / name).is_file()


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.parent.name)
def test_never_slower_than_eager(path: Path) -> None:
    """In what was measured and committed; nothing is timed here."""
    for record in harness.load(path)["time"]:
        times = record["results"]
        if "eager" in times:
            ours, eager = (times[name]["ratio"]["median"] for name in ("drl_fast", "eager"))
            assert ours <= eager, (record["shape"], record["mode"])
