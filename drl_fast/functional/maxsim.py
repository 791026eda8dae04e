"""ColBERT's late interaction on the token-interaction operator."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import validation
from ..numerics import accumulation_dtype
from .prepared import PreparedVideos, check_sides
from .token_interaction import interact


def maxsim(
    query: Tensor,
    document: Tensor | PreparedVideos,
    query_mask: Tensor | None = None,
    document_mask: Tensor | None = None,
    *,
    query_weight: Tensor | None = None,
    normalize: bool = False,
    reduction: str = "sum",
    masking: str = "exclude",
) -> Tensor:
    """Score every query against every document: sum over query tokens the best match among document tokens.

    Its defaults are ColBERT's: tokens as given, and masked tokens left out. :func:`token_maxsim` has DRL's:
    ``normalize=True, masking="drl"``.

    Args:
        query: (A, Nt, D) token features; float32, float16, bfloat16 or float64.
        document: (B, Nv, D), the same dtype and device, or what :func:`prepare` made of them; its weights play no part.
        query_mask: (A, Nt), non-zero = real, holes allowed; None: all real.
        document_mask: (B, Nv), likewise.
        query_weight: (A, Nt), any float dtype; None: 1 for every real token.
        normalize: L2-normalise tokens first.
        reduction: ``"sum"``, or ``"mean"``: the sum divided by the query's number of real tokens (Video-ColBERT).
        masking: ``"exclude"``: masked tokens take no part and are never read (ColBERT); ``"drl"``: a masked document
            token's similarity is 0 and competes for the maximum (PyLate's ``colbert_scores``); ``"none"``: masked
            document tokens are tokens like all others, and ``query_mask`` only shapes the weights.

    Returns:
        (A, B) scores, float32 (float64 for float64 input). A query or document without a real token scores 0,
            except with ``masking="none"``.

    Raises:
        ValueError: an unknown ``reduction``, or as :func:`token_interaction`.
        TypeError: as :func:`token_interaction`.

    Source: Khattab & Zaharia, "ColBERT", arXiv 2004.12832, section 3.3; the mean: Reddy et al., "Video-ColBERT", arXiv
    2503.19009, section 3.1.
    """
    validation.flag("normalize", normalize)
    validation.option("reduction", reduction, ("sum", "mean"))
    validation.option("masking", masking, validation.MASKINGS)
    names = "query", "document"
    sides = check_sides(query, document, query_mask, document_mask, names, normalize=normalize, masking=masking)
    if query_weight is None:
        dtype = accumulation_dtype(sides.text.dtype)
        ones = torch.ones(sides.text.shape[:2], dtype=dtype, device=sides.text.device)
        weight = ones if sides.text_mask is None else sides.text_mask.to(dtype)
    else:
        weight = validation.weight("query_weight", query_weight, sides.text, "A, Nt", "query")
    if reduction == "mean":
        real = sides.text.shape[1] if sides.text_mask is None else sides.text_mask.sum(1, keepdim=True).clamp(min=1)
        weight = weight / real
    scores = interact(sides, weight, None, normalize=normalize, masking=masking, bidirectional=False)
    assert isinstance(scores, Tensor)
    return scores
