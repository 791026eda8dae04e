"""How every rank's videos meet this rank's texts: alone, gathered, or round a ring.

``visit`` calls ``work(source, videos)`` once for the videos of every rank. What it returns, a vector of
``size(rows, frames)`` numbers, goes home to rank ``source``, merged there or on the way with what the others found.

    alone      one visit, nothing is sent
    gathered   one all-gather of packed videos (kept for the next round), one all-to-all of results
               holds all ranks' videos and results
    ring       step k: this rank works on the videos of rank - k, while those of rank - k - 1 arrive; results follow
               their videos and are home after as many steps as there are ranks
               holds two ranks' videos and three ranks' results

A rank's videos travel as bytes: owner, weight, features, mask, one behind the other, and only what there is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .group import Group

# Gathered videos, padded to the largest rank's, may take this much; results take twice to five times as much again.
GATHER_BYTES = 256 << 20
# Every part of a packed rank starts where any dtype may.
ALIGNMENT = 64


class Tokens(NamedTuple):
    """One side: features (rows, N, D), weights (rows, N), mask (rows, N) or None, owner (rows,) or None."""

    features: Tensor
    weight: Tensor
    mask: Tensor | None
    owner: Tensor | None


Work = Callable[[int, Tokens], Tensor]
Merge = Callable[[Tensor, Tensor], Tensor]
Size = Callable[[int, int], int]


class Visits(Protocol):
    """One of the ways above. It holds no tensors that gradients are asked of: they are given with every round."""

    rank: int

    def rows(self, videos: Tokens) -> list[int]:
        """How many pairs each rank has."""

    def visit(self, videos: Tokens, work: Work, merge: Merge, size: Size) -> Tensor:
        """Results for this rank's own videos."""

    def everywhere(self, x: Tensor) -> Tensor:
        """Every rank's (rows, ...) ``x``, in rank order."""

    def add(self, x: Tensor) -> Tensor:
        """The sum of every rank's ``x``."""


class Alone:
    """All pairs are in this process."""

    rank = 0

    def rows(self, videos: Tokens) -> list[int]:
        return [len(videos.features)]

    def visit(self, videos: Tokens, work: Work, merge: Merge, size: Size) -> Tensor:
        return work(0, videos)

    def everywhere(self, x: Tensor) -> Tensor:
        return x

    def add(self, x: Tensor) -> Tensor:
        return x


class Shape(NamedTuple):
    """Of one rank's videos: what unpacks them on another."""

    rows: int
    frames: int
    masked: bool


class _Shared:
    """What both ways over a group have in common."""

    def __init__(self, group: Group, shapes: list[Shape]) -> None:
        self.rank, self._group, self._shapes = group.rank, group, shapes

    def rows(self, videos: Tokens) -> list[int]:
        return [shape.rows for shape in self._shapes]

    def everywhere(self, x: Tensor) -> Tensor:
        return torch.cat(self._group.gather(x, [shape.rows for shape in self._shapes]))

    def add(self, x: Tensor) -> Tensor:
        return self._group.add(x)


def like(own: Tokens, shape: Shape) -> list[tuple[torch.dtype, torch.Size] | None]:
    """Dtype and shape of each part of a rank's videos, in the order in which they are packed."""
    rows, frames, masked = shape
    return [
        None if own.owner is None else (own.owner.dtype, torch.Size((rows,))),
        (own.weight.dtype, torch.Size((rows, frames))),
        (own.features.dtype, torch.Size((rows, frames, own.features.shape[2]))),
        (torch.bool, torch.Size((rows, frames))) if masked else None,
    ]


def packed_bytes(own: Tokens, shape: Shape) -> int:
    return sum(_extent(*part) for part in like(own, shape) if part is not None)


def pack(own: Tokens, shape: Shape) -> Tensor:
    packed = torch.zeros(packed_bytes(own, shape), dtype=torch.uint8, device=own.features.device)
    for part, x in zip(unpack(packed, own, shape), own, strict=True):
        if part is not None and x is not None:
            part.copy_(x)
    return packed


def unpack(packed: Tensor, own: Tokens, shape: Shape) -> Tokens:
    """Views into a rank's packed bytes; ``own`` are videos of the same kind."""
    parts: list[Tensor | None] = []
    start = 0
    for part in like(own, shape):
        if part is None:
            parts.append(None)
            continue
        dtype, size = part
        parts.append(packed[start : start + dtype.itemsize * size.numel()].view(dtype).view(size))
        start += _extent(dtype, size)
    owner, weight, features, mask = parts
    assert features is not None
    assert weight is not None
    return Tokens(features, weight, mask, owner)


def _extent(dtype: torch.dtype, size: torch.Size) -> int:
    return -(-dtype.itemsize * size.numel() // ALIGNMENT) * ALIGNMENT


class Gathered(_Shared):
    """Every rank holds all videos from the forward to the backward."""

    _packed: list[Tensor] | None = None
    _gathered_before = False

    def visit(self, videos: Tokens, work: Work, merge: Merge, size: Size) -> Tensor:
        packed, self._packed = self._packed, None
        if packed is None:
            own = pack(videos, self._shapes[self.rank])
            packed = self._group.gather(own, [packed_bytes(videos, shape) for shape in self._shapes])
            # For the first backward alone: the graph may live on, and be run again, long after it.
            if not self._gathered_before:
                self._packed, self._gathered_before = packed, True
        parts = [
            work(source, unpack(x, videos, shape))
            for source, (x, shape) in enumerate(zip(packed, self._shapes, strict=True))
        ]
        first, *others = self._group.send_home(parts)
        for other in others:
            first = merge(first, other)
        return first


class Ring(_Shared):
    """Two ranks' videos at a time."""

    def visit(self, videos: Tokens, work: Work, merge: Merge, size: Size) -> Tensor:
        group, shapes = self._group, self._shapes
        packed = pack(videos, shapes[group.rank])
        result_arrives: Callable[[], Tensor] | None = None
        for step in range(group.size):
            source = (group.rank - step) % group.size
            following = shapes[source - 1]
            videos_arrive = None
            if step + 1 < group.size:
                videos_arrive = group.pass_on(packed, packed.new_empty(packed_bytes(videos, following)), tag=0)
            result = work(source, unpack(packed, videos, shapes[source]))
            if result_arrives is not None:
                result = merge(result_arrives(), result)
            result_arrives = group.pass_on(result, result.new_empty(size(following.rows, following.frames)), tag=1)
            if videos_arrive is not None:
                packed = videos_arrive()
        assert result_arrives is not None
        return result_arrives()


def over(group: Group, videos: Tokens, shapes: list[Shape]) -> Visits:
    """The way for these sizes; the same on every rank, for every rank knows all of them."""
    if group.size == 1:
        return Alone()
    largest = max(packed_bytes(videos, shape) for shape in shapes)
    return (Gathered if group.size * largest <= GATHER_BYTES else Ring)(group, shapes)
