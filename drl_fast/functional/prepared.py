"""Videos that are normalised and laid out once and then scored by many calls."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import autocast, validation
from ..numerics import accumulation_dtype, uniform_weight, unit
from ..ops import prepared as op
from ..ops.chunked.prepared import unpack

STORAGE = (torch.float32, torch.float16, torch.bfloat16)


class PreparedVideos:
    """Videos that :func:`prepare` made. :func:`token_interaction` and others accept them in place of ``video``.

    ``len(prepared)`` is the number of videos B. ``prepared[a:b]`` is a view of consecutive videos, which shares memory.
    No gradient reaches the videos. ``torch.save`` works, and of a slice it saves all the videos; ``torch.load`` then
    needs ``weights_only=False``. The C++ kernels of one CPU can score what another CPU prepared if both have vectors of
    the same width; otherwise the call raises.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        storage: torch.dtype,
        normalize: bool,
        mask: Tensor | None,
        weight: Tensor | None,
        *,
        lanes: list[Tensor] | None = None,
        tokens: Tensor | None = None,
        tokens_are_final: bool = False,
    ) -> None:
        self._videos = range(shape[0])
        self._frames, self._dim = shape[1:]
        self._storage = storage
        self._normalize = normalize
        self._mask = mask
        self._weight = weight
        # Either what the C++ kernels read, or tokens (B, Nv, D). Those are as given, to be normalised in every call,
        # unless `tokens_are_final`: normalised, if that is wanted, and rounded.
        self._lanes = lanes
        self._tokens = tokens
        self._tokens_are_final = tokens_are_final

    def __len__(self) -> int:
        return len(self._videos)

    def __getitem__(self, rows: slice) -> PreparedVideos:
        if not isinstance(rows, slice):
            raise TypeError(f"prepared must be indexed by a slice, got {validation.describe(rows)}; use prepared[a:b]")
        videos = self._videos[rows]
        if videos.step != 1:
            raise ValueError(
                f"prepared must be sliced with step 1, got {videos.step}; prepare the videos that you need"
            )
        part = PreparedVideos.__new__(PreparedVideos)
        first = videos.start
        part.__dict__.update(self.__dict__, _videos=range(first, first + len(videos)))
        return part

    def __repr__(self) -> str:
        return (
            f"PreparedVideos(shape={self.shape}, dtype={self.dtype}, device={str(self.device)!r}, "
            f"normalize={self.normalize})"
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, Nv, D)."""
        return len(self), self._frames, self._dim

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that the tokens are stored in."""
        return self._storage

    @property
    def device(self) -> torch.device:
        return self._tensors()[0].device

    @property
    def normalize(self) -> bool:
        """Whether the similarities are those of L2-normalised tokens."""
        return self._normalize

    @property
    def mask(self) -> Tensor | None:
        """(B, Nv) bool, True = real token; None: all real."""
        return None if self._mask is None else self._rows(self._mask)

    @property
    def weight(self) -> Tensor | None:
        """(B, Nv) token weights; None: uniform over real tokens."""
        return None if self._weight is None else self._rows(self._weight)

    @property
    def nbytes(self) -> int:
        """Bytes of memory in use. A slice shares that of the videos it was cut from, and counts all of it."""
        return sum(x.nbytes for x in self._tensors())

    @torch.no_grad()
    def to(self, device: torch.device | str) -> PreparedVideos:
        """Return the videos on a device; they keep their stored values."""
        target = torch.device(device)
        if target.type == self.device.type and target.index in (None, self.device.index):
            return self
        tokens, final = self.rows()
        moved = [None if x is None else x.to(target) for x in (tokens, self.weight, self.mask)]
        assert moved[0] is not None
        return _lay_out(moved[0], moved[1], moved[2], self._normalize, self._storage, final)

    @property
    def lanes(self) -> tuple[list[Tensor], int, int] | None:
        """The lanes, first video and last video + 1 for :mod:`drl_fast.ops.prepared`; None: see :meth:`rows`."""
        return None if self._lanes is None else (self._lanes, self._videos.start, self._videos.stop)

    def rows(self) -> tuple[Tensor, bool]:
        """Return tokens (B, Nv, D), and whether they must not be normalised again."""
        if self._lanes is not None:
            first, last = self._videos.start, self._videos.stop
            return unpack(self._lanes, self._dim, first, last, self._frames).tokens, True
        assert self._tokens is not None
        return self._rows(self._tokens), self._tokens_are_final

    def _rows(self, x: Tensor) -> Tensor:
        return x[self._videos.start : self._videos.stop]

    def _tensors(self) -> list[Tensor]:
        held = [*(self._lanes or []), self._tokens, self._weight, self._mask]
        return [x for x in held if x is not None]


