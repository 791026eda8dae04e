"""Memory that changes between the forward and the backward pass, behind autograd's back.

A data loader that reuses NumPy buffers does that, and so does whoever writes to what autograd saved. The backward pass
must read nothing beyond its memory: the cases run in processes of their own, where a segfault is a failed test.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

import drl_fast
from drl_fast import functional, modules
from drl_fast.ops import token_contrastive_loss
from tests.conftest import use
from tests.implementations import IMPLEMENTATIONS

PAIRS, WORDS, FRAMES, CHANNELS = 9, 7, 5, 24
LONG_ROW = 260  # its matches are int16
SCORED_AGAIN = "token_contrastive_loss that keeps nothing"

Inputs = dict[str, Tensor]
Loss = Callable[[Inputs], Tensor]


def masks(words: int, frames: int) -> Inputs:
    """Real tokens first, as many as a row's number says, so that another mask has fewer or more of them."""
    of_text = torch.arange(words) < torch.randint(2, words + 1, (PAIRS, 1))
    return {"text_mask": of_text, "video_mask": torch.arange(frames) < torch.randint(2, frames + 1, (PAIRS, 1))}


def given(words: int = WORDS, frames: int = FRAMES) -> Inputs:
    torch.manual_seed(0)
    return {
        "text": torch.randn(PAIRS, words, CHANNELS),
        "video": torch.randn(PAIRS, frames, CHANNELS),
        "text_weight": torch.rand(PAIRS, words),
        "video_weight": torch.rand(PAIRS, frames),
        **masks(words, frames),
    }


def contrastive(x: Inputs) -> Tensor:
    tensors = [x[name] for name in given()]
    return drl_fast.token_contrastive_loss(*tensors, logit_scale=x["logit_scale"], owner=x["owner"])


def scored_again(x: Inputs) -> Tensor:
    with patch.object(token_contrastive_loss, "KEPT_BYTES", 0):
        return contrastive(x)


def interaction(x: Inputs, **options: object) -> Tensor:
    probe = torch.linspace(-1, 1, PAIRS * PAIRS).view(PAIRS, PAIRS)
    return (drl_fast.token_interaction(**x, **options) * probe).sum()


def one_way(x: Inputs) -> Tensor:
    return interaction({name: value for name, value in x.items() if name != "video_weight"}, bidirectional=False)


def cdcr(x: Inputs, alpha_off: float) -> Tensor:
    return functional.cdcr_loss(**x, alpha_on=0.1, alpha_off=alpha_off)


def layer(x: Inputs, name: str) -> Tensor:
    torch.manual_seed(0)
    sides = (x["text"], x["video"], x["text_mask"], x["video_mask"])
    options = {"chunk": 20} if name in ("xti", "mlp") else {}
    return modules.build_interaction(name, CHANNELS, **options)(*sides).sum()


LOSSES: dict[str, Loss] = {
    "token_interaction": interaction,
    "token_interaction of long rows": partial(interaction, masking="exclude"),
    "token_interaction one way": one_way,
    "token_contrastive_loss": contrastive,
    SCORED_AGAIN: scored_again,
    "cdcr_loss diagonal": partial(cdcr, alpha_off=0.0),
    "cdcr_loss full": partial(cdcr, alpha_off=0.06),
    "wti": partial(layer, name="wti"),
    "hi": partial(layer, name="hi"),
    "xti": partial(layer, name="xti"),
    "mlp": partial(layer, name="mlp"),
    "mean_maxsim": partial(layer, name="mean_maxsim"),
}


def inputs_of(name: str) -> Inputs:
    inputs = given(WORDS, LONG_ROW) if "long" in name else given()
    if "contrastive" in name:
        inputs |= {"logit_scale": torch.tensor(20.0), "owner": torch.arange(PAIRS) // 2}
    return inputs


def contents(x: Tensor) -> list[Tensor]:
    """What may stand in an input's memory by the time of the backward pass."""
    if x.dtype == torch.bool:
        first = torch.zeros_like(x)
        first[:, 0] = True
        return [first, torch.zeros_like(x), torch.ones_like(x), ~x]
    if not x.is_floating_point():
        return [torch.zeros_like(x), torch.full_like(x, torch.iinfo(x.dtype).max)]
    return [torch.randn_like(x), torch.full_like(x, torch.nan), torch.full_like(x, 3e38), torch.zeros_like(x)]


def gradients(loss: Loss, inputs: Inputs, leaves: tuple[str, ...], change: Callable[[Inputs], None]) -> list[Tensor]:
    """Gradients of ``leaves``, with every input in NumPy's memory and ``change`` between forward and backward."""
    shared = {name: torch.from_numpy(np.array(x.numpy())) for name, x in inputs.items()}
    used = {name: x.requires_grad_() if name in leaves else x for name, x in shared.items()}
    value = loss(used)
    change(shared)
    return list(torch.autograd.grad(value, [used[name] for name in leaves], allow_unused=True))


def write(name: str, content: Tensor, inputs: Inputs) -> None:
    """Write through NumPy, which autograd's version counter does not see."""
    inputs[name].detach().numpy()[...] = content.numpy()


def check_copies(name: str) -> None:
    """What needs no gradient and is small is copied: the gradient is that of the values of the forward pass."""
    loss, inputs, leaves = LOSSES[name], inputs_of(name), ("text", "video")
    want = gradients(loss, inputs, leaves, lambda _: None)
    assert all(x.isfinite().all() for x in want)
    assert all(x.any() for x in want)
    for changed in inputs:
        for content in contents(inputs[changed]) if changed not in leaves else ():
            print(name, changed, content.flatten()[:3].tolist(), flush=True)
            found = gradients(loss, inputs, leaves, partial(write, changed, content))
            assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))


