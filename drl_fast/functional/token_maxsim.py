"""Every text token's own maximum, or soft maximum, over each video's tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import validation
from .prepared import PreparedVideos, check_sides
from .token_interaction import interact


def token_maxsim(
    text: Tensor,
    video: Tensor | PreparedVideos,
    text_mask: Tensor | None = None,
    video_mask: Tensor | None = None,
    *,
    normalize: bool = True,
    masking: str = "drl",
    pooling: str = "max",
    temperature: float = 1.0,
) -> Tensor:
    """Compute the maximum similarity of every text token over the tokens of every video.

    For code that pools these values itself: a softmax or top-k over words, or weights for each pair. The A x B x Nt x
    Nv similarities are never stored. Differentiable once in both features. Its defaults are DRL's; those of
    :func:`maxsim` are ColBERT's: ``normalize=False, masking="exclude"``.

    Args:
        text: (A, Nt, D) token features, raw; float32, float16, bfloat16 or float64.
        video: (B, Nv, D) frame features of the same dtype and device. Swap the sides for the frames' maxima over words.
            Or what :func:`prepare` made of them; its weights play no part.
        text_mask: (A, Nt), non-zero = real token, any dtype, holes allowed; None: all real.
        video_mask: (B, Nv), likewise.
        normalize: L2-normalise tokens first, as :func:`token_interaction` does.
        masking: ``"drl"``: a masked video token's similarity is 0 and competes for the maximum; ``"exclude"``: it never
            takes part; ``"none"``: masks are ignored. Except with ``"none"``, a masked text token's maximum is 0.
        pooling: what replaces the maximum: ``"max"``, ``"softmax"`` or ``"logsumexp"``, as in
            :func:`token_interaction`.
        temperature: of ``"softmax"`` and ``"logsumexp"``, > 0.

    Returns:
        (A, B, Nt), float32 (float64 for float64 input): a view whose last axis is not contiguous.

    Raises:
        ValueError, TypeError: as :func:`token_interaction`.

    Source: the inner maximum of arXiv 2203.07111, section 3.2; the softmax over frames or words: Ma et al., "X-CLIP",
    arXiv 2207.07285, section 3.4.
    """
    validation.option("masking", masking, validation.MASKINGS)
    validation.flag("normalize", normalize)
    temperature = validation.pooling(pooling, temperature)
    sides = check_sides(text, video, text_mask, video_mask, normalize=normalize, masking=masking)
    texts, words, _ = sides.text.shape
    # A word's own value is the score of a text that has no other word.
    one_word = sides._replace(
        text=sides.text.flatten(0, 1)[:, None],
        text_mask=None if sides.text_mask is None else sides.text_mask.flatten()[:, None],
    )
    weight = torch.ones((texts * words, 1), dtype=torch.float32, device=sides.text.device)
    scores = interact(
        one_word,
        weight,
        None,
        normalize=normalize,
        masking=masking,
        bidirectional=False,
        pooling=pooling,
        temperature=temperature,
    )
    assert isinstance(scores, Tensor)
    return scores.view(texts, words, len(sides.video)).transpose(1, 2)
