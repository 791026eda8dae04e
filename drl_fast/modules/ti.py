"""TI: token-wise interaction with uniform weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import autocast, validation
from ..functional import Matches, PreparedVideos, prepare, rerank, token_interaction
from ..numerics import uniform_weight
from .wti import interaction_options, pooling_repr


class TI(nn.Module):
    """Token-wise interaction with uniform weights over real tokens (FILIP-style). No parameters.

    ``layer(text (A, Nt, D), video (B, Nv, D), text_mask=None, video_mask=None, *, return_matches=False)`` returns
    (A, B) logits in float32 (float64 for float64 input); see :func:`drl_fast.token_interaction`, also for the errors.

    Args:
        masking: ``"drl"``, ``"exclude"`` or ``"none"``.
        normalize: L2-normalise tokens first.
        bidirectional: False: only the text side's sum, not halved.
        pooling: ``"max"``, ``"softmax"`` or ``"logsumexp"``, as in :func:`drl_fast.token_interaction`.
        temperature: of ``"softmax"`` and ``"logsumexp"``, > 0.

    Raises:
        ValueError: an unknown ``masking`` or ``pooling``, or a ``temperature`` that is not positive or is given with
            ``"max"``.
        TypeError: an option that must be a bool is not one.

    Source: arXiv 2203.07111, section 3.2; Yao et al., "FILIP", arXiv 2111.07783, section 3.1.
    """

    def __init__(
        self,
        *,
        masking: str = "drl",
        normalize: bool = True,
        bidirectional: bool = True,
        pooling: str = "max",
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        validation.option("masking", masking, validation.MASKINGS)
        validation.flag("normalize", normalize)
        validation.flag("bidirectional", bidirectional)
        self.pooling, self.temperature = pooling, validation.pooling(pooling, temperature)
        self.masking = masking
        self.normalize = normalize
        self.bidirectional = bidirectional

    def extra_repr(self) -> str:
        return (
            f"masking={self.masking!r}, normalize={self.normalize}, bidirectional={self.bidirectional}"
            + pooling_repr(self)
        )

    def forward(
        self,
        text: Tensor,
        video: Tensor | PreparedVideos,
        text_mask: Tensor | None = None,
        video_mask: Tensor | None = None,
        *,
        return_matches: bool = False,
    ) -> Tensor | tuple[Tensor, Matches]:
        """Score every text (A, Nt, D) against every video (B, Nv, D): logits (A, B), float32 or float64.

        Masks are (A, Nt) and (B, Nv), non-zero = real; None: all real. ``video`` may be what :meth:`prepare` returned,
        without a mask. With ``return_matches`` the result is a pair ``(logits, Matches)``. Errors are those of
        :func:`drl_fast.token_interaction`.
        """
        return token_interaction(
            text,
            video,
            None,
            None,
            text_mask,
            video_mask,
            return_matches=return_matches,
            **interaction_options(self),
        )

    def prepare(
        self, video: Tensor, video_mask: Tensor | None = None, *, dtype: torch.dtype | None = None
    ) -> PreparedVideos:
        """Prepare videos (B, Nv, D) for many calls; see :func:`drl_fast.prepare`, also for ``dtype``.

        >>> prepared = layer.prepare(video, video_mask)
        >>> logits = layer(text, prepared, text_mask)

        Errors are those of the call.
        """
        weight = None
        if self.masking == "none" and self.bidirectional and video_mask is not None:
            # The mask only shapes the weights, so they take its place.
            video = autocast.cast(validation.tokens("video", video, "B, Nv, D"))
            weight = uniform_weight(validation.mask("video_mask", video_mask, video, "B, Nv", "video"), video)
        kept = None if self.masking == "none" else video_mask
        return prepare(video, weight, kept, normalize=self.normalize, dtype=dtype)

    def rerank(
        self,
        text: Tensor,
        candidates: Tensor,
        text_mask: Tensor | None = None,
        candidate_mask: Tensor | None = None,
        *,
        offsets: Tensor | None = None,
    ) -> Tensor:
        """Score every text (A, Nt, D) against candidates of its own (A, K, Nv, D): (A, K).

        Masks are (A, Nt) and (A, K, Nv). With ``offsets`` (A + 1,) the candidates are (sum K, Nv, D), their mask is
        (sum K, Nv) and the result (sum K,); see :func:`drl_fast.rerank`, also for the errors.
        """
        return rerank(
            text, candidates, None, None, text_mask, candidate_mask, offsets=offsets, **interaction_options(self)
        )