def check_leaves(name: str) -> None:
    """What needs a gradient is not copied: the gradient is that of the new values, and finite if they are."""
    loss, inputs = LOSSES[name], inputs_of(name)
    leaves = tuple(n for n, x in inputs.items() if x.is_floating_point())
    for changed in leaves:
        for content in contents(inputs[changed]):
            print(name, changed, content.flatten()[:3].tolist(), flush=True)
            found = gradients(loss, inputs, leaves, partial(write, changed, content))
            shapes = [inputs[n].shape for n, x in zip(leaves, found, strict=True) if x is not None]
            assert [x.shape for x in found if x is not None] == shapes
            # If the contrastive loss scores again, it compares new logits with the forward's sums.
            tame = content.isfinite().all() and content.abs().max() < 10 and name != SCORED_AGAIN
            assert not tame or all(x.isfinite().all() for x in found if x is not None)


def check_saved(name: str) -> None:
    """Random bytes in place of all that autograd saved: a result or a RuntimeError, and nothing worse."""
    loss, inputs = LOSSES[name], inputs_of(name)
    leaves = tuple(n for n, x in inputs.items() if x.is_floating_point())
    generator = np.random.default_rng(0)
    raised = 0

    def garble(x: Tensor) -> Tensor:
        x = x.detach().clone(memory_format=torch.contiguous_format)
        if x.dim() > 0 and x.numel() > 0:
            of_bytes = x.view(torch.uint8).numpy() if x.dtype != torch.bool else x.numpy().view(np.uint8)
            of_bytes[...] = generator.integers(0, 256, of_bytes.shape, dtype=np.uint8)
        return x

    for attempt in range(10):
        print(name, "attempt", attempt, flush=True)
        used = {n: x.clone().requires_grad_(n in leaves) for n, x in inputs.items()}
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, garble):
            value = loss(used)
            try:
                torch.autograd.grad(value, [used[n] for n in leaves], allow_unused=True)
            except RuntimeError as error:
                message = str(error)
                assert "drl_fast::" in message or "out of bounds" in message, message
                raised += 1
    # C++ says what is wrong with a match or a partner. A loss that scores again saves none.
    assert raised > 0 or name == SCORED_AGAIN or sys.argv[1] != "cpp"


CHECKS = {"copies": check_copies, "leaves": check_leaves, "saved": check_saved}
OPERATORS = [name for name in LOSSES if "_" in name]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("implementation", ["cpp", "chunked"])
def test_changed_memory_is_survived(implementation: str, check: str) -> None:
    """All losses in one process, which prints what it is about to do."""
    with use(implementation):
        pass  # skips, or fails, where it is absent
    names = LOSSES if check == "copies" else OPERATORS
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.ops.test_changed_buffers", implementation, check, *names],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, (done.stdout[-300:], done.stderr[-2000:])


STALE = "a match names a token that is masked or beyond its row"


@pytest.mark.parametrize("frames", [FRAMES, LONG_ROW])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("place", ["beyond the row", "masked"])
def test_a_stale_match_raises(frames: int, which: int, place: str) -> None:
    """The operator itself, which a traced graph calls with the caller's own masks."""
    with use("cpp"):
        inputs = given(WORDS, frames)
        text, video, *others = inputs.values()
        text.requires_grad_()
        video.requires_grad_()
        logits, *matches = torch.ops.drl_fast.token_interaction(text, video, *others, True, True, True)
        if place == "masked":
            inputs[("video_mask", "text_mask")[which]].numpy()[...] = False
        else:
            matches[which].numpy()[...] = (frames, WORDS)[which]
        with pytest.raises(RuntimeError, match=STALE):
            logits.sum().backward()


def test_a_negative_match_is_none() -> None:
    with use("cpp"):
        text, video, *others = given(WORDS, LONG_ROW).values()
        video.requires_grad_()
        logits, by_word, *_ = torch.ops.drl_fast.token_interaction(text, video, *others, True, True, True)
        by_word.numpy()[...] = -7
        (changed,) = torch.autograd.grad(logits.sum(), video)
        others[0].zero_()
        logits, *_ = torch.ops.drl_fast.token_interaction(text, video, *others, True, True, True)
        (want,) = torch.autograd.grad(logits.sum(), video)
        assert torch.equal(changed, want)


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("which", [0, 1])
def test_a_stale_partner_raises(full: bool, which: int) -> None:
    with use("cpp"):
        text, video, *weights, text_mask, video_mask = given().values()
        partners = torch.ops.drl_fast.cdcr_statistics(text, video, text_mask, video_mask, True, True)[:2]
        partners[which].numpy()[3, 1] = (FRAMES, WORDS)[which]
        channels = torch.ones(4, 4, CHANNELS, dtype=torch.float64)
        pull = torch.ones((CHANNELS, CHANNELS) if full else CHANNELS)
        with pytest.raises(RuntimeError, match="a partner lies beyond its row"):
            torch.ops.drl_fast.cdcr_gradient(text, video, *weights, *partners, channels, pull, True)


if __name__ == "__main__":
    torch.set_num_threads(2)
    with IMPLEMENTATIONS[sys.argv[1]].install():
        for loss_name in sys.argv[3:]:
            CHECKS[sys.argv[2]](loss_name)
