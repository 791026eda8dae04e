"""The scaling model's arithmetic by hand, its bytes against those of real collectives, and its committed plan."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import harness, scaling_check
from benchmarks.scaling_model import (
    WAYS,
    Machine,
    Way,
    Work,
    bound,
    flop,
    gradients,
    held,
    hiding_rows,
    most_pairs,
    packed,
    plan,
    seconds,
    sent,
)

SMALL = Work(pairs=8, ranks=4, nt=3, nv=2, dim=32, itemsize=4)
# 1 s a product's FLOP, so that terms can be read off.
ROUND = Machine("round", flops=2.0, share=0.5, memory=1e9, link=100.0, far=10.0, node=8)


def test_terms_by_hand() -> None:
    # 2 pairs a rank: 4 frames of 32 channels in float32, 4 weights, padded to 64
    assert packed(SMALL) == 4 * 32 * 4 + 64
    assert packed(SMALL, masked=True) == 4 * 32 * 4 + 64 + 64
    assert gradients(SMALL) == 4 * (4 * 32 + 4)
    assert flop(SMALL) == 2 * 2 * 8 * 3 * 2 * 32
    p, g, c = 576, 528, 16
    assert sent(SMALL, "gathered") == {"videos": 3 * p, "column_sums": 6 * c, "gradients": 3 * g}
    assert sent(SMALL, "ring") == {"videos": 6 * p, "column_sums": 7 * c, "gradients": 4 * g}
    assert sum(sent(replace(SMALL, ranks=1), "ring").values()) == 0


def test_step_times_by_hand() -> None:
    one, p, g, c = flop(SMALL) / 1.0, 576, 528, 16
    gathered = seconds(SMALL, "gathered", ROUND)
    assert gathered["compute"] == 4 * one
    assert gathered["step"] == pytest.approx(4 * one + 3 * (p + g + 2 * c) / 100)
    # So slow that every hop hides: what is left over is the last result's way home.
    assert seconds(SMALL, "ring", ROUND)["step"] == pytest.approx(4 * one + (g + 4 * c) / 100)
    # So fast that no hop does.
    fast = replace(ROUND, flops=2e9)
    assert seconds(SMALL, "ring", fast)["step"] == pytest.approx((3 * (2 * p + g + c) + g + 4 * c) / 100, rel=1e-3)


def test_hops_hide_from_the_predicted_size_on() -> None:
    machine, ranks = Machine(), 64
    least = hiding_rows(Work(0, ranks), machine)
    for rows, hides in ((1.1 * least, True), (0.9 * least, False)):
        work = Work(round(rows) * ranks, ranks)
        found = seconds(work, "ring", machine)
        exposed = found["step"] / found["compute"] - 1
        assert (exposed < 0.02) == hides, exposed
        assert bound(work, "ring", machine, 1e12) == ("compute" if hides else "network")


@pytest.mark.parametrize("way", WAYS)
def test_most_pairs_fit_and_more_do_not(way: Way) -> None:
    most = most_pairs(Work(0, 8), way, 20e9)
    assert sum(held(Work(most, 8), way).values()) <= 20e9 < sum(held(Work(most + 8, 8), way).values())


def test_a_ring_holds_the_less_the_more_ranks_share() -> None:
    works = [Work(1 << 20, ranks) for ranks in (8, 64, 1024)]
    ring, gathered = ([sum(held(work, way).values()) for work in works] for way in ("ring", "gathered"))
    assert ring[0] > 5 * ring[1] > 20 * ring[2]
    assert gathered[2] > 0.8 * gathered[0]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts bytes in /proc")
@pytest.mark.parametrize("kind", [*WAYS, *scaling_check.CDCR])
def test_predicted_bytes_are_those_that_a_group_sends(kind: str) -> None:
    """Headers and scalars are left out of the model: some kilobytes."""
    found = scaling_check.group(Work(64, 2, 16, 8, 128, 4), kind)["sent"]
    assert abs(found["measured"] - found["predicted"]) < 4000, found
    assert found["predicted"] > 10_000


def test_the_committed_plan_is_the_models(tmp_path: Path) -> None:
    harness.save(plan(Machine()), tmp_path / "scaling.json")
    assert harness.load(tmp_path / "scaling.json") == harness.load(harness.RESULTS / "static" / "scaling.json")
