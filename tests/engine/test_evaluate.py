"""Encoding in batches."""

from __future__ import annotations

import pytest
import torch

from drl_fast.engine.evaluate import encode_texts, encode_videos
from drl_fast.model.small import small_model

pytestmark = pytest.mark.usefixtures("one_thread")


def test_batches_change_nothing_and_keep_the_order() -> None:
    model, tokenizer = small_model(32, 8, seed=0)
    ids = tokenizer(["dog " * i for i in range(7)])
    frames, mask = torch.randint(0, 256, (7, 3, 3, 32, 32), dtype=torch.uint8), torch.rand(7, 3) < 0.7
    model.train()
    (one, one_mask), (many, many_mask) = encode_texts(model, ids, batch=99), encode_texts(model, ids, batch=2)
    assert not model.training
    assert not one.requires_grad
    torch.testing.assert_close(many, one, rtol=1e-5, atol=1e-5)
    assert torch.equal(many_mask, one_mask)
    videos = encode_videos(model, frames, mask, batch=2)
    assert not videos.requires_grad
    torch.testing.assert_close(videos, encode_videos(model, frames, mask, batch=99), rtol=1e-5, atol=1e-5)
    assert videos.shape == (7, 3, 128)
