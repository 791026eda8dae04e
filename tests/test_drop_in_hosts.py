"""The hosts of docs/drop_in.md that pool in other ways: one training step before and after the diff.

A host gets two small linear layers as its towers. Loss and every parameter after the step must agree.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.test_docs_code import HOSTS, load

DIM, BATCH, WORDS, FRAMES, GROUP = 24, 6, 7, 5, 2
OPTIONS: dict[str, dict[str, int]] = {
    "PyLate": {"dim": DIM},
    "VideoColBERT": {"dim": DIM},
    "DiscoVLA": {},
    "XCLIP": {"dim": DIM, "words": WORDS, "frames": FRAMES},
}
MASKS = {"PyLate": ("text", "video"), "VideoColBERT": ("video",), "DiscoVLA": (), "XCLIP": ()}
# Learned matrices of the host that the change drops.
DROPPED = {"XCLIP": {"host.frame_mat_weight", "host.word_mat_weight"}}


class Model(nn.Module):
    """A host behind towers of one linear layer each."""

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.text_tower, self.video_tower = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.host = host

    def forward(self, text: Tensor, video: Tensor, *masks: Tensor) -> Tensor:
        return self.host(self.text_tower(text), self.video_tower(video), *masks)


def models(name: str, dtype: torch.dtype) -> tuple[Model, Model]:
    """Build a model before and after the diff, with equal weights."""
    before, after = (Model(load(code, name)(**OPTIONS[name])).to(dtype) for code in HOSTS[name])
    missing, unexpected = after.load_state_dict(copy.deepcopy(before.state_dict()), strict=False)
    assert missing == []
    assert set(unexpected) == DROPPED.get(name, set())
    return before, after


def batch(name: str, dtype: torch.dtype) -> list[Tensor]:
    """Draw a host's tokens and masks. PyLate has groups of documents; one of its documents has no real token."""
    rows = (BATCH, GROUP) if name == "PyLate" else (BATCH,)
    drawn = {"text": torch.randn(BATCH, WORDS, DIM, dtype=dtype), "video": torch.randn(*rows, FRAMES, DIM, dtype=dtype)}
    masks = []
    for side in MASKS[name]:
        *rows, tokens, _ = drawn[side].shape
        masks.append((torch.arange(tokens) < torch.randint(1, tokens + 1, (*rows, 1))).to(dtype))
    if name == "PyLate":
        masks[1][0, 1] = 0
    return [*drawn.values(), *masks]


def train(model: Model, optimizer: torch.optim.Optimizer, inputs: list[Tensor]) -> Tensor:
    loss = model(*inputs)
    loss.backward()
    optimizer.step()
    return loss.detach()


# Adam divides a gradient by its own size, so that float32's rounding decides about entries near 0.
STEPS: list[Any] = [
    pytest.param(torch.float32, torch.optim.SGD, 1e-5, id="float32-SGD"),
    pytest.param(torch.float64, torch.optim.AdamW, 1e-10, id="float64-AdamW"),
]


@pytest.mark.parametrize(("dtype", "optimizer", "tolerance"), STEPS)
@pytest.mark.parametrize("name", OPTIONS)
def test_a_training_step(name: str, dtype: torch.dtype, optimizer: type, tolerance: float) -> None:
    before, after = models(name, dtype)
    inputs, start = batch(name, dtype), copy.deepcopy(dict(after.named_parameters()))
    losses = [train(model, optimizer(model.parameters(), lr=1e-2), inputs) for model in (before, after)]
    torch.testing.assert_close(losses[1], losses[0], atol=tolerance, rtol=tolerance)
    trained = dict(before.named_parameters())
    for key, parameter in after.named_parameters():
        torch.testing.assert_close(
            parameter, trained[key], atol=tolerance, rtol=tolerance, msg=lambda text, key=key: f"{key}: {text}"
        )
        moved = float((parameter - start[key]).detach().abs().max())
        assert moved > 10 * tolerance, f"the step moved {key} by {moved}: too little to compare"


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_reach_the_tokens(name: str) -> None:
    gradients = []
    text, video, *masks = batch(name, torch.float64)
    for model in models(name, torch.float64):
        tokens = [x.clone().requires_grad_() for x in (text, video)]
        gradients.append(torch.autograd.grad(model(*tokens, *masks), tokens))
    for ours, theirs in zip(*reversed(gradients), strict=True):
        assert theirs.any()
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)


def test_pylate_without_masks() -> None:
    before, after = models("PyLate", torch.float32)
    queries, documents, *_ = batch("PyLate", torch.float32)
    torch.testing.assert_close(
        after.host.score_metric(queries, documents), before.host.score_metric(queries, documents), atol=1e-5, rtol=1e-5
    )


def test_a_trained_xclip_is_another_model() -> None:
    """The page says that the two dropped matrices matter once they are trained."""
    before, after = models("XCLIP", torch.float32)
    words, frames = (nn.functional.normalize(x, dim=-1) for x in batch("XCLIP", torch.float32))

    def distance() -> float:
        scores = [m.host._attenion_over_fine_grained_sim_matrix(words, frames) for m in (before, after)]
        return float((scores[0] - scores[1]).detach().abs().max())

    assert distance() < 1e-5
    with torch.no_grad():
        before.host.frame_mat_weight.add_(0.1)
    assert distance() > 1e-2
