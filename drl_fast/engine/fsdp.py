"""Replicas of a model over several processes, or shards of one."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from ..model.head import Head
from .processes import Processes

# Numbers per all-reduce: enough to use the bandwidth, few beside a model's parameters.
BUCKET = 1 << 23
METHODS = ("encode", "losses")


def distribute(model: Head, parallel: str, processes: Processes) -> None:
    """Give every process the first one's weights; ``"fsdp"`` then shards them, and the optimizer's state with them.

    The whole model is one shard group: its parameters are gathered once per pass. Sharding block by block would gather
    inside the towers. These run a different number of times on every process (captions are grouped by length, a batch
    may lack unreadable videos), so the processes would wait for each other forever.
    """
    if processes.group is None:
        return
    for tensor in chain(model.parameters(), model.buffers()):
        dist.broadcast(tensor.data, 0, group=processes.group)
    if parallel == "fsdp":
        mesh = init_device_mesh(processes.device.type, (processes.size,))
        # A scalar cannot be sharded; average_gradients serves it.
        scalars = {p for p in model.parameters() if p.ndim == 0}
        fully_shard(model, mesh=mesh, reshard_after_forward=False, ignored_params=scalars)
        for method in METHODS:
            register_fsdp_forward_method(model, method)


def reduce_after(model: nn.Module, last: bool) -> None:
    """Make a sharded model reduce gradients over processes only in the ``last`` backward pass of a step."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)


def average_gradients(model: nn.Module, processes: Processes) -> None:
    """Replace gradients by their mean over processes, where the sharded model has not done so.

    DistributedDataParallel does not fit: it reduces after its own ``forward``, and a step here is three passes through
    different methods. Parameters without a gradient count as zero, so that all processes send equally much.
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
    """Scale all gradients to a norm of at most ``limit``; return the norm before."""
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
