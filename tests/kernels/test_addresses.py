"""Offsets of matches in tensors of more than 2^31 elements, which no test can allocate."""

from __future__ import annotations

import pytest
import torch

from tests.implementations import Implementation

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
kernels = pytest.importorskip("drl_fast.kernels.token_interaction")
match_address = kernels.match_address


@triton.jit
def offsets(texts, out, token, video, tokens, videos, FORM: tl.constexpr):
    i = tl.arange(0, 4)
    text = tl.load(texts + i).to(tl.int64)
    tl.store(out + i, match_address(text, token, video, 0, tokens, videos, FORM))


def test_offsets_of_matches_are_64_bit(impl: Implementation) -> None:
    if impl.name not in ("interpreter", "cuda"):
        pytest.skip("only the Triton kernels compute offsets")
    numbers = [0, 1, 40_000, 2_000_000]
    texts = torch.tensor(numbers, dtype=torch.int32, device=impl.device)
    out = torch.empty(4, dtype=torch.int64, device=impl.device)
    form = kernels.Form(**(dict.fromkeys(kernels.Form._fields, 0) | {"swapped": False}))
    offsets[(1,)](texts, out, 63, 70_000, 64, 100_000, FORM=form)
    assert out.tolist() == [(n * 64 + 63) * 100_000 + 70_000 for n in numbers]
