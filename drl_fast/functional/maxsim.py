"""ColBERT's late interaction on the token-interaction operator."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import validation
from .token_interaction import interact


def maxsim(
    query: Tensor,
    document: Tensor,
    query_mask: Tensor | None = None,
    document_mask: Tensor | None = None,
    *,
    query_weight: Tensor | None = None,
    normalize: bool = False,
) -> Tensor:
    """Score every query against every document: sum over query tokens the best match among document tokens.

    Args:
        query: (A, Nt, D) token features; float32, float16, bfloat16 or float64.
        document: (B, Nv, D), the same dtype and device.
        query_mask: (A, Nt), non-zero = real, holes allowed; None: all real. Masked tokens are excluded, never read.
        document_mask: (B, Nv), likewise.
        query_weight: (A, Nt), any float dtype; None: 1 for every real token.
        normalize: L2-normalise tokens first.

    Returns:
        (A, B) scores, float32 (float64 for float64 input). A query or document without a real token scores 0.

    Raises:
        ValueError, TypeError: as :func:`token_interaction`.

    Source: Khattab & Zaharia, "ColBERT", arXiv 2004.12832, section 3.3.
    """
    validation.flag("normalize", normalize)
    sides = validation.check_sides(query, document, query_mask, document_mask, ("query", "document"))
    if query_weight is None:
        query_weight = torch.ones(query.shape[:2], dtype=torch.float32, device=query.device)
    query_weight = validation.weight("query_weight", query_weight, sides.text, "A, Nt", "query")
    scores = interact(sides, query_weight, None, normalize=normalize, masking="exclude", bidirectional=False)
    assert isinstance(scores, Tensor)
    return scores