@torch.no_grad()
def prepare(
    video: Tensor,
    video_weight: Tensor | None = None,
    video_mask: Tensor | None = None,
    *,
    normalize: bool = True,
    dtype: torch.dtype | None = None,
) -> PreparedVideos:
    """Normalise videos and lay them out, once, to score them many times.

    :func:`token_interaction`, :func:`token_maxsim`, :func:`maxsim` and :func:`topk` accept the result in place of
    ``video``. Beside it leave out ``video_weight`` and ``video_mask``, and pass the same ``normalize``; a mask needs
    ``masking="drl"`` or ``"exclude"``. The text keeps its own dtype, and it and its weights get gradients; the videos
    get none.

    The C++ kernels neither normalise nor lay out prepared videos again. Elsewhere (on a GPU, without the extension, or
    under another :func:`drl_fast.backend`) every call still does. There the result may share the arguments' memory, so
    do not change them in place.

    >>> prepared = drl_fast.prepare(video)  # (6, 12, 512)
    >>> scores, indices = drl_fast.topk(text, prepared, k=3)  # (4, 3) each
    >>> drl_fast.token_interaction(text, prepared[2:4]).shape
    torch.Size([4, 2])

    Args:
        video: (B, Nv, D) frame features, raw; float32, float16, bfloat16 or float64.
        video_weight: (B, Nv) weights, any float dtype, used as given; None: uniform over real tokens.
        video_mask: (B, Nv), non-zero = real token, any dtype, holes allowed; None: all real.
        normalize: L2-normalise tokens, in float32 (float64 for float64).
        dtype: what the tokens are stored in, after they are normalised: float32, float16 or bfloat16; None: as given.
            float32 gives the same bits as unprepared videos. 16 bits halve the memory. float16 rounds every number of a
            normalised token by at most 2^-11 of itself (by 2^-25 if it is below 2^-14), bfloat16 by at most 2^-8 of
            itself, so a similarity moves by about that at most. Scores of 20,000 random videos with D = 512 moved by at
            most 1.4e-5 and 1.0e-4 (benchmarks/bench_prepared.py). Without ``normalize``, float16 must hold the raw
            numbers, at most 65,504.

    Returns:
        :class:`PreparedVideos`. A float64 text needs videos stored in float64, and those need a float64 text.

    Raises:
        ValueError: a wrong rank or size, an unknown ``dtype``, or a mask as in :func:`token_interaction`.
        TypeError: not a tensor, or an unsupported dtype of the features.

    Source: arXiv 2203.07111, section 3.2, as :func:`token_interaction`.
    """
    validation.flag("normalize", normalize)
    video = autocast.cast(validation.tokens("video", video, "B, Nv, D")).detach()
    storage = video.dtype if dtype is None else dtype
    if storage not in STORAGE and storage != video.dtype:
        raise ValueError(
            f"dtype must be None, torch.float32, torch.float16 or torch.bfloat16, got {dtype!r}; None keeps the video's"
        )
    mask = validation.mask("video_mask", video_mask, video, "B, Nv", "video")
    weight = None
    if video_weight is not None:
        weight = validation.weight("video_weight", video_weight, video, "B, Nv", "video").detach()
    return _lay_out(video, weight, mask, normalize, storage, False)


