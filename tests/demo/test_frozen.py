"""The demo's part on frozen towers: the tokens are the towers', every seed trains, and the findings fit the numbers."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console

from drl_fast.console import progress
from drl_fast.demo import frozen
from drl_fast.demo.comparison import tokenizer
from drl_fast.demo.frozen import Frozen, findings, train_frozen
from drl_fast.engine.in_memory import Pairs
from drl_fast.model.head import Head
from drl_fast.model.small import small_model

pytestmark = pytest.mark.usefixtures("one_thread")


def test_heads_learn_on_the_towers_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = small_model(64, 16, 0, interaction="dp")
    model.stored_scale.data.fill_(1.5)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    frames = torch.randint(0, 256, (8, 3, 3, 64, 64), dtype=torch.uint8)
    mask = torch.ones(8, 3, dtype=torch.bool)
    mask[3, 2] = False
    pairs = Pairs(frames, mask, tokenizer()([f"clip number {number}" for number in range(8)]))
    tokens = frozen._encode(model, pairs)
    text, text_mask = model.encode_text(pairs.text)
    assert torch.equal(tokens.text, text)
    assert tokens.text_mask is not None
    assert torch.equal(tokens.text_mask, text_mask)
    torch.testing.assert_close(tokens.video, model.encode_video(frames, mask))
    losses: list[list[float]] = []
    train = frozen.train

    def recorded(head: Head, *arguments: object, **options: object) -> list[float]:
        assert head.stored_scale.item() == 1.5
        losses.append(list(train(head, *arguments, **options)))  # type: ignore[arg-type]
        return losses[-1]

    monkeypatch.setattr(frozen, "train", recorded)
    with progress(Console(quiet=True)) as bars:
        found = train_frozen(model, pairs, pairs, 12, 5, bars)
    assert len(losses) == 9
    assert all(values[-1] < values[0] for values in losses)
    assert len({values[0] for values in losses}) == 9  # rows and seeds differ
    assert {name: len(values) for name, values in found.recalls.items()} == {"DP": 3, "TI": 3, "WTI": 3}
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_findings() -> None:
    found = Frozen(1.0, {"DP": [50.0, 51.0], "TI": [60.0, 64.0], "WTI": [62.0, 66.0]}, {})
    shown = "\n".join(findings(found))
    assert "WTI against DP: +13.5 points; the ranges are apart." in shown
    assert "The ranges are of 3 seeds on generated clips. The towers were trained with DP" in shown
    assert "WTI against TI: +2.0 points; the ranges of the seeds overlap, this run does not order them." in shown
    assert "this table does not compare frozen towers with end-to-end training" in shown
