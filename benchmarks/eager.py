"""What users replace: the token interaction as public text-video retrieval code writes it, in plain PyTorch.

All A x B x Nt x Nv similarities exist at once, masks multiply them, and each maximum is a pass of its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def token_interaction(
    text: Tensor, video: Tensor, text_weight: Tensor, video_weight: Tensor, text_mask: Tensor, video_mask: Tensor
) -> Tensor:
    """Both directions, logits (A, B), for text (A, Nt, D) and video (B, Nv, D)."""
    words, frames = F.normalize(text, dim=-1), F.normalize(video, dim=-1)
    similarity = torch.einsum("atd,bvd->abtv", words, frames)
    similarity = similarity * text_mask[:, None, :, None]
    similarity = similarity * video_mask[None, :, None, :]
    best_frame = similarity.max(dim=3).values
    best_word = similarity.max(dim=2).values
    by_text = torch.einsum("abt,at->ab", best_frame, text_weight)
    by_video = torch.einsum("abv,bv->ab", best_word, video_weight)
    return (by_text + by_video) / 2


def maxsim(query: Tensor, document: Tensor, query_mask: Tensor) -> Tensor:
    """One direction, tokens already normalised: the sum over real query tokens of the best document token."""
    similarity = torch.einsum("atd,bvd->abtv", query, document)
    return torch.einsum("abt,at->ab", similarity.max(dim=3).values, query_mask)
