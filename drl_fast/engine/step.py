"""The gradients of one step: negatives of the whole batch, towers in chunks.

Contrastive losses do not split into parts of a batch. So tokens come first, chunk by chunk and without a graph; the
loss of all of them gives every token its gradient; then each chunk runs through the towers again, with a graph, and
takes its tokens' gradients back (Gao et al., GradCache, arXiv 2101.06983). What a process holds is one chunk's graph
and all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..model.drl import DRL
from .precision import autocast_for

Losses = dict[str, Tensor]


def add_gradients(
    model: DRL,
    batch: Mapping[str, Tensor],
    *,
    chunks: int = 1,
    precision: str = "fp32",
    group: ProcessGroup | None = None,
    reseed: Callable[[int], object] = lambda part: None,
    before_last: Callable[[], object] = lambda: None,
) -> Losses:
    """Add the gradients of a batch's total loss to the parameters', and return its losses, detached.

    Args:
        batch: as of :meth:`DRL.forward`, on the model's device; over a group this process's rows, none perhaps.
        chunks: parts that the towers take it in.
        precision: ``"bf16"`` or ``"fp32"``.
        group: all its processes' pairs are one batch; the mean of their gradients is the batch's.
        reseed: called with a part's number before the towers run on it, both times, and with -1 before the losses: what
            is drawn at random there (dropout) must be the same twice.
        before_last: called before the backward pass that is the last one.
    """
    context = autocast_for(precision, batch["text_ids"].device.type)
    rows = len(batch["text_ids"])
    if chunks == 1:
        before_last()
        reseed(-1)
        with context():
            losses = model(batch, process_group=group)
        losses["total"].backward()
        return {name: loss.detach() for name, loss in losses.items()}

    def encode(part: int) -> Losses:
        own = slice(rows * part // chunks, rows * (part + 1) // chunks)
        reseed(part)
        with context():
            text, text_mask = model.encode_text(batch["text_ids"][own])
            video = model.encode_video(batch["video"][own], batch["video_mask"][own])
        return {"text": text, "video": video, "text_mask": text_mask}

    with torch.no_grad():
        parts = [encode(part) for part in range(chunks)]
    text, video, text_mask = (torch.cat([part[name] for part in parts]) for name in ("text", "video", "text_mask"))
    leaves = text.requires_grad_(), video.requires_grad_()
    reseed(-1)
    with context():
        losses = model.losses(*leaves, text_mask, batch["video_mask"] != 0, batch.get("owner"), group)
    losses["total"].backward()
    gradients = [x.new_zeros(x.shape) if x.grad is None else x.grad for x in leaves]
    for part in range(chunks):
        if part == chunks - 1:
            before_last()
        own = slice(rows * part // chunks, rows * (part + 1) // chunks)
        found = encode(part)
        torch.autograd.backward([found["text"], found["video"]], [gradient[own] for gradient in gradients])
    return {name: loss.detach() for name, loss in losses.items()}
