"""WTI: token-wise interaction with learned token weights."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .. import autocast, validation
from ..functional import Matches
from ..functional.prepared import PreparedSides, PreparedVideos, check_sides, prepare
from ..functional.rerank import check_candidates, score
from ..functional.token_interaction import interact, refuse_unused_weight
from ..numerics import unit, zero_masked


class WTI(nn.Module):
    """Weighted token-wise interaction: a small network computes the weight of each token.

    ``layer(text (A, Nt, D), video (B, Nv, D), text_mask=None, video_mask=None, *, return_matches=False)`` returns
    (A, B) logits in float32 (float64 for float64 input); see :func:`drl_fast.token_interaction`, also for the errors.
    The parameters have the same names as in the public DRL code, so its checkpoint entries load with ``strict=True``.

    Args:
        dim: D, the width of the tokens.
        arch: 1: Linear(D, 1); 2: Linear-ReLU-Linear; 3: Linear-ReLU-Linear-ReLU-Linear.
        hidden_dim: width of the hidden layers; None: ``dim``.
        masking: ``"drl"``, ``"exclude"`` or ``"none"``.
        normalize: L2-normalise tokens before the similarity.
        weight_input: the tokens that the weight heads read: ``"raw"`` or ``"normalized"`` (codebases differ).
        bidirectional: False: only the text side's sum, not halved, and no ``video_weight_fc``.
        pooling: ``"max"``, ``"softmax"`` or ``"logsumexp"``, as in :func:`drl_fast.token_interaction`.
        temperature: of ``"softmax"`` and ``"logsumexp"``, > 0.

    Raises:
        ValueError: ``arch`` outside 1..3, an unknown ``masking``, ``weight_input`` or ``pooling``, a ``temperature``
            that is not positive or is given with ``"max"``, or a size below 1.
        TypeError: a size is not an integer, or an option not a bool; in the call, tokens of a wider dtype than the
            parameters (float64 into float32), which would lose precision.

    Source: arXiv 2203.07111, section 3.2, equations 5-7.
    """

    def __init__(
        self,
        dim: int = 512,
        arch: int = 2,
        *,
        hidden_dim: int | None = None,
        masking: str = "drl",
        normalize: bool = True,
        weight_input: str = "raw",
        bidirectional: bool = True,
        pooling: str = "max",
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        dim, arch = validation.positive_int("dim", dim), validation.positive_int("arch", arch)
        validation.option("arch", arch, (1, 2, 3))
        validation.option("masking", masking, validation.MASKINGS)
        validation.flag("normalize", normalize)
        validation.flag("bidirectional", bidirectional)
        self.pooling, self.temperature = pooling, validation.pooling(pooling, temperature)
        validation.option("weight_input", weight_input, ("raw", "normalized"))
        hidden = dim if hidden_dim is None else validation.positive_int("hidden_dim", hidden_dim)
        self.dim = dim
        self.masking = masking
        self.normalize = normalize
        self.weight_input = weight_input
        self.bidirectional = bidirectional
        self.text_weight_fc = weight_head(dim, hidden, arch)
        if bidirectional:
            self.video_weight_fc = weight_head(dim, hidden, arch)

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, masking={self.masking!r}, normalize={self.normalize}, "
            f"weight_input={self.weight_input!r}, bidirectional={self.bidirectional}" + pooling_repr(self)
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
        """Score every text against every video.

        Args:
            text: (A, Nt, D) word features, raw.
            video: (B, Nv, D) frame features, raw, of the same dtype and device; or what :meth:`prepare` made of them,
                without ``video_mask``.
            text_mask: (A, Nt), non-zero = real word, any dtype, holes allowed; None: all real.
            video_mask: (B, Nv), likewise for frames.
            return_matches: also return which token matched each token best.

        Returns:
            (A, B) logits, float32 (float64 for float64 input), not scaled by temperature; with ``return_matches`` a
            pair ``(logits, Matches)``.

        Raises:
            ValueError, TypeError: as :func:`drl_fast.token_interaction`; also for tokens of another width than ``dim``,
                or of a wider dtype than the parameters (float64 into float32).
        """
        validation.flag("return_matches", return_matches)
        sides = check_sides(text, video, text_mask, video_mask, normalize=self.normalize, masking=self.masking)
        return interact(
            sides,
            *self._weights(sides),
            return_matches=return_matches,
            **interaction_options(self),
        )

    @torch.no_grad()
    def prepare(
        self, video: Tensor, video_mask: Tensor | None = None, *, dtype: torch.dtype | None = None
    ) -> PreparedVideos:
        """Compute the weights of videos (B, Nv, D) and prepare them for many calls; see :func:`drl_fast.prepare`.

        >>> prepared = layer.prepare(video, video_mask)
        >>> logits = layer(text, prepared, text_mask)

        The weights are those of the parameters now: prepare again after training. ``dtype`` is what the tokens are
        stored in; None: as given. Errors are those of the call.
        """
        video = autocast.cast(validation.tokens("video", video, "B, Nv, D"))
        real = validation.mask("video_mask", video_mask, video, "B, Nv", "video")
        check_width(self, video)
        weight = None
        if self.bidirectional:
            normalized = self.weight_input == "normalized"
            weight = softmax_weights(self.video_weight_fc, video, real, normalized=normalized)
        # With masking="none" the mask only shapes the weights.
        real = None if self.masking == "none" else real
        return prepare(video, weight, real, normalize=self.normalize, dtype=dtype)

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

        The heads compute the weights. Masks are (A, Nt) and (A, K, Nv). With ``offsets`` (A + 1,) the candidates are
        (sum K, Nv, D), their mask is (sum K, Nv) and the result (sum K,); see :func:`drl_fast.rerank`, also for the
        errors.
        """
        checked = check_candidates(text, candidates, text_mask, candidate_mask, offsets)
        return score(checked, *self._weights(checked.sides), **interaction_options(self))

    def weights(
        self, text: Tensor, video: Tensor, text_mask: Tensor | None = None, video_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Compute token weights (A, Nt) and (B, Nv), for losses that take tokens and weights.

        They sum to 1 over a row's real tokens and are 0 elsewhere, in float32 or float64. The second is None if the
        layer is not bidirectional. Arguments and errors are those of the call.
        """
        return self._weights(validation.check_sides(text, video, text_mask, video_mask))

    def _weights(self, sides: validation.Sides | PreparedSides) -> tuple[Tensor, Tensor | None]:
        check_width(self, sides.text)
        normalized = self.weight_input == "normalized"
        video_weight = None
        if isinstance(sides, PreparedSides):
            refuse_unused_weight(sides.video.weight, self.bidirectional)
            if self.bidirectional and sides.video.weight is None:
                raise ValueError("video must hold the layer's weights, got none; prepare it with layer.prepare(video)")
        elif self.bidirectional:
            video_weight = softmax_weights(self.video_weight_fc, sides.video, sides.video_mask, normalized=normalized)
        return softmax_weights(self.text_weight_fc, sides.text, sides.text_mask, normalized=normalized), video_weight


def interaction_options(layer: nn.Module) -> dict[str, Any]:
    """Return WTI's or TI's options as :func:`drl_fast.token_interaction` takes them."""
    return {name: getattr(layer, name) for name in ("normalize", "masking", "bidirectional", "pooling", "temperature")}


def pooling_repr(layer: nn.Module) -> str:
    """Show a layer's pooling if it is not the maximum."""
    return "" if layer.pooling == "max" else f", pooling={layer.pooling!r}, temperature={layer.temperature}"


def softmax_weights(head: nn.Module, tokens: Tensor, mask: Tensor | None, *, normalized: bool = False) -> Tensor:
    """Compute the softmax over a row's real tokens, in float32 or better; a row without real tokens gets only 0."""
    # A NaN at a masked position would reach the head's gradient as 0 * NaN.
    tokens = zero_masked(tokens, mask)
    if normalized:
        tokens = unit(tokens)
    score = head(tokens.to(head_dtype(head, tokens))).squeeze(-1)
    score = score.to(torch.promote_types(score.dtype, torch.float32))
    if mask is None:
        return score.softmax(dim=-1)
    # Fill with a finite number: with -inf, the softmax of an all-masked row and its gradient would be NaN.
    return torch.where(mask, score.masked_fill(~mask, torch.finfo(score.dtype).min).softmax(dim=-1), 0)


def check_width(layer: nn.Module, text: Tensor) -> None:
    """Check that text and video have the layer's width."""
    if text.shape[2] != layer.dim:
        raise ValueError(
            f"text and video must have D = {layer.dim} channels, the layer's dim, got {text.shape[2]}; "
            f"build it with {type(layer).__name__}(dim={text.shape[2]})"
        )


def head_dtype(head: nn.Module, tokens: Tensor, names: str = "text and video") -> torch.dtype:
    """Return the dtype of a head's parameters; raise TypeError if it cannot hold the tokens without loss."""
    # A quantised head has no parameters: pass the tokens' own dtype.
    dtype = next((p.dtype for p in head.parameters()), tokens.dtype)
    if torch.promote_types(dtype, tokens.dtype) != dtype and not autocast.is_on(tokens.device.type):
        raise TypeError(
            f"{names} must be no wider than the layer's {dtype}, got {tokens.dtype}; convert the layer with "
            f"layer.to({tokens.dtype}), or the tokens"
        )
    return dtype


def weight_head(dim: int, hidden: int, arch: int) -> nn.Module:
    """Stack ``arch`` linear layers with ReLU between, D -> 1. One alone stays bare, for the public state-dict keys."""
    if arch == 1:
        return nn.Linear(dim, 1)
    widths = [dim] + [hidden] * (arch - 1)
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 1))
