"""WTI: token-wise interaction with learned token weights."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from .. import autocast, validation
from ..functional import Matches, token_interaction
from ..functional._inputs import check_sides
from ..functional.dot_product import unit


class WTI(nn.Module):
    """Weighted token-wise interaction: a small network reads each token and says how much it counts.

    ``layer(text (A, Nt, D), video (B, Nv, D), text_mask=None, video_mask=None, *, return_matches=False)`` returns
    (A, B) logits in float32 (float64 for float64 input); see :func:`drl_fast.token_interaction`, also for the errors.
    The parameters carry the public codes' names, so the entries of a checkpoint load with ``strict=True``.

    Args:
        dim: D, the width of the tokens.
        arch: 1: Linear(D, 1); 2: Linear-ReLU-Linear; 3: Linear-ReLU-Linear-ReLU-Linear.
        hidden_dim: width of the hidden layers; None: ``dim``.
        masking: ``"drl"``, ``"exclude"`` or ``"none"``.
        normalize: L2-normalise tokens before the similarity.
        weight_input: what the weight heads read: ``"raw"`` or ``"normalized"`` tokens (codebases differ).
        bidirectional: False: the text side's sum alone, not halved, and no ``video_weight_fc``.

    Raises:
        ValueError: ``arch`` outside 1..3, an unknown ``masking`` or ``weight_input``, a size below 1.
        TypeError: a size that is no integer, an option that is no bool; in the call, tokens wider than the parameters
            (float64 into a float32 layer), which would lose precision in silence.

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
    ) -> None:
        super().__init__()
        validation.positive_int("dim", dim)
        validation.option("arch", validation.positive_int("arch", arch), (1, 2, 3))
        validation.option("masking", masking, validation.MASKINGS)
        validation.flag("normalize", normalize)
        validation.flag("bidirectional", bidirectional)
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
            f"weight_input={self.weight_input!r}, bidirectional={self.bidirectional}"
        )

    def forward(
        self,
        text: Tensor,
        video: Tensor,
        text_mask: Tensor | None = None,
        video_mask: Tensor | None = None,
        *,
        return_matches: bool = False,
    ) -> Tensor | tuple[Tensor, Matches]:
        text, video, t_mask, v_mask = check_sides(text, video, text_mask, video_mask)
        text_weight, video_weight = self._both_weights(text, video, t_mask, v_mask)
        return token_interaction(
            text,
            video,
            text_weight,
            video_weight,
            t_mask,
            v_mask,
            normalize=self.normalize,
            masking=self.masking,
            bidirectional=self.bidirectional,
            return_matches=return_matches,
        )

    def weights(
        self, text: Tensor, video: Tensor, text_mask: Tensor | None = None, video_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Token weights (A, Nt) and (B, Nv), for the losses that take them beside the tokens.

        They sum to 1 over a row's real tokens, 0 elsewhere; float32 or better. The second is None where the layer is
        not bidirectional.
        """
        return self._both_weights(*check_sides(text, video, text_mask, video_mask))

    def _both_weights(
        self, text: Tensor, video: Tensor, text_mask: Tensor | None, video_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        check_width(self, text)
        video_weight = self._weights(self.video_weight_fc, video, video_mask) if self.bidirectional else None
        return self._weights(self.text_weight_fc, text, text_mask), video_weight

    def _weights(self, head: nn.Module, tokens: Tensor, mask: Tensor | None) -> Tensor:
        return softmax_weights(head, tokens, mask, normalized=self.weight_input == "normalized")


def softmax_weights(head: nn.Module, tokens: Tensor, mask: Tensor | None, *, normalized: bool = False) -> Tensor:
    """Softmax over a row's real tokens, in float32 or better; a row without one has weights 0."""
    if mask is not None:
        # A NaN at a masked position would reach the head's gradient, even as 0 * NaN.
        tokens = torch.where(mask[..., None], tokens, 0)
    if normalized:
        tokens = unit(tokens)
    score = head(tokens.to(head_dtype(head, tokens))).squeeze(-1)
    score = score.to(torch.promote_types(score.dtype, torch.float32))
    if mask is None:
        return score.softmax(dim=-1)
    # A finite floor: an all-masked row of -inf would make softmax and its gradient NaN.
    return torch.where(mask, score.masked_fill(~mask, torch.finfo(score.dtype).min).softmax(dim=-1), 0)


def check_width(layer: nn.Module, text: Tensor) -> None:
    """Check that tokens, of one width already, have the layer's."""
    if text.shape[2] != layer.dim:
        raise ValueError(
            f"text and video must have D = {layer.dim} channels, the layer's dim, got {text.shape[2]}; "
            f"build it with {type(layer).__name__}(dim={text.shape[2]})"
        )


def head_dtype(head: nn.Module, tokens: Tensor, names: str = "text and video") -> torch.dtype:
    """The dtype of a head's parameters, which is to hold the tokens without loss."""
    # A quantised head has no parameters and says itself what it takes.
    dtype = next((p.dtype for p in head.parameters()), tokens.dtype)
    if torch.promote_types(dtype, tokens.dtype) != dtype and not autocast.is_on(tokens.device.type):
        raise TypeError(
            f"{names} must be no wider than the layer's {dtype}, got {tokens.dtype}; convert the layer with "
            f"layer.to({tokens.dtype}), or the tokens"
        )
    return dtype


def weight_head(dim: int, hidden: int, arch: int) -> nn.Module:
    """``arch`` linear layers with ReLU between, D -> 1; a bare Linear for one, so that state-dict keys fit."""
    if arch == 1:
        return nn.Linear(dim, 1)
    widths = [dim] + [hidden] * (arch - 1)
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 1))
