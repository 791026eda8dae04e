"""InfoNCE and the sigmoid loss from tokens and weights, without the logit matrix where that is large."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import validation
from ..distributed.exchange import Shape, WeightedTokens, choose_exchange
from ..distributed.group import Group, agree
from ..numerics import uniform_weight
from ..ops import token_contrastive_loss as ops
from .info_nce import DIRECTIONS, check_bias, check_scale
from .positives import INTEGERS, check_positives
from .token_interaction import refuse_forward_mode, refuse_unused_weight

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
    loss: str = "softmax",
    logit_bias: float | Tensor | None = None,
    direction: str = "both",
    positives: Tensor | None = None,
    pooling: str = "max",
    temperature: float = 1.0,
    bidirectional: bool = True,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Compute ``info_nce(token_interaction(...), logit_scale)`` with memory that does not grow with A x B.

    With ``loss="sigmoid"`` it is ``sigmoid_loss(token_interaction(...), logit_scale, logit_bias)``.

    In one process, logits and matches of all pairs are kept for the backward pass if they fit 256 MB; the shapes alone
    decide. That is enough for 2,364 pairs of 32 words and 12 frames. Otherwise blocks of texts are scored against all
    videos twice, once in each pass, and memory beyond the inputs and their gradients is one block (about 16 MB), seven
    numbers per training example, and on the CPU copies of masks, ids and weights that need no gradient. The loss is
    differentiable once in features, weights, ``logit_scale`` and ``logit_bias``; a second derivative or forward-mode AD
    raises.

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
        text: (A, Nt, D) token features, raw; float32, float16, bfloat16 or float64.
        video: (B, Nv, D), the same dtype and device. Without ``positives``, A = B and text i belongs to video i.
        text_weight: (A, Nt) weights, any float dtype, used as given; None is uniform over real tokens (TI).
        video_weight: (B, Nv), likewise. Must be None when ``bidirectional=False``.
        text_mask: (A, Nt), non-zero = real token, any dtype, holes allowed; None: all real.
        video_mask: (B, Nv), likewise.
        logit_scale: the factor of the logits, a positive float or a 0-dim tensor that gets a gradient. Pass
            ``logit_scale.exp()`` (about 100), not CLIP's log-scale parameter.
        masking: ``"drl"``, ``"exclude"`` or ``"none"``, as in :func:`token_interaction`.
        normalize: L2-normalise tokens first.
        owner: (B,) integer ids, such as the number of the video, for A = B. Pairs with the same id are not negatives of
            each other, also across ranks.
        loss: ``"softmax"`` (InfoNCE) or ``"sigmoid"`` (SigLIP).
        logit_bias: the sigmoid loss's bias, a float or a 0-dim tensor that gets a gradient; SigLIP starts at -10. None
            with ``"softmax"``.
        direction: ``"t2v"`` averages over texts, ``"v2t"`` over videos, ``"both"`` takes the mean of the two. The
            sigmoid loss has only ``"both"``.
        positives: (A,) integers, the row of ``video`` that belongs to each text, -1 for a text that is only a negative;
            or (A, B) bool. None: the diagonal. Over a group they index this rank's own videos: (own A,) or
            (own A, own B).
        pooling, temperature, bidirectional: as in :func:`token_interaction`.
        process_group: a torch.distributed group whose backend serves the tensors' device; None: this process alone.
            ``torch.distributed.group.WORLD`` is None before ``init_process_group``. Not within ``torch.compile``.

    Returns:
        A scalar, float32 (float64 for float64 input): with ``"softmax"`` the mean cross-entropy, 0 for one pair; with
        ``"sigmoid"`` the sum over all pairs divided by the number of texts. Averages run over all ranks.

    Raises:
        ValueError: wrong rank, sizes or devices that do not match, A and B that differ without ``positives``, no pair,
            an unknown ``masking``, ``loss``, ``direction`` or ``pooling``, a float ``logit_scale`` that is not positive
            and finite, ``positives`` out of range (checked on the CPU only) or none at all, ``owner`` together with
            ``positives``, or options that do not go together.
        TypeError: not a tensor, an unsupported dtype, or ``owner`` or ``positives`` of another type.

        Over a group, an error on one rank raises RuntimeError with its message on all others. All ranks raise the same
        ValueError if they differ in D, dtype, options or which inputs need gradients, or if no rank has a pair. A rank
        that dies, never calls, or fails while computing is only noticed by the group's timeout: 30 minutes for gloo, 10
        for NCCL, unless ``init_process_group`` or ``new_group`` got ``timeout=timedelta(...)``.

    Source: arXiv 2203.07111, section 3.4; the sigmoid loss: arXiv 2303.15343; the running log-sum-exp is Milakov &
    Gimelshein's, arXiv 1805.02867.
    """
    group = None if process_group is None else Group(process_group)
    with agree(group, "token_contrastive_loss") as agreement:
        validation.option("masking", masking, validation.MASKINGS)
        validation.flag("normalize", normalize)
        validation.flag("bidirectional", bidirectional)
        temperature = validation.pooling(pooling, temperature)
        _check_loss(loss, direction, logit_bias)
        sides = validation.check_sides(text, video, text_mask, video_mask)
        scale = check_scale(logit_scale, sides.text.device)
        bias = 0.0 if logit_bias is None else check_bias(logit_bias, sides.text.device)
        if owner is not None and positives is not None:
            raise ValueError(
                "owner must be None with positives, which say what the negatives are, got both; drop one of them"
            )
        rows, frames, dim = sides.video.shape
        columns = check_positives(
            positives,
            len(sides.text),
            rows,
            sides.text.device,
            f"video must have as many rows as text, {len(sides.text)}, got {rows}; say with positives= which video "
            "belongs to each text, or repeat a video for each of its captions and mark them with owner",
            needs_one=group is None,
        )
        refuse_unused_weight(video_weight, bidirectional)
        wt = uniform_weight(sides.text_mask, sides.text) if text_weight is None else text_weight
        wv = uniform_weight(sides.video_mask, sides.video) if video_weight is None else video_weight
        wt = validation.weight("text_weight", wt, sides.text, "A, Nt", "text")
        wv = validation.weight("video_weight", wv, sides.video, "B, Nv", "video")
        differentiable = (sides.text, sides.video, wt, wv, *(x for x in (scale, bias) if isinstance(x, Tensor)))
        refuse_forward_mode(differentiable, "token contrastive loss")
        ids = None if owner is None else _owner(owner, sides.text)
        masks = (None, None) if masking == "none" else (sides.text_mask, sides.video_mask)
        counts = _count(None if positives is None else columns, len(sides.text), rows, wt)
        agreement.sizes = {"rows": rows, "frames": frames, "masked": int(masks[1] is not None)}
        agreement.sizes |= {"texts": len(sides.text)}
        if group is not None:
            group.require("text", sides.text)
            for name, count in zip(("positive texts", "positive videos"), counts, strict=True):
                agreement.sizes[name] = int((count > 0).sum())
            given: dict[str, object] = {
                "text": text,
                "video": video,
                "text_weight": text_weight,
                "video_weight": video_weight,
            }
            given |= {"logit_scale": logit_scale, "logit_bias": logit_bias}
            agreement.same = {
                "D": dim,
                "dtype": sides.video.dtype,
                "device type": sides.video.device.type,
                "masking": masking,
                "normalize": normalize,
                "text_weight": "None" if text_weight is None else "weights",
                "video_weight": "None" if video_weight is None else "weights",
                "owner": "None" if owner is None else "ids",
                "loss": loss,
                "direction": direction,
                "pooling": pooling if pooling == "max" else f"{pooling} at temperature {temperature}",
                "bidirectional": bidirectional,
                "logit_scale": _comparable(scale),
                "logit_bias": _comparable(bias),
                "what needs gradients": _needing_gradients(given),
            }
    sizes = agreement.sizes_by_rank
    shapes = [Shape(size["rows"], size["frames"], bool(size["masked"])) for size in sizes]
    texts, videos = (sum(size[name] for size in sizes) for name in ("texts", "rows"))
    if texts == 0 or videos == 0:
        found = (
            f"shapes {tuple(text.shape)} and {tuple(video.shape)}" if group is None else "none on any rank of the group"
        )
        raise ValueError(f"text must hold at least one pair, got {found}; skip empty batches")
    totals: list[int | Tensor] = [(count > 0).sum() for count in counts]
    if group is not None:
        totals = [sum(size[name] for size in sizes) for name in ("positive texts", "positive videos")]
        if totals[0] == 0:
            raise ValueError(
                "positives must hold at least one positive pair, got none on any rank of the group; skip such batches"
            )
    exchange = choose_exchange(group, WeightedTokens(sides.video, wv, masks[1], ids), shapes)
    rule = ops.Rule(normalize, masking == "drl", bidirectional, pooling, temperature)
    directions = direction != "v2t", direction != "t2v"
    weights = [
        (count > 0).to(wt.dtype) * wanted / (sum(directions) * total)
        for count, wanted, total in zip(counts, directions, totals, strict=True)
    ]
    return ops.token_contrastive_loss(
        sides.text,
        sides.video,
        wt,
        wv,
        scale,
        bias,
        *masks,
        ids,
        ops.Positives(None if positives is None else columns, *counts, *weights),
        ops.Options(rule, loss == "sigmoid", texts, directions),
        exchange,
    )


