"""Channel decorrelation (CDCR): the loss of a batch of pairs, and the cross-correlation loss that it is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from .. import validation
from ..distributed.group import Group, Terms
from ..ops import cdcr as op
from ._inputs import check_sides
from .token_interaction import refuse_forward_mode

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def cdcr_loss(
    text: Tensor,
    video: Tensor,
    text_weight: Tensor | None = None,
    video_weight: Tensor | None = None,
    text_mask: Tensor | None = None,
    video_mask: Tensor | None = None,
    *,
    alpha_on: float,
    alpha_off: float,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    r"""Channel decorrelation of matched tokens: text a belongs to video a.

    Every real word is paired with the frame of its own video that it matches best, every real frame with a word
    alike; all tokens are L2-normalised. With each channel standardised over the batch (unbiased deviation),

    .. math:: C = \tfrac12\Big[\tfrac1B \tilde X^\top \mathrm{diag}(w^t) \tilde X' + \tfrac1B \tilde Y^\top
              \mathrm{diag}(w^v) \tilde Y'\Big], \qquad
              loss = \alpha_{on} \sum_d (C_{dd} - 1)^2 + \alpha_{off} \sum_{d \ne e} C_{de}^2

    X are the words and X' their frames, Y the frames and Y' their words. Without weights each term is divided by its
    number of tokens instead. ``alpha_off=0``, which every published setting uses, never forms the D x D matrix.
    Gradients flow through standardisation, weights and both partners, not through the choice of partners. A channel
    whose standard deviation is <= 1e-12, or within rounding of 0, counts as constant: 0 when standardised, no gradient.

    Args:
        text: (B, Nt, D) token features, raw; float32, float16, bfloat16 or float64.
        video: (B, Nv, D) frame features of the same dtype and device; row b is text b's video.
        text_weight: (B, Nt) weights, any float dtype, used as given (WTI: the public code's CDCR 3); None, for both
            sides together, is the unweighted form (TI: its CDCR 2).
        video_weight: (B, Nv), likewise.
        text_mask: (B, Nt), non-zero = real token, any dtype, holes allowed; None: all real. Masked tokens are never
            read.
        video_mask: (B, Nv), likewise. A pair with an empty side is left out; B still counts it.
        alpha_on: weight of the diagonal, >= 0 (published: 0.11 to 0.16; the public code's default is 1.0).
        alpha_off: weight of all other entries, >= 0 (published: 0; the public code's default is 0.06).
        process_group: a torch.distributed group whose ranks each hold some of the pairs (their numbers may differ, one
            may have none): every rank returns the whole batch's loss, and gradients are the ranks' number times the
            single process's, so that DistributedDataParallel's mean over ranks equals it. What must agree, and what
            happens where a rank fails, is as in :func:`token_contrastive_loss`. Not within ``torch.compile``.

    Returns:
        A scalar, float32 (float64 for float64 input).

    Raises:
        ValueError: numbers of texts and videos differ, B = 0, fewer than 2 words or frames in paired rows (seen from
            the shapes; from the masks on the CPU only), a negative or NaN alpha, one weight without the other, and
            what :func:`token_interaction` raises.
        TypeError: as :func:`token_interaction`.

    Source: arXiv 2203.07111, section 3.3, "Channel Decorrelation Regularization".
    """

    def check() -> Inputs:
        t, v, t_mask, v_mask = check_sides(text, video, text_mask, video_mask)
        if t.shape[0] != v.shape[0]:
            raise ValueError(
                f"video must have B = {t.shape[0]} rows to pair with text, got {v.shape[0]}; row b of each is pair b"
            )
        if (text_weight is None) != (video_weight is None):
            name, other = ("video_weight", "text_weight") if video_weight is None else ("text_weight", "video_weight")
            raise ValueError(f"{name} must be given where {other} is, got None; give both (weighted) or neither")
        wt = None if text_weight is None else validation.weight("text_weight", text_weight, t, "B, Nt", "text")
        wv = None if video_weight is None else validation.weight("video_weight", video_weight, v, "B, Nv", "video")
        return Inputs(t, v, wt, wv, t_mask, v_mask)

    alphas = {"alpha_on": alpha_on, "alpha_off": alpha_off}
    return _loss("cdcr_loss", ("text", "video"), check, alphas, process_group, by_pairs=text_weight is not None)


def cross_correlation_loss(
    x: Tensor,
    y: Tensor,
    weight: Tensor | None = None,
    *,
    alpha_on: float,
    alpha_off: float,
    divisor: float | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    r"""Barlow Twins' loss between paired rows: channels of x and y are to agree with themselves and with no other.

    .. math:: C = \tfrac1{divisor} \tilde x^\top \mathrm{diag}(w) \tilde y, \qquad
              loss = \alpha_{on} \sum_d (C_{dd} - 1)^2 + \alpha_{off} \sum_{d \ne e} C_{de}^2

    with channels standardised over the rows, as in :func:`cdcr_loss`. Rows are used as they are: with pooled,
    normalised vectors of texts and videos this is CDCR 1, for DP.

    Args:
        x: (N, D) features; float32, float16, bfloat16 or float64.
        y: (N, D), the same dtype and device.
        weight: (N,) weights, any float dtype; None: 1.
        alpha_on: weight of the diagonal, >= 0.
        alpha_off: weight of all other entries, >= 0; 0 never forms the D x D matrix.
        divisor: what C is divided by, > 0; None: N (over all ranks).
        process_group: as in :func:`cdcr_loss`.

    Returns:
        A scalar, float32 (float64 for float64 input).

    Raises:
        ValueError: shapes that do not match, N < 2, a negative or NaN alpha, a divisor that is not positive and finite.
        TypeError: not a tensor, or a dtype that is not served.

    Source: Zbontar et al., "Barlow Twins", arXiv 2103.03230, section 2.1; arXiv 2203.07111, section 3.3.
    """

    def check() -> Inputs:
        a, b = _rows("x", x), _rows("y", y)
        if a.shape[0] != b.shape[0]:
            raise ValueError(
                f"y must be (N, D) = {tuple(a.shape)} to pair with x, got {tuple(b.shape)}; row n pairs row n"
            )
        a, b, _, _ = check_sides(a[:, None], b[:, None], None, None, ("x", "y"))
        if weight is None:
            return Inputs(a, b)
        given = validation.tensor("weight", weight)
        if tuple(given.shape) != (a.shape[0],):
            raise ValueError(f"weight must be (N,) = ({a.shape[0]},) to match x, got {tuple(given.shape)}")
        return Inputs(a, b, validation.weight("weight", given[:, None], a, "N", "x"))

    options = {"alpha_on": alpha_on, "alpha_off": alpha_off, "divisor": divisor}
    return _loss("cross_correlation_loss", ("x", "y"), check, options, process_group)


class Inputs(NamedTuple):
    """Checked arguments, as pairs of rows of tokens."""

    text: Tensor
    video: Tensor
    text_weight: Tensor | None = None
    video_weight: Tensor | None = None
    text_mask: Tensor | None = None
    video_mask: Tensor | None = None


def _loss(
    kind: str,
    names: tuple[str, str],
    check: Callable[[], Inputs],
    options: dict[str, Any],
    process_group: Any,
    *,
    by_pairs: bool = False,
) -> Tensor:
    """Check, agree with the other ranks where there are any, and call the operators."""
    group = None if process_group is None else Group(process_group)
    checked: list[Inputs] = []

    def terms() -> Terms:
        for name, value in options.items():
            if name != "divisor":
                options[name] = validation.non_negative_number(name, value, "0 leaves its term out")
            elif value is not None:
                options[name] = validation.positive_number(name, value, "leave it out to divide by N")
        inputs = check()
        refuse_forward_mode(inputs, kind)
        checked.append(inputs)
        features = inputs.text
        if group is not None:
            group.require(names[0], features)
        weighted = "None" if inputs.text_weight is None else "weights"
        same = {
            "D": features.shape[2],
            "dtype": features.dtype,
            "device type": features.device.type,
            f"{names[0]} weights": weighted,
            **options,
        }
        return Terms({"rows": features.shape[0], "Nt": features.shape[1], "Nv": inputs.video.shape[1]}, same)

    sizes = [terms().sizes] if group is None else group.agree(kind, terms)
    for name, tokens in zip(names, ("Nt", "Nv"), strict=True):
        _enough(name, [(size["rows"], size[tokens]) for size in sizes])
    both = kind == "cdcr_loss"
    divisor = float(sum(size["rows"] for size in sizes)) if by_pairs else options.get("divisor")
    alphas = options["alpha_on"], options["alpha_off"]
    return op.loss(*checked[0], op.Options(*alphas, divisor, both, both, group))


def _rows(name: str, value: object) -> Tensor:
    """Check one matrix of rows: rank 2 and a dtype we serve."""
    x = validation.tensor(name, value)
    if x.dim() != 2:
        raise ValueError(f"{name} must be (N, D), got shape {tuple(x.shape)}; flatten tokens to rows")
    if x.shape[1] == 0:
        raise ValueError(f"{name} must be (N, D) with at least one channel, got shape {tuple(x.shape)}")
    return x


def _enough(name: str, shapes: list[tuple[int, int]]) -> None:
    """A standard deviation needs two tokens, of all ranks together."""
    if sum(rows * tokens for rows, tokens in shapes) < 2:
        found = ", ".join(f"{rows} x {tokens}" for rows, tokens in shapes)
        found += " on the ranks of the group" if len(shapes) > 1 else ""
        raise ValueError(
            f"{name} must hold at least 2 tokens to standardise channels over, got rows x tokens = {found}; "
            "use a larger batch"
        )
