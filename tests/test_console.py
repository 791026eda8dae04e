"""Progress: bars in a terminal, lines in a file."""

from __future__ import annotations

import io

import pytest

pytest.importorskip("rich")

from rich.console import Console

from drl_fast.console import progress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_file_gets_a_line_every_15_seconds_and_one_at_the_end() -> None:
    file, clock = io.StringIO(), Clock()
    with progress(Console(file=file, width=40), clock) as bars:
        task = bars.add_task("train [red]", total=1000, note="")
        for step in range(1, 1001):
            clock.now += 0.04
            bars.update(task, completed=step, note=f"loss {1000 / step:.1f}")
        other = bars.add_task("evaluate, videos", total=2, note="")
        clock.now += 1
        bars.advance(other)
        bars.advance(other)
        bars.update(other, completed=2)
    lines = file.getvalue().splitlines()
    assert [line.partition(",")[0] for line in lines] == [
        "train [red]: 375 of 1",
        "train [red]: 750 of 1",
        "train [red]: 1",
        "evaluate",
    ]
    assert lines[0].startswith("train [red]: 375 of 1,000, 15 s, 26 s left, loss 2.7")
    assert lines[2] == "train [red]: 1,000 of 1,000, 40 s, loss 1.0"
    assert lines[3] == "evaluate, videos: 2 of 2, 1 s"


def test_a_terminal_gets_bars() -> None:
    file = io.StringIO()
    with progress(Console(file=file, force_terminal=True, width=120)) as bars:
        bars.update(bars.add_task("train", total=2, note=""), completed=2, note="loss 1.0")
    assert "2/2" in file.getvalue()
    assert "loss 1.0" in file.getvalue()


def test_a_quiet_console_stays_quiet() -> None:
    file, clock = io.StringIO(), Clock()
    with progress(Console(file=file, quiet=True), clock) as bars:
        bars.update(bars.add_task("train", total=2, note=""), completed=2)
    assert file.getvalue() == ""
