"""A step in chunks has the whole batch's gradients, with every interaction and CDCR."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import drl_fast
from drl_fast.engine import schedule
from drl_fast.engine.config import RunConfig
from drl_fast.engine.step import add_gradients, take_step
from drl_fast.model import losses

from .runs import tower

pytestmark = pytest.mark.usefixtures("one_thread")
CASES: dict[str, dict[str, Any]] = {
    "dp": {"interaction": "dp", "cdcr": 1, "cdcr_alpha_off": 0.1},
    "hi": {"interaction": "hi"},
    "mlp": {"interaction": "mlp"},
    "xti, with dropout": {"interaction": "xti"},
    "ti": {"interaction": "ti", "cdcr": 2},
    "wti": {"interaction": "wti", "cdcr": 3, "cdcr_alpha_off": 0.1},
    "mean_maxsim": {"interaction": "mean_maxsim", "query_expansion": True, "loss": "sigmoid"},
    "seqLSTM": {"interaction": "wti", "temporal": "seqLSTM"},
    "seqTransf": {"interaction": "ti", "temporal": "seqTransf"},
}
PAIRS = 7


def model_of(case: dict[str, Any]) -> drl_fast.DRL:
    torch.manual_seed(0)
    model = drl_fast.DRL(tower(), **{"temporal": None, **case})
    return model.double().train()


def batch_of(pairs: int = PAIRS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 50, (pairs, 16), generator=generator)
    ids[torch.arange(pairs), torch.arange(pairs) % 9 + 3] = 59
    mask = torch.rand(pairs, 4, generator=generator) < 0.7
    mask[:, 0] = True
    video = torch.rand(pairs, 4, 3, 32, 32, dtype=torch.float64, generator=generator)
    return {"text_ids": ids, "video": video, "video_mask": mask, "owner": torch.arange(pairs) // 2}


def gradients(model: drl_fast.DRL, **options: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    losses = add_gradients(model, batch_of(), reseed=lambda part: torch.manual_seed(part + 10), **options)
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chunks", [2, 3, 7])
def test_chunks_change_no_gradient(name: str, chunks: int) -> None:
    losses, whole = gradients(model_of(CASES[name]))
    again, parts = gradients(model_of(CASES[name]), chunks=chunks)
    torch.testing.assert_close(again, losses)
    assert parts.keys() == whole.keys()
    for key, expected in whole.items():
        torch.testing.assert_close(parts[key], expected, rtol=1e-8, atol=1e-10, msg=lambda t, k=key: f"{k}: {t}")


def test_chunks_are_not_batches_of_their_own() -> None:
    """Negatives come from the whole batch. A single pair has a loss of 0."""
    losses, _ = gradients(model_of({"interaction": "wti"}), chunks=PAIRS)
    batch = batch_of()
    alone = [model_of({"interaction": "wti"})({name: x[i : i + 1] for name, x in batch.items()}) for i in range(PAIRS)]
    assert max(float(loss["info_nce"].detach()) for loss in alone) < 1e-12
    assert float(losses["info_nce"]) > 0.5


def test_gradients_are_added() -> None:
    model = model_of(CASES["wti"])
    _, first = gradients(model, chunks=2)
    first = {name: x.clone() for name, x in first.items()}
    _, second = gradients(model, chunks=2)
    for key, x in second.items():
        torch.testing.assert_close(x, 2 * first[key])


def test_towers_see_a_chunk_at_a_time() -> None:
    model, seen = model_of(CASES["wti"]), []
    model.clip.visual.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    gradients(model, chunks=PAIRS)
    assert len(seen) == 2 * PAIRS
    assert max(seen) <= 4


def test_bf16_is_autocast() -> None:
    """Towers run in bfloat16, losses in float32; gradients have the parameters' dtype."""
    batch = {name: x.float() if x.is_floating_point() else x for name, x in batch_of().items()}
    exact, half = model_of(CASES["wti"]).float(), model_of(CASES["wti"]).float()
    expected = add_gradients(exact, batch)
    for chunks in (1, 3):
        half.zero_grad()
        losses = add_gradients(half, batch, precision="bf16", chunks=chunks)
        assert losses["total"].dtype == torch.float32
        assert losses["total"] != expected["total"]
        torch.testing.assert_close(losses["total"], expected["total"], rtol=0.2, atol=0.2)
        assert {p.grad.dtype for p in half.parameters() if p.grad is not None} == {torch.float32}
    assert not torch.is_autocast_enabled("cpu")


def test_an_empty_batch_has_gradients_of_zero() -> None:
    """A process whose videos are all unreadable needs a gradient for every parameter, as other processes have."""
    model = model_of(CASES["wti"])
    text, mask = model.encode_text(torch.zeros(0, 16, dtype=torch.int64))
    video = model.encode_video(torch.zeros(0, 4, 3, 32, 32, dtype=torch.uint8))
    assert (text.shape, mask.shape, video.shape) == ((0, 16, 32), (0, 16), (0, 4, 32))
    (text.sum() + video.sum()).backward()
    assert float(model.clip.visual.conv1.weight.grad.abs().sum()) == 0
    assert float(model.clip.token_embedding.weight.grad.abs().sum()) == 0


@pytest.mark.parametrize(
    ("spoiled", "words"),
    [
        ("text_projection", "the loss info_nce is nan"),
        ("gradient", "the gradient of clip.visual.proj is not"),
    ],
)
def test_no_step_is_taken_on_a_loss_or_gradient_that_is_not_finite(spoiled: str, words: str) -> None:
    model = model_of(CASES["wti"])
    config = RunConfig("folder", pretrained=None, precision="fp32")
    optimizer = schedule.optimizer(model, config)
    take_step(model, optimizer, batch_of(), config, 1.0)
    if spoiled == "gradient":
        model.clip.visual.proj.register_hook(lambda gradient: gradient / 0)
    else:
        model.clip.text_projection.data[0, 0] = float("nan")
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(FloatingPointError, match=words):
        take_step(model, optimizer, batch_of(), config, 1.0)
    for name, x in model.state_dict().items():
        torch.testing.assert_close(x, before[name], rtol=0, atol=0, equal_nan=True, msg=name)


def test_the_likely_cause_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig("folder", pretrained=None, precision="fp32")
    model = model_of({"interaction": "wti", "cdcr": 3, "cdcr_padding": "competes"})
    optimizer = schedule.optimizer(model, config)
    with monkeypatch.context() as patch:
        patch.setattr(losses, "decorrelation_loss", lambda *_: torch.tensor(torch.nan, requires_grad=True))
        with pytest.raises(FloatingPointError, match=r"the loss cdcr is nan; .*cdcr_padding='competes'.*use 'never'"):
            take_step(model, optimizer, batch_of(), config, 1.0)
    for p in model.parameters():
        p.register_hook(lambda gradient: gradient * 1e200)
    with pytest.raises(FloatingPointError, match=r"the norm of all gradients is not finite \(the largest is that"):
        take_step(model, optimizer, batch_of(), config, 1.0)
    model.interaction.text_weight_fc[0].weight.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=r"weights that were not finite before this step, such as interaction"):
        take_step(model, optimizer, batch_of(), config, 1.0)
