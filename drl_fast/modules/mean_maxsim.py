"""MeanMaxSim: Video-ColBERT's late interaction on two levels, frames alone and frames in context."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .. import autocast, validation
from ..functional.token_interaction import interact
from .blocks import INIT_STD
from .temporal import SeqTransf, check_frames
from .wti import check_width


class MeanMaxSim(nn.Module):
    """Mean over a text's words of the best match, among the frames and among the frames in context.

    ``layer(text (A, Nt, D), video (B, Nv, D), text_mask=None, video_mask=None) -> (A, B)`` logits in float32 (float64
    for float64 input): the sum of two levels, which :meth:`levels` returns apart, as the dual sigmoid loss needs them.

    - Frame level: every word takes the frame with the highest cosine similarity; the mean over the words.
    - Video level: the same, with frames that a temporal transformer has mixed. It also reads ``expansion`` learned
      tokens, the visual expansion tokens, and its outputs for them compete like frames.

    ``video`` holds one token per frame, not mixed over time: the layer has its own temporal transformer. Masked tokens
    take no part and are never read. A side without a real token scores 0.

    From the paper, as public summaries quote it: the mean of maxima, from text to video alone; the two levels and their
    sum; a temporal transformer with visual expansion tokens; query expansion by padding tokens that count as words; one
    sigmoid loss per level, with a learned factor and bias. The authors published no code, and we had no full text. What
    follows is our interpretation:

    - Similarities are cosines, as in ColBERT and CLIP.
    - The transformer has the form of CLIP4Clip's, :class:`SeqTransf`: learned positions, no causal mask, and its input
      added to its output. Expansion tokens have the first positions, which padding does not move.
    - Four blocks and two expansion tokens, as in the public reimplementations.
    - The layer expands no query. The text encoder encodes padding, and ``text_mask`` marks it as real;
      :class:`drl_fast.DRL` does so with ``query_expansion=True``, up to ``max_words`` positions.
    - Both levels' losses have weight 1, one factor, one bias, and SigLIP's sign: factor * logits + bias. They start at
      SigLIP's 10 and -10. The reimplementations give 4.77 and -12.93 as the paper's. SigLIP's weights store about 4.7
      as the factor's logarithm, so we read 4.77 as one; with CLIP's cosines all pairs would then start as positives.

    Args:
        dim: D, the width of the tokens.
        layers: number of transformer blocks.
        max_positions: the largest number of frames.
        expansion: number of visual expansion tokens; 0: none.

    Raises:
        ValueError: a size below 1, an ``expansion`` below 0, or a ``dim`` that is not a multiple of its heads,
            dim // 64; in the call, tokens of another width, or more frames than ``max_positions``.
        TypeError: a size is not an integer; in the call, tokens of a wider dtype than the parameters (float64 into
            float32).

    Source: Reddy et al., "Video-ColBERT", CVPR 2025, arXiv 2503.19009, section 3.
    """

    def __init__(self, dim: int = 512, layers: int = 4, max_positions: int = 77, *, expansion: int = 2) -> None:
        super().__init__()
        self.dim = dim = validation.positive_int("dim", dim)
        self.max_positions = validation.positive_int("max_positions", max_positions)
        expansion = validation.non_negative_int("expansion", expansion)
        self.expansion_tokens = nn.Parameter(torch.empty(expansion, dim))
        nn.init.normal_(self.expansion_tokens, std=INIT_STD)
        self.temporal = SeqTransf(dim, layers, expansion + self.max_positions)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, max_positions={self.max_positions}, expansion={len(self.expansion_tokens)}"

    def init_from_clip(self, positional_embedding: Tensor, blocks: Mapping[str, Tensor]) -> bool:
        """Start as CLIP's text positions and first blocks; see :func:`drl_fast.modules.blocks.copy_from_clip`."""
        return self.temporal.init_from_clip(positional_embedding, blocks)

    def forward(
        self,
        text: Tensor,
        video: Tensor,
        text_mask: Tensor | None = None,
        video_mask: Tensor | None = None,
        *,
        in_context: tuple[Tensor, Tensor | None] | None = None,
    ) -> Tensor:
        """Score every text (A, Nt, D) against every video (B, Nv, D): logits (A, B), float32 or float64.

        Masks are (A, Nt) and (B, Nv), non-zero = real; None: all real. ``in_context``: what :meth:`in_context` returned
        for these videos, so that many calls share its work; None: compute it.
        """
        frame_level, video_level = self.levels(text, video, text_mask, video_mask, in_context=in_context)
        return frame_level + video_level

    def levels(
        self,
        text: Tensor,
        video: Tensor,
        text_mask: Tensor | None = None,
        video_mask: Tensor | None = None,
        *,
        in_context: tuple[Tensor, Tensor | None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the logits of the frame level and of the video level, (A, B) each; arguments as of the call."""
        sides = validation.check_sides(text, video, text_mask, video_mask)
        check_width(self, sides.text)
        if in_context is None:
            tokens, real = self.in_context(sides.video, sides.video_mask)
            return _mean_max(sides), _mean_max(sides._replace(video=tokens, video_mask=real))
        frames = len(self.expansion_tokens) + sides.video.shape[1]
        if in_context[0].shape[:2] != (len(sides.video), frames):
            raise ValueError(
                f"in_context must hold the video's tokens, ({len(sides.video)}, {frames}, D), got "
                f"{tuple(in_context[0].shape)}; call layer.in_context(video, video_mask)"
            )
        context = validation.check_sides(text, in_context[0], text_mask, in_context[1], ("text", "in_context"))
        return _mean_max(sides), _mean_max(context)

    def in_context(self, video: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Mix frames (B, Nv, D) over time; return E expansion tokens and the frames, (B, E + Nv, D), and their mask.

        The mask is None if ``mask`` is. The expansion tokens of a video without a real frame are masked.
        """
        mask = check_frames(video, mask, self.dim, type(self).__name__)
        if video.shape[1] > self.max_positions:
            raise ValueError(
                f"video must have at most {self.max_positions} frames, the layer's max_positions, got "
                f"{video.shape[1]}; take fewer frames or build it with more positions"
            )
        video = autocast.cast(video)
        shape = len(video), len(self.expansion_tokens)
        tokens = torch.cat([self.expansion_tokens.to(video.dtype).expand(*shape, self.dim), video], dim=1)
        if mask is None:
            return self.temporal(tokens), None
        attends = torch.cat([mask.new_ones(shape), mask], dim=1)
        real = torch.cat([mask.any(dim=1, keepdim=True).expand(shape), mask], dim=1)
        return self.temporal(tokens, attends), real


def _mean_max(sides: validation.Sides) -> Tensor:
    """Compute the mean over real words of the largest cosine similarity to a real video token: (A, B)."""
    # The weights that the operator takes for None are 1 / (real words).
    logits = interact(sides, None, None, normalize=True, masking="exclude", bidirectional=False)
    assert isinstance(logits, Tensor)
    return logits
