"""The byte counts of many GPUs: by hand, against real processes, and the committed plan."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import harness
import scaling
from scaling import WAYS, Work, gradients, held, packed, plan, sent

SMALL = Work(pairs=8, ranks=4, nt=3, nv=2, dim=32, itemsize=4)


def test_terms_by_hand() -> None:
    # 2 pairs per rank: 4 frames of 32 channels in float32, 4 weights, padded to 64 bytes.
    assert packed(SMALL) == 4 * 32 * 4 + 64
    assert gradients(SMALL) == 4 * (4 * 32 + 4)
    p, g, c = 576, 528, 16
    assert sent(SMALL, "gathered") == 3 * p + 6 * c + 3 * g
    assert sent(SMALL, "ring") == 6 * p + 7 * c + 4 * g


def test_a_ring_holds_less_with_more_ranks() -> None:
    works = [Work(1 << 20, ranks) for ranks in (8, 64, 1024)]
    ring, gathered = ([held(work, way) for work in works] for way in ("ring", "gathered"))
    assert ring[0] > 5 * ring[1] > 20 * ring[2]
    assert gathered[2] > 0.8 * gathered[0]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts bytes in /proc")
@pytest.mark.parametrize("kind", [*WAYS, *scaling.CDCR])
def test_predicted_bytes_against_a_real_group(kind: str) -> None:
    """The model leaves out headers and scalars, a few kilobytes."""
    found = scaling.group(Work(64, 2, 16, 8, 128, 4), kind)["sent"]
    assert abs(found["measured"] - found["predicted"]) < 4000, found
    assert found["predicted"] > 10_000


def test_the_committed_plan_is_the_models(tmp_path: Path) -> None:
    harness.save(plan(), tmp_path / "scaling.json")
    assert harness.load(tmp_path / "scaling.json") == harness.load(harness.RESULTS / "static" / "scaling.json")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts bytes in /proc")
def test_a_small_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(scaling, "GROUPS", (Work(6, 2, 4, 2, 8, 4),))
    monkeypatch.setattr(scaling, "CDCR", {})
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--check", "--quick", "--out", str(tmp_path), "--threads", "1"])
    scaling.main()
    (path,) = tmp_path.glob("*/*")
    assert path.name == "scaling_check_quick.json"
    assert [row["kind"] for row in harness.load(path)["groups"]] == list(WAYS)
    shown = capsys.readouterr().out
    assert "expected duration" in shown.splitlines()[0]
    assert "sent, predicted" in shown
