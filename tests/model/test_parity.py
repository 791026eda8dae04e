"""30 training steps against the losses of a dense model of upstream's form, recorded by record_parity.py."""

from __future__ import annotations

import json

import pytest
import torch

import drl_fast
from tests.model.record_parity import CURVE, batches, digest, initial_state


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.usefixtures("one_thread")
def test_the_loss_curve_is_the_dense_models(dtype: torch.dtype) -> None:
    recorded = json.loads(CURVE.read_text())
    steps, recipe = batches(), recorded["recipe"]
    assert digest(steps) == recorded["batches_sha256"], "this numpy version draws other batches than the recorded ones"
    model = (
        drl_fast.DRL.from_upstream(
            initial_state(),
            cdcr=3,
            cdcr_alpha1=recipe["alpha_on"],
            cdcr_alpha2=recipe["alpha_off"],
            cdcr_lambda=recipe["lambda"],
            cdcr_padding="never",
        )
        .to(dtype)
        .train()
    )
    adam = torch.optim.Adam(model.parameters(), lr=recipe["lr"], betas=recipe["betas"], eps=recipe["eps"])
    assert len(recorded["curve"]) == len(steps) == 30
    for step, (batch, want) in enumerate(zip(steps, recorded["curve"], strict=True)):
        # The dense model reads absent frames; ours must not.
        batch["video"][batch["video_mask"] == 0] = float("nan")
        losses = model({**batch, "video": batch["video"].to(dtype)})
        adam.zero_grad()
        losses["total"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe["clip_norm"])
        adam.step()
        for name, value in want.items():
            assert losses[name].item() == pytest.approx(value, abs=1e-4), (step, name)
    assert recorded["curve"][-1]["info_nce"] < recorded["curve"][0]["info_nce"] / 2, "the model did not learn"
