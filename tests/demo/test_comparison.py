"""The demo's comparison: one recipe for all rows, intervals over groups of four, findings, plots."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from drl_fast.console import progress
from drl_fast.data.split import Split
from drl_fast.demo import comparison
from drl_fast.demo.comparison import RECIPE, ROWS, Row, compare, draw, findings, tokenizer
from drl_fast.engine.config import RunConfig
from drl_fast.engine.in_memory import Pairs
from drl_fast.metrics import recall_interval
from drl_fast.model.drl import DRL

pytestmark = pytest.mark.usefixtures("one_thread")
CLIPS = 160


def row(name: str, found: float, swapped: bool = False, seed: int = 0) -> Row:
    """Make a row that finds this share of the clips, in whole groups of four; other answers are from another group.

    ``swapped``: it answers with a clip of the right words in another order instead of the right clip.
    """
    fours = torch.randperm(CLIPS // 4, generator=torch.Generator().manual_seed(seed)) < found * CLIPS / 4
    hits = fours.repeat_interleave(4)
    every = torch.arange(CLIPS)
    right = every ^ 1 if swapped else every
    best = torch.where(hits, right, (every + 8) % CLIPS)
    return Row(name, [4.0, 3.0, 2.0], torch.nn.functional.one_hot(best, CLIPS).float())


def rows(**found: float) -> list[Row]:
    """Make all rows, with recall 0.5 by default. The last row's key is CDCR."""
    return [row(name, found.get(name.split()[-1], 0.5), seed=number) for number, name in enumerate(ROWS)]


def text(*of: Row) -> str:
    return "\n".join(findings(list(of)))


def test_interval_is_over_fours() -> None:
    """Whole groups of four are found or not, so the interval is that of one clip per group."""
    some = row("DP", 0.5)
    one_of_four = some.sim[::4, ::4]
    for direction in ("t2v", "v2t"):
        assert some.intervals[direction] == recall_interval(one_of_four, direction=direction)
    low, high = recall_interval(some.sim)
    assert some.intervals["t2v"][1] - some.intervals["t2v"][0] > 1.5 * (high - low)


def test_interval_of_a_direction() -> None:
    """All captions find their clip, but one clip does not find its caption."""
    sim = torch.eye(8)
    sim[1, 0], sim[1, 1] = 2.0, 3.0
    lopsided = Row("DP", [1.0], sim)
    assert lopsided.intervals["t2v"] == (100, 100)
    low, high = lopsided.intervals["v2t"]
    assert low < 100 * 7 / 8 < high


def test_findings_by_intervals() -> None:
    shown = text(*rows(WTI=0.9, CDCR=0.95, TI=0.85))
    assert "Highest R@1, text to video: WTI + CDCR, 95.0." in shown
    assert "Its interval overlaps TI and WTI: this run does not order them." in shown
    assert "It lies above DP, HI, MLP and XTI." in shown
    assert "WTI against DP: +40.0 points; the intervals are apart." in shown
    assert "WTI + CDCR against WTI: +5.0 points; the intervals overlap, this run does not order them." in shown
    assert "above chance" not in shown


def test_findings_against_the_paper() -> None:
    shown = text(*rows(DP=0.95, MLP=0.0, WTI=0.3))
    assert "Highest R@1, text to video: DP, 95.0." in shown
    assert "Its interval overlaps" not in shown
    assert "WTI against DP: -65.0 points; the intervals are apart." in shown
    assert "Not above chance by their intervals: MLP." in shown


def test_word_order_is_reported_separately() -> None:
    some = rows()
    some[0] = row("DP", 0.5, swapped=True)
    shown = text(*some)
    assert some[0].recall == 0
    assert "DP 0 %, HI 100 %" in shown
    some[1] = row("HI", 0.0)
    assert some[1].arranged() is None
    assert "HI 100 %" not in text(*some)


def test_one_recipe_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows start from the towers that DP trained, with the same pairs and recipe; the last has CDCR."""
    seen: list[tuple[DRL, dict[str, Tensor], Pairs, RunConfig, int]] = []

    def spy(model: DRL, pairs: Pairs, config: RunConfig, steps: int, together: int) -> list[float]:
        seen.append((model, {name: x.clone() for name, x in model.clip.state_dict().items()}, pairs, config, steps))
        assert together == 4
        with torch.no_grad():  # as if it had learned
            for x in model.clip.parameters():
                x.add_(0.01)
        return [1.0]

    monkeypatch.setattr(comparison, "train", spy)
    captions = [f"a red cross number {i}" for i in range(16)]
    frames = torch.randint(0, 256, (16, 2, 3, 64, 64), dtype=torch.uint8)
    training = Pairs(frames[:8], torch.ones(8, 2, dtype=torch.bool), tokenizer()(captions[:8]))
    names = tuple(f"clip{i}.mp4" for i in range(8))
    test = Split("folder", "test", tuple(captions[8:]), tuple(range(8)), tuple(map(Path, names)), names)
    with progress(Console(quiet=True)) as bars:
        done, by_name = compare(training, test, list(frames[8:]), 1, 5, bars)
    assert [one.name for one in done] == ["DP", "HI", "MLP", "XTI", "TI", "WTI", "WTI + CDCR"]
    towers, models = seen[0][0], seen[1:]
    assert towers.config.interaction == "dp"
    configs = [model.config for model, *_ in models]
    assert [config.interaction for config in configs] == ["dp", "hi", "mlp", "xti", "ti", "wti", "wti"]
    assert [config.cdcr for config in configs] == [0] * 6 + [3]
    assert {config.temporal for config in configs} == {None}
    for _, at_first, given, by, steps in models:
        assert all(torch.equal(at_first[name], x) for name, x in towers.clip.state_dict().items())
        assert given is training
        assert steps == 1
        assert (by.seed, {name: getattr(by, name) for name in RECIPE}) == (5, RECIPE)
    assert all(one.sim.shape == (8, 8) for one in done)
    assert list(by_name) == [one.name for one in done]
    assert by_name["WTI + CDCR"] is seen[-1][0]


def test_every_row_is_drawn(tmp_path: Path) -> None:
    assert [path.name for path in draw(rows(), 64, tmp_path)] == ["loss.png", "recall.png"]
    assert {path.name for path in tmp_path.iterdir()} == {"loss.png", "recall.png"}
