"""One process or many: what torchrun started, and the few words that the processes exchange."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Rank 0 alone writes checkpoints, the others wait for it: longer than NCCL's own ten minutes.
TIMEOUT = timedelta(minutes=60)
# What gloo and NCCL say when the other end is gone.
GONE = ("closed by peer", "Connection reset", "remote process exited")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Processes:
    """This process among those that torchrun started; alone without it."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU
    group: ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """This process's share of ``count`` rows: contiguous, and of sizes that differ by one at most."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def any(self, flag: bool) -> bool:
        """Whether any process has the flag up; all get the same answer."""
        if self.group is None:
            return flag
        value = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self.group)
        return bool(value)


@contextlib.contextmanager
def processes() -> Iterator[Processes]:
    """Join the processes that torchrun started, if it did; CUDA where there is one, a GPU a process.

    Raises:
        ValueError: more processes on this machine than GPUs.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield Processes(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        return
    device, backend = CPU, "gloo"
    if torch.cuda.is_available():
        local, here = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= here:
            raise ValueError(f"nproc-per-node must be at most {here}, this machine's GPUs, got {local + 1} or more")
        device, backend = torch.device("cuda", local), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=TIMEOUT)
    group = dist.group.WORLD
    assert group is not None
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), device, group)
    except BaseException as error:
        # Not destroyed: that waits for what the others will never send, and nobody would read the error meanwhile.
        with contextlib.suppress(Exception):
            group.abort()
        if isinstance(error, RuntimeError) and any(words in str(error) for words in GONE):
            raise RuntimeError("another process of this run ended; what it said is the reason") from error
        raise
    # What lies in a reference cycle and holds the group would let its threads outlive the interpreter.
    del group
    gc.collect()
    dist.destroy_process_group()
