"""InfoNCE from tokens and weights, without the logit matrix where that is large."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import validation
from ..distributed.exchange import Shape, WeightedTokens, choose_exchange
from ..distributed.group import Group, agree
from ..numerics import uniform_weight
from ..ops import token_contrastive_loss as ops
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
    """Compute ``info_nce(token_interaction(...), logit_scale)`` with memory that does not grow with B^2 for large B.

    In one process, logits and matches of all pairs are kept for the backward pass if they fit 256 MB; the shapes alone
    decide. That is enough for 2,364 pairs of 32 words and 12 frames. Otherwise blocks of texts are scored against all
    videos twice, once in each pass, and memory beyond the inputs and their gradients is one block (about 16 MB), six
    numbers per training example, and on the CPU copies of masks, ids and weights that need no gradient. The loss is
    differentiable once in features, weights and ``logit_scale``; a second derivative or forward-mode AD raises.

    With ``process_group`` each of W ranks passes its own pairs, and all get the loss of the whole batch, with the same
    bits. The number of pairs, Nt and Nv may differ between ranks, and a rank may have no pair; options and D must be
    the same. Gradients of features and token weights are W times those of a single process, and the mean over ranks of
    ``logit_scale``'s gradient equals the single process's. DDP's mean over ranks then gives the single process's
    gradient for encoders, weight heads and ``logit_scale``. If one rank runs the backward pass, all must, on the same
    multiple of the loss.

    Communication: every rank scores its own texts against all videos. If the videos of all ranks take at most 256 MB,
    every rank gathers them once and returns their gradients by one all-to-all in float32; it holds both. Otherwise
    videos travel round a ring in both passes, each followed by its gradient in float32; a rank holds two ranks' videos
    and four ranks' gradients. In addition the ranks exchange a header of 26 integers, two numbers per pair and rank,
    two numbers per pair, and one number at the end.

    Args:
        text: (B, Nt, D) token features, raw; float32, float16, bfloat16 or float64. Text i belongs to video i.
        video: (B, Nv, D), the same dtype and device.
        text_weight: (B, Nt) weights, any float dtype, used as given; None is uniform over real tokens (TI).
        video_weight: (B, Nv), likewise.
        text_mask: (B, Nt), non-zero = real token, any dtype, holes allowed; None: all real.
        video_mask: (B, Nv), likewise.
        logit_scale: the factor of the logits, a positive float or a 0-dim tensor that gets a gradient. Pass
            ``logit_scale.exp()`` (about 100), not CLIP's log-scale parameter.
        masking: ``"drl"``, ``"exclude"`` or ``"none"``, as in :func:`token_interaction`.
        normalize: L2-normalise tokens first.
        owner: (B,) integer ids, such as the number of the video. Pairs with the same id are not negatives of each
            other, also across ranks.
        process_group: a torch.distributed group whose backend serves the tensors' device; None: this process alone.
            ``torch.distributed.group.WORLD`` is None before ``init_process_group``. Not within ``torch.compile``.

    Returns:
        A scalar, float32 (float64 for float64 input), the mean of the two cross-entropies. B = 1 gives 0.

    Raises:
        ValueError: wrong rank, sizes or devices that do not match, different numbers of texts and videos, B = 0, an
            unknown ``masking``, or a float ``logit_scale`` that is not positive and finite.
        TypeError: not a tensor, an unsupported dtype, or ``owner`` does not hold integers.

        Over a group, an error on one rank raises RuntimeError with its message on all others. All ranks raise the same
        ValueError if they differ in D, dtype, options or which inputs need gradients, or if no rank has a pair. A rank
        that dies, never calls, or fails while computing is only noticed by the group's timeout: 30 minutes for gloo, 10
        for NCCL, unless ``init_process_group`` or ``new_group`` got ``timeout=timedelta(...)``.

    Source: arXiv 2203.07111, section 3.4; the running log-sum-exp is Milakov & Gimelshein's, arXiv 1805.02867.
    """
    group = None if process_group is None else Group(process_group)
    with agree(group, "token_contrastive_loss") as agreement:
        validation.option("masking", masking, validation.MASKINGS)
        validation.flag("normalize", normalize)
        sides = validation.check_sides(text, video, text_mask, video_mask)
        scale = check_scale(logit_scale, sides.text.device)
        if len(sides.text) != len(sides.video):
            raise ValueError(
                f"video must have as many rows as text, {len(sides.text)}, got {len(sides.video)}; "
                "repeat a video for each of its captions and mark them with owner"
            )
        wt = uniform_weight(sides.text_mask, sides.text) if text_weight is None else text_weight
        wv = uniform_weight(sides.video_mask, sides.video) if video_weight is None else video_weight
        wt = validation.weight("text_weight", wt, sides.text, "B, Nt", "text")
        wv = validation.weight("video_weight", wv, sides.video, "B, Nv", "video")
        differentiable = (sides.text, sides.video, wt, wv, scale if isinstance(scale, Tensor) else None)
        refuse_forward_mode(differentiable, "token contrastive loss")
        ids = None if owner is None else _owner(owner, sides.text)
        masks = (None, None) if masking == "none" else (sides.text_mask, sides.video_mask)
        rows, frames, dim = sides.video.shape
        agreement.sizes = {"rows": rows, "frames": frames, "masked": int(masks[1] is not None)}
        if group is not None:
            group.require("text", sides.text)
            given = {"text": text, "video": video, "text_weight": text_weight, "video_weight": video_weight}
            agreement.same = {
                "D": dim,
                "dtype": sides.video.dtype,
                "device type": sides.video.device.type,
                "masking": masking,
                "normalize": normalize,
                "text_weight": "None" if text_weight is None else "weights",
                "video_weight": "None" if video_weight is None else "weights",
                "owner": "None" if owner is None else "ids",
                "logit_scale": _comparable(scale),
                "what needs gradients": _needing_gradients({**given, "logit_scale": logit_scale}),
            }
    shapes = [Shape(size["rows"], size["frames"], bool(size["masked"])) for size in agreement.sizes_by_rank]
    if sum(shape.rows for shape in shapes) == 0:
        found = f"shape {tuple(text.shape)}" if group is None else "none on any rank of the group"
        raise ValueError(f"text must hold at least one pair, got {found}; skip empty batches")
    exchange = choose_exchange(group, WeightedTokens(sides.video, wv, masks[1], ids), shapes)
    rule = ops.Rule(normalize, masking == "drl")
    return ops.token_contrastive_loss(sides.text, sides.video, wt, wv, scale, *masks, ids, rule, exchange)


def _comparable(scale: float | Tensor) -> object:
    """Return what ranks compare of the scale: its value, unless reading it would synchronise with an accelerator."""
    if not isinstance(scale, Tensor):
        return scale
    return f"a tensor of {scale.item()}" if scale.device.type == "cpu" else "a tensor"


def _needing_gradients(inputs: dict[str, object]) -> str:
    """Name the inputs that need gradients.

    They must be the same on all ranks, because a rank's backward pass waits for those of all others. A rank without
    pairs needs them too.
    """
    names = [name for name, x in inputs.items() if isinstance(x, Tensor) and x.requires_grad]
    return (", ".join(names) if torch.is_grad_enabled() else "") or "nothing"


def _owner(value: object, text: Tensor) -> Tensor:
    """Check the ids (B,) and return them as int64."""
    owner = validation.tensor("owner", value)
    if tuple(owner.shape) != (len(text),):
        raise ValueError(f"owner must be (B,) = ({len(text)},) to match text, got {tuple(owner.shape)}")
    if owner.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"owner must hold integers, one id a video, got {owner.dtype}; convert it with owner.long()")
    if owner.device != text.device:
        raise ValueError(
            f"owner must be on text's device {text.device}, got {owner.device}; move it with owner.to(text.device)"
        )
    return validation.private_copy(owner).to(torch.int64)