def _lay_out(
    tokens: Tensor, weight: Tensor | None, mask: Tensor | None, normalize: bool, storage: torch.dtype, final: bool
) -> PreparedVideos:
    """Build the layout for the tokens' device; ``final``: they must not be normalised."""
    b, frames, dim = tokens.shape
    sums = accumulation_dtype(storage)
    if normalize and not final and tokens.dtype == torch.float64 != storage:
        # Numbers that float32 does not hold have a norm in float64.
        tokens, final = unit(tokens), True
    lane_weight = uniform_weight(mask, tokens) if weight is None else weight
    lanes = op.prepare_videos(tokens, lane_weight.to(sums), mask, normalize and not final, storage)
    held: dict[str, Any] = {"lanes": lanes}
    if not lanes:
        # Tokens as given have the bits of an unprepared call, unless they must become narrower.
        if torch.promote_types(storage, tokens.dtype) != storage:
            tokens = (unit(tokens) if normalize and not final else tokens).to(storage)
            final = True
        held = {"lanes": None, "tokens": tokens, "tokens_are_final": final}
    weight = None if weight is None else weight.to(sums)
    return PreparedVideos((b, frames, dim), storage, normalize, mask, weight, **held)


class PreparedSides(NamedTuple):
    """Checked arguments, as :class:`drl_fast.validation.Sides`, with prepared videos."""

    text: Tensor
    video: PreparedVideos
    text_mask: Tensor | None


def check_sides(
    text: Tensor,
    video: Tensor | PreparedVideos,
    text_mask: Tensor | None,
    video_mask: Tensor | None,
    names: tuple[str, str] = ("text", "video"),
    *,
    normalize: bool,
    masking: str,
) -> validation.Sides | PreparedSides:
    """Check both sides of an interaction, as :func:`drl_fast.validation.check_sides`; the videos may be prepared.

    Raises:
        ValueError: beside prepared videos, ``video_mask`` or another ``normalize``, a mask with ``masking="none"``,
            another device or D.
        TypeError: beside prepared videos, a text that is float64 where they are not, or the reverse.
    """
    if not isinstance(video, PreparedVideos):
        return validation.check_sides(text, video, text_mask, video_mask, names)
    t, v = names
    text = autocast.cast(validation.tokens(t, text, "A, Nt, D"))
    refuse_beside_prepared(f"{v}_mask", video_mask)
    if normalize != video.normalize:
        raise ValueError(
            f"normalize must be {video.normalize}, as in prepare(), got {normalize}; pass normalize={video.normalize}, "
            f"or prepare the {v} with normalize={normalize}"
        )
    if masking == "none" and video.mask is not None:
        raise ValueError(
            f"masking must be 'drl' or 'exclude' for a prepared {v} that holds a mask, got 'none'; prepare it without "
            f"the mask, with the weights that the mask implies as {v}_weight"
        )
    if text.device != video.device:
        raise ValueError(
            f"{v} must be on {t}'s device {text.device}, got {video.device}; move it with {v}.to({t}.device)"
        )
    if accumulation_dtype(text.dtype) != accumulation_dtype(video.dtype):
        raise TypeError(
            f"{t} and the prepared {v} must both be float64 or neither, got {text.dtype} and {video.dtype}; convert "
            f"{t}, or prepare the {v} again"
        )
    if text.shape[2] != video.shape[2]:
        raise ValueError(
            f"{v} must have D = {text.shape[2]} channels to match {t}, got {video.shape[2]}; project one side to the "
            "other's width"
        )
    return PreparedSides(text, video, validation.mask(f"{t}_mask", text_mask, text, "A, Nt", t))


def refuse_beside_prepared(name: str, value: object) -> None:
    """Raise if ``value`` is given, although prepared videos hold it already."""
    if value is not None:
        raise ValueError(
            f"{name} must be None beside prepared videos, got {validation.describe(value)}; pass it to prepare()"
        )
