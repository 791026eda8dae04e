"""InfoNCE straight from tokens and weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import validation
from ..distributed.exchange import Shape, over
from ..distributed.group import Group, Terms
from ..ops import token_contrastive_loss as ops
from ._inputs import check_sides, uniform_weight
from .info_nce import check_scale
from .token_interaction import refuse_forward_mode

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """``info_nce(token_interaction(...), logit_scale)`` without the B x B logits and without a match kept for any pair.

    Blocks of texts are scored against all videos, once in the forward and once more in the backward; memory beyond the
    inputs and their gradients is one block (some 16 MB) and six numbers a pair. Differentiable once in features,
    weights and ``logit_scale``; a second derivative or forward-mode AD raises.

    With ``process_group`` each of W ranks passes its own pairs and all get the loss of the whole batch, the same bits.
    Pairs, Nt and Nv may differ between ranks, 0 pairs on some are fine; options and D may not. Gradients of features
    and token weights are W times the one process's, ``logit_scale``'s average to it, so that DDP's mean over ranks is
    the one process's gradient for encoders, weight heads and ``logit_scale`` alike. All ranks must run the backward if
    one does, on the same multiple of the loss.

    What is communicated: a header of 26 integers first, one number at the end. Every rank scores its own texts against
    all videos. Up to 256 MB of videos over all ranks they are gathered once, their gradients come back by one
    all-to-all in float32, and every rank holds both. Beyond, videos go round a ring, in the forward and again in the
    backward, each followed by its gradient in float32: a rank holds two ranks' videos and three ranks' gradients. Two
    numbers a pair and rank go home with the videos either way, and two numbers of every pair are gathered.

    Args:
        text: (B, Nt, D) token features, raw; float32, float16, bfloat16 or float64. Text i belongs to video i.
        video: (B, Nv, D), the same dtype and device.
        text_weight: (B, Nt) weights, any float dtype, used as given; None is uniform over real tokens (TI).
        video_weight: (B, Nv), likewise.
        text_mask: (B, Nt), non-zero = real token, any dtype, holes allowed; None: all real.
        video_mask: (B, Nv), likewise.
        logit_scale: the factor itself (exp already taken, open_clip's ClipLoss convention): a positive float, or a
            0-dim tensor that gets a gradient.
        masking: ``"drl"``, ``"exclude"`` or ``"none"``, as in :func:`token_interaction`.
        normalize: L2-normalise tokens first.
        owner: (B,) integer ids. Other pairs of the same id (captions of one video) are left out of a text's and a
            video's negatives, across ranks as well.
        process_group: a torch.distributed group whose backend serves the tensors' device; None: this process alone.
            ``torch.distributed.group.WORLD`` is None before ``init_process_group``. Not within ``torch.compile``.

    Returns:
        A scalar, float32 (float64 for float64 input), the mean of the two cross-entropies. B = 1 gives 0.

    Raises:
        ValueError: wrong rank, sizes that do not match, text and video of different batch, B = 0, another device, an
            unknown ``masking``, a float ``logit_scale`` that is not positive and finite.
        TypeError: not a tensor, a dtype that is not served, ``owner`` not of integers.

        Over a group: a rank's own error on that rank and RuntimeError with its words on all others; ValueError with the
        same words on all where they differ in D, dtype, options or what needs gradients, or hold no pair
        together. A rank that died, never calls or fails while computing shows by the group's timeout alone: 30
        minutes for gloo, 10 for NCCL, unless ``init_process_group`` or ``new_group`` got ``timeout=timedelta(...)``.

    Source: arXiv 2203.07111, section 3.4; the running log-sum-exp is Milakov & Gimelshein's, arXiv 1805.02867.
    """
    arguments = (text, video, text_weight, video_weight, text_mask, video_mask, logit_scale, masking, normalize, owner)
    if process_group is not None:
        return _over_group(Group(process_group), *arguments)
    pairs = _check(*arguments)
    if len(pairs.text.features) == 0:
        raise ValueError(f"text must hold at least one pair, got shape {tuple(text.shape)}; skip empty batches")
    return ops.token_contrastive_loss(*pairs)


class Pairs(NamedTuple):
    """Checked arguments."""

    text: ops.Tokens
    video: ops.Tokens
    logit_scale: float | Tensor
    rule: ops.Rule


def _over_group(group: Group, *arguments: Any) -> Tensor:
    """The loss of all ranks' pairs, after they have agreed on what they compute."""
    checked: list[Pairs] = []

    def terms() -> Terms:
        pairs = _check(*arguments)
        checked.append(pairs)
        return _terms(group, pairs, *arguments)

    sizes = group.agree("token_contrastive_loss", terms)
    (pairs,) = checked
    if sum(size["rows"] for size in sizes) == 0:
        raise ValueError("text must hold at least one pair on some rank of the group, got none; skip empty batches")
    shapes = [Shape(size["rows"], size["Nv"], bool(size["masked"])) for size in sizes]
    return ops.token_contrastive_loss(*pairs, over(group, pairs.video, shapes))


def _terms(group: Group, pairs: Pairs, *arguments: Any) -> Terms:
    text, video, text_weight, video_weight, _, _, scale, masking, normalize, owner = arguments
    features, mask = pairs.video.features, pairs.video.mask
    group.require("text", features)
    inputs = {
        "text": text,
        "video": video,
        "text_weight": text_weight,
        "video_weight": video_weight,
        "logit_scale": scale,
    }
    same: dict[str, object] = {
        "D": features.shape[2],
        "dtype": features.dtype,
        "device type": features.device.type,
        "masking": masking,
        "normalize": normalize,
        "text_weight": "None" if text_weight is None else "weights",
        "video_weight": "None" if video_weight is None else "weights",
        "owner": "None" if owner is None else "ids",
        "logit_scale": _value(pairs.logit_scale),
    }
    differentiated = [name for name, x in inputs.items() if isinstance(x, Tensor) and x.requires_grad]
    # Else one rank's backward would wait for others that have none. An empty batch must ask for gradients as well.
    same["what needs gradients"] = (", ".join(differentiated) if torch.is_grad_enabled() else "") or "nothing"
    return Terms({"rows": len(features), "Nv": features.shape[1], "masked": int(mask is not None)}, same)


def _value(scale: float | Tensor) -> object:
    """What the ranks compare: the number, but for a tensor elsewhere than on the CPU, where reading it would wait."""
    if not isinstance(scale, Tensor):
        return scale
    return f"a tensor of {scale.item()}" if scale.device.type == "cpu" else "a tensor"


def _check(
    text: Tensor,
    video: Tensor,
    text_weight: Tensor | None,
    video_weight: Tensor | None,
    text_mask: Tensor | None,
    video_mask: Tensor | None,
    logit_scale: float | Tensor,
    masking: str,
    normalize: bool,
    owner: Tensor | None,
) -> Pairs:
    validation.option("masking", masking, validation.MASKINGS)
    validation.flag("normalize", normalize)
    text, video, t_mask, v_mask = check_sides(text, video, text_mask, video_mask)
    scale = check_scale(logit_scale, text.device)
    if len(text) != len(video):
        raise ValueError(
            f"video must have as many rows as text, one video a text: {len(text)}, got {len(video)}; "
            "repeat a video for each of its captions and say so with owner"
        )
    wt = uniform_weight(t_mask, text) if text_weight is None else text_weight
    wv = uniform_weight(v_mask, video) if video_weight is None else video_weight
    wt = validation.weight("text_weight", wt, text, "B, Nt", "text")
    wv = validation.weight("video_weight", wv, video, "B, Nv", "video")
    refuse_forward_mode((text, video, wt, wv, scale if isinstance(scale, Tensor) else None), "token contrastive loss")
    ids = None if owner is None else _owner(owner, text)
    if masking == "none":
        t_mask = v_mask = None
    sides = ops.Tokens(text, wt, t_mask, ids), ops.Tokens(video, wv, v_mask, ids)
    return Pairs(*sides, scale, ops.Rule(normalize, masking == "drl"))


def _owner(value: object, text: Tensor) -> Tensor:
    """Check (B,) ids of the videos that the pairs belong to."""
    owner = validation.tensor("owner", value)
    if tuple(owner.shape) != (len(text),):
        raise ValueError(f"owner must be (B,) = ({len(text)},) to match text, got {tuple(owner.shape)}")
    if owner.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"owner must hold integers, one id a video, got {owner.dtype}; convert it with owner.long()")
    if owner.device != text.device:
        raise ValueError(
            f"owner must be on text's device {text.device}, got {owner.device}; move it with owner.to(text.device)"
        )
    return owner.to(torch.int64)
