"""Training in memory: schedule, batches, sampled frames, and equal results from run to run."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import open_clip
import pytest
import torch

from drl_fast.engine.config import RunConfig
from drl_fast.engine.in_memory import Pairs, some_frames, train
from drl_fast.engine.schedule import by_decay, rate
from drl_fast.model.drl import DRL

SIZE = 32
pytestmark = pytest.mark.usefixtures("one_thread")


def problem(name: str, count: int = 12) -> tuple[DRL, Pairs]:
    """Make videos of one colour each with two to five real frames, and captions with the video's number."""
    torch.manual_seed(0)
    model = DRL(open_clip.create_model(name), temporal=None)
    tokenizer = open_clip.get_tokenizer(name)
    generator = torch.Generator().manual_seed(1)
    colours = torch.randint(0, 256, (count, 1, 3, 1, 1), generator=generator, dtype=torch.uint8)
    lengths = torch.randint(2, 6, (count, 1), generator=generator)
    mask = torch.arange(5) < lengths
    frames = colours.expand(count, 5, 3, SIZE, SIZE).clone()
    frames[~mask] = 255
    return model, Pairs(frames, mask, tokenizer([f"colour number {i}" for i in range(count)]))


def recipe(**options: Any) -> RunConfig:
    usual: dict[str, Any] = {"pretrained": None, "temporal": None, "lr": 3e-3, "weight_decay": 0.1, "precision": "fp32"}
    config = {**usual, **options}
    return RunConfig("folder", clip_lr=config["lr"], **config)


def drawn(count: int, steps: int, batch: int, together: int = 1) -> list[torch.Tensor]:
    """Return the rows of each batch. Every pair's caption is its number."""
    pairs = Pairs(torch.zeros(count, 1), torch.ones(count, 1, dtype=torch.bool), torch.arange(count)[:, None])
    return [found["text_ids"][:, 0] for found in pairs.batches(steps, batch, frames=1, together=together)]


