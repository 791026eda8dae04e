"""Tiles that are read through tensor descriptors (TMA), as on sm_90 and sm_100."""

from __future__ import annotations

import pytest
import torch

from tests.implementations import Implementation
from tests.oracle import judge, make


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(5, 9, 6, 4), (5, 40, 6, 4), (2, 140, 3, 5)], ids=str)
def test_values(
    impl: Implementation, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    if impl.name != "interpreter":
        pytest.skip("only the interpreter can use both ways")
    from drl_fast.kernels import tuning

    for table in (*tuning.FORWARD["interpreter"].values(), tuning.PRODUCT["interpreter"]):
        for size, tile in table.items():
            monkeypatch.setitem(table, size, tile._replace(tma=True))
    judge(make(shape, 70, dtype, masks=("holes", "empty"), weights=torch.float32), impl.device)
