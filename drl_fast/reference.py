"""The reference: every public function in plain, dense PyTorch, easy to compare with the paper.

Tests and benchmarks compare against it; the rest of the library never imports it. It is slow and its memory is not
bounded: :func:`token_interaction` builds the A x B x Nt x Nv tensor that the library avoids. Gradients come from
autograd, second derivatives included, and everything also runs in float64.

Source: Wang et al., "Disentangled Representation Learning for Text-Video Retrieval", arXiv 2203.07111, section 3.2.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-12


def unit(tokens: Tensor) -> Tensor:
    """L2-normalise the last axis in float32 or better; a token of norm <= 1e-12 maps to 0 with gradient 0."""
    tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    alive = tokens.detach().norm(dim=-1, keepdim=True).nan_to_num(1.0) > NORM_EPS
    safe = torch.where(alive, tokens, 1.0)
    return torch.where(alive, safe / safe.norm(dim=-1, keepdim=True), 0.0)


def real_mask(mask: Tensor | None, tokens: Tensor) -> Tensor:
    """Return a boolean (rows, tokens) mask; None means that all tokens are real."""
    if mask is None:
        return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    return mask != 0


def uniform_weight(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Weight real tokens by 1 / (number of real tokens) and others by 0; a row without real tokens gets only 0."""
    count = mask.sum(dim=-1, keepdim=True).clamp(min=1)
    return mask.to(dtype) / count


