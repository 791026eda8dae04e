"""Temporal modules: mix the frames of each video before the interaction."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .. import validation
from ..numerics import zero_masked
from .blocks import Transformer, copy_from_clip, start_new
from .wti import head_dtype

HEAD_WIDTH = 64


class SeqTransf(nn.Module):
    """Temporal transformer: positions and blocks of CLIP's text form over the frames, plus the frames themselves.

    ``module(video (B, Nv, D), mask (B, Nv) or None) -> (B, Nv, D)``, in the frames' dtype. Attention is masked, not
    causal, with ``dim // 64`` heads (at least 1). A masked frame is not read and is returned unchanged.

    Args:
        dim: D, the width of the frames.
        layers: number of transformer blocks.
        max_positions: the largest number of frames.

    Raises:
        ValueError: a size below 1, or a ``dim`` that is not a multiple of its heads; in the call, frames of another
            width, more than ``max_positions`` frames, or a mask of another shape.
        TypeError: a size is not an integer; in the call, frames of a wider dtype than the parameters (float64 into
            float32).

    Source: Luo et al., "CLIP4Clip", arXiv 2104.08860, section 3.3, "sequential type"; arXiv 2203.07111, section 4.1.
    """

    def __init__(self, dim: int = 512, layers: int = 4, max_positions: int = 77) -> None:
        super().__init__()
        self.dim = dim = validation.positive_int("dim", dim)
        self.frame_position_embeddings = nn.Embedding(validation.positive_int("max_positions", max_positions), dim)
        self.transformer = Transformer(dim, layers, max(1, dim // HEAD_WIDTH))
        self.apply(start_new)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"

    def init_from_clip(self, positional_embedding: Tensor, blocks: Mapping[str, Tensor]) -> bool:
        """Start as CLIP's text positions and first blocks; see :func:`drl_fast.modules.blocks.copy_from_clip`."""
        return copy_from_clip(self.frame_position_embeddings, self.transformer, positional_embedding, blocks)

    def forward(self, video: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix frames (B, Nv, D) over time; mask (B, Nv), non-zero = real frame. Return the same shape and dtype."""
        mask = check_frames(video, mask, self.dim, type(self).__name__)
        frames, positions = video.shape[1], self.frame_position_embeddings
        if frames > positions.num_embeddings:
            raise ValueError(
                f"video must have at most {positions.num_embeddings} frames, the module's max_positions, got {frames}; "
                "take fewer frames or build it with more positions"
            )
        # A NaN in a masked frame would reach the parameters' gradient as 0 * NaN.
        x = zero_masked(video, mask).to(head_dtype(positions, video, "video"))
        # Attention kernels disagree on a row without a real position. Let it attend to all; its output is not used.
        attends = None if mask is None else mask | ~mask.any(dim=1, keepdim=True)
        out = self.transformer(x + positions.weight[:frames], attends)
        return add_to_real(video, out, mask)


class SeqLSTM(nn.Module):
    """Temporal LSTM: one layer over each video's real frames, plus the frames themselves.

    ``module(video (B, Nv, D), mask (B, Nv) or None) -> (B, Nv, D)``, in the frames' dtype. A masked frame is not read
    and is returned unchanged; the LSTM skips it.

    Args:
        dim: D, the width of the frames.
        max_positions: rows of ``frame_position_embeddings``, a table that public checkpoints contain but the LSTM does
            not use; None: no table. It takes no gradient.

    Raises:
        ValueError: a size below 1; in the call, frames of another width, or a mask of another shape.
        TypeError: a size is not an integer; in the call, frames of a wider dtype than the parameters (float64 into
            float32).

    Source: Luo et al., "CLIP4Clip", arXiv 2104.08860, section 3.3, "sequential type".
    """

    def __init__(self, dim: int = 512, max_positions: int | None = None) -> None:
        super().__init__()
        self.dim = dim = validation.positive_int("dim", dim)
        self.lstm = nn.LSTM(dim, dim, batch_first=True)
        if max_positions is not None:
            self.frame_position_embeddings = nn.Embedding(validation.positive_int("max_positions", max_positions), dim)
            self.frame_position_embeddings.requires_grad_(False)
            self.apply(start_new)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"

    def init_from_clip(self, positional_embedding: Tensor, blocks: Mapping[str, Tensor]) -> bool:
        """Copy CLIP's text positions into the unused table, if there is one; return whether anything was copied."""
        if not hasattr(self, "frame_position_embeddings"):
            return False
        return copy_from_clip(self.frame_position_embeddings, None, positional_embedding, blocks)

    def forward(self, video: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix frames (B, Nv, D) over time; mask (B, Nv), non-zero = real frame. Return the same shape and dtype."""
        mask = check_frames(video, mask, self.dim, type(self).__name__)
        # A NaN in a masked frame would reach the parameters' gradient as 0 * NaN.
        x = zero_masked(video, mask).to(head_dtype(self.lstm, video, "video"))
        if len(video) == 0:  # cuDNN rejects an empty batch; slicing a dummy row keeps the parameters in the graph
            return self(video.new_zeros((1, *video.shape[1:])))[:0] + video
        if mask is None:
            return add_to_real(video, self.lstm(x)[0], None)
        # Sort real frames to the front. The LSTM only looks back, so the masked frames behind them change nothing.
        # Packed sequences would copy the lengths to the host, which synchronises.
        order = mask.int().argsort(dim=1, descending=True, stable=True)
        index = order[..., None].expand_as(x)
        out, _ = self.lstm(x.gather(1, index))
        return add_to_real(video, torch.empty_like(out).scatter(1, index, out), mask)


def check_frames(video: Tensor, mask: Tensor | None, dim: int, layer: str) -> Tensor | None:
    """Check the frames and return the mask as bool."""
    validation.tokens("video", video, "B, Nv, D")
    if video.shape[2] != dim:
        raise ValueError(
            f"video must have D = {dim} channels, the module's dim, got {video.shape[2]}; "
            f"build it with {layer}(dim={video.shape[2]})"
        )
    return validation.mask("mask", mask, video, "B, Nv", "video")


def add_to_real(video: Tensor, out: Tensor, mask: Tensor | None) -> Tensor:
    """Return ``video + out`` on real frames and ``video`` on masked ones, in the frames' dtype."""
    return (video + zero_masked(out, mask)).to(video.dtype)
