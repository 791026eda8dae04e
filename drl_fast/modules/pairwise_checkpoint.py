"""Run a network that takes pairs on every text and every video, in bounded memory.

All pairs share one autograd node. torch.utils.checkpoint around each block would keep one graph per block, about 200 kB
for XTI, and their number grows with the number of pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from .. import autocast


def score_pairs(
    layer: nn.Module, score: Callable[..., Tensor], text: Tensor, video: tuple[Tensor, ...], pairs: int, *, random: bool
) -> Tensor:
    """Compute the logits (A, B) of ``score`` in blocks of at most ``pairs`` pairs.

    With more than one block, each block keeps only its logits and runs again in the backward pass, so that memory holds
    the activations of one block at a time.

    Args:
        layer: the module that holds all parameters that ``score`` reads.
        score: ``score(text rows (a, ...), video rows (b, ...), ...) -> (a, b)``, in a dtype no wider than ``text``'s.
        text: (A, ...).
        video: tensors of B rows each.
        random: whether ``score`` draws random numbers; the backward pass then draws the same ones.
    """
    columns = min(max(len(video[0]), 1), pairs)
    rows = max(1, pairs // columns)
    if len(text) <= rows and len(video[0]) <= columns:
        return score(text, *video)
    # torch.compile cannot trace `_Blocks`; use torch's checkpointing there.
    if torch.compiler.is_compiling():
        blocks = list(zip(*(x.split(columns) for x in video), strict=True))
        line = [[checkpoint(score, t, *v, use_reentrant=False) for v in blocks] for t in text.split(rows)]
        return torch.cat([torch.cat(logits, dim=1) for logits in line])
    parameters = dict(layer.named_parameters())
    plan = _Plan(_block(layer, score, list(parameters)), (rows, columns), 1 + len(video), random)
    return _Blocks.apply(plan, text, *video, *parameters.values())


class _Plan(NamedTuple):
    """What the forward and the backward pass share."""

    block: Callable[[list[Tensor], list[Tensor]], Tensor]  # rows of each side, parameters -> (a, b)
    size: tuple[int, int]  # rows and columns of a block
    sides: int  # tensors of text and video; parameters follow
    random: bool

    def slices(self, texts: int, videos: int) -> Iterator[tuple[slice, slice]]:
        rows, columns = self.size
        for a in range(0, texts, rows):
            for b in range(0, videos, columns):
                yield slice(a, a + rows), slice(b, b + columns)


class _Caller(nn.Module):
    """Wrap a method of a layer in a module, because ``functional_call`` only calls modules."""

    def __init__(self, layer: nn.Module, score: Callable[..., Tensor]) -> None:
        super().__init__()
        self.layer = layer
        self.score = score

    def forward(self, *rows: Tensor) -> Tensor:
        return self.score(*rows)


def _block(
    layer: nn.Module, score: Callable[..., Tensor], names: list[str]
) -> Callable[[list[Tensor], list[Tensor]], Tensor]:
    """Return ``score`` as a function of rows and parameters, under the present autocast state.

    In the backward pass autocast is off again, and the module may hold other parameters: ``torch.func.functional_call``
    replaces them during the forward pass only.
    """
    caller, same_autocast = _Caller(layer, score), autocast.same(next(layer.parameters()).device.type)

    def block(rows: list[Tensor], parameters: list[Tensor]) -> Tensor:
        state = {f"layer.{name}": p for name, p in zip(names, parameters, strict=True)}
        with same_autocast():
            return torch.func.functional_call(caller, state, tuple(rows))

    return block


class _Blocks(torch.autograd.Function):
    """Compute the logits in blocks; the backward pass computes each block again and differentiates it."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, *tensors: Tensor) -> Tensor:
        text, *video = tensors[: plan.sides]
        ctx.plan = plan
        ctx.random_state = _random_state(text.device) if plan.random else None
        ctx.save_for_backward(*tensors)
        logits = text.new_empty(len(text), len(video[0]))
        for a, b in plan.slices(*logits.shape):
            logits[a, b] = plan.block([text[a], *(x[b] for x in video)], list(tensors[plan.sides :]))
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        tensors: tuple[Tensor, ...] = ctx.saved_tensors
        needed = [i for i, need in enumerate(ctx.needs_input_grad[1:]) if need]
        # Sum in float32 or better: a parameter's gradient has as many terms as there are blocks.
        sums = {i: torch.zeros_like(tensors[i], dtype=_wide(tensors[i])) for i in needed}
        parameters = [p.detach().requires_grad_(i in sums) for i, p in enumerate(tensors) if i >= plan.sides]
        with _drawing_from(grad.device, ctx.random_state):
            for a, b in plan.slices(*grad.shape):
                at = [a] + [b] * (plan.sides - 1)
                rows = [tensors[i][where].detach().requires_grad_(i in sums) for i, where in enumerate(at)]
                with torch.enable_grad():
                    logits = plan.block(rows, parameters)
                leaves = rows + parameters
                parts = torch.autograd.grad(logits, [leaves[i] for i in needed], grad[a, b].to(logits.dtype))
                for i, part in zip(needed, parts, strict=True):
                    (sums[i][at[i]] if i < plan.sides else sums[i]).add_(part)
        return None, *(sums[i].to(x.dtype) if i in sums else None for i, x in enumerate(tensors))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _random_state(device: torch.device, new: Tensor | None = None) -> Tensor:
    """Return the state of the device's random generator, and set it to ``new`` if given."""
    module = torch if device.type == "cpu" else torch.get_device_module(device)
    which = () if device.type in ("cpu", "mps") else (device,)
    state: Tensor = module.get_rng_state(*which)
    if new is not None:
        module.set_rng_state(new, *which)
    return state


@contextmanager
def _drawing_from(device: torch.device, state: Tensor | None) -> Iterator[None]:
    """Set the random state in a ``with`` block and restore the previous one afterwards; None: do nothing."""
    if state is None:
        yield
        return
    before = _random_state(device, state)
    try:
        yield
    finally:
        _random_state(device, before)
