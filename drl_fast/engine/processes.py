"""One process or many: join what torchrun started, and the little that the processes exchange."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from torch.distributed import ProcessGroup

# Only rank 0 writes checkpoints, and the others wait for it: longer than NCCL's default of ten minutes.
TIMEOUT = timedelta(minutes=60)
# What gloo and NCCL report when the other end is gone.
GONE = ("closed by peer", "Connection reset", "remote process exited")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Processes:
    """This process among those that torchrun started; without torchrun it is the only one."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU
    group: ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """Return this process's share of ``count`` rows: contiguous, and sizes differ by at most one."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def any(self, flag: bool) -> bool:
        """Return whether ``flag`` is set on any process; all get the same answer."""
        if self.group is None:
            return flag
        value = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self.group)
        return bool(value)

    def sum(self, count: int) -> int:
        """Return the sum of all processes' counts; all get the same answer."""
        if self.group is None:
            return count
        value = torch.tensor(count, device=self.device)
        dist.all_reduce(value, group=self.group)
        return int(value)

    def gather(self, values: list[Any]) -> list[Any]:
        """Return the values of all processes, by rank; all get the same answer."""
        if self.group is None:
            return values
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, values, group=self.group)
        return [value for part in found for value in part]

    def acquire(self, lock: FileLock) -> bool:
        """Take a folder's lock on the first process, which makes the folder; return on all whether it was free."""
        free = True
        if self.first:
            Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                free = False
        return not self.any(not free)

    def wait(self) -> None:
        """Return when all processes have called this."""
        self.any(False)


@contextlib.contextmanager
def processes() -> Iterator[Processes]:
    """Join the processes that torchrun started, if it did. Each uses one GPU, or the CPU if there is none.

    Raises:
        ValueError: more processes on this machine than GPUs.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield Processes(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        return
    device, backend = CPU, "gloo"
    if torch.cuda.is_available():
        local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= gpus:
            raise ValueError(f"nproc-per-node must be at most {gpus}, this machine's GPUs, got {local + 1} or more")
        device, backend = torch.device("cuda", local), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=TIMEOUT)
    group = dist.group.WORLD
    assert group is not None
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), device, group)
    except BaseException as error:
        # Abort, not destroy: destroying waits for messages that never come, and would delay this error.
        with contextlib.suppress(Exception):
            group.abort()
        if isinstance(error, RuntimeError) and any(words in str(error) for words in GONE):
            raise RuntimeError("another process of this run ended; its error is the reason") from error
        raise
    # A reference cycle that holds the group would keep its threads alive beyond the interpreter.
    del group
    gc.collect()
    dist.destroy_process_group()
