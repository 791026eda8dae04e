"""CDCR over ranks has a single process's value and gradients; an error on one rank raises on all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from drl_fast import functional
from tests.distributed.ranks import error_of, on_ranks

DIM, WORDS, FRAMES = 9, 6, 4
ROWS = {2: [5, 9], 3: [4, 0, 7], 4: [3, 6, 1, 5]}
FORMS = {"diagonal": {"alpha_on": 0.11, "alpha_off": 0.0}, "full": {"alpha_on": 0.11, "alpha_off": 0.06}}
LEAVES = ("text", "video", "text_weight", "video_weight")


def batch() -> dict[str, Tensor]:
    """Draw more pairs than any group has; each rank takes its own rows."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "text": (16, WORDS, DIM),
        "video": (16, FRAMES, DIM),
        "text_weight": (16, WORDS),
        "video_weight": (16, FRAMES),
    }
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    masks = {
        f"{side}_mask": torch.rand(tensors[side].shape[:2], generator=generator) < 0.7 for side in ("text", "video")
    }
    masks["video_mask"][2] = False
    return {**tensors, **masks}


def step(tensors: dict[str, Tensor], rows: slice, form: str, weighted: bool, group: Any = None) -> dict[str, Tensor]:
    given = {name: x[rows].clone() for name, x in tensors.items() if weighted or not name.endswith("weight")}
    leaves = {name: given[name].requires_grad_() for name in LEAVES if name in given}
    loss = functional.cdcr_loss(**given, **FORMS[form], process_group=group)
    loss.backward()
    return {"loss": loss.detach(), **{name: x.grad for name, x in leaves.items()}}


def rows_step(tensors: dict[str, Tensor], rows: slice, form: str, group: Any = None) -> dict[str, Tensor]:
    x, y = (tensors[side][rows, 0].clone().requires_grad_() for side in ("text", "video"))
    loss = functional.cross_correlation_loss(x, y, **FORMS[form], process_group=group)
    loss.backward()
    return {"loss": loss.detach(), "x": x.grad, "y": y.grad}


def all_forms(tensors: dict[str, Tensor], rows: slice, group: Any = None) -> dict[str, dict[str, Tensor]]:
    return {
        **{f"{form} {weighted}": step(tensors, rows, form, weighted, group) for form in FORMS for weighted in (0, 1)},
        **{f"{form} rows": rows_step(tensors, rows, form, group) for form in FORMS},
    }


def own_rows(rank: int, size: int) -> slice:
    first = sum(ROWS[size][:rank])
    return slice(first, first + ROWS[size][rank])


def one_rank(rank: int, size: int) -> dict[str, Any]:
    tensors = batch()
    found: dict[str, Any] = all_forms(tensors, own_rows(rank, size), dist.group.WORLD)
    own = {name: x[own_rows(rank, size)] for name, x in tensors.items()}

    def fails(**changes: Any) -> str:
        arguments = {**own, **FORMS["full"], **(changes if rank == size - 1 else {})}
        return error_of(lambda: functional.cdcr_loss(**arguments, process_group=dist.group.WORLD))

    found["errors"] = {
        "narrow": fails(text=own["text"][..., :5], video=own["video"][..., :5]),
        "alphas": fails(alpha_off=0.0),
        "bad argument": fails(alpha_on=-1.0),
        "unweighted": fails(text_weight=None, video_weight=None),
        "divisor": error_of(
            lambda: functional.cross_correlation_loss(
                own["text"][:, 0],
                own["video"][:, 0],
                divisor=-1 if rank == 0 else 5,
                **FORMS["full"],
                process_group=dist.group.WORLD,
            )
        ),
        "empty": error_of(
            lambda: functional.cross_correlation_loss(
                torch.zeros(0, 4), torch.zeros(0, 4), alpha_on=1, alpha_off=0, process_group=dist.group.WORLD
            )
        ),
    }
    return found


@pytest.mark.parametrize("size", ROWS)
def test_over_ranks(size: int, tmp_path: Path) -> None:
    answers = on_ranks(size, one_rank, tmp_path)
    wanted = all_forms(batch(), slice(0, sum(ROWS[size])))
    for name, want in wanted.items():
        for rank, answer in enumerate(answers):
            assert torch.equal(answer[name]["loss"], answers[0][name]["loss"]), name
            torch.testing.assert_close(answer[name]["loss"], want["loss"], rtol=1e-5, atol=1e-6)
            for leaf in want.keys() - {"loss"}:
                # DDP takes the mean over ranks, so gradients are the single process's times the number of ranks.
                expected = size * want[leaf][own_rows(rank, size)]
                scale = float(want[leaf].abs().max()) * size
                torch.testing.assert_close(answer[name][leaf], expected, rtol=0, atol=2e-5 * scale)
    for rank, answer in enumerate(answers):
        errors = answer["errors"]
        assert "D must be the same on all ranks" in errors["narrow"]
        assert f"{DIM} on rank" in errors["narrow"]
        assert "alpha_off must be the same on all ranks" in errors["alphas"]
        assert "alpha_on must be finite and >= 0, got -1.0" in errors["bad argument"]
        assert errors["bad argument"].startswith("ValueError" if rank == size - 1 else "RuntimeError: cdcr_loss failed")
        assert "weights must be the same on all ranks" in errors["unweighted"]
        assert "x must hold at least 2 tokens" in errors["empty"]
        assert "divisor must be positive and finite, got -1" in errors["divisor"]
