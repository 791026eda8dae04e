"""Share the rows of tensors among processes: each computes whole chunks, and all get the bits of one process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..distributed.group import Group, agree


def own_chunks(rows: int, chunk: int, group: Group | None) -> list[slice]:
    """Return the chunks that this process computes, one per turn. All have equally many; the last may be empty."""
    size, rank = (1, 0) if group is None else (group.size, group.rank)
    firsts = range(rank * chunk, -(-rows // (size * chunk)) * size * chunk, size * chunk)
    return [slice(min(first, rows), min(first + chunk, rows)) for first in firsts]


def shard_rows(
    buffers: Sequence[Tensor], chunk: int, group: Group | None, on_progress: Callable[[int, int], None] | None = None
) -> Iterator[slice]:
    """Yield chunks of rows, which the loop's body fills in every buffer; then give them to all processes.

    A chunk's rows depend on its number alone, so the number of processes changes no bit. The processes meet after every
    chunk, so none waits for long, and a process holds one extra chunk per other process.

    Args:
        buffers: CPU tensors of R rows; the same shapes on all ranks.
        on_progress: called with rows done, from 0 on, and R.
    """
    total, size = len(buffers[0]), 1 if group is None else group.size
    if on_progress is not None:
        on_progress(0, total)
    for turn, own in enumerate(own_chunks(total, chunk, group)):
        yield own
        first = turn * size * chunk
        end = min(first + size * chunk, total)
        if group is not None:
            counts = [min(max(total - first - rank * chunk, 0), chunk) for rank in range(size)]
            for buffer in buffers:
                # gloo sends no bool.
                rows = buffer.view(torch.uint8) if buffer.dtype == torch.bool else buffer
                rows[first:end] = torch.cat(group.gather(rows[own], counts))
        if on_progress is not None:
            on_progress(end, total)


def gather_dict(entries: dict[int, str], group: Group | None) -> dict[int, str]:
    """The entries of all ranks, sorted by number."""
    if group is None:
        return entries
    raw = json.dumps(list(entries.items())).encode()
    with agree(group, "evaluate") as agreement:
        agreement.sizes = {"bytes": len(raw)}
    counts = [size["bytes"] for size in agreement.sizes_by_rank]
    rows = group.gather(torch.tensor(list(raw), dtype=torch.uint8), counts)
    return dict(sorted(item for row in rows for item in json.loads(bytes(row.tolist()))))
