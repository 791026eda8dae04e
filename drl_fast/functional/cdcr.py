"""Channel decorrelation (CDCR) of a batch of pairs, and the cross-correlation loss of paired rows."""

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
    r"""Compute the channel decorrelation loss (CDCR) of matched tokens; text b belongs to video b.

    Every real word is paired with its best match among the frames of its video, and every real frame with its best
    match among the words; all tokens are L2-normalised. With each channel standardised over the batch (unbiased
    deviation),

    .. math:: C = \tfrac12\Big[\tfrac1B \tilde X^\top \mathrm{diag}(w^t) \tilde X' + \tfrac1B \tilde Y^\top
              \mathrm{diag}(w^v) \tilde Y'\Big], \qquad
              loss = \alpha_{on} \sum_d (C_{dd} - 1)^2 + \alpha_{off} \sum_{d \ne e} C_{de}^2

    X are the words and X' their frames, Y the frames and Y' their words. Without weights each term is divided by its
    number of tokens instead of B. ``alpha_off=0``, which every published setting uses, never forms the D x D matrix.
    Gradients flow through the standardisation, the weights and both tokens of a match, but not through the choice of
    the match. A channel whose standard deviation is <= 1e-12, or within rounding of 0, counts as constant: it is 0 when
    standardised and gets no gradient.

    Args:
        text: (B, Nt, D) token features, raw; float32, float16, bfloat16 or float64.
        video: (B, Nv, D) frame features of the same dtype and device; row b is text b's video.
        text_weight: (B, Nt) weights, any float dtype, used as given (with WTI: the public code's CDCR 3). If both
            weights are None, the loss is unweighted (with TI: CDCR 2).
        video_weight: (B, Nv), likewise.
        text_mask: (B, Nt), non-zero = real token, any dtype, holes allowed; None: all real. Masked tokens are never
            read.
        video_mask: (B, Nv), likewise. A pair with an empty side is left out; B still counts it.
        alpha_on: weight of the diagonal, >= 0 (published: 0.11 to 0.16; the public code's default is 1.0).
        alpha_off: weight of all other entries, >= 0 (published: 0; the public code's default is 0.06).
        process_group: a torch.distributed group whose ranks each hold some of the pairs; their numbers may differ, and
            a rank may have none. Every rank returns the loss of the whole batch. Gradients are W times those of a
            single process, for W ranks, so that DistributedDataParallel's mean over ranks equals them.
            :func:`token_contrastive_loss` says what the ranks must agree on and what happens if one fails. Not within
            ``torch.compile``.

    Returns:
        A scalar, float32 (float64 for float64 input).

    Raises:
        ValueError: the numbers of texts and videos differ, B = 0, there are fewer than 2 words or frames (masks are
            checked on the CPU only), an alpha is negative or NaN, one weight is given without the other, or as
            :func:`token_interaction`.
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
            raise ValueError(f"{name} must be given together with {other}, got None; give both (weighted) or neither")
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
    r"""Compute Barlow Twins' loss of paired rows: each channel should correlate with itself and with no other.

    .. math:: C = \tfrac1{divisor} \tilde x^\top \mathrm{diag}(w) \tilde y, \qquad
              loss = \alpha_{on} \sum_d (C_{dd} - 1)^2 + \alpha_{off} \sum_{d \ne e} C_{de}^2

    with channels standardised over the rows, as in :func:`cdcr_loss`. Rows are not normalised: pass the pooled, unit
    vectors of texts and videos (:meth:`DP.pool`) for CDCR 1.

    Args:
        x: (N, D) features; float32, float16, bfloat16 or float64.
        y: (N, D), the same dtype and device.
        weight: (N,) weights, any float dtype; None: 1.
        alpha_on: weight of the diagonal, >= 0.
        alpha_off: weight of all other entries, >= 0; 0 never forms the D x D matrix.
        divisor: a number > 0 that C is divided by; None: N over all ranks.
        process_group: as in :func:`cdcr_loss`.

    Returns:
        A scalar, float32 (float64 for float64 input).

    Raises:
        ValueError: shapes do not match, N < 2, an alpha is negative or NaN, or ``divisor`` is not positive and finite.
        TypeError: not a tensor, or an unsupported dtype.

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
        # The operators take tokens: each row becomes a pair with one token per side.
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
    """Fill in what the ranks exchange about the checked arguments; ``names`` are the argument names of both sides."""
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
    """Check one matrix of rows (N, D)."""
    x = validation.tensor(name, value)
    if x.dim() != 2:
        raise ValueError(f"{name} must be (N, D), got shape {tuple(x.shape)}; flatten tokens to rows")
    if x.shape[1] == 0:
        raise ValueError(f"{name} must be (N, D) with at least one channel, got shape {tuple(x.shape)}")
    return x


def _check_enough(names: tuple[str, str], sizes: list[dict[str, int]]) -> None:
    """Check that each side has at least two tokens over all ranks, as a standard deviation needs."""
    for name, tokens in zip(names, ("Nt", "Nv"), strict=True):
        if sum(size["rows"] * size[tokens] for size in sizes) < 2:
            found = ", ".join(f"{size['rows']} x {size[tokens]}" for size in sizes)
            found += " on the ranks of the group" if len(sizes) > 1 else ""
            raise ValueError(
                f"{name} must hold at least 2 tokens to standardise channels over, got rows x tokens = {found}; "
                "use a larger batch"
            )
