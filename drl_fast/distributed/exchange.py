"""Bring every rank's videos to this rank's texts: in one process, gathered, or round a ring.

``map_videos`` calls ``work(source, videos)`` once for the videos of every rank. The result, a vector of
``size(rows, frames)`` numbers, returns to rank ``source``, which merges the results of all ranks.

    LocalExchange    one call, nothing is sent
    GatherExchange   one all-gather of packed videos (kept for the backward pass), one all-to-all of results
                     holds all ranks' videos and results
    RingExchange     step k: this rank works on the videos of rank - k, while those of rank - k - 1 arrive; results
                     follow their videos, are merged on the way, and arrive after as many steps as there are ranks
                     holds two ranks' videos and three ranks' results

A rank's videos travel as bytes: owner, weight, features, mask, one behind the other; None takes no bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .group import Group

# Limit of the gathered videos, padded to the largest rank's. Results take two to five times as much again.
GATHER_BYTES = 256 << 20
# Bytes; a multiple of every dtype's size.
ALIGNMENT = 64


class WeightedTokens(NamedTuple):
    """One side: features (rows, N, D), weights (rows, N), mask (rows, N) or None, owner (rows,) or None."""

    features: Tensor
    weight: Tensor
    mask: Tensor | None
    owner: Tensor | None


Work = Callable[[int, WeightedTokens], Tensor]
Merge = Callable[[Tensor, Tensor], Tensor]
Size = Callable[[int, int], int]


class Exchange(Protocol):
    """One of the three ways above. It holds no tensors that need gradients: each call passes them."""

    rank: int

    def rows(self, videos: WeightedTokens) -> list[int]:
        """Return how many pairs each rank has."""

    def map_videos(self, videos: WeightedTokens, work: Work, merge: Merge, size: Size) -> Tensor:
        """Return the merged results for this rank's own videos."""

    def gather(self, x: Tensor) -> Tensor:
        """Return every rank's (rows, ...) ``x``, in rank order."""

    def add(self, x: Tensor) -> Tensor:
        """Return the sum of every rank's ``x``."""


class LocalExchange:
    """All pairs are in this process."""

    rank = 0

    def rows(self, videos: WeightedTokens) -> list[int]:
        return [len(videos.features)]

    def map_videos(self, videos: WeightedTokens, work: Work, merge: Merge, size: Size) -> Tensor:
        return work(0, videos)

    def gather(self, x: Tensor) -> Tensor:
        return x

    def add(self, x: Tensor) -> Tensor:
        return x


class Shape(NamedTuple):
    """What another rank needs to unpack one rank's videos."""

    rows: int
    frames: int
    masked: bool


class _GroupExchange:
    """What both ways over a group share."""

    def __init__(self, group: Group, shapes: list[Shape]) -> None:
        self.rank, self._group, self._shapes = group.rank, group, shapes

    def rows(self, videos: WeightedTokens) -> list[int]:
        return [shape.rows for shape in self._shapes]

    def gather(self, x: Tensor) -> Tensor:
        return torch.cat(self._group.gather(x, [shape.rows for shape in self._shapes]))

    def add(self, x: Tensor) -> Tensor:
        return self._group.add(x)


def like(own: WeightedTokens, shape: Shape) -> list[tuple[torch.dtype, torch.Size] | None]:
    """Dtype and shape of each part of a rank's videos, in the order in which they are packed."""
    rows, frames, masked = shape
    return [
        None if own.owner is None else (own.owner.dtype, torch.Size((rows,))),
        (own.weight.dtype, torch.Size((rows, frames))),
        (own.features.dtype, torch.Size((rows, frames, own.features.shape[2]))),
        (torch.bool, torch.Size((rows, frames))) if masked else None,
    ]


def packed_bytes(own: WeightedTokens, shape: Shape) -> int:
    return sum(_extent(*part) for part in like(own, shape) if part is not None)


def pack(own: WeightedTokens, shape: Shape) -> Tensor:
    packed = torch.zeros(packed_bytes(own, shape), dtype=torch.uint8, device=own.features.device)
    for part, x in zip(unpack(packed, own, shape), own, strict=True):
        if part is not None and x is not None:
            part.copy_(x)
    return packed


def unpack(packed: Tensor, own: WeightedTokens, shape: Shape) -> WeightedTokens:
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
    return WeightedTokens(features, weight, mask, owner)


def _extent(dtype: torch.dtype, size: torch.Size) -> int:
    return -(-dtype.itemsize * size.numel() // ALIGNMENT) * ALIGNMENT


class GatherExchange(_GroupExchange):
    """Every rank holds all videos from the forward to the backward."""

    _packed: list[Tensor] | None = None
    _gathered_before = False

    def map_videos(self, videos: WeightedTokens, work: Work, merge: Merge, size: Size) -> Tensor:
        packed, self._packed = self._packed, None
        if packed is None:
            own = pack(videos, self._shapes[self.rank])
            packed = self._group.gather(own, [packed_bytes(videos, shape) for shape in self._shapes])
            # Keep them for the first backward pass only: the graph may live long after it, and run again.
            if not self._gathered_before:
                self._packed, self._gathered_before = packed, True
        parts = [
            work(source, unpack(x, videos, shape))
            for source, (x, shape) in enumerate(zip(packed, self._shapes, strict=True))
        ]
        first, *others = self._group.return_to_owners(parts)
        for other in others:
            first = merge(first, other)
        return first


class RingExchange(_GroupExchange):
    """Two ranks' videos at a time."""

    def map_videos(self, videos: WeightedTokens, work: Work, merge: Merge, size: Size) -> Tensor:
        group, shapes = self._group, self._shapes
        packed = pack(videos, shapes[group.rank])
        result_arrives: Callable[[], Tensor] | None = None
        for step in range(group.size):
            source = (group.rank - step) % group.size
            following = shapes[source - 1]
            videos_arrive = None
            if step + 1 < group.size:
                videos_arrive = group.send_to_next(packed, packed.new_empty(packed_bytes(videos, following)), tag=0)
            result = work(source, unpack(packed, videos, shapes[source]))
            if result_arrives is not None:
                result = merge(result_arrives(), result)
            result_arrives = group.send_to_next(result, result.new_empty(size(following.rows, following.frames)), tag=1)
            if videos_arrive is not None:
                packed = videos_arrive()
        assert result_arrives is not None
        return result_arrives()


def choose_exchange(group: Group | None, videos: WeightedTokens, shapes: list[Shape]) -> Exchange:
    """Choose by size; every rank knows all sizes, so that all choose the same."""
    if group is None or group.size == 1:
        return LocalExchange()
    largest = max(packed_bytes(videos, shape) for shape in shapes)
    return (GatherExchange if group.size * largest <= GATHER_BYTES else RingExchange)(group, shapes)
