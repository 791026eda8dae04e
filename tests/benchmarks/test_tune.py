"""Tuning without a GPU: the choice of a tile, and JSON entries of kernels/tuning.py's tables."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from drl_fast.kernels import tuning
from drl_fast.kernels.tuning import Tile

import harness
import tune

SLOW, EVEN, UNEVEN = (Tile(size, 64, 64, 8, 2, False) for size in (64, 128, 256))


def test_the_best_tile_is_chosen_over_all_shapes() -> None:
    times = {SLOW: [3.0, 3.0], EVEN: [1.1, 1.1], UNEVEN: [1.0, 2.0]}
    assert tune.best(times) == EVEN
    assert tune.best({SLOW: [3.0, 3.0], UNEVEN: [1.0, 2.0]}) == UNEVEN


def test_without_a_gpu_it_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["tune.py"])
    with pytest.raises(SystemExit, match="tune needs a CUDA device"):
        tune.main()


def test_rows_are_entries_of_the_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(table: dict[str, Tile], kind: str, side: str | None, candidates: list[Tile]) -> dict[Tile, list[float]]:
        assert table[kind] in candidates, "the present entry must be a candidate"
        return {tile: [1e-3 * (1 + i)] for i, tile in enumerate(reversed(candidates))}

    machine: dict[str, Any] = {"slug": "some-gpu", "cpu": "some cpu", "gpu": "Some GPU"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(tuning, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(harness, "machine", lambda device, threads: machine)
    monkeypatch.setattr(tune, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["tune.py", "--quick", "--out", str(tmp_path)])
    tune.main()
    assert "expected duration" in capsys.readouterr().out.splitlines()[0]
    rows = harness.load(tmp_path / "some-gpu" / "tuning_quick.json")["tiles"]
    places = [("forward", kind) for kind in tuning.FORWARD["sm_90"]]
    places += [(side, kind) for side in tuning.SIDES for kind in tuning.BACKWARD["sm_90"][side]]
    assert [(row["kernel"], row["kind"]) for row in rows] == places
    for row in rows:
        tile = Tile(**row["tile"])
        assert (row["arch"], tile.source, row["ms"]) == ("sm_90", "measured on Some GPU", [1.0])
        assert tile.m in (64, 128, 256)
