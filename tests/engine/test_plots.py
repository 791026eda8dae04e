"""Plots: complete files, labels with units, a line for chance, legends in the order of the curves."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from drl_fast.engine import plots
from drl_fast.engine.plots import Figure, Point, interval_plot, loss_plot, recall_plot, save

NAMES = ("DP", "HI", "MLP", "XTI", "TI", "WTI", "WTI + CDCR")
POINTS = {
    name: {"t2v": Point(10 * i, (10 * i - 2, 10 * i + 2)), "v2t": Point(9, (9.5, 12))} for i, name in enumerate(NAMES)
}


def evaluation(recall: float) -> dict[str, dict[str, float]]:
    return {key: {"R1": recall, "R5": recall + 20, "R10": recall + 40} for key in ("t2v", "v2t")}


def test_plots_are_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {
        "loss.png": loss_plot({"total": [4.0, 3.0]}, 64, "a run"),
        "recall.png": recall_plot({1: evaluation(3.0)}, "a run"),
        "interval.png": interval_plot(POINTS, 0.625, "a demo"),
    }
    for name, figure in figures.items():
        save(figure, tmp_path / name)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert {path.name for path in before} == figures.keys()
    assert all(content.startswith(b"\x89PNG") for content in before.values())

    def breaks_off(self: object, path: Path, **_: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", breaks_off)
    for name, figure in figures.items():
        with pytest.raises(OSError, match="No space left"):
            save(figure, tmp_path / name)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_losses() -> None:
    """One line per row and one for chance; axes end at the data; the legend is in the order of the lines' ends."""
    losses = {name: [5.0, 4.0, 3.0 + i % 3 + i / 10] for i, name in enumerate(NAMES)}
    axes = loss_plot(losses, 64, "rows").axes[0]
    assert axes.get_xlabel() == "step"
    assert axes.get_ylabel() == "loss in nats, 64 pairs"
    assert len(axes.get_lines()) == len(NAMES) + 1
    assert axes.get_lines()[-1].get_ydata()[0] == pytest.approx(math.log(64))
    assert 2.5 < axes.get_ylim()[0] < 3
    shown = [text.get_text() for text in axes.get_legend().get_texts()]
    ends = {name: values[-1] for name, values in losses.items()} | {"log(64) = 4.16, chance": math.log(64)}
    assert shown == sorted(ends, key=lambda name: -ends[name])
    assert loss_plot({"total": [1.0] * 90}, 64, "").axes[0].get_ylabel().endswith("mean of 3 steps")


def test_recalls_of_a_run() -> None:
    axes = recall_plot({1: evaluation(30.0), 2: evaluation(35.0)}, "val").axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "recall in percent")
    assert len(axes.get_lines()) == 6
    assert list(axes.get_lines()[0].get_xdata()) == [1, 2]
    assert list(axes.get_lines()[0].get_ydata()) == [30, 35]
    assert 20 < axes.get_ylim()[0] < 30
    assert axes.get_lines()[0].get_marker() == "o", "without markers a run of one epoch would show nothing"


def test_intervals_of_rows() -> None:
    axes = interval_plot(POINTS, 0.625, "rows").axes[0]
    assert axes.get_xlabel() == "R@1 in percent"
    assert [label.get_text() for label in axes.get_yticklabels()] == list(NAMES)
    assert [line.get_label() for line in axes.get_lines() if line.get_label()[0] != "_"] == ["chance, 0.625 %"]
    t2v, v2t = axes.containers
    assert t2v.lines[0].get_xdata()[5] == pytest.approx(50)
    assert len(v2t.lines[0].get_xdata()) == len(NAMES)
    assert len(plots.COLOURS) == len(plots.LINES) == len(NAMES)
