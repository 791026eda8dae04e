"""DRL: a CLIP whose towers give tokens, a temporal module over frames, an interaction, and the losses."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import open_clip
import torch
from torch import Tensor, nn

from ..modules import INTERACTIONS, WTI, XTI, SeqLSTM, SeqTransf, build_interaction
from ..validation import describe, option
from . import losses, padding
from .clip import build_clip, check_clip, clip_from_state_dict

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

MAX_LOGIT_SCALE = 100.0
TEMPORAL = (None, "seqLSTM", "seqTransf")
# Captions of about one length share a pass of the text tower.
LENGTH_STEP = 8


@dataclass(frozen=True)
class Config:
    """What a DRL is made of, beside its CLIP. Defaults are the paper's for MSR-VTT.

    Args:
        interaction: ``"dp"``, ``"hi"``, ``"mlp"``, ``"xti"``, ``"ti"`` or ``"wti"``.
        temporal: over frames: None, ``"seqLSTM"`` or ``"seqTransf"``.
        wti_arch: layers of WTI's weight heads, 1 to 3.
        cdcr: channel decorrelation, by the public code's number: 0 none, 1 pooled vectors, 2 tokens, 3 weighted tokens.
        cdcr_alpha_on: weight of the correlation's diagonal.
        cdcr_alpha_off: weight of all its other entries.
        cdcr_weight: lambda, the regulariser's share in the total loss.
        cdcr_padding: ``"never"`` leaves padding out of CDCR; ``"competes"`` is the public code's rule, with which its
            checkpoints load: see :mod:`drl_fast.model.padding`. It costs the towers' work on padding, in training.
    """

    interaction: str = "wti"
    temporal: str | None = "seqTransf"
    wti_arch: int = 2
    cdcr: int = 0
    cdcr_alpha_on: float = 0.11
    cdcr_alpha_off: float = 0.0
    cdcr_weight: float = 0.001
    cdcr_padding: str = "never"

    def __post_init__(self) -> None:
        option("interaction", self.interaction, tuple(INTERACTIONS))
        if self.temporal not in TEMPORAL:
            raise ValueError(f"temporal must be one of None, 'seqLSTM', 'seqTransf', got {self.temporal!r}")
        option("cdcr", self.cdcr, (0, 1, 2, 3))
        option("cdcr_padding", self.cdcr_padding, ("never", "competes"))
        if self.cdcr == 3 and self.interaction != "wti":
            raise ValueError(
                f"cdcr must be 0, 1 or 2 with interaction={self.interaction!r}, got 3, which wants WTI's weights; "
                "use interaction='wti'"
            )


class DRL(nn.Module):
    """Text-video retrieval after DRL, on an open_clip model.

    >>> model = drl_fast.DRL("ViT-B-32", pretrained="openai", interaction="wti", cdcr=3)
    >>> text, text_mask = model.encode_text(ids)  # (A, Nt)
    >>> video = model.encode_video(frames, video_mask)  # (B, Nv, 3, H, W)
    >>> logits = model.similarity(text, video, text_mask, video_mask)  # (A, B)

    Args:
        clip: an open_clip model's name (any of its ViTs of the original CLIP's form), or an ``open_clip.CLIP``.
        pretrained: a tag of that model (``"openai"``), a local weight file, or None: random weights.
        config: see :class:`Config`.

    Temporal blocks, XTI and their positions start as CLIP's text transformer and positions do, where widths agree.

    Raises:
        ValueError: an unknown name, tag, file, interaction or temporal module; what is near or to be done is named.

    Source: arXiv 2203.07111, section 3.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, clip: str | nn.Module = "ViT-B-32", pretrained: str | None = None, **config: Any) -> None:
        super().__init__()
        self.config = Config(**config)
        self.clip_name = clip if isinstance(clip, str) else None
        self.clip = build_clip(clip, pretrained) if isinstance(clip, str) else check_clip(clip)
        preprocess = open_clip.get_model_preprocess_cfg(self.clip)
        for name, default in (("mean", open_clip.OPENAI_DATASET_MEAN), ("std", open_clip.OPENAI_DATASET_STD)):
            buffer = torch.tensor(preprocess.get(name, default)).view(3, 1, 1)
            self.register_buffer(name, buffer, persistent=False)
        dim, context = self.dim, self.clip.positional_embedding.shape[0]
        self.temporal: nn.Module | None = None
        if self.config.temporal == "seqTransf":
            self.temporal = SeqTransf(dim, max_positions=context)
        elif self.config.temporal == "seqLSTM":
            self.temporal = SeqLSTM(dim, max_positions=context)
        options: dict[str, Any] = {}
        if self.config.interaction == "wti":
            options["arch"] = self.config.wti_arch
        if self.config.interaction == "xti":
            options["max_positions"] = context
        self.interaction = build_interaction(self.config.interaction, dim, **options)
        for module in (self.temporal, self.interaction):
            if isinstance(module, SeqTransf | SeqLSTM | XTI):
                module.init_from_clip(self.clip.positional_embedding, self.clip.transformer.resblocks.state_dict())

    @classmethod
    def from_clip_state_dict(cls, state: Mapping[str, Tensor], **config: Any) -> DRL:
        """Build around a CLIP of any size, given as a state dict in OpenAI's layout; everything else is new.

        Raises:
            ValueError: entries that are missing, unexpected or of another shape, each named.
        """
        return cls(clip_from_state_dict(state), **config)

    @classmethod
    def from_upstream(cls, state: Mapping[str, Any] | str | os.PathLike[str], **config: Any) -> DRL:
        """Load a checkpoint of the public DRL or CLIP4Clip code: :func:`drl_fast.model.checkpoint.from_upstream`."""
        from .checkpoint import from_upstream

        return from_upstream(cls, state, **config)

    def to_upstream(self) -> dict[str, Tensor]:
        """The state dict under the public code's names, which :meth:`from_upstream` reads back."""
        from .checkpoint import to_upstream

        return to_upstream(self)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``model.safetensors`` and ``config.json``, aside first and then renamed."""
        from .checkpoint import save_pretrained

        save_pretrained(self, folder)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> DRL:
        """Read what :meth:`save_pretrained` wrote.

        Raises:
            ValueError: files that are missing, cut off, or of another model; entries that do not fit are named.
        """
        from .checkpoint import from_pretrained

        return from_pretrained(cls, folder)

    @property
    def dim(self) -> int:
        """D, the width of tokens."""
        return self.clip.text_projection.shape[1]

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width of the CLIP's pictures, pixels."""
        size = self.clip.visual.image_size
        return size if isinstance(size, tuple) else (size, size)

    @property
    def logit_scale(self) -> Tensor:
        """The factor itself, at most 100.

        Its gradient passes the limit: CLIP's own weights lie there, and a clamp would never let them leave it.
        """
        stored = self.clip.logit_scale
        return (stored + (stored.clamp(max=math.log(MAX_LOGIT_SCALE)) - stored).detach()).exp()

    @torch.no_grad()
    def limit_logit_scale(self) -> None:
        """After a step of an optimizer: bring the stored temperature back to the limit, as the public code does."""
        self.clip.logit_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))

    def encode_text(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids (A, Nt), Nt <= the context -> tokens (A, Nt, D), mask (A, Nt) bool.

        Real are the positions up to and including the end token, the largest id of a row; tokens behind it are 0 and
        not computed. Longer captions are cut to the context, the end token kept, which is said once.

        Raises:
            ValueError, TypeError: ids that are no (A, Nt) integers, or lie outside the vocabulary (CPU only).
        """
        ids = self._check_ids(ids)
        if len(ids) == 0:  # tokens of nothing, with a graph: over a group every rank's loss must have gradients
            return self._text_tower(ids.new_zeros((1, ids.shape[1])))[:0], torch.zeros_like(ids, dtype=torch.bool)
        mask = _until_end(ids)
        # Causal attention: nothing behind the end token reaches what is before it.
        groups = (mask.sum(dim=1) + LENGTH_STEP - 1) // LENGTH_STEP
        order, parts = groups.argsort(stable=True), []
        for rows in order.split(groups.bincount().tolist()):
            if len(rows):
                part = self._text_tower(ids[rows, : int(groups[rows[0]]) * LENGTH_STEP])
                parts.append(nn.functional.pad(part, (0, 0, 0, ids.shape[1] - part.shape[1])))
        return torch.cat(parts)[order.argsort()].masked_fill(~mask[..., None], 0), mask

    def _text_tower(self, ids: Tensor) -> Tensor:
        clip, length = self.clip, ids.shape[1]
        dtype = clip.transformer.get_cast_dtype()
        hidden = clip.token_embedding(ids).to(dtype) + clip.positional_embedding[:length].to(dtype)
        hidden = clip.ln_final(clip.transformer(hidden, attn_mask=clip.attn_mask[:length, :length]))
        return hidden @ clip.text_projection

    def _check_ids(self, ids: Tensor) -> Tensor:
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] == 0:
            raise ValueError(f"ids must be (A, Nt) token ids, got {describe(ids)}; tokenize captions first")
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise TypeError(f"ids must be integers, got {ids.dtype}; pass what the tokenizer returns")
        vocabulary, context = self.clip.token_embedding.weight.shape[0], self.clip.positional_embedding.shape[0]
        if ids.device.type == "cpu" and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise ValueError(
                f"ids must lie in 0..{vocabulary - 1}, the CLIP's vocabulary, got {int(ids.min())}..{int(ids.max())}; "
                "use this model's tokenizer"
            )
        if ids.shape[1] <= context:
            return ids
        cut, end = ids[:, :context].clone(), ids.amax(dim=1)
        late = ids.argmax(dim=1) >= context
        cut[late, -1] = end[late]
        warnings.warn(
            f"drl_fast: {int(late.sum())} of {len(ids)} captions are longer than the CLIP's context of {context} "
            "tokens and were cut there, their end token kept; this is said once",
            RuntimeWarning,
            stacklevel=3,
        )
        return cut

    def encode_video(self, frames: Tensor, mask: Tensor | None = None) -> Tensor:
        """Frames (B, Nv, 3, H, W), mask (B, Nv) -> tokens (B, Nv, D).

        Masked frames never enter the image tower; their tokens are 0.

        Args:
            frames: uint8 pictures, which are normalised here, or floating point ones that are normalised already.
            mask: non-zero = real, any dtype, holes allowed; None: all real.

        Raises:
            ValueError, TypeError: frames of another rank, size or type, a mask of another shape.
        """
        real = self._check_frames(frames, mask)
        features = self.frame_features(frames[real])
        tokens = features.new_zeros((*real.shape, self.dim)).index_put((real,), features)
        if self.temporal is not None:
            tokens = self.temporal(tokens, real)
        return tokens.masked_fill(~real[..., None], 0)

    def frame_features(self, pictures: Tensor) -> Tensor:
        """Pictures (N, 3, H, W), uint8 or normalised, -> (N, D) by the image tower."""
        if pictures.dtype == torch.uint8:
            pictures = (pictures.to(self.mean.dtype) / 255 - self.mean) / self.std
        pictures = pictures.to(self.clip.visual.conv1.weight.dtype)
        if len(pictures) == 0:  # CLIP's own reshapes fail then; with a graph, as in encode_text
            return self.clip.encode_image(pictures.new_zeros((1, *pictures.shape[1:])))[:0]
        return self.clip.encode_image(pictures)

    def _check_frames(self, frames: Tensor, mask: Tensor | None) -> Tensor:
        height, width = self.picture_size
        if not isinstance(frames, Tensor) or frames.dim() != 5 or tuple(frames.shape[2:]) != (3, height, width):
            raise ValueError(
                f"frames must be (B, Nv, 3, {height}, {width}), the CLIP's picture size, got {describe(frames)}; "
                "resize and crop them as drl_fast.data.video does"
            )
        if frames.dtype != torch.uint8 and not frames.is_floating_point():
            raise TypeError(f"frames must be uint8, or floating point and normalised, got {frames.dtype}")
        if mask is None:
            return torch.ones(frames.shape[:2], dtype=torch.bool, device=frames.device)
        if not isinstance(mask, Tensor) or mask.shape != frames.shape[:2]:
            raise ValueError(f"mask must be (B, Nv) = {tuple(frames.shape[:2])} to match frames, got {describe(mask)}")
        return mask != 0

    def similarity(
        self, text: Tensor, video: Tensor, text_mask: Tensor | None = None, video_mask: Tensor | None = None
    ) -> Tensor:
        """Every text against every video: tokens (A, Nt, D), (B, Nv, D) -> logits (A, B), without temperature."""
        return self.interaction(text, video, text_mask, video_mask)

    def forward(self, batch: Mapping[str, Tensor], process_group: ProcessGroup | None = None) -> dict[str, Tensor]:
        """Losses of a batch of pairs: ``total`` = ``info_nce`` + lambda ``cdcr``, scalars.

        Args:
            batch: ``text_ids`` (B, Nt) and ``video`` (B, Nv, 3, H, W), row by row; if there, ``video_mask`` (B, Nv),
                ``text_mask`` (B, Nt; else up to the end token), ``owner`` (B,) ids of the videos that captions share.
            process_group: negatives of all its ranks. TI and WTI never form the batch's logits; the others gather all
                videos, and every rank scores its own texts against them.

        Raises:
            ValueError: entries that are missing, or options that the interaction cannot serve.
        """
        for name in ("text_ids", "video"):
            if name not in batch:
                raise ValueError(f"batch must hold {name!r}, got {', '.join(map(repr, batch)) or 'nothing'}")
        text, video, text_mask, video_mask, padded = self._encode(batch)
        return self.losses(text, video, text_mask, video_mask, batch.get("owner"), process_group, padded=padded)

    def losses(
        self,
        text: Tensor,
        video: Tensor,
        text_mask: Tensor,
        video_mask: Tensor,
        owner: Tensor | None = None,
        process_group: ProcessGroup | None = None,
        *,
        padded: tuple[Tensor, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """What :meth:`forward` returns, from tokens (B, Nt, D), (B, Nv, D) and masks that the towers gave already.

        ``padded``: tokens of both sides with padding's among them, for ``cdcr_padding="competes"``.
        """
        if self.config.cdcr in (2, 3) and self.config.cdcr_padding == "competes" and padded is None:
            raise ValueError("padded must hold tokens with padding's for cdcr_padding='competes', got None")
        weights: tuple[Tensor | None, Tensor | None] = (None, None)
        if isinstance(self.interaction, WTI):
            weights = self.interaction.weights(text, video, text_mask, video_mask)
        tokens = losses.Tokens(text, video, *weights, text_mask, video_mask)
        contrast = losses.contrast(self.interaction, tokens, self.logit_scale, owner, process_group)
        regulariser = losses.decorrelation(self.config, tokens, padded, process_group)
        total = contrast if self.config.cdcr == 0 else contrast + self.config.cdcr_weight * regulariser
        return {"total": total, "info_nce": contrast, "cdcr": regulariser}

    def _encode(
        self, batch: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """Tokens and masks (bool) of both sides; tokens that include padding's, where CDCR is to see them."""
        ids, frames = batch["text_ids"], batch["video"]
        video_mask = self._check_frames(frames, batch.get("video_mask"))
        padded = None
        if self.config.cdcr in (2, 3) and self.config.cdcr_padding == "competes":
            ids = self._check_ids(ids)
            text_mask = _until_end(ids)
            padded = self._text_tower(ids), padding.frames_with_padding(self, frames, video_mask)
            text, video = (
                x.masked_fill(~real[..., None], 0) for x, real in zip(padded, (text_mask, video_mask), strict=True)
            )
        else:
            text, text_mask = self.encode_text(ids)
            video = self.encode_video(frames, video_mask)
        return text, video, batch["text_mask"] != 0 if "text_mask" in batch else text_mask, video_mask, padded

    def describe_config(self) -> dict[str, Any]:
        """What :meth:`save_pretrained` writes beside the weights."""
        quick = any(type(module).__name__ == "QuickGELU" for module in self.clip.modules())
        return {"clip": self.clip_name, "quick_gelu": quick, **asdict(self.config)}


def _until_end(ids: Tensor) -> Tensor:
    """(A, Nt) bool: the positions up to and including the end token, the largest id of a row."""
    return torch.arange(ids.shape[1], device=ids.device) <= ids.argmax(dim=1, keepdim=True)
