"""The demo's comparison: one recipe for all rows, intervals over fours, sentences from the numbers, plots."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from drl_fast.cli import _comparison, _plots
from drl_fast.cli._comparison import ROWS, Row, compare, findings, tokenizer
from drl_fast.cli._tables import progress
from drl_fast.engine.in_memory import Pairs, Schedule
from drl_fast.metrics import recall_interval
from drl_fast.model.drl import DRL

pytestmark = pytest.mark.usefixtures("one_thread")
CLIPS = 160


def row(name: str, found: float, swapped: bool = False, seed: int = 0) -> Row:
    """A row that finds this share of the clips, whole fours, and else answers with another four's clip.

    ``swapped``: it answers with the right words in another order instead of what it would find.
    """
    fours = torch.randperm(CLIPS // 4, generator=torch.Generator().manual_seed(seed)) < found * CLIPS / 4
    hits = fours.repeat_interleave(4)
    every = torch.arange(CLIPS)
    right = every ^ 1 if swapped else every
    best = torch.where(hits, right, (every + 8) % CLIPS)
    return Row(name, [4.0, 3.0, 2.0], torch.nn.functional.one_hot(best, CLIPS).float())


def rows(**found: float) -> list[Row]:
    """All rows; 0.5 where nothing is said. Names as in ``ROWS``, CDCR for the last."""
    return [row(name, found.get(name.split()[-1], 0.5), seed=number) for number, name in enumerate(ROWS)]


def text(*of: Row) -> str:
    return "\n".join(findings(list(of)))


def test_interval_is_over_fours() -> None:
    """As wide as that of as many clips as there are fours; whole fours are found or not."""
    some = row("DP", 0.5)
    one_of_four = some.sim[::4, ::4]
    for direction in ("t2v", "v2t"):
        assert some.interval(direction) == recall_interval(one_of_four, direction=direction)
    low, high = recall_interval(some.sim)
    assert some.interval()[1] - some.interval()[0] > 1.5 * (high - low)


def test_interval_of_a_direction() -> None:
    """All captions find their clip and half of the clips do not find their caption."""
    sim = torch.eye(8)
    sim[1, 0], sim[1, 1] = 2.0, 3.0
    lopsided = Row("DP", [1.0], sim)
    assert lopsided.interval() == (100, 100)
    low, high = lopsided.interval("v2t")
    assert low < 100 * 7 / 8 < high


def test_what_can_be_told_apart_is() -> None:
    told = text(*rows(WTI=0.9, CDCR=0.95, TI=0.85))
    assert "Highest R@1, text to video: WTI + CDCR, 95.0." in told
    assert "Its interval overlaps TI and WTI: this run does not order them." in told
    assert "It lies above DP, HI, MLP and XTI." in told
    assert "WTI against DP: +40.0 points; the intervals are apart." in told
    assert "WTI + CDCR against WTI: +5.0 points; the intervals overlap, this run does not order them." in told
    assert "above chance" not in told


def test_the_paper_need_not_be_right() -> None:
    told = text(*rows(DP=0.95, MLP=0.0, WTI=0.3))
    assert "Highest R@1, text to video: DP, 95.0." in told
    assert "Its interval overlaps" not in told
    assert "WTI against DP: -65.0 points; the intervals are apart." in told
    assert "Not above chance by their intervals: MLP." in told


def test_order_is_told_from_words() -> None:
    some = rows()
    some[0] = row("DP", 0.5, swapped=True)
    told = text(*some)
    assert some[0].recall == 0
    assert "DP 0 %, HI 100 %" in told
    some[1] = row("HI", 0.0)
    assert some[1].arranged() is None
    assert "HI 100 %" not in text(*some)


def test_one_recipe_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The towers that DP trained, the same pairs and schedule; each row with its interaction, the last with CDCR."""
    seen: list[tuple[DRL, dict[str, Tensor], Pairs, Schedule]] = []

    def spy(model: DRL, pairs: Pairs, schedule: Schedule, on_step: object) -> list[float]:
        seen.append((model, {name: x.clone() for name, x in model.clip.state_dict().items()}, pairs, schedule))
        with torch.no_grad():  # as if it had learned
            for x in model.clip.parameters():
                x.add_(0.01)
        return [1.0]

    monkeypatch.setattr(_comparison, "train", spy)
    captions = [f"a red cross number {i}" for i in range(16)]
    frames = torch.randint(0, 256, (16, 2, 3, 64, 64), dtype=torch.uint8)
    pairs = Pairs(frames, torch.ones(16, 2, dtype=torch.bool), tokenizer()(captions))
    training, test, schedule = pairs[:8], pairs[8:], Schedule(steps=1, seed=5)
    with progress(Console(quiet=True)) as bars:
        done, last = compare(training, test, schedule, bars)
    assert [one.name for one in done] == ["DP", "HI", "MLP", "XTI", "TI", "WTI", "WTI + CDCR"]
    towers, models = seen[0][0], seen[1:]
    assert towers.config.interaction == "dp"
    configs = [model.config for model, *_ in models]
    assert [config.interaction for config in configs] == ["dp", "hi", "mlp", "xti", "ti", "wti", "wti"]
    assert [config.cdcr for config in configs] == [0] * 6 + [3]
    assert {config.temporal for config in configs} == {None}
    for _, at_first, given, by in models:
        assert all(torch.equal(at_first[name], x) for name, x in towers.clip.state_dict().items())
        assert given is training
        assert by is schedule
    assert all(one.sim.shape == (8, 8) for one in done)
    assert last is seen[-1][0]


def test_plots_are_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = _plots.draw(rows(), 64, tmp_path)
    assert [path.name for path in paths] == ["loss.png", "recall.png"]
    before = [path.read_bytes() for path in paths]

    def breaks_off(self: object, path: Path, **_: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_plots.Figure, "savefig", breaks_off)
    with pytest.raises(OSError, match="No space left"):
        _plots.draw(rows(), 64, tmp_path)
    assert sorted(tmp_path.iterdir()) == paths
    assert [path.read_bytes() for path in paths] == before


def test_plots_say_what_they_show() -> None:
    """Labels, chance, a line and a point for each row."""
    some = rows(WTI=0.9)
    losses, recalls = _plots._losses(some, 64).axes[0], _plots._recalls(some).axes[0]
    assert losses.get_xlabel() == "step"
    assert losses.get_ylabel() == "loss on 64 pairs"
    assert len(losses.get_lines()) == len(ROWS) + 1
    assert "chance" in [note.get_text() for note in losses.texts]
    assert recalls.get_xlabel() == "R@1 in percent"
    assert [label.get_text() for label in recalls.get_yticklabels()] == list(ROWS)
    assert [line.get_label() for line in recalls.get_lines() if line.get_label()[0] != "_"] == ["chance, 0.625 %"]
    t2v, v2t = recalls.containers
    assert t2v.lines[0].get_xdata()[5] == pytest.approx(90)
    assert len(v2t.lines[0].get_xdata()) == len(ROWS)
