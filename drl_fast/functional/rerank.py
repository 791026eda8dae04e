"""Token-wise interaction of each text with candidates of its own."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import autocast, validation
from ..ops import rerank as op
from .prepared import PreparedVideos
from .token_interaction import operands, refuse_unused_weight


class Candidates(NamedTuple):
    """Checked texts and candidates; ``sides`` holds the candidates in one row, in place of the videos."""

    sides: validation.Sides
    offsets: Tensor  # (A + 1,) int64
    shape: tuple[int, ...]  # of the scores
    letters: str  # the candidates' dimensions, for error messages


def rerank(
    text: Tensor,
    candidates: Tensor,
    text_weight: Tensor | None = None,
    candidate_weight: Tensor | None = None,
    text_mask: Tensor | None = None,
    candidate_mask: Tensor | None = None,
    *,
    offsets: Tensor | None = None,
    normalize: bool = True,
    masking: str = "drl",
    bidirectional: bool = True,
    pooling: str = "max",
    temperature: float = 1.0,
) -> Tensor:
    """Score every text against candidates of its own, such as the videos that a first search found for it.

    Row by row it gives what :func:`token_interaction` gives for that text and its candidates, without scoring a text
    against the candidates of others. Differentiable once in features and weights; a second derivative or forward-mode
    AD raises. If all texts have the same candidates, :func:`token_interaction` is faster.

    >>> text, candidates = torch.randn(2, 8, 64), torch.randn(2, 5, 12, 64)
    >>> drl_fast.rerank(text, candidates).shape  # 5 candidates for each of 2 texts
    torch.Size([2, 5])
    >>> offsets = torch.tensor([0, 3, 10])  # 3 candidates for the first text, 7 for the second
    >>> drl_fast.rerank(text, candidates.flatten(0, 1), offsets=offsets).shape
    torch.Size([10])

    Args:
        text: (A, Nt, D) token features, raw; float32, float16, bfloat16 or float64.
        candidates: (A, K, Nv, D) frame features of each text's K candidates, of the same dtype and device. With
            ``offsets``: (sum K, Nv, D).
        text_weight: (A, Nt) weights, any float dtype, used as given; None: uniform over real tokens.
        candidate_weight: (A, K, Nv), with ``offsets`` (sum K, Nv), likewise. Must be None when ``bidirectional=False``.
        text_mask: (A, Nt), non-zero = real token, any dtype, holes allowed; None: all real.
        candidate_mask: (A, K, Nv), with ``offsets`` (sum K, Nv), likewise.
        offsets: (A + 1,) int64, from 0 to sum K, not decreasing: text a owns the candidates
            ``offsets[a]:offsets[a + 1]``, possibly none. None: K for each text.
        normalize: as in :func:`token_interaction`, and so are the other options.
        masking: ``"drl"``, ``"exclude"`` or ``"none"``.
        bidirectional: False: only the text side's sum, not halved.
        pooling: ``"max"``, ``"softmax"`` or ``"logsumexp"``.
        temperature: of ``"softmax"`` and ``"logsumexp"``, > 0.

    Returns:
        (A, K) scores, with ``offsets`` (sum K,); float32 (float64 for float64 input).

    Raises:
        ValueError: as :func:`token_interaction`; another number of texts than of rows of candidates; offsets that do
            not fit (their values are checked on the CPU in eager mode only).
        TypeError: not a tensor, or an unsupported dtype.

    Source: arXiv 2203.07111, section 3.2; scoring again what a first stage found: Khattab & Zaharia, "ColBERT", arXiv
    2004.12832, section 3.5.
    """
    validation.option("masking", masking, validation.MASKINGS)
    for name, value in (("normalize", normalize), ("bidirectional", bidirectional)):
        validation.flag(name, value)
    temperature = validation.pooling(pooling, temperature)
    checked = check_candidates(text, candidates, text_mask, candidate_mask, offsets)
    if text_weight is not None:
        text_weight = validation.weight("text_weight", text_weight, checked.sides.text, "A, Nt", "text")
    refuse_unused_weight(candidate_weight, bidirectional, "candidate_weight")
    if candidate_weight is not None:
        letters = checked.letters.removesuffix(", D")
        candidate_weight = validation.weight("candidate_weight", candidate_weight, candidates, letters, "candidates")
        candidate_weight = candidate_weight.reshape(checked.sides.video.shape[:2])
    return score(
        checked,
        text_weight,
        candidate_weight,
        normalize=normalize,
        masking=masking,
        bidirectional=bidirectional,
        pooling=pooling,
        temperature=temperature,
    )


def check_candidates(
    text: Tensor,
    candidates: Tensor,
    text_mask: Tensor | None,
    candidate_mask: Tensor | None,
    offsets: Tensor | None,
) -> Candidates:
    """Check texts, candidates, masks and offsets, and under autocast cast the features.

    Raises:
        ValueError, TypeError: as :func:`rerank`.
    """
    text = autocast.cast(validation.tokens("text", text, "A, Nt, D"))
    texts = len(text)
    if isinstance(candidates, PreparedVideos):
        raise TypeError(
            "candidates must be a torch.Tensor, got PreparedVideos, which save nothing if a candidate meets one text; "
            "pass the tokens of each text's candidates"
        )
    if offsets is None and isinstance(candidates, Tensor) and candidates.dim() == 3:
        raise ValueError(
            f"candidates must be (A, K, Nv, D), got shape {tuple(candidates.shape)}; with (sum K, Nv, D) also pass "
            "offsets=, and for candidates that all texts share call token_interaction"
        )
    letters = "A, K, Nv, D" if offsets is None else "sum K, Nv, D"
    candidates = autocast.cast(validation.tokens("candidates", candidates, letters))
    validation.same_features(text, candidates, "text", "candidates")
    if offsets is None and len(candidates) != texts:
        raise ValueError(
            f"candidates must have a row for each of the {texts} texts, got shape {tuple(candidates.shape)}; pass "
            "offsets= if numbers of candidates differ"
        )
    text_mask = validation.mask("text_mask", text_mask, text, "A, Nt", "text")
    mask_letters = letters.removesuffix(", D")
    candidate_mask = validation.mask("candidate_mask", candidate_mask, candidates, mask_letters, "candidates")
    shape = tuple(candidates.shape[:-2])
    if offsets is None:
        offsets = torch.arange(texts + 1, device=text.device) * shape[1]
        candidates = candidates.flatten(0, 1)
        candidate_mask = None if candidate_mask is None else candidate_mask.flatten(0, 1)
    else:
        offsets = check_offsets(offsets, text, len(candidates))
    return Candidates(validation.Sides(text, candidates, text_mask, candidate_mask), offsets, shape, letters)


def check_offsets(value: object, text: Tensor, candidates: int) -> Tensor:
    """Return the offsets in memory of their own; the backward pass reads them again."""
    offsets, texts = validation.tensor("offsets", value), len(text)
    if offsets.dtype != torch.int64:
        raise TypeError(f"offsets must be int64, got {offsets.dtype}; convert them with offsets.long()")
    if tuple(offsets.shape) != (texts + 1,):
        raise ValueError(
            f"offsets must be (A + 1,) = ({texts + 1},), one more than texts, got {tuple(offsets.shape)}; begin with 0 "
            "and end with the number of candidates"
        )
    if offsets.device != text.device:
        raise ValueError(
            f"offsets must be on text's device {text.device}, got {offsets.device}; move them with "
            "offsets.to(text.device)"
        )
    if validation.values_are_visible(offsets) and validation.has_values(offsets):
        first, last = int(offsets[0]), int(offsets[-1])
        if (first, last) != (0, candidates):
            raise ValueError(
                f"offsets must go from 0 to the number of candidates, {candidates}, got {first} to {last}; text a owns "
                "candidates offsets[a]:offsets[a + 1]"
            )
        if bool((offsets.diff() < 0).any()):
            row = int((offsets.diff() < 0).int().argmax())
            raise ValueError(
                f"offsets must not decrease, got {int(offsets[row])} before {int(offsets[row + 1])} at text {row}; "
                "build them with a cumulative sum of the numbers of candidates"
            )
    return validation.private_copy(offsets)


def score(
    checked: Candidates,
    text_weight: Tensor | None,
    candidate_weight: Tensor | None,
    *,
    normalize: bool,
    masking: str,
    bidirectional: bool,
    pooling: str,
    temperature: float,
) -> Tensor:
    """Compute :func:`rerank` of arguments that are checked; weights are (A, Nt) and (sum K, Nv)."""
    inputs, masks = operands(
        checked.sides, text_weight, candidate_weight, masking=masking, bidirectional=bidirectional, what="rerank"
    )
    options = normalize, masking == "drl", pooling, temperature
    return op.rerank(*inputs, *masks, checked.offsets, *options).view(checked.shape)
