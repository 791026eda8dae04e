"""DRL over several ranks: the loss of the whole batch; the mean gradient over ranks is a single process's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import drl_fast

from ..engine.runs import tower
from .ranks import on_ranks

ROWS = (3, 0, 2)
CASES = {
    "dp": {"interaction": "dp", "cdcr": 1, "cdcr_alpha_off": 0.1},
    "hi": {"interaction": "hi"},
    "mlp": {"interaction": "mlp", "cdcr": 1},
    "xti": {"interaction": "xti"},
    "ti": {"interaction": "ti", "cdcr": 2},
    "mean_maxsim": {"interaction": "mean_maxsim", "loss": "sigmoid"},
    "wti, sigmoid": {"interaction": "wti", "loss": "sigmoid"},
    "wti": {"interaction": "wti", "cdcr": 3, "cdcr_alpha_off": 0.1},
}


def model_and_tokens(case: dict[str, Any]) -> tuple[drl_fast.DRL, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = drl_fast.DRL(tower(), temporal=None, **case).double().eval()
    count = sum(ROWS)
    tokens = {
        "text": torch.randn(count, 6, 32, dtype=torch.float64),
        "video": torch.randn(count, 4, 32, dtype=torch.float64),
        "text_mask": torch.rand(count, 6) < 0.7,
        "video_mask": torch.rand(count, 4) < 0.7,
        "owner": torch.tensor([0, 1, 0, 2, 2]),
    }
    tokens["text_mask"][:, 0] = tokens["video_mask"][:, 0] = True
    return model, tokens


def gradients(model: drl_fast.DRL, tokens: dict[str, Tensor], group: object = None) -> dict[str, Tensor]:
    """Compute the loss and the gradients of tokens, the interaction's parameters and the temperature."""
    tokens = {name: x.requires_grad_() if x.is_floating_point() else x for name, x in tokens.items()}
    losses = model.losses(**tokens, process_group=group)  # type: ignore[arg-type]
    losses["total"].backward()
    found = {name: x.grad for name, x in tokens.items() if x.requires_grad}
    wanted = [(name, p) for name, p in model.named_parameters() if not name.startswith("clip.") or "scale" in name]
    found |= {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in wanted}
    return {**{name: loss.detach() for name, loss in losses.items()}, **found}  # type: ignore[dict-item]


def _every_case(rank: int, size: int) -> dict[str, dict[str, Tensor]]:
    found = {}
    start = sum(ROWS[:rank])
    for name, case in CASES.items():
        model, tokens = model_and_tokens(case)
        own = {key: x[start : start + ROWS[rank]].clone() for key, x in tokens.items()}
        found[name] = gradients(model, own, torch.distributed.group.WORLD)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    return on_ranks(len(ROWS), _every_case, tmp_path_factory.mktemp("ranks"))


@pytest.mark.xdist_group("ranks of DRL")
@pytest.mark.parametrize("name", CASES)
def test_the_mean_over_ranks_equals_one_process(name: str, ranks: list[dict[str, dict[str, Tensor]]]) -> None:
    whole = gradients(*model_and_tokens(CASES[name]))
    shares = [rank[name] for rank in ranks]
    for key, expected in whole.items():
        values = [share[key] for share in shares]
        if key in ("text", "video"):
            # DDP would divide these by the number of ranks.
            found = torch.cat(values) / len(ROWS)
        elif key in ("total", "info_nce", "cdcr"):
            assert all(torch.equal(value, values[0]) for value in values)
            found = values[0]
        else:
            found = torch.stack(values).mean(dim=0)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11, msg=lambda text, key=key: f"{key}: {text}")


def test_captions_of_one_owner_are_not_negatives(tmp_path: Path) -> None:
    """The loss equals that of logits in which pairs of one owner are -inf."""
    model, tokens = model_and_tokens(CASES["dp"])
    logits = model.similarity(*(tokens[name] for name in ("text", "video", "text_mask", "video_mask")))
    siblings = (tokens["owner"][:, None] == tokens["owner"]).fill_diagonal_(False)
    scaled = (logits * model.logit_scale).masked_fill(siblings, -torch.inf)
    expected = -(scaled.log_softmax(0).diagonal() + scaled.log_softmax(1).diagonal()).mean() / 2
    torch.testing.assert_close(model.losses(**tokens)["info_nce"], expected)
    assert torch.isfinite(torch.autograd.grad(model.losses(**tokens)["info_nce"], model.clip.logit_scale)[0])
