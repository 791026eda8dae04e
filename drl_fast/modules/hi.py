"""HI: a learned mixture of three levels of matching."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import autocast, validation
from ..functional.dot_product import last_real_token, pool
from ..functional.token_interaction import interact
from ..numerics import unit, zero_masked
from .wti import check_width, softmax_weights, weight_head


class HI(nn.Module):
    """Hierarchical interaction: sentence against video, sentence against frames, words against video.

    ``layer(text (A, Nt, D), video (B, Nv, D), text_mask=None, video_mask=None) -> (A, B)`` logits in float32 (float64
    for float64 input). A logit is a convex combination, with learned coefficients, of three similarities of unit
    vectors:

    - sentence-video: the end token and the mean frame, as in :class:`DP`;
    - sentence-frame: the end token and the frame nearest to it;
    - word-video: the words and the mean frame, averaged over the words with :class:`WTI`'s weights.

    A side without a real token scores 0.

    This is our interpretation. The paper lists an HI in its table but does not define it, and its public code does not
    contain it. The levels follow other work: sentence-video is CLIP4Clip's (Luo et al., arXiv 2104.08860),
    sentence-frame and word-video are X-CLIP's (Ma et al., arXiv 2207.07285), and the mixture of levels is HGR's (Chen
    et al., arXiv 2003.00392). Results will differ from the paper's row.

    Args:
        dim: D, the width of the tokens.
        masking: what a masked frame does at the sentence-frame level: ``"drl"`` (its similarity is 0 and competes),
            ``"exclude"`` or ``"none"``; see :func:`drl_fast.token_interaction`.

    Raises:
        ValueError: an unknown ``masking``, or a size below 1; in the call, tokens of another width.
        TypeError: a size is not an integer; in the call, tokens of a wider dtype than the parameters (float64 into
            float32).

    Source: arXiv 2203.07111, table 1, "HI"; and the papers above.
    """

    def __init__(self, dim: int = 512, *, masking: str = "drl") -> None:
        super().__init__()
        self.dim = dim = validation.positive_int("dim", dim)
        validation.option("masking", masking, validation.MASKINGS)
        self.masking = masking
        self.text_weight_fc = weight_head(dim, dim, arch=2)
        self.level_logits = nn.Parameter(torch.zeros(3))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, masking={self.masking!r}"

    def forward(
        self, text: Tensor, video: Tensor, text_mask: Tensor | None = None, video_mask: Tensor | None = None
    ) -> Tensor:
        """Score every text (A, Nt, D) against every video (B, Nv, D): logits (A, B), float32 or float64.

        Masks are (A, Nt) and (B, Nv), non-zero = real; None: all real.
        """
        text, video, t_mask, v_mask = validation.check_sides(text, video, text_mask, video_mask)
        check_width(self, text)
        weight = softmax_weights(self.text_weight_fc, text, t_mask)
        end_token, mean_frame = pool(text, video, t_mask, v_mask)
        words = unit(zero_masked(text, t_mask))
        with autocast.off(text.device.type):
            sentence = validation.Sides(last_real_token(text, t_mask)[:, None], video, None, v_mask)
            sentence_frame = interact(sentence, None, None, normalize=True, masking=self.masking, bidirectional=False)
            assert isinstance(sentence_frame, Tensor)
            level = self.level_logits.to(mean_frame.dtype).softmax(dim=0)
            # The two other levels are linear in the text vector, so one product computes both.
            weighted_words = (weight[..., None].to(words.dtype) * words).sum(dim=1)
            return (level[0] * end_token + level[2] * weighted_words) @ mean_frame.T + level[1] * sentence_frame
