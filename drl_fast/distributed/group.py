"""Collective operations for losses over a process group: agree on the arguments, then exchange rows.

Nothing here is differentiable: a loss calls it in its own forward and backward pass, on every rank in the same order.
Ranks are numbered from 0 within the group.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

# The header's int64 slots: state, kind of loss, sizes, and hashes of the values that must be the same.
SIZES, SAME = 8, 16
HEADER = 2 + SIZES + SAME
READY, FAILED = 1, 2
# Bytes of a rank's error text, which is sent only after an error.
WORDS = 512


@dataclass
class Agreement:
    """A rank's input to :func:`agree`, and its result."""

    sizes: dict[str, int] = field(default_factory=dict)
    """Numbers that may differ between ranks, under the same names on all; at most 8."""
    same: dict[str, object] = field(default_factory=dict)
    """Values that must be the same on all ranks, compared by ``repr``; at most 16."""
    sizes_by_rank: list[dict[str, int]] = field(default_factory=list)
    """Every rank's ``sizes``, available after the ``with`` block."""


@contextlib.contextmanager
def agree(group: Group | None, kind: str) -> Iterator[Agreement]:
    """Check that all ranks are about to compute the same thing, before any of them starts.

    The ``with`` block checks this rank's arguments and fills in the :class:`Agreement`. An error in it is sent to all
    ranks, so that none waits for a rank that has failed. Without a group nothing is exchanged.

    Args:
        kind: the loss's name, used in messages and to detect a rank that runs another loss.

    Raises:
        Exception: this rank's own error, after it was sent to the others.
        RuntimeError: another rank raised; names the rank and its error.
        ValueError: the ranks differ in a value that must be the same; the message is the same on all ranks.

    If a rank dies, never calls this, or fails afterwards, the others notice it only by the group's timeout: 30 minutes
    for gloo, 10 for NCCL, unless ``init_process_group`` or ``new_group`` got ``timeout=``.
    """
    mine = Agreement()
    try:
        yield mine
    except Exception as error:
        if group is not None:
            group.announce_failure(kind, error)
        raise
    mine.sizes_by_rank = [mine.sizes] if group is None else group.exchange_headers(kind, mine)


