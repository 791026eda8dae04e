"""Bring every rank's videos to this rank's texts: in place, gathered, or round a ring.

    for source, videos in (visit := exchange.start(own, merge, sizes)):     one step per rank
        visit.give(result)                                                  a vector of sizes[source] numbers
    visit.result()                                                          all ranks' results for this rank's videos

Results return to the rank that owns the videos, and are merged there or on the way.

    one process   One step; nothing is sent.
    gathered      One all-gather of packed videos, which the first backward pass uses again, and one all-to-all of
                  results. A rank holds all ranks' videos and results.
    ring          In step k this rank works on the videos of rank - k while those of rank - k - 1 arrive. Results follow
                  their videos and reach the owner after one step per rank. A rank holds two ranks' videos and four
                  ranks' results.

A rank's videos are sent as bytes: owner (if given), weight, features and mask (if given), one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .group import Group

# Most bytes of videos to gather, each rank's padded to the largest. Results take two to five times as much.
GATHER_BYTES = 256 << 20
# Alignment of packed tensors, in bytes: a multiple of every dtype's size.
ALIGNMENT = 64


class WeightedTokens(NamedTuple):
    """One side: features (rows, N, D), weights (rows, N), mask (rows, N) or None, owner (rows,) or None."""

    features: Tensor
    weight: Tensor
    mask: Tensor | None
    owner: Tensor | None


Merge = Callable[[Tensor, Tensor], Tensor]


class Shape(NamedTuple):
    """The sizes of one rank's videos, which other ranks need to unpack them."""

    rows: int
    frames: int
    masked: bool  # whether the rank has a mask


def like(own: WeightedTokens, shape: Shape) -> list[tuple[torch.dtype, torch.Size] | None]:
    """Return dtype and shape of each part of a rank's videos, in packing order; None if absent."""
    rows, frames, masked = shape
    return [
        None if own.owner is None else (own.owner.dtype, torch.Size((rows,))),
        (own.weight.dtype, torch.Size((rows, frames))),
        (own.features.dtype, torch.Size((rows, frames, own.features.shape[2]))),
        (torch.bool, torch.Size((rows, frames))) if masked else None,
    ]


def packed_bytes(own: WeightedTokens, shape: Shape) -> int:
    """Return the packed size of a rank's videos."""
    return sum(_extent(*part) for part in like(own, shape) if part is not None)


def pack(own: WeightedTokens, shape: Shape) -> Tensor:
    """Copy this rank's videos into one uint8 vector."""
    packed = torch.zeros(packed_bytes(own, shape), dtype=torch.uint8, device=own.features.device)
    for part, x in zip(unpack(packed, own, shape), own, strict=True):
        if part is not None and x is not None:
            part.copy_(x)
    return packed


def unpack(packed: Tensor, own: WeightedTokens, shape: Shape) -> WeightedTokens:
    """Return views into a rank's packed videos; ``own`` (this rank's) gives the dtypes and D."""
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


class Exchange:
    """The exchange of videos over a group, for a forward pass and its backward passes.

    It keeps no tensors that need gradients: every pass receives them as arguments.
    """

    def __init__(self, group: Group | None, shapes: list[Shape], *, gathers: bool = True) -> None:
        self.group, self.shapes, self.gathers = group, shapes, gathers
        self.rank = 0 if group is None else group.rank
        self.rows = [shape.rows for shape in shapes]
        self.kept: list[Tensor] | None = None
        self.gathered_before = False

    def start(self, own: WeightedTokens, merge: Merge, sizes: list[int]) -> Visit:
        """Begin one pass over all ranks' videos.

        Args:
            own: this rank's videos.
            merge: combines two results for the same videos.
            sizes: length of the result for each rank's videos.
        """
        if self.group is None:
            return Visit(own)
        kind = GatheredVisit if self.gathers else RingVisit
        return kind(self, self.group, own, merge, sizes)

    def gather(self, x: Tensor) -> Tensor:
        """Concatenate every rank's (rows, ...) ``x`` in rank order."""
        return x if self.group is None else torch.cat(self.group.gather(x, self.rows))

    def add(self, x: Tensor) -> Tensor:
        """Sum every rank's ``x``."""
        return x if self.group is None else self.group.add(x)

    def packed_videos(self, group: Group, own: WeightedTokens) -> list[Tensor]:
        """Gather all ranks' packed videos, or take those kept from the forward pass."""
        packed, self.kept = self.kept, None
        if packed is None:
            sizes = [packed_bytes(own, shape) for shape in self.shapes]
            packed = group.gather(pack(own, self.shapes[self.rank]), sizes)
            # Keep them for the first backward pass only: a retained graph must not hold them for long.
            if not self.gathered_before:
                self.kept, self.gathered_before = packed, True
        return packed