def test_rate_warms_up_and_falls() -> None:
    factors = [rate(step, 100) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert factors[10] == 1
    assert factors[55] == pytest.approx(0.5)
    assert all(a > b for a, b in pairwise(factors[10:]))
    assert 0 < factors[-1] < 1e-3
    assert rate(100, 100) == pytest.approx(0)


@pytest.mark.parametrize("steps", [1, 2, 5, 11])
def test_rate_of_a_short_run(steps: int) -> None:
    factors = [rate(step, steps) for step in range(steps)]
    assert factors[0] == 1
    assert all(0 < factor <= 1 for factor in factors)


@pytest.mark.parametrize(("count", "batch"), [(10, 3), (10, 10), (4, 64), (7, 1)])
def test_no_pair_twice_in_a_batch(count: int, batch: int) -> None:
    batches = drawn(count, 25, batch)
    assert len(batches) == 25
    for rows in batches:
        assert len(rows) == len(set(rows.tolist())) == min(batch, count)
        assert set(rows.tolist()) <= set(range(count))
    per_epoch = count // min(batch, count)
    epoch = torch.cat(batches[:per_epoch]).tolist()
    assert len(set(epoch)) == len(epoch), "a pair was drawn twice before all others were drawn once"
    assert set(torch.cat(batches).tolist()) == set(range(count))


def test_rows_that_stay_together() -> None:
    batches = drawn(12, 9, 6, together=3)
    for rows in batches:
        assert len(rows) == len(set(rows.tolist())) == 6
        heads = rows.view(2, 3)[:, :1]
        assert (heads % 3 == 0).all()
        assert torch.equal(rows.view(2, 3), heads + torch.arange(3))
    assert set(torch.cat(batches[:2]).tolist()) == set(range(12))
    assert len({tuple(rows.tolist()) for rows in batches}) > 2


@pytest.mark.parametrize(
    ("count", "batch", "message"), [(10, 8, "pairs.*got 10; take 8"), (12, 7, "batch.*got 7; take 4")]
)
def test_rows_that_cannot_stay_together(tiny_clip: str, count: int, batch: int, message: str) -> None:
    model, pairs = problem(tiny_clip, count)
    with pytest.raises(ValueError, match=message):
        list(train(model, pairs, recipe(batch=batch), 1, together=4))


@pytest.mark.parametrize("limit", [1, 3, 6, 9])
def test_some_frames_are_real_and_in_order(limit: int) -> None:
    mask = torch.rand(40, 6) < 0.6
    numbers = torch.arange(6).expand(40, 6)
    generator = torch.Generator().manual_seed(0)
    seen = [set() for _ in mask]
    for _ in range(30):
        frames, real = some_frames(numbers, mask, limit, generator)
        assert frames.shape == real.shape == (40, min(limit, 6))
        for row, there in enumerate(mask):
            chosen = frames[row][real[row]].tolist()
            assert len(chosen) == min(limit, int(there.sum()))
            assert chosen == sorted(set(chosen))
            assert there[chosen].all()
            seen[row].update(chosen)
    assert all(chosen == set(there.nonzero().flatten().tolist()) for chosen, there in zip(seen, mask, strict=True))


def test_no_weight_decay_on_biases_and_norms(tiny_clip: str) -> None:
    model, _ = problem(tiny_clip)
    decayed, free = by_decay(model.parameters(), 0.3)
    assert decayed["weight_decay"] == 0.3
    assert free["weight_decay"] == 0
    names = {id(p): name for name, p in model.named_parameters()}
    assert {id(p) for p in (*decayed["params"], *free["params"])} == names.keys()
    assert len(decayed["params"]) + len(free["params"]) == len(names)
    held = {names[id(p)] for p in decayed["params"]}
    assert not {name for name in held if name.endswith("bias") or "ln_" in name or name == "clip.logit_scale"}
    assert {"clip.text_projection", "clip.visual.conv1.weight", "interaction.text_weight_fc.0.weight"} <= held


def repaint(pairs: Pairs) -> Pairs:
    """Change the pictures of masked frames."""
    return Pairs(torch.where(pairs.mask[:, :, None, None, None], pairs.video, 0), pairs.mask, pairs.text)


def run(
    name: str, change: Callable[[Pairs], Pairs] | None = None, steps: int = 30, seed: int = 0
) -> tuple[list[float], DRL]:
    model, pairs = problem(name)
    config = recipe(batch=8, seed=seed)
    return list(train(model, change(pairs) if change else pairs, config, steps, frames=2)), model


def test_loss_falls_and_two_runs_are_equal(tiny_clip: str) -> None:
    losses, model = run(tiny_clip)
    assert len(losses) == 30
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    again, same = run(tiny_clip)
    assert losses == again
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    assert run(tiny_clip, steps=3, seed=1)[0] != run(tiny_clip, steps=3)[0]


def test_masked_frames_have_no_effect(tiny_clip: str) -> None:
    assert run(tiny_clip, steps=3)[0] == run(tiny_clip, repaint, steps=3)[0]


def test_every_loss_is_one_step(tiny_clip: str) -> None:
    model, pairs = problem(tiny_clip)
    model.eval()
    taken = train(model, pairs, recipe(batch=4), 3)
    before = model.clip.text_projection.detach().clone()
    assert next(taken) > 0
    assert model.training
    assert not torch.equal(model.clip.text_projection, before)
    assert len(list(taken)) == 2


def test_optimizer_sees_clipped_gradients_and_the_schedule(tiny_clip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def spy(self: torch.optim.AdamW, *args: object) -> object:
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        rates.append(self.param_groups[0]["lr"])
        norms.append(float(torch.stack([g.norm() for g in grads]).norm()))
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    model, pairs = problem(tiny_clip)
    model.clip.logit_scale.data.fill_(4.6)
    list(train(model, pairs, recipe(batch=8, lr=1e-3), 3))
    assert norms == pytest.approx([1, 1, 1], rel=1e-3)
    assert rates == pytest.approx([1e-3 * rate(number, 3) for number in range(3)])
