"""DP: the dot product of pooled vectors."""

from __future__ import annotations

from torch import Tensor, nn

from ..functional.dot_product import dot_product, pool
from ..validation import check_sides


class DP(nn.Module):
    """Dot-product interaction: a text's end token against a video's mean frame. No parameters.

    ``layer(text (A, Nt, D), video (B, Nv, D), text_mask=None, video_mask=None) -> (A, B)``; see
    :func:`drl_fast.functional.dot_product`. Source: arXiv 2203.07111, table 1, "DP"; CLIP4Clip's mean pooling.
    """

    def forward(
        self, text: Tensor, video: Tensor, text_mask: Tensor | None = None, video_mask: Tensor | None = None
    ) -> Tensor:
        """Score every text (A, Nt, D) against every video (B, Nv, D): logits (A, B), float32 or float64.

        Masks are (A, Nt) and (B, Nv), non-zero = real; None: all real.
        """
        return dot_product(text, video, text_mask, video_mask)

    def pool(
        self, text: Tensor, video: Tensor, text_mask: Tensor | None = None, video_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the unit vectors of texts (A, D) and videos (B, D), the input of CDCR 1."""
        return pool(*check_sides(text, video, text_mask, video_mask))
