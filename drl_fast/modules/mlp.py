"""MLP: a small network scores two pooled vectors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import autocast, validation
from ..functional.dot_product import pool
from ..numerics import accumulation_dtype
from .blocks import start_new
from .pairwise_checkpoint import score_pairs
from .wti import check_width, head_dtype

# Hidden activations of one block if the caller sets no chunk: 16 MiB in float32.
CHUNK_ACTIVATIONS = 2**22


class MLP(nn.Module):
    """Two-layer network on [end token; mean frame], DP's unit vectors: Linear(2D, D), ReLU, Linear(D, 1).

    ``layer(text (A, Nt, D), video (B, Nv, D), text_mask=None, video_mask=None) -> (A, B)`` logits in float32 (float64
    for float64 input). The first layer runs once per text and once per video; only the rest runs per pair, in chunks,
    which training computes again in the backward pass. A side without a real token counts as a zero vector, and its
    scores are finite.

    Args:
        dim: D, the width of the tokens and of the hidden layer.
        chunk: pairs computed at a time; None: as many as make 4 M hidden activations.

    Raises:
        ValueError: a size below 1; in the call, tokens of another width.
        TypeError: a size is not an integer; in the call, tokens of a wider dtype than the parameters (float64 into
            float32).

    Source: arXiv 2203.07111, table 1, "MLP". The public code declares this layer but never calls it.
    """

    def __init__(self, dim: int = 512, *, chunk: int | None = None) -> None:
        super().__init__()
        self.dim = dim = validation.positive_int("dim", dim)
        self.chunk = None if chunk is None else validation.positive_int("chunk", chunk)
        self.hidden = nn.Linear(2 * dim, dim)
        self.similarity_dense = nn.Linear(dim, 1)
        self.apply(start_new)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, chunk={self.chunk}"

    def forward(
        self, text: Tensor, video: Tensor, text_mask: Tensor | None = None, video_mask: Tensor | None = None
    ) -> Tensor:
        """Score every text (A, Nt, D) against every video (B, Nv, D): logits (A, B), float32 or float64.

        Masks are (A, Nt) and (B, Nv), non-zero = real; None: all real.
        """
        text, video, t_mask, v_mask = validation.check_sides(text, video, text_mask, video_mask)
        check_width(self, text)
        dtype = head_dtype(self.hidden, text)
        end_token, mean_frame = pool(text, video, t_mask, v_mask)
        by_text = F.linear(end_token.to(dtype), self.hidden.weight[:, : self.dim], self.hidden.bias)
        by_video = F.linear(mean_frame.to(dtype), self.hidden.weight[:, self.dim :])
        wide = torch.promote_types(dtype, torch.float32)
        pairs = max(1, CHUNK_ACTIVATIONS // self.dim) if self.chunk is None else self.chunk
        with autocast.off(text.device.type):
            logits = score_pairs(
                self.similarity_dense, self._score, by_text.to(wide), (by_video.to(wide),), pairs, random=False
            )
        return logits.to(accumulation_dtype(text.dtype))

    def _score(self, by_text: Tensor, by_video: Tensor) -> Tensor:
        """Compute logits (a, b) from the first layer's outputs of both sides, (a, D) and (b, D)."""
        hidden = torch.relu(by_text[:, None] + by_video[None])
        weight, bias = (x.to(hidden.dtype) for x in (self.similarity_dense.weight, self.similarity_dense.bias))
        return F.linear(hidden, weight, bias).squeeze(-1)
