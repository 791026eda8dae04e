"""Replicas of a model over several processes, or shards of one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from ..model.drl import DRL
from .processes import Processes

# Numbers of one all-reduce: large enough for the wire, small beside a model.
BUCKET = 1 << 23
METHODS = ("encode_text", "encode_video", "losses")


def distribute(model: DRL, parallel: str, processes: Processes) -> None:
    """Give every process the first one's weights; ``"fsdp"`` then shards them, and the optimizer's state with them.

    One shard group for the whole model: its parameters are gathered once a pass. Sharding block by block would gather
    inside the towers, which here run another number of times on every process (captions go by length, a batch may lack
    unreadable videos), and so would wait for ever.
    """
    if processes.group is None:
        return
    for tensor in chain(model.parameters(), model.buffers()):
        dist.broadcast(tensor.data, 0, group=processes.group)
    if parallel == "fsdp":
        mesh = init_device_mesh(processes.device.type, (processes.size,))
        # A scalar cannot be sharded: it is replicated, and averaged below.
        scalars = {p for p in model.parameters() if p.ndim == 0}
        fully_shard(model, mesh=mesh, reshard_after_forward=False, ignored_params=scalars)
        for method in METHODS:
            register_fsdp_forward_method(model, method)


def reduce_after(model: nn.Module, last: bool) -> None:
    """Let a sharded model add up gradients until the ``last`` backward pass of a step, and reduce them there."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)


@contextlib.contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Every process holds all parameters meanwhile: they may then call the model differently often."""
    if isinstance(model, FSDPModule):
        model.unshard()
    try:
        yield
    finally:
        if isinstance(model, FSDPModule):
            model.reshard()


def average_gradients(model: nn.Module, processes: Processes) -> None:
    """Replace gradients by their mean over processes, where the sharded model has not done so.

    Not DistributedDataParallel: its reduction hangs on its own ``forward``, and a step here is three passes through
    different methods. Parameters that got no gradient count as zero, so that all processes send the same.
    """
    if processes.group is None:
        return
    own = [p for p in model.parameters() if p.requires_grad and not isinstance(p, DTensor)]
    for p in own:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    for bucket in _buckets([p.grad for p in own if p.grad is not None]):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        dist.all_reduce(flat, group=processes.group)
        flat /= processes.size
        for gradient, mean in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def clip_gradients(model: nn.Module, limit: float) -> Tensor:
    """Scale all gradients to a norm of at most ``limit``; returns the norm they had."""
    shards = [p.grad for p in model.parameters() if isinstance(p.grad, DTensor)]
    whole = [p.grad for p in model.parameters() if p.grad is not None and not isinstance(p.grad, DTensor)]
    norms = [torch.nn.utils.get_total_norm(part) for part in (shards, whole) if part]
    norm = torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]).norm()
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), limit, norm)
    return norm


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of gradients of one dtype, of ``BUCKET`` numbers or one tensor."""
    run: list[Tensor] = []
    for gradient in gradients:
        if run and (gradient.dtype != run[0].dtype or sum(g.numel() for g in run) + gradient.numel() > BUCKET):
            yield run
            run = []
        run.append(gradient)
    if run:
        yield run
