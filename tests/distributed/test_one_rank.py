"""A group of one process, as in `torchrun --nproc-per-node 1`: the same numbers as without a group."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from drl_fast import cdcr_loss, token_contrastive_loss
from drl_fast.distributed import exchange


def contrastive(text: Tensor, video: Tensor, group: object) -> Tensor:
    return token_contrastive_loss(text, video, logit_scale=9.0, process_group=group)


def decorrelation(text: Tensor, video: Tensor, group: object) -> Tensor:
    return cdcr_loss(text, video, alpha_on=0.1, alpha_off=0.1, process_group=group)


@pytest.mark.parametrize("loss", [contrastive, decorrelation])
def test_one_rank(loss: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "GATHER_BYTES", 0)  # several ranks would use the ring
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        found = []
        for group in (None, dist.group.WORLD):
            text, video = (torch.randn(6, n, 8, generator=torch.Generator().manual_seed(n)) for n in (4, 3))
            value = loss(text.requires_grad_(), video, group)
            found.append((value.detach(), *torch.autograd.grad(value, text)))
    finally:
        dist.destroy_process_group()
    for alone, of_one in zip(*found, strict=True):
        torch.testing.assert_close(alone, of_one)
