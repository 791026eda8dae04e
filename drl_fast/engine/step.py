"""One step of training: negatives of the whole batch, towers in chunks.

A contrastive loss does not split into parts of a batch. So tokens come first, chunk by chunk and without a graph; the
loss of all of them gives every token its gradient; then each chunk runs through the towers again, with a graph, and
takes its tokens' gradients back (Gao et al., GradCache, arXiv 2101.06983). A process holds one chunk's graph and all
tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from ..model.head import Encoded, Head
from .config import RunConfig
from .fsdp import average_gradients, clip_gradients, reduce_after
from .precision import autocast_for
from .processes import Processes
from .schedule import set_rates

Losses = dict[str, Tensor]


def take_step(
    model: Head,
    optimizer: torch.optim.Optimizer,
    batch: Mapping[str, Tensor],
    config: RunConfig,
    factor: float,
    *,
    processes: Processes | None = None,
    chunks: int = 1,
    reseed: Callable[[int], object] = lambda part: None,
) -> tuple[Losses, Tensor]:
    """Take one step of the optimizer; return its losses and the gradients' norm.

    Args:
        batch, chunks, reseed: as of :func:`add_gradients`.
        config: its precision and ``clip_grad``.
        factor: of the learning rates' peaks, see :func:`drl_fast.engine.schedule.rate`.
        processes: all that train together; None: this one alone.

    Raises:
        FloatingPointError: a loss or a gradient that is NaN or infinite, on all processes. Parameters and optimizer are
            as they were before the step.
    """
    processes = processes or Processes()
    model.train()
    optimizer.zero_grad()
    set_rates(optimizer, factor)
    reduce_after(model, last=False)
    losses = add_gradients(
        model,
        batch,
        chunks=chunks,
        precision=config.precision,
        group=processes.group,
        reseed=reseed,
        before_last=lambda: reduce_after(model, last=True),
    )
    average_gradients(model, processes)
    norm = clip_gradients(model, config.clip_grad)
    _check_finite(model, losses, norm, processes)
    optimizer.step()
    model.limit_logit_scale()
    return losses, norm


def _check_finite(model: Head, losses: Losses, norm: Tensor, processes: Processes) -> None:
    """Raise FloatingPointError on all processes if a loss or the gradients' norm is not finite on any of them."""
    terms = {name: losses[name] for name in ("info_nce", "cdcr", "total")}
    found = next((f"the loss {name} is {float(x)}" for name, x in terms.items() if not math.isfinite(x)), None)
    if not processes.any(found is not None or not math.isfinite(norm)):
        return
    raise FloatingPointError(f"{found or _of_gradients(model)}; the likely cause is {_cause(model, losses)}")


def _of_gradients(model: Head) -> str:
    """Say which gradient is not finite, where this process's losses are."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    first = next((name for name, gradient in gradients.items() if not _is_finite(gradient)), None)
    if first is not None:
        return f"the gradient of {first} is not finite"
    largest = max(gradients, key=lambda name: float(_local(gradients[name]).abs().max()), default="no parameter")
    return f"the norm of all gradients is not finite (the largest is that of {largest})"


def _cause(model: Head, losses: Losses) -> str:
    broken = next((name for name, p in model.named_parameters() if not _is_finite(p.detach())), None)
    if broken is not None:
        return f"weights that were not finite before this step, such as {broken}"
    config, of_cdcr = model.config, math.isfinite(losses["info_nce"]) and not math.isfinite(losses["cdcr"])
    if of_cdcr and config.cdcr in (2, 3) and config.cdcr_padding == "competes":
        return "cdcr_padding='competes', which can divide by zero as the public code does; use 'never'"
    return "a learning rate that is too high, or inputs that are not finite"


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def _is_finite(x: Tensor) -> bool:
    return bool(torch.isfinite(_local(x)).all())


def add_gradients(
    model: Head,
    batch: Mapping[str, Tensor],
    *,
    chunks: int = 1,
    precision: str = "fp32",
    group: ProcessGroup | None = None,
    reseed: Callable[[int], object] = lambda part: None,
    before_last: Callable[[], object] = lambda: None,
) -> Losses:
    """Add the gradients of a batch's total loss to the parameters' gradients; return its losses, detached.

    Args:
        model: a DRL, or a head on stored features.
        batch: as of the model's ``forward``, on its device; over a group this process's rows, possibly none.
        chunks: parts in which the towers take the batch.
        precision: ``"bf16"`` or ``"fp32"``.
        group: all its processes' pairs are one batch; the mean of their gradients is the batch's.
        reseed: called with a part's number before the towers run on it, both times, and with -1 before the losses, so
            that random numbers there (dropout) are the same twice.
        before_last: called before the last backward pass.
    """
    context = autocast_for(precision, batch["video"].device.type)
    if chunks == 1:
        before_last()
        reseed(-1)
        with context():
            losses = model(batch, process_group=group)
        losses["total"].backward()
        return {name: loss.detach() for name, loss in losses.items()}

    def part_of(name: str, part: int) -> slice:
        rows = len(batch[name])
        return slice(rows * part // chunks, rows * (part + 1) // chunks)

    def encode(part: int) -> Encoded:
        # Texts and videos are cut apart: several texts may share a video.
        own = {name: x[part_of(name, part)] for name, x in batch.items() if name not in ("owner", "video_of")}
        reseed(part)
        with context():
            return model.encode(own)

    with torch.no_grad():
        text, video, text_mask, video_mask = (torch.cat(x) for x in zip(*map(encode, range(chunks)), strict=True))
    leaves = text.requires_grad_(model.trains("text")), video.requires_grad_(model.trains("video"))
    reseed(-1)
    with context():
        losses = model.losses(*leaves, text_mask, video_mask, batch.get("owner"), group, video_of=batch.get("video_of"))
    losses["total"].backward()
    names = [text_name(batch), "video"]
    for part in range(chunks):
        if part == chunks - 1:
            before_last()
        sides = [
            (tokens, leaf.new_zeros(tokens.shape) if leaf.grad is None else leaf.grad[part_of(name, part)])
            for tokens, leaf, name in zip(encode(part)[:2], leaves, names, strict=True)
            if tokens.requires_grad
        ]
        if sides:
            torch.autograd.backward([tokens for tokens, _ in sides], [gradient for _, gradient in sides])
    return {name: loss.detach() for name, loss in losses.items()}


def text_name(batch: Mapping[str, Tensor]) -> str:
    """Return the name of a batch's texts: token ids, or tokens."""
    return "text_ids" if "text_ids" in batch else "text"