def _check_loss(loss: str, direction: str, logit_bias: object) -> None:
    """Check the loss and the options that depend on it."""
    validation.option("loss", loss, ("softmax", "sigmoid"))
    validation.option("direction", direction, DIRECTIONS)
    if loss == "softmax" and logit_bias is not None:
        raise ValueError(
            f"logit_bias must be None with loss='softmax', which a bias does not change, got "
            f"{validation.describe(logit_bias)}; use loss='sigmoid' or leave it out"
        )
    if loss == "sigmoid" and logit_bias is None:
        raise ValueError("logit_bias must be given with loss='sigmoid', got None; SigLIP starts at -10")
    if loss == "sigmoid" and direction != "both":
        raise ValueError(
            f"direction must be 'both' with loss='sigmoid', which has no direction, got {direction!r}; leave it out"
        )


def _count(columns: Tensor | None, texts: int, videos: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of positives of every text (A,) and every video (B,); ``columns`` None: the diagonal."""
    if columns is None:
        return like.new_ones(texts), like.new_ones(videos)
    if columns.dtype == torch.bool:
        return columns.sum(1).to(like.dtype), columns.sum(0).to(like.dtype)
    # Texts without a positive go to one video more, which is dropped: a rank may have no video at all.
    slots = torch.where(columns >= 0, columns, videos)
    per_video = like.new_zeros(videos + 1).index_add_(0, slots, like.new_ones(texts))[:videos]
    return (columns >= 0).to(like.dtype), per_video


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
    if owner.dtype not in INTEGERS:
        raise TypeError(f"owner must hold integers, one id a video, got {owner.dtype}; convert it with owner.long()")
    if owner.device != text.device:
        raise ValueError(
            f"owner must be on text's device {text.device}, got {owner.device}; move it with owner.to(text.device)"
        )
    return validation.private_copy(owner).to(torch.int64)
