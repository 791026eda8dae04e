"""Rows divided over processes: each computes whole chunks, and all of them get all rows, bit for bit as one would."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..distributed.group import Group, Terms


def turns(rows: int, chunk: int, group: Group | None) -> list[slice]:
    """The chunks that this process computes in :func:`fill`, in order."""
    size, rank = (1, 0) if group is None else (group.size, group.rank)
    return [slice(start, min(start + chunk, rows)) for start in range(rank * chunk, rows, size * chunk)]


def fill(
    buffers: Sequence[Tensor],
    chunk: int,
    compute: Callable[[slice], Sequence[Tensor]],
    group: Group | None,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Fill tensors of equally many rows, ``chunk`` rows at a time.

    A chunk's rows depend on its number alone, so how many processes there are changes no bit. The processes meet after
    every chunk: none waits for long, and all of another's rows that one ever holds twice are a chunk's.

    Args:
        buffers: CPU tensors of R rows, no bool; the same shapes on all ranks.
        compute: ``compute(rows)`` gives those rows of each buffer; what it raises reaches all ranks.
        on_progress: called with rows done and R.
    """
    total, size = len(buffers[0]), 1 if group is None else group.size
    mine = turns(total, chunk, group)
    for turn, first in enumerate(range(0, total, size * chunk)):
        rows = mine[turn] if turn < len(mine) else slice(0, 0)
        parts: list[Tensor] = [buffer[:0] for buffer in buffers]
        if group is None:
            parts = list(compute(rows))
            counts = [rows.stop - rows.start]
        else:
            counts, parts = _agree(group, rows, compute, parts)
        for buffer, part in zip(buffers, parts, strict=True):
            part = part.to(buffer.device, buffer.dtype)
            everyone = [part] if group is None else group.gather(part, counts)
            at = first
            for theirs in everyone:
                buffer[at : at + len(theirs)] = theirs
                at += len(theirs)
        if on_progress is not None:
            on_progress(min(first + size * chunk, total), total)


def _agree(
    group: Group, rows: slice, compute: Callable[[slice], Sequence[Tensor]], nothing: list[Tensor]
) -> tuple[list[int], list[Tensor]]:
    """How many rows each rank has, and this rank's; or one rank's error, on all of them."""
    parts = nothing

    def terms() -> Terms:
        nonlocal parts
        if rows.stop > rows.start:
            parts = list(compute(rows))
        return Terms({"rows": rows.stop - rows.start}, {})

    return [sizes["rows"] for sizes in group.agree("evaluate", terms)], parts


def of_all(said: dict[int, str], group: Group | None) -> dict[int, str]:
    """What all ranks say, by number."""
    if group is None:
        return said
    raw = json.dumps(list(said.items())).encode()
    sizes = group.agree("evaluate", lambda: Terms({"bytes": len(raw)}, {}))
    rows = group.gather(torch.tensor(list(raw), dtype=torch.uint8), [size["bytes"] for size in sizes])
    return dict(sorted(item for row in rows for item in json.loads(bytes(row.tolist()))))
