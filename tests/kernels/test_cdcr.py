"""CDCR's kernels with several blocks of product rows and several parts of a sum, as in large problems."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from drl_fast import functional
from tests.implementations import Implementation
from tests.ops.test_cdcr import FORMS, judge, pairs, rows


@pytest.mark.parametrize("shape", [(40, 5, 3), (40, 3, 5)], ids=str)
def test_blocks_and_parts(impl: Implementation, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int]) -> None:
    """Against the reference with few pairs per block, and with parts of more than one tile."""
    if impl.name not in ("interpreter", "cuda"):
        pytest.skip("only the Triton kernels have these sizes")
    from drl_fast.kernels import cdcr

    problem = pairs(shape, 20, masks="holes", **FORMS["full"])
    monkeypatch.setattr(cdcr, "BLOCK_BYTES", 4 * 2 * 3 * 20 * 17)
    monkeypatch.setattr(cdcr, "MOST_PARTS", 2)
    seen, whole = [], cdcr.product_rows

    def watched(*given: Any) -> Iterator[tuple[Any, ...]]:
        for block, *found in whole(*given):
            seen.append((block.start, block.stop))
            yield block, *found

    monkeypatch.setattr(cdcr, "product_rows", watched)
    judge(problem, impl.device)
    blocks = [(0, 17), (17, 34), (34, 40)]
    # The first call in a process may run the loss more than once.
    assert seen == blocks * max(1, len(seen) // 3)
    judge(rows(300, 20, **FORMS["diagonal"]), impl.device)


def test_equal_bits(impl: Implementation) -> None:
    """Sums do not depend on the order in which programs finish."""
    problem = pairs((12, 9, 6), 40, masks="holes", **FORMS["full"]).map(lambda x: x.to(impl.device))
    first, second = (problem.grads(functional) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(grad, second[1][name]) for name, grad in first[1].items())


def test_ties_and_nan_in_long_rows(impl: Implementation) -> None:
    """The first of equal candidates wins, and the first NaN beats all others, in rows of several tiles."""
    text, video = torch.randn(2, 3, 20), torch.zeros(2, 70, 20)
    real = torch.ones(2, 70, dtype=torch.bool)
    real[:, :2] = False
    video[1, 40] = video[1, 60] = torch.nan
    arguments = [x.to(impl.device) for x in (text, video)]
    statistics = torch.ops.drl_fast.cdcr_statistics(*arguments, None, real.to(impl.device), True, True)
    video_index, text_index = (index.cpu() for index in statistics[:2])
    assert (video_index == torch.tensor([[2], [40]])).all()
    assert (text_index == torch.where(real, 0, -1)).all()


@pytest.mark.parametrize("form", FORMS)
def test_a_partner_beyond_its_row_is_not_read(impl: Implementation, form: str) -> None:
    """Whatever was written to saved partners: a kernel reads no token that is not there."""
    if impl.name not in ("interpreter", "cuda"):
        pytest.skip("the CPU's operators raise instead")
    text, video = torch.randn(6, 5, 20, device=impl.device), torch.randn(6, 4, 20, device=impl.device)
    weights = [torch.rand(x.shape[:2], device=impl.device) for x in (text, video)]
    partners = torch.ops.drl_fast.cdcr_statistics(text, video, None, None, True, True)[:2]
    channels = torch.ones(4, 4, 20, dtype=torch.float64, device=impl.device)
    pull = torch.ones((20, 20) if form == "full" else 20, device=impl.device)
    found = []
    for value in (None, 32767):
        for index in partners if value is not None else ():
            index[3, 1] = value
        arguments = (text, video, *weights, *partners)
        cross, _ = torch.ops.drl_fast.cdcr_correlation(*arguments, channels[:2], True, form == "full")
        assert bool(cross.isfinite().all())
        found.append(torch.ops.drl_fast.cdcr_gradient(*arguments, channels, pull, True))
    others = torch.arange(6) != 3
    for whole, stale in zip(*found, strict=True):
        assert torch.equal(whole[others], stale[others])
        assert bool(stale.isfinite().all())