class Visit:
    """One pass over the videos of a single process; iterating it yields (rank, videos)."""

    def __init__(self, own: WeightedTokens) -> None:
        self.own = own
        self.given: Tensor | None = None

    def __iter__(self) -> Iterator[tuple[int, WeightedTokens]]:
        yield 0, self.own

    def give(self, result: Tensor) -> None:
        """Hand over this rank's result for the videos of the current step."""
        self.given = result

    def take(self) -> Tensor:
        """Take the result of the step that ended."""
        given, self.given = self.given, None
        assert given is not None, "every step must give its result"
        return given

    def result(self) -> Tensor:
        """Return what all ranks found for this rank's own videos, after the last step."""
        return self.take()


class GroupVisit(Visit):
    """Base of the two exchanges over a group."""

    def __init__(self, exchange: Exchange, group: Group, own: WeightedTokens, merge: Merge, sizes: list[int]) -> None:
        super().__init__(own)
        self.exchange, self.group, self.merge, self.sizes = exchange, group, merge, sizes


class GatheredVisit(GroupVisit):
    """Gather all ranks' videos before the first step."""

    def __iter__(self) -> Iterator[tuple[int, WeightedTokens]]:
        parts = []
        packed = self.exchange.packed_videos(self.group, self.own)
        for source, (x, shape) in enumerate(zip(packed, self.exchange.shapes, strict=True)):
            yield source, unpack(x, self.own, shape)
            parts.append(self.take())
        first, *others = self.group.return_to_owners(parts)
        for other in others:
            first = self.merge(first, other)
        self.given = first


class RingVisit(GroupVisit):
    """Pass videos round a ring, holding those of two ranks at a time."""

    def __iter__(self) -> Iterator[tuple[int, WeightedTokens]]:
        group, shapes = self.group, self.exchange.shapes
        packed = pack(self.own, shapes[group.rank])
        result_arrives: Callable[[], Tensor] | None = None
        for step in range(group.size):
            source = (group.rank - step) % group.size
            videos_arrive = None
            if step + 1 < group.size:
                arriving = packed.new_empty(packed_bytes(self.own, shapes[source - 1]))
                videos_arrive = group.send_to_next(packed, arriving, tag=0)
            yield source, unpack(packed, self.own, shapes[source])
            result = self.take()
            if result_arrives is not None:
                result = self.merge(result_arrives(), result)
            result_arrives = group.send_to_next(result, result.new_empty(self.sizes[source - 1]), tag=1)
            if videos_arrive is not None:
                packed = videos_arrive()
        assert result_arrives is not None
        self.given = result_arrives()


def choose_exchange(group: Group | None, videos: WeightedTokens, shapes: list[Shape]) -> Exchange:
    """Gather if all videos fit ``GATHER_BYTES``, else use the ring. Every rank knows all sizes and chooses the same."""
    if group is None or group.size == 1:
        return Exchange(None, shapes)
    largest = max(packed_bytes(videos, shape) for shape in shapes)
    return Exchange(group, shapes, gathers=group.size * largest <= GATHER_BYTES)