class Group:
    """One rank's view of a process group.

    Raises:
        TypeError: not a process group of torch.distributed, or one that this process is not in.
    """

    def __init__(self, process_group: object) -> None:
        if not dist.is_available() or not isinstance(process_group, dist.ProcessGroup):
            outside = dist.is_available() and process_group is dist.GroupMember.NON_GROUP_MEMBER
            found = "a group that this process is not in" if outside else type(process_group).__name__
            raise TypeError(
                f"process_group must be a torch.distributed.ProcessGroup, got {found}; "
                "pass torch.distributed.group.WORLD after init_process_group, or None for a single process"
            )
        self._group = process_group
        self.rank, self.size = dist.get_rank(process_group), dist.get_world_size(process_group)

    def backends(self) -> dict[str, str]:
        """Return the group's backend for each device type, such as {"cpu": "gloo"}."""
        return dict(entry.split(":") for entry in str(dist.get_backend_config(self._group)).split(","))

    def require(self, name: str, x: Tensor) -> None:
        """Raise ValueError if the group has no backend for the device of tensor ``name``."""
        serves = self.backends()
        if x.device.type not in serves:
            known = ", ".join(f"{backend} for {device} tensors" for device, backend in serves.items())
            raise ValueError(
                f"process_group must support {name}'s device {x.device}, got a group of {known}; move the tensors, or "
                "support both devices with init_process_group(backend='cpu:gloo,cuda:nccl')"
            )

    def exchange_headers(self, kind: str, mine: Agreement) -> list[dict[str, int]]:
        """Send this rank's header, compare all of them, and return every rank's sizes; see :func:`agree`."""
        if len(mine.sizes) > SIZES or len(mine.same) > SAME:
            raise ValueError(f"a header holds at most {SIZES} sizes and {SAME} values that must be the same")
        header = [READY, _hash(kind), *mine.sizes.values()]
        header += [0] * (2 + SIZES - len(header)) + [_hash(value) for value in mine.same.values()]
        found = self._all(torch.tensor(header + [0] * (HEADER - len(header))))
        failed = [rank for rank, row in enumerate(found) if row[0] != READY]
        if failed:
            raise RuntimeError(f"{kind} failed on rank {failed[0]}: {self._texts('')[failed[0]]}")
        # Not a dict: a loss may have an option of that name, too.
        compared = [("loss", kind), *((name, _show(value)) for name, value in mine.same.items())]
        for (name, shown), *values in zip(compared, *([row[1], *row[2 + SIZES :]] for row in found), strict=False):
            if len(set(values)) > 1:
                texts = self._texts(shown)
                raise ValueError(f"{kind}: {name} must be the same on all ranks of the group, got {_by_rank(texts)}")
        return [dict(zip(mine.sizes, row[2:], strict=False)) for row in found]

    def announce_failure(self, kind: str, error: Exception) -> None:
        """Send this rank's error to the other ranks, which are waiting in :meth:`exchange_headers`."""
        header = [FAILED, _hash(kind)]
        self._all(torch.tensor(header + [0] * (HEADER - len(header))))
        self._texts(f"{type(error).__name__}: {error}")

    def gather(self, x: Tensor, counts: Sequence[int]) -> list[Tensor]:
        """Gather every rank's ``x`` (counts[rank], ...), in rank order; all other dimensions must be equal.

        Every rank's rows are padded to the largest count, so memory holds size x max(counts) rows.
        """
        longest = max(counts)
        padded = x.new_zeros((longest, *x.shape[1:]))
        padded[: len(x)] = x
        return [row[:count] for row, count in zip(self._all_tensors(padded), counts, strict=True)]

    def add(self, x: Tensor) -> Tensor:
        """Sum all ranks' ``x`` of one shape in rank order: all get the same bits. Memory holds three times ``x``."""
        piece = -(-x.numel() // self.size)
        padded = x.new_zeros(self.size * piece)
        padded[: x.numel()] = x.reshape(-1)
        total, *others = self.return_to_owners(padded.view(self.size, piece).unbind())
        for other in others:
            total = total + other
        return torch.cat(self.gather(total, [piece] * self.size))[: x.numel()].view(x.shape)

    def return_to_owners(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Send part ``j`` (1-dimensional) to rank j; return the parts that this rank receives, in rank order."""
        own = len(parts[self.rank])
        sent = torch.cat(list(parts))
        received = sent.new_empty(self.size * own)
        wire = self._wire(sent)
        arrived = received.to(wire.device)
        dist.all_to_all_single(arrived, wire, [own] * self.size, [len(part) for part in parts], group=self._group)
        return list(arrived.to(sent.device).view(self.size, own).unbind())

    def send_to_next(self, outgoing: Tensor, incoming: Tensor, tag: int) -> Callable[[], Tensor]:
        """Start to send to the next rank and to receive from the previous one; return a function that waits.

        ``incoming`` has the size of what arrives. Empty tensors are not sent. Exchanges that run at the same time need
        different tags.
        """
        sent, arriving = self._wire(outgoing), self._wire(incoming)
        operations = []
        if sent.numel():
            operations.append(self._operation(dist.isend, sent, self.rank + 1, tag))
        if arriving.numel():
            operations.append(self._operation(dist.irecv, arriving, self.rank - 1, tag))
        works = dist.batch_isend_irecv(operations) if operations else []

        def wait() -> Tensor:
            for work in works:
                work.wait()
            # Refer to `sent` so that it stays alive until it was sent.
            return arriving.to(incoming.device) if sent is not None else incoming

        return wait

    def _operation(self, how: Callable, x: Tensor, rank: int, tag: int) -> dist.P2POp:
        peer = dist.get_global_rank(self._group, rank % self.size)
        return dist.P2POp(how, x, peer, group=self._group, tag=tag)

    def _wire(self, x: Tensor) -> Tensor:
        """Copy ``x`` to where the group can send it from: gloo needs the CPU."""
        on_cpu = self.backends().get(x.device.type) == "gloo"
        return (x.cpu() if on_cpu else x).contiguous()

    def _all_tensors(self, x: Tensor) -> list[Tensor]:
        wire = self._wire(x)
        found = list(wire.new_empty((self.size, *wire.shape)).unbind())
        dist.all_gather(found, wire, group=self._group)
        return [row.to(x.device) for row in found]

    def _all(self, x: Tensor) -> list[list[int]]:
        """Gather a vector of every rank as a list of numbers; move it to a device that the group supports."""
        serves = self.backends()
        device = "cpu" if "cpu" in serves else next(iter(serves))
        return [row.tolist() for row in self._all_tensors(x.to(device))]

    def _texts(self, text: str) -> list[str]:
        raw = text.encode()[:WORDS]
        rows = self._all(torch.tensor(list(raw.ljust(WORDS, b"\0")), dtype=torch.uint8))
        return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows]


def _hash(value: object) -> int:
    # Python's hash() of a string differs between processes.
    return zlib.crc32(_show(value).encode())


def _show(value: object) -> str:
    return value if isinstance(value, str) else repr(value)


def _by_rank(texts: list[str]) -> str:
    """Format texts by rank, such as "512 on ranks 0, 2 and 256 on rank 1"."""
    groups: dict[str, list[str]] = {}
    for rank, text in enumerate(texts):
        groups.setdefault(text, []).append(str(rank))
    return " and ".join(f"{text} on rank{'s' * (len(on) > 1)} {', '.join(on)}" for text, on in groups.items())