def best_match(similarity: Tensor, competes: Tensor, zero: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return the maximum of ``similarity`` over ``dim`` among the tokens that compete, and its first index.

    If ``zero`` holds, a masked token's similarity of 0 competes too. If that 0 wins, or if no token competes, the
    maximum is 0 and the index is -1.
    """
    best, index = similarity.masked_fill(~competes, -torch.inf).max(dim)
    nobody = (zero & (best < 0)) | ~competes.any(dim).expand_as(best)
    return torch.where(nobody, 0.0, best), torch.where(nobody, -1, index)


def soft_pool(similarity: Tensor, takes_part: Tensor, dim: int, pooling: str, temperature: float) -> Tensor:
    """Pool ``similarity`` over ``dim`` by softmax or logsumexp, among the tokens that take part; 0 where none does."""
    takes_part = takes_part.expand_as(similarity)
    some = takes_part.any(dim, keepdim=True)
    # Without a token that takes part, both poolings and their gradients would be NaN.
    takes_part = takes_part | ~some
    scaled = similarity.masked_fill(~takes_part, -torch.inf) / temperature
    if pooling == "softmax":
        pooled = (scaled.softmax(dim) * similarity.masked_fill(~takes_part, 0)).sum(dim)
    else:
        pooled = temperature * scaled.logsumexp(dim)
    return torch.where(some.squeeze(dim), pooled, 0)


def token_interaction(
    text: Tensor,
    video: Tensor,
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
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor | None]]:
    """Compute the token interaction's logits (A, B); see :func:`drl_fast.functional.token_interaction`."""
    t_real, v_real = real_mask(text_mask, text), real_mask(video_mask, video)
    dtype = torch.promote_types(text.dtype, torch.float32)
    wt = uniform_weight(t_real, dtype) if text_weight is None else text_weight.to(dtype)
    wv = uniform_weight(v_real, dtype) if video_weight is None else video_weight.to(dtype)
    if masking == "none":
        t_real, v_real = torch.ones_like(t_real), torch.ones_like(v_real)

    # Masked tokens may hold anything, NaN included: replace them before any arithmetic.
    t = torch.where(t_real[..., None], text, 0).to(dtype)
    v = torch.where(v_real[..., None], video, 0).to(dtype)
    if normalize:
        t, v = unit(t), unit(v)

    similarity = torch.einsum("aid,bjd->abij", t, v)
    drl = masking == "drl"
    zero_v = drl & (~v_real).any(-1)[None, :, None]  # video b's row has a masked token
    zero_t = drl & (~t_real).any(-1)[:, None, None]
    m_t, frame = best_match(similarity, v_real[None, :, None, :], zero_v, dim=3)
    m_v, word = best_match(similarity, t_real[:, None, :, None], zero_t, dim=2)
    if pooling != "max":
        # Under "drl" masked tokens take part with the similarity 0 that their zeroed features give.
        m_t = soft_pool(similarity, v_real[None, :, None, :] | drl, 3, pooling, temperature)
        m_v = soft_pool(similarity, t_real[:, None, :, None] | drl, 2, pooling, temperature)
    # A masked token's own maximum is 0 whatever its weight, and it chooses no token.
    m_t, frame = torch.where(t_real[:, None, :], m_t, 0), torch.where(t_real[:, None, :], frame, -1)
    m_v, word = torch.where(v_real[None, :, :], m_v, 0), torch.where(v_real[None, :, :], word, -1)
    by_text = torch.einsum("abi,ai->ab", m_t, torch.where(t_real, wt, 0))
    by_video = torch.einsum("abj,bj->ab", m_v, torch.where(v_real, wv, 0))
    logits = (by_text + by_video) / 2 if bidirectional else by_text
    # A pair with an empty side scores 0, even if the other side has infinite weights.
    logits = torch.where(t_real.any(-1)[:, None] & v_real.any(-1)[None, :], logits, 0)
    return (logits, (frame, word if bidirectional else None)) if return_matches else logits


def topk(
    text: Tensor,
    video: Tensor,
    k: int,
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
) -> tuple[Tensor, Tensor]:
    """Sort all scores: the k best of every text (A, k), ties by the lower index, and their videos' indices."""
    scores = token_interaction(
        text,
        video,
        text_weight,
        video_weight,
        text_mask,
        video_mask,
        normalize=normalize,
        masking=masking,
        bidirectional=bidirectional,
        pooling=pooling,
        temperature=temperature,
    )
    assert isinstance(scores, Tensor)
    order = scores.nan_to_num(-torch.inf, torch.inf, -torch.inf).argsort(dim=1, descending=True, stable=True)[:, :k]
    return scores.gather(1, order), order


def token_maxsim(
    text: Tensor,
    video: Tensor,
    text_mask: Tensor | None = None,
    video_mask: Tensor | None = None,
    *,
    normalize: bool = True,
    masking: str = "drl",
    pooling: str = "max",
    temperature: float = 1.0,
) -> Tensor:
    """Compute every text token's maximum over the tokens of every video: (A, B, Nt)."""
    t_real, v_real = real_mask(text_mask, text), real_mask(video_mask, video)
    if masking == "none":
        t_real, v_real = torch.ones_like(t_real), torch.ones_like(v_real)
    dtype = torch.promote_types(text.dtype, torch.float32)
    t = torch.where(t_real[..., None], text, 0).to(dtype)
    v = torch.where(v_real[..., None], video, 0).to(dtype)
    if normalize:
        t, v = unit(t), unit(v)
    similarity, drl = torch.einsum("aid,bjd->abij", t, v), masking == "drl"
    pooled, _ = best_match(similarity, v_real[None, :, None, :], drl & (~v_real).any(-1)[None, :, None], dim=3)
    if pooling != "max":
        pooled = soft_pool(similarity, v_real[None, :, None, :] | drl, 3, pooling, temperature)
    # A masked token has no value of its own, and neither has a token for a video without a real token.
    return torch.where(t_real[:, None, :] & v_real.any(-1)[None, :, None], pooled, 0)


def maxsim(
    query: Tensor,
    document: Tensor,
    query_mask: Tensor | None = None,
    document_mask: Tensor | None = None,
    *,
    query_weight: Tensor | None = None,
    normalize: bool = False,
    reduction: str = "sum",
    masking: str = "exclude",
) -> Tensor:
    """Compute ColBERT's late interaction (Khattab & Zaharia 2020, section 3.3): logits (A, B)."""
    real = real_mask(query_mask, query)
    query_weight = real.to(torch.promote_types(query.dtype, torch.float32)) if query_weight is None else query_weight
    if reduction == "mean":
        query_weight = query_weight / real.sum(-1, keepdim=True).clamp(min=1)
    scores = token_interaction(
        query,
        document,
        query_weight,
        None,
        query_mask,
        document_mask,
        normalize=normalize,
        masking=masking,
        bidirectional=False,
    )
    assert isinstance(scores, Tensor)
    return scores


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
    """Score every text against candidates of its own; see :func:`drl_fast.functional.rerank`."""
    scores = []
    for a in range(len(text)):
        rows = a if offsets is None else slice(int(offsets[a]), int(offsets[a + 1]))
        own = [None if x is None else x[rows] for x in (candidates, candidate_weight, candidate_mask)]
        one = [None if x is None else x[a : a + 1] for x in (text, text_weight, text_mask)]
        assert one[0] is not None
        assert own[0] is not None
        found = token_interaction(
            one[0],
            own[0],
            one[1],
            own[1],
            one[2],
            own[2],
            normalize=normalize,
            masking=masking,
            bidirectional=bidirectional,
            pooling=pooling,
            temperature=temperature,
        )
        assert isinstance(found, Tensor)
        scores.append(found[0])
    if not scores:
        return text.new_zeros(candidates.shape[:-2], dtype=torch.promote_types(text.dtype, torch.float32))
    return torch.cat(scores) if offsets is not None else torch.stack(scores)


def dot_product(
    text: Tensor, video: Tensor, text_mask: Tensor | None = None, video_mask: Tensor | None = None
) -> Tensor:
    """Score the last real token against the mean-pooled frames (DP, CLIP4Clip): logits (A, B)."""
    t_real, v_real = real_mask(text_mask, text), real_mask(video_mask, video)
    dtype = torch.promote_types(text.dtype, torch.float32)
    t = torch.where(t_real[..., None], text, 0).to(dtype)
    v = unit(torch.where(v_real[..., None], video, 0).to(dtype))
    last = t_real.shape[1] - 1 - t_real.int().flip(1).argmax(dim=1)
    end_token = unit(t[torch.arange(len(t)), last])
    pooled = unit((v * uniform_weight(v_real, dtype)[..., None]).sum(1))
    return end_token @ pooled.T


def positive_mask(positives: Tensor | None, logits: Tensor) -> Tensor:
    """Return positives as a bool (A, B) matrix; None: the diagonal."""
    if positives is None:
        return torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    if positives.dtype == torch.bool:
        return positives
    return positives[:, None] == torch.arange(logits.shape[1], device=logits.device)


def info_nce(
    logits: Tensor,
    logit_scale: float | Tensor,
    *,
    positives: Tensor | None = None,
    direction: str = "both",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Average the row-wise and column-wise cross-entropies; see :func:`drl_fast.functional.info_nce`."""
    scaled, positive = logits * logit_scale, positive_mask(positives, logits)
    losses = []
    for x, p in ((scaled, positive), (scaled.T, positive.T)):
        rows = p.any(1)
        log_softmax = x.log_softmax(1)[rows]
        nll = -torch.where(p[rows], log_softmax, 0).sum(1) / p[rows].sum(1)
        if label_smoothing:
            nll = (1 - label_smoothing) * nll - label_smoothing * log_softmax.mean(1)
        losses.append(nll.mean())
    return {"t2v": losses[0], "v2t": losses[1], "both": (losses[0] + losses[1]) / 2}[direction]


def sigmoid_loss(
    logits: Tensor, logit_scale: float | Tensor, logit_bias: float | Tensor, positives: Tensor | None = None
) -> Tensor:
    """Compute SigLIP's loss (arXiv 2303.15343, section 3.2)."""
    z = torch.where(positive_mask(positives, logits), 1, -1)
    return -F.logsigmoid(z * (logits * logit_scale + logit_bias)).sum() / len(logits)


def standardize(x: Tensor) -> Tensor:
    """Standardise each channel of x (N, D) with its mean and unbiased deviation; a constant channel becomes 0."""
    # Subtract the first row: a constant channel is then exactly 0, without rounding.
    x = x - x[:1].detach()
    std = x.detach().std(0)
    constant = std <= 1e-12
    centred = torch.where(constant, 0, x - x.mean(0))
    return centred / torch.where(constant, 1, torch.where(constant, 1, x).std(0))


def cross_correlation(x: Tensor, y: Tensor, weight: Tensor | None, divisor: Tensor | float) -> Tensor:
    """Compute the weighted cross-correlation (D, D) of rows x, y (N, D) after standardising them."""
    x, y = standardize(x), standardize(y)
    return (x if weight is None else x * weight[:, None]).T @ y / divisor


def decorrelation(correlation: Tensor, alpha_on: float, alpha_off: float) -> Tensor:
    """Sum the squared distances of C's diagonal from 1 and of all other entries from 0, weighted by the alphas."""
    diagonal = correlation.diagonal()
    off = correlation - torch.diag(diagonal)
    return alpha_on * (diagonal - 1).square().sum() + alpha_off * off.square().sum()


def cross_correlation_loss(
    x: Tensor,
    y: Tensor,
    weight: Tensor | None = None,
    *,
    alpha_on: float,
    alpha_off: float,
    divisor: float | None = None,
    process_group: Any = None,
) -> Tensor:
    """Compute Barlow Twins' loss (arXiv 2103.03230) of rows x, y (N, D). ``process_group`` is ignored."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    weight = None if weight is None else weight.to(dtype)
    c = cross_correlation(x.to(dtype), y.to(dtype), weight, len(x) if divisor is None else divisor)
    return decorrelation(c, alpha_on, alpha_off)


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
    process_group: Any = None,
) -> Tensor:
    """Compute CDCR of B pairs (arXiv 2203.07111, section 3.3). ``process_group`` is ignored."""
    t_real, v_real = real_mask(text_mask, text), real_mask(video_mask, video)
    paired = t_real.any(-1) & v_real.any(-1)
    t_real, v_real = t_real & paired[:, None], v_real & paired[:, None]
    t, v = unit(torch.where(t_real[..., None], text, 0)), unit(torch.where(v_real[..., None], video, 0))
    s = torch.einsum("bid,bjd->bij", t, v)
    frame = s.masked_fill(~v_real[:, None, :], -torch.inf).argmax(2)
    word = s.masked_fill(~t_real[:, :, None], -torch.inf).argmax(1)
    pair = torch.arange(len(text), device=text.device)[:, None]
    terms = []
    for own, real, other, partner, weight in ((t, t_real, v, frame, text_weight), (v, v_real, t, word, video_weight)):
        x, y = own[real], other[pair, partner][real]
        w = None if weight is None else weight.to(x.dtype)[real]
        terms.append(cross_correlation(x, y, w, len(text) if text_weight is not None else len(x)))
    return decorrelation((terms[0] + terms[1]) / 2, alpha_on, alpha_off)


def token_contrastive_loss(
    text: Tensor,
    video: Tensor,
    text_weight: Tensor | None = None,
    video_weight: Tensor | None = None,
    text_mask: Tensor | None = None,
    video_mask: Tensor | None = None,
    *,
    logit_scale: float | Tensor,
    masking: str = "drl",
    normalize: bool = True,
    owner: Tensor | None = None,
    loss: str = "softmax",
    logit_bias: float | Tensor | None = None,
    direction: str = "both",
    positives: Tensor | None = None,
    pooling: str = "max",
    temperature: float = 1.0,
    bidirectional: bool = True,
    process_group: object = None,
) -> Tensor:
    """Compute a contrastive loss of the token interaction from all its logits. ``process_group`` is ignored."""
    logits = token_interaction(
        text,
        video,
        text_weight,
        video_weight,
        text_mask,
        video_mask,
        normalize=normalize,
        masking=masking,
        bidirectional=bidirectional,
        pooling=pooling,
        temperature=temperature,
    )
    assert isinstance(logits, Tensor)
    scaled = logits * logit_scale
    if owner is not None:
        same = owner[:, None] == owner[None, :]
        scaled = scaled.masked_fill(same.fill_diagonal_(False), -torch.inf)
    if loss == "sigmoid":
        assert logit_bias is not None
        return sigmoid_loss(scaled, 1.0, logit_bias, positives)
    return info_nce(scaled, 1.0, positives=positives, direction=direction)
