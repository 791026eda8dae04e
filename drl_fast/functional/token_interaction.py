"""Token-wise interaction (WTI, TI): logits from tokens and token weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import validation
from ..numerics import accumulation_dtype, uniform_weight, unit, zero_masked
from ..ops import prepared as prepared_op
from ..ops import token_interaction as op
from ..ops.soft_token_interaction import soft_token_interaction
from .prepared import PreparedSides, PreparedVideos, check_sides, refuse_beside_prepared


class Matches(NamedTuple):
    """The best match of each token: an index into the padded rows, -1 if no real token was chosen."""

    video_index: Tensor
    """(A, B, Nt) int64: the frame of video b that word i of text a chose."""
    text_index: Tensor | None
    """(A, B, Nv) int64: the word of text a that frame j of video b chose; None when not bidirectional."""


def token_interaction(
    text: Tensor,
    video: Tensor | PreparedVideos,
    text_weight: Tensor | None = None,
    video_weight: Tensor | None = None,
    text_mask: Tensor | None = None,
    video_mask: Tensor | None = None,
    *,
    normalize: bool = True,
    masking: str = "drl",
    bidirectional: bool = True,
    pooling: str = "max",
    temperature: float = 1.0,
    return_matches: bool = False,
) -> Tensor | tuple[Tensor, Matches]:
    r"""Score every text against every video by their tokens' best matches.

    .. math:: logits_{ab} = \tfrac12\Big[\sum_i w^t_{ai} \max_j \langle t_{ai}, v_{bj}\rangle
                                       + \sum_j w^v_{bj} \max_i \langle t_{ai}, v_{bj}\rangle\Big]

    The A x B x Nt x Nv similarities are never stored. The logits are differentiable once in features and weights; a
    second derivative or forward-mode AD raises.

    Args:
        text: (A, Nt, D) token features, raw; float32, float16, bfloat16 or float64.
        video: (B, Nv, D) frame features of the same dtype and device, or what :func:`prepare` made of them, which holds
            their weights and mask.
        text_weight: (A, Nt) weights, any float dtype, used as given; None: uniform over real tokens (TI).
        video_weight: (B, Nv), likewise. Must be None when ``bidirectional=False``.
        text_mask: (A, Nt), non-zero = real token, any dtype, holes allowed; None: all real.
        video_mask: (B, Nv), likewise.
        normalize: L2-normalise tokens first, in float32 (float64 for float64). A token of norm <= 1e-12 maps to 0.
        masking: ``"drl"``: a masked token's similarity is 0 and competes for the maximum, as in the public code;
            ``"exclude"``: it never takes part; ``"none"``: every token competes and counts with its weight, and masks
            only affect uniform weights. Except with ``"none"``, masked features are never read, and a masked token's
            own maximum is 0 whatever its weight.
        bidirectional: False: only the first sum, not halved.
        pooling: what replaces the maximum over the other side's tokens: ``"max"``, ``"softmax"`` (the mean of the
            similarities S weighted by softmax(S / temperature)) or ``"logsumexp"`` (temperature * logsumexp(S /
            temperature)). Under ``masking="drl"`` every masked token takes part with similarity 0, so the result
            depends on how many there are.
        temperature: of ``"softmax"`` and ``"logsumexp"``, > 0. Towards 0 both become the maximum.
        return_matches: also return :class:`Matches`; with ``pooling="max"`` only.

    Returns:
        (A, B) logits, float32 (float64 for float64 input), not scaled by temperature; with ``return_matches`` a pair
        ``(logits, Matches)``. A pair's score has the same bits whatever else is in the batch.

    Raises:
        ValueError: wrong rank, sizes or devices that do not match, an unknown ``masking``, or a mask with NaN or a
            negative value (checked on the CPU in eager mode only); an unknown ``pooling``, a ``temperature`` outside
            1e-30..1e30 or given with ``"max"``, or ``return_matches`` with another pooling.
        TypeError: not a tensor, or an unsupported dtype.

    Source: arXiv 2203.07111, section 3.2, "Weighted Token-wise Interaction"; the softmax over similarities: Ma et al.,
    "X-CLIP", arXiv 2207.07285, section 3.4.
    """
    validation.flag("return_matches", return_matches)
    temperature = validation.pooling(pooling, temperature)
    sides, text_weight, video_weight = check_arguments(
        text,
        video,
        text_weight,
        video_weight,
        text_mask,
        video_mask,
        normalize=normalize,
        masking=masking,
        bidirectional=bidirectional,
    )
    return interact(
        sides,
        text_weight,
        video_weight,
        normalize=normalize,
        masking=masking,
        bidirectional=bidirectional,
        pooling=pooling,
        temperature=temperature,
        return_matches=return_matches,
    )


def check_arguments(
    text: Tensor,
    video: Tensor | PreparedVideos,
    text_weight: Tensor | None,
    video_weight: Tensor | None,
    text_mask: Tensor | None,
    video_mask: Tensor | None,
    *,
    normalize: bool,
    masking: str,
    bidirectional: bool,
) -> tuple[validation.Sides | PreparedSides, Tensor | None, Tensor | None]:
    """Check the arguments of :func:`token_interaction`; return both sides and their weights for :func:`interact`."""
    validation.option("masking", masking, validation.MASKINGS)
    validation.flag("normalize", normalize)
    validation.flag("bidirectional", bidirectional)
    sides = check_sides(text, video, text_mask, video_mask, normalize=normalize, masking=masking)
    if text_weight is not None:
        text_weight = validation.weight("text_weight", text_weight, sides.text, "A, Nt", "text")
    if isinstance(sides, PreparedSides):
        refuse_beside_prepared("video_weight", video_weight)
        refuse_unused_weight(sides.video.weight, bidirectional)
        return sides, text_weight, None
    refuse_unused_weight(video_weight, bidirectional)
    if video_weight is not None:
        video_weight = validation.weight("video_weight", video_weight, sides.video, "B, Nv", "video")
    return sides, text_weight, video_weight


def interact(
    sides: validation.Sides | PreparedSides,
    text_weight: Tensor | None,
    video_weight: Tensor | None,
    *,
    normalize: bool,
    masking: str,
    bidirectional: bool,
    pooling: str = "max",
    temperature: float = 1.0,
    return_matches: bool = False,
) -> Tensor | tuple[Tensor, Matches]:
    """Compute :func:`token_interaction` of arguments that the caller has checked one by one.

    Matches are kept if the caller wants them or a backward pass will read them.
    """
    if return_matches and pooling != "max":
        raise ValueError(
            f"return_matches must be False with pooling={pooling!r}, in which a token chooses no single other; "
            "call again with pooling='max' for matches"
        )
    if isinstance(sides, PreparedSides):
        return _interact_prepared(
            sides,
            text_weight,
            normalize=normalize,
            masking=masking,
            bidirectional=bidirectional,
            pooling=pooling,
            temperature=temperature,
            return_matches=return_matches,
        )
    inputs, masks = operands(
        sides, text_weight, video_weight, masking=masking, bidirectional=bidirectional, what="token interaction"
    )
    if pooling != "max":
        soft = normalize, masking == "drl", pooling == "logsumexp", temperature
        return soft_token_interaction(*inputs, *masks, *soft)
    train = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    learned = train and any(x is not None and x.requires_grad for x in inputs[2:])
    kept = train and op.keeps_matches(*inputs[:2], bidirectional, learned, normalize)
    logits, video_index, text_index, *_ = op.token_interaction(
        *inputs, *masks, normalize, masking == "drl", return_matches or kept, kept and learned
    )
    if not return_matches:
        return logits
    by_word = op.public_index(video_index, masks[0], None)
    return logits, Matches(by_word, op.public_index(text_index, None, masks[1]) if bidirectional else None)


def operands(
    sides: validation.Sides,
    text_weight: Tensor | None,
    video_weight: Tensor | None,
    *,
    masking: str,
    bidirectional: bool,
    what: str,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor | None, Tensor | None]]:
    """Return features and weights as operators take them, and the masks that they see.

    Raises:
        NotImplementedError: a kind of derivative that the operator ``what`` does not have.
    """
    text, video, text_mask, video_mask = sides
    dtype = accumulation_dtype(text.dtype)
    text_weight = uniform_weight(text_mask, text) if text_weight is None else text_weight.to(dtype)
    if not bidirectional:
        video_weight = None
    else:
        video_weight = uniform_weight(video_mask, video) if video_weight is None else video_weight.to(dtype)
    inputs = (text, video, text_weight, video_weight)
    refuse_forward_mode(inputs, what)
    refuse_func_grad(inputs, what)
    return inputs, (None, None) if masking == "none" else (text_mask, video_mask)


def _interact_prepared(
    sides: PreparedSides,
    text_weight: Tensor | None,
    *,
    normalize: bool,
    masking: str,
    bidirectional: bool,
    pooling: str,
    temperature: float,
    return_matches: bool,
) -> Tensor | tuple[Tensor, Matches]:
    """Compute :func:`interact` with prepared videos, from their lanes or, where there are none, from their tokens."""
    text, video, text_mask = sides
    if video.lanes is None:
        tokens, final = video.rows()
        if final and normalize:
            text = unit(text if masking == "none" else zero_masked(text, text_mask))
        dtype = torch.promote_types(text.dtype, tokens.dtype)
        return interact(
            validation.Sides(text.to(dtype), tokens.to(dtype), text_mask, video.mask),
            text_weight,
            video.weight if bidirectional else None,
            normalize=normalize and not final,
            masking=masking,
            bidirectional=bidirectional,
            pooling=pooling,
            temperature=temperature,
            return_matches=return_matches,
        )
    text_weight = uniform_weight(text_mask, text) if text_weight is None else text_weight
    text_weight = text_weight.to(accumulation_dtype(text.dtype))
    if masking == "none":
        text_mask = None
    refuse_forward_mode((text, text_weight), "token interaction")
    refuse_func_grad((text, text_weight), "token interaction")
    lanes, first, last = video.lanes
    arguments = text, text_weight, text_mask, lanes, first, last, video.shape[1], normalize, masking == "drl"
    if pooling != "max":
        return prepared_op.prepared_soft_token_interaction(
            *arguments, bidirectional, pooling == "logsumexp", temperature
        )
    logits, video_index, text_index = prepared_op.prepared_token_interaction(*arguments, bidirectional, return_matches)
    if not return_matches:
        return logits
    by_word = op.public_index(video_index, text_mask, None)
    return logits, Matches(by_word, op.public_index(text_index, None, video.mask) if bidirectional else None)


def refuse_unused_weight(video_weight: Tensor | None, bidirectional: bool, name: str = "video_weight") -> None:
    """Raise if weights of the video's tokens are given although only the text side is summed."""
    if video_weight is not None and not bidirectional:
        raise ValueError(
            f"{name} must be None when bidirectional=False (only the text side is summed), "
            f"got {validation.describe(video_weight)}"
        )


def refuse_forward_mode(inputs: tuple[Tensor | None, ...], what: str) -> None:
    """Raise if an input carries a forward-mode tangent: the operator would drop it without an error."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in inputs):
        raise NotImplementedError(
            f"drl_fast: the {what} has no forward-mode derivative; use backward(), or "
            f"drl_fast.reference.{what.replace(' ', '_')}"
        )


def refuse_func_grad(inputs: tuple[Tensor | None, ...], what: str) -> None:
    """Raise under ``torch.func.grad``, of which the operator would know nothing."""
    if torch.compiler.is_compiling():
        return
    tracked = torch._C._functorch.is_gradtrackingtensor
    # Weights made inside such a call, or inside jvp, are tracked but need no gradient.
    if any(x is not None and tracked(x) and x.requires_grad for x in inputs):
        raise NotImplementedError(
            f"drl_fast: the {what} does not work under torch.func.grad; use torch.autograd.grad or backward()"
        )
