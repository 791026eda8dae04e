"""XTI: a cross transformer reads a text and a video together."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import validation
from ..functional.dot_product import last_real_token
from ..numerics import accumulation_dtype, zero_masked
from .blocks import LayerNorm, QuickGELU, Transformer, copy_from_clip, start_new
from .pairwise_checkpoint import score_pairs
from .wti import check_width, head_dtype

# Positions of one block if the caller sets no chunk: about 650 MB of activations in training with 512 channels.
CHUNK_POSITIONS = 4096


class Pooler(nn.Module):
    """LayerNorm, first position, Linear, QuickGELU: (R, N, D) -> (R, D)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.ln_pool = LayerNorm(dim)
        self.dense = nn.Linear(dim, dim)
        self.activation = QuickGELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.dense(self.ln_pool(x[:, 0])))


class XTI(nn.Module):
    """Cross-transformer interaction: a transformer reads the sequence [end token; frames] of every pair.

    ``layer(text (A, Nt, D), video (B, Nv, D), text_mask=None, video_mask=None) -> (A, B)`` logits in float32 (float64
    for float64 input). The features are raw; masked frames get no attention and are never read. The A x B sequences run
    in chunks, and training computes each chunk's activations again in the backward pass, so memory does not grow with
    the number of pairs. A text without a real token counts as a zero vector; a video without a real frame leaves only
    the text in its sequence. Both have finite scores.

    Args:
        dim: D, the width of the tokens.
        layers: number of transformer blocks.
        heads: number of attention heads.
        max_positions: the longest sequence: one position for the text, the rest for frames.
        dropout: dropout rate on the input sequence, in training.
        chunk: pairs computed at a time; None: as many as make 4096 positions.

    Raises:
        ValueError: a size below 1, a ``dim`` that is not a multiple of ``heads``, or ``dropout`` outside [0, 1); in the
            call, tokens of another width, or more frames than ``max_positions - 1``.
        TypeError: a size is not an integer; in the call, tokens of a wider dtype than the parameters (float64 into
            float32).

    Source: arXiv 2203.07111, table 1, "XTI"; Luo et al., "CLIP4Clip", arXiv 2104.08860, section 3.3, "tight type".
    """

    def __init__(
        self,
        dim: int = 512,
        layers: int = 4,
        heads: int = 8,
        max_positions: int = 128,
        dropout: float = 0.1,
        *,
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim = validation.positive_int("dim", dim)
        self.dropout = validation.fraction("dropout", dropout, one=False)
        self.chunk = None if chunk is None else validation.positive_int("chunk", chunk)
        self.position_embeddings = nn.Embedding(validation.positive_int("max_positions", max_positions), dim)
        self.transformer = Transformer(dim, layers, heads)
        self.pooler = Pooler(dim)
        self.similarity_dense = nn.Linear(dim, 1)
        self.apply(start_new)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, dropout={self.dropout}, chunk={self.chunk}"

    def init_from_clip(self, positional_embedding: Tensor, blocks: Mapping[str, Tensor]) -> bool:
        """Start as CLIP's text positions and first blocks; see :func:`drl_fast.modules.blocks.copy_from_clip`."""
        return copy_from_clip(self.position_embeddings, self.transformer, positional_embedding, blocks)

    def forward(
        self, text: Tensor, video: Tensor, text_mask: Tensor | None = None, video_mask: Tensor | None = None
    ) -> Tensor:
        """Score every text (A, Nt, D) against every video (B, Nv, D): logits (A, B), float32 or float64.

        Masks are (A, Nt) and (B, Nv), non-zero = real; None: all real.
        """
        text, video, t_mask, v_mask = validation.check_sides(text, video, text_mask, video_mask)
        check_width(self, text)
        length = video.shape[1] + 1
        if length > self.position_embeddings.num_embeddings:
            most = self.position_embeddings.num_embeddings - 1
            raise ValueError(
                f"video must have at most {most} frames, the layer's max_positions minus 1 for the text, got "
                f"{video.shape[1]}; take fewer frames or build it with XTI(max_positions={length})"
            )
        dtype = head_dtype(self.similarity_dense, text)
        end_token = last_real_token(text, t_mask).to(dtype)
        frames = zero_masked(video, v_mask).to(dtype)
        # Fixed here, so that the backward pass recomputes with the same dropout even after layer.eval().
        dropout = self.dropout if self.training else 0.0
        score = partial(self._score, dropout=dropout)
        sides = (frames,) if v_mask is None else (frames, v_mask)
        pairs = max(1, CHUNK_POSITIONS // length) if self.chunk is None else self.chunk
        logits = score_pairs(self, score, end_token, sides, pairs, random=dropout > 0)
        return logits.to(accumulation_dtype(text.dtype))

    def _score(self, end_token: Tensor, frames: Tensor, mask: Tensor | None = None, *, dropout: float) -> Tensor:
        """Score end tokens (a, D) against frames (b, Nv, D) with mask (b, Nv): logits (a, b)."""
        a, (b, count, dim) = len(end_token), frames.shape
        sequence = torch.cat(
            [end_token[:, None, None].expand(a, b, 1, dim), frames.expand(a, b, count, dim)], dim=2
        ).flatten(0, 1)
        attends = None if mask is None else F.pad(mask, (1, 0), value=True).repeat(a, 1)
        x = sequence + self.position_embeddings.weight[: count + 1]
        x = self.transformer(F.dropout(x, dropout, training=dropout > 0), attends, queries=1)
        return self.similarity_dense(self.pooler(x)).view(a, b)
