"""Channel decorrelation (CDCR): the loss of a batch of pairs, and the cross-correlation loss that it is made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .. import validation
from ..distributed.group import Agreement, Group, agree
from ..ops import cdcr as op
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

    group = None if process_group is None else Group(process_group)
    with agree(group, "cdcr_loss") as agreement:
        on, off = _alphas(alpha_on, alpha_off)
        sides = validation.check_sides(text, video, text_mask, video_mask)
        if sides.text.shape[0] != sides.video.shape[0]:
            raise ValueError(
                f"video must have B = {sides.text.shape[0]} rows to pair with text, got {sides.video.shape[0]}; "
                "row b of each is pair b"
            )
        if (text_weight is None) != (video_weight is None):
            name, other = ("video_weight", "text_weight") if video_weight is None else ("text_weight", "video_weight")
            raise ValueError(f"{name} must be given where {other} is, got None; give both (weighted) or neither")
        weighted = text_weight is not None
        if text_weight is not None and video_weight is not None:
            text_weight = validation.weight("text_weight", text_weight, sides.text, "B, Nt", "text")
            video_weight = validation.weight("video_weight", video_weight, sides.video, "B, Nv", "video")
        inputs = (sides.text, sides.video, text_weight, video_weight, sides.text_mask, sides.video_mask)
        _announce(agreement, group, "cdcr_loss", ("text", "video"), inputs, {"alpha_on": on, "alpha_off": off})
    _check_enough(("text", "video"), agreement.sizes_by_rank)
    divisor = float(sum(size["rows"] for size in agreement.sizes_by_rank)) if weighted else None
    return op.loss(*inputs, op.Options(on, off, divisor, normalize=True, both=True, group=group))


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

    group = None if process_group is None else Group(process_group)
    with agree(group, "cross_correlation_loss") as agreement:
        on, off = _alphas(alpha_on, alpha_off)
        if divisor is not None:
            divisor = validation.positive_number("divisor", divisor, "leave it out to divide by N")
        a, b = _rows("x", x), _rows("y", y)
        if a.shape[0] != b.shape[0]:
            raise ValueError(
                f"y must be (N, D) = {tuple(a.shape)} to pair with x, got {tuple(b.shape)}; row n pairs row n"
            )
        # To the operators each row is a pair of one token and one token.
        sides = validation.check_sides(a[:, None], b[:, None], None, None, ("x", "y"))
        row_weight = None
        if weight is not None:
            row_weight = validation.tensor("weight", weight)
            if tuple(row_weight.shape) != (a.shape[0],):
                raise ValueError(f"weight must be (N,) = ({a.shape[0]},) to match x, got {tuple(row_weight.shape)}")
            row_weight = validation.weight("weight", row_weight[:, None], sides.text, "N", "x")
        inputs = (sides.text, sides.video, row_weight, None, None, None)
        options = {"alpha_on": on, "alpha_off": off, "divisor": divisor}
        _announce(agreement, group, "cross_correlation_loss", ("x", "y"), inputs, options)
    _check_enough(("x", "y"), agreement.sizes_by_rank)
    return op.loss(*inputs, op.Options(on, off, divisor, normalize=False, both=False, group=group))


def _alphas(alpha_on: float, alpha_off: float) -> tuple[float, float]:
    remedy = "0 leaves its term out"
    return (
        validation.non_negative_number("alpha_on", alpha_on, remedy),
        validation.non_negative_number("alpha_off", alpha_off, remedy),
    )


def _announce(
    agreement: Agreement,
    group: Group | None,
    kind: str,
    names: tuple[str, str],
    inputs: tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    options: dict[str, float | None],
) -> None:
    """Fill in what the ranks exchange about checked arguments; ``names`` are those of the two sides."""
    text, video, weight, *_ = inputs
    refuse_forward_mode(inputs, kind)
    if group is not None:
        group.require(names[0], text)
    agreement.sizes = {"rows": text.shape[0], "Nt": text.shape[1], "Nv": video.shape[1]}
    agreement.same = {
        "D": text.shape[2],
        "dtype": text.dtype,
        "device type": text.device.type,
        f"{names[0]} weights": "None" if weight is None else "weights",
        **options,
    }


def _rows(name: str, value: object) -> Tensor:
    """Check one matrix of rows: rank 2 and a dtype we serve."""
    x = validation.tensor(name, value)
    if x.dim() != 2:
        raise ValueError(f"{name} must be (N, D), got shape {tuple(x.shape)}; flatten tokens to rows")
    if x.shape[1] == 0:
        raise ValueError(f"{name} must be (N, D) with at least one channel, got shape {tuple(x.shape)}")
    return x


def _check_enough(names: tuple[str, str], sizes: list[dict[str, int]]) -> None:
    """Check that each side has two tokens over all ranks, which a standard deviation needs."""
    for name, tokens in zip(names, ("Nt", "Nv"), strict=True):
        if sum(size["rows"] * size[tokens] for size in sizes) < 2:
            found = ", ".join(f"{size['rows']} x {size[tokens]}" for size in sizes)
            found += " on the ranks of the group" if len(sizes) > 1 else ""
            raise ValueError(
                f"{name} must hold at least 2 tokens to standardise channels over, got rows x tokens = {found}; "
                "use a larger batch"
            )
