"""DRL: a CLIP whose towers return tokens, a temporal module over frames, an interaction, and the losses."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import open_clip
import torch
from torch import Tensor, nn

from ..validation import describe
from . import padding, pretrained, towers, upstream
from .clip import (
    QUICK,
    build_clip,
    check_clip,
    clip_from_state_dict,
    create_clip,
    has_openai_heads,
    load_strictly,
    load_tokenizer,
    uses_quick_gelu,
)
from .config import Config, Pictures, Sizes
from .head import FIRST_SIGMOID_SCALE, Encoded, Head, architecture_differences, read_source, require
from .weight_files import weights_hash

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Positions of frames, where the CLIP's text has fewer; the original CLIP has as many.
POSITIONS = 77


class DRL(Head):
    """Text-video retrieval with DRL, on an open_clip model.

    >>> model = drl_fast.DRL("ViT-B-32", pretrained="openai", interaction="wti", cdcr=3)
    >>> text, text_mask = model.encode_text(ids)  # (A, Nt)
    >>> video = model.encode_video(frames, video_mask)  # (B, Nv, 3, H, W)
    >>> logits = model.similarity(text, video, text_mask, video_mask)  # (A, B)

    Args:
        clip: an open_clip model's name (CLIP, SigLIP 2, PE-Core, EVA, CoCa, ...), or such a model. Its module is used,
            not copied; a CoCa loses its decoder. What the towers' tokens are: :mod:`drl_fast.model.towers`.
        pretrained: a tag of that model (``"openai"``), a local weight file, or None: random weights.

    The other options are those of :class:`drl_fast.model.config.Config`. Temporal blocks, XTI and their positions start
    as CLIP's text transformer and positions do, if widths and form agree. With ``loss="sigmoid"`` temperature and bias
    start as the CLIP's own, if it has a bias, as SigLIP's models do; else at log(10) and -10.

    Raises:
        ValueError: an unknown name, tag, file or option; the nearest name or the remedy is given.

    Source: arXiv 2203.07111, section 3.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        clip: str | nn.Module = "ViT-B-32",
        pretrained: str | None = None,
        *,
        interaction: str = "wti",
        temporal: str | None = "seqTransf",
        wti_arch: int = 2,
        masking: str = "drl",
        cdcr: int = 0,
        cdcr_alpha_on: float = 0.11,
        cdcr_alpha_off: float = 0.0,
        cdcr_weight: float = 0.001,
        cdcr_padding: str = "never",
        query_expansion: bool = False,
        loss: str = "softmax",
        pooling: str = "max",
        pooling_temperature: float = 1.0,
    ) -> None:
        nn.Module.__init__(self)  # Head's own would add a temperature beside the CLIP's
        # Signatures list the options in Config's order, which a test checks.
        config = Config(
            interaction,
            temporal,
            wti_arch,
            masking,
            cdcr,
            cdcr_alpha_on,
            cdcr_alpha_off,
            cdcr_weight,
            cdcr_padding,
            query_expansion,
            loss,
            pooling,
            pooling_temperature,
        )
        self.clip_name = clip if isinstance(clip, str) else None
        # A module of any form, whose parts have no types that mypy could know.
        self.clip: Any = build_clip(clip, pretrained) if isinstance(clip, str) else check_clip(clip)
        if not towers.ends_at_largest_id(self.clip):
            self._check_form(config)
        preprocess = open_clip.get_model_preprocess_cfg(self.clip)
        form = {
            key: preprocess.get(name) for key, name in (("resize", "resize_mode"), ("interpolation", "interpolation"))
        }
        self.pictures = Pictures(
            self.picture_size[0], **{key: value for key, value in form.items() if value is not None}
        )
        for name, default in (("mean", open_clip.OPENAI_DATASET_MEAN), ("std", open_clip.OPENAI_DATASET_STD)):
            buffer = torch.tensor(preprocess.get(name, default)).view(3, 1, 1)
            self.register_buffer(name, buffer, persistent=False)
        dim, positions = towers.width(self.clip), towers.context(self.clip)
        if not isinstance(self.clip, open_clip.CLIP):
            positions = max(positions, POSITIONS)
        self._build(Sizes(dim, dim, dim, positions), config)
        if self.logit_bias is not None and self.clip.logit_bias is not None:
            self.logit_bias.data.copy_(self.clip.logit_bias.detach().reshape(()))
        elif config.loss == "sigmoid":
            # CLIP's own factor, about 100, would make positives of all pairs.
            nn.init.constant_(self.clip.logit_scale, math.log(FIRST_SIGMOID_SCALE))
        start = towers.start(self.clip)
        if start is not None:
            self.init_from_clip(*start)

    def _check_form(self, config: Config) -> None:
        """Check that no option needs the original CLIP's text tower."""
        for name, value in (("query_expansion", config.query_expansion), ("cdcr_padding", config.cdcr_padding)):
            if value not in (False, "never"):
                raise ValueError(
                    f"{name} must be {getattr(Config, name)!r} with this clip, got {value!r}, which needs the original "
                    "CLIP's causal text tower; leave it out, or choose a clip such as ViT-B-32"
                )

    @classmethod
    def from_clip_state_dict(
        cls,
        state: Mapping[str, Tensor],
        *,
        interaction: str = "wti",
        temporal: str | None = "seqTransf",
        wti_arch: int = 2,
        masking: str = "drl",
        cdcr: int = 0,
        cdcr_alpha_on: float = 0.11,
        cdcr_alpha_off: float = 0.0,
        cdcr_weight: float = 0.001,
        cdcr_padding: str = "never",
        query_expansion: bool = False,
        loss: str = "softmax",
        pooling: str = "max",
        pooling_temperature: float = 1.0,
    ) -> DRL:
        """Build around a CLIP of any size, given as a state dict in OpenAI's layout; all other modules are new.

        Raises:
            ValueError: entries that are missing, unexpected or of another shape; each is named.
        """
        config = Config(
            interaction,
            temporal,
            wti_arch,
            masking,
            cdcr,
            cdcr_alpha_on,
            cdcr_alpha_off,
            cdcr_weight,
            cdcr_padding,
            query_expansion,
            loss,
            pooling,
            pooling_temperature,
        )
        return cls(clip_from_state_dict(state), **asdict(config))

    @classmethod
    def from_upstream(
        cls,
        state: Mapping[str, Any] | str | os.PathLike[str],
        *,
        interaction: str = "auto",
        temporal: str | None = "auto",
        wti_arch: int | None = None,
        masking: str = "drl",
        cdcr: int = 0,
        cdcr_alpha_on: float = 0.11,
        cdcr_alpha_off: float = 0.0,
        cdcr_weight: float = 0.001,
        cdcr_padding: str = "competes",
        query_expansion: bool = False,
        loss: str = "softmax",
        pooling: str = "max",
        pooling_temperature: float = 1.0,
        agg_module: str | None = None,
        cdcr_alpha1: float | None = None,
        cdcr_alpha2: float | None = None,
        cdcr_lambda: float | None = None,
        patch: int | None = None,
        image_size: int | None = None,
    ) -> DRL:
        """Build the model of a checkpoint of the public DRL or CLIP4Clip code, and load all of its weights.

        The model is in evaluation mode.

        Args:
            state: the state dict (``clip.*``, ``transformerClip.*``, ``text_weight_fc.*``, ...), with or without
                DistributedDataParallel's ``module.``; or the path of a file that holds one (``torch.load`` with
                ``weights_only=True``: no other pickle is read).
            interaction, temporal: ``"auto"`` infers them from the entries: ``"wti"`` from weight heads, ``"xti"`` from
                a cross transformer, else ``"dp"``.
            wti_arch: None infers it.
            agg_module, cdcr_alpha1, cdcr_alpha2, cdcr_lambda: the public code's names for ``temporal``,
                ``cdcr_alpha_on``, ``cdcr_alpha_off`` and ``cdcr_weight``; each replaces the option of our name.
            patch, image_size: pixels; the entries tell them, and another value is an error.

        Raises:
            ValueError: entries that are missing, unexpected or of another shape, each of them named; a file without a
                state dict; an option that does not fit the entries.
        """
        if loss != Config.loss:
            raise ValueError(f"loss must be 'softmax' for a public checkpoint, which has no bias, got {loss!r}")
        weights, inferred = upstream.read(state)
        temporal = temporal if agg_module is None else agg_module
        if temporal == "auto":
            temporal = inferred["temporal"]
        model = cls.from_clip_state_dict(
            _clip_part(weights),
            interaction=inferred["interaction"] if interaction == "auto" else interaction,
            temporal=None if temporal in ("None", "") else temporal,
            wti_arch=inferred.get("wti_arch", Config.wti_arch) if wti_arch is None else wti_arch,
            masking=masking,
            cdcr=cdcr,
            cdcr_alpha_on=cdcr_alpha_on if cdcr_alpha1 is None else cdcr_alpha1,
            cdcr_alpha_off=cdcr_alpha_off if cdcr_alpha2 is None else cdcr_alpha2,
            cdcr_weight=cdcr_weight if cdcr_lambda is None else cdcr_lambda,
            cdcr_padding=cdcr_padding,
            query_expansion=query_expansion,
            loss=loss,
            pooling=pooling,
            pooling_temperature=pooling_temperature,
        )
        sizes = {"patch": (patch, model.clip.visual.patch_size[0]), "image_size": (image_size, model.picture_size[0])}
        for name, (value, own) in sizes.items():
            if value is not None and value != own:
                raise ValueError(f"{name} must be the state's own, {own}, got {value}; leave it out")
        load_strictly(model, weights, str(state) if isinstance(state, str | os.PathLike) else "state")
        return model.eval()

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> DRL:
        """Read a folder that :meth:`save_pretrained` wrote, or the best model of a run of ``drl-fast train``.

        The model is in evaluation mode. Its ``inputs`` say how to prepare captions and frames, and its
        :meth:`tokenizer` is the CLIP's, which must be one that open_clip knows. Nothing is fetched, except the
        configuration of a Hugging Face text tower.

        Raises:
            ValueError: files that are missing, cut short, or of another model; entries that do not fit are named.
        """
        state, saved = pretrained.read_folder(folder)
        if saved.sizes is not None:
            raise ValueError(
                f"{folder} must hold a DRL, got a Head without a CLIP; read it with Head.from_pretrained, or "
                "join it with its CLIP by DRL.from_head"
            )
        try:
            clip = (
                clip_from_state_dict(_clip_part(state))
                if saved.clip is None
                else create_clip(saved.clip, quick_gelu=saved.quick_gelu)
            )
            model = cls(clip, **saved.options)
            model.clip_name, model.inputs = saved.clip, saved.inputs
            for key, values in saved.statistics.items():
                getattr(model, key).copy_(torch.tensor(values).view(3, 1, 1))
            model.pictures = Pictures(model.picture_size[0], **saved.pictures)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{folder} must hold a model of this version of drl-fast, got: {error}") from error
        load_strictly(model, state, str(folder))
        return model.eval()

    @classmethod
    def from_head(cls, head: Head | str | os.PathLike[str], towers: DRL) -> DRL:
        """Join a head that was trained on a CLIP's tokens with that CLIP; the model is in evaluation mode.

        >>> model = DRL.from_head("runs/wti/best", DRL("ViT-B-32", pretrained="openai"))

        Args:
            head: a :class:`drl_fast.Head`, or a folder that its ``from_pretrained`` reads.
            towers: a model with that CLIP, which becomes the new model's own; its other parts are not used.

        Raises:
            ValueError: tokens of another width, or another CLIP than the head's record names.
        """
        head = head if isinstance(head, Head) else Head.from_pretrained(head)
        if {head.sizes.text_dim, head.sizes.video_dim, head.dim} != {towers.dim}:
            raise ValueError(
                f"head must read, and compare, tokens of the towers' width {towers.dim}, got {head.sizes}; a head with "
                "projections is scored on features"
            )
        for side, known in (asdict(head.encoders) if head.encoders is not None else {}).items():
            if known is None or known["weights"] != towers.encoder_hash(side):
                name = "imported from elsewhere"
                if known is not None:
                    weights = known["init_from"] or known["pretrained"] or f"random weights of seed {known['seed']}"
                    name = f"encoded by {known['clip']}, {weights}"
                raise ValueError(
                    f"towers must be what the head was trained on, got another CLIP: the head's {side} tokens were "
                    f"{name}; load those weights"
                )
        model = cls(towers.clip, **asdict(head.config))
        model.clip_name, model.inputs = towers.clip_name, head.inputs
        model.mean.copy_(towers.mean)
        model.std.copy_(towers.std)
        model.pictures = towers.pictures
        clip = {name: x for name, x in model.state_dict().items() if name.startswith("clip.")}
        own = dict(head.state_dict())
        clip["clip.logit_scale"] = own.pop("log_scale")
        load_strictly(model, {**clip, **own}, "head")
        return model.eval()

    def encoder_hash(self, side: str) -> str:
        """Hash the weights and the build of one tower: all that its tokens depend on besides rounding.

        Args:
            side: ``"text"`` or ``"video"``.
        """
        clip, visual = self.clip, "visual."
        state = {
            name: x
            for name, x in clip.state_dict().items()
            if name.startswith(visual) == (side == "video") and name not in towers.OF_LOSS
        }
        tower = clip.visual if side == "video" else towers.text_tower(clip).transformer
        heads = [module.num_heads for module in tower.modules() if hasattr(module, "num_heads")]
        pictures = [self.mean.flatten().tolist(), self.std.flatten().tolist(), clip.visual.image_size]
        if self.pictures[1:] != Pictures(0)[1:]:  # older hashes, of before these were recorded, stay valid
            pictures += self.pictures[1:]
        return weights_hash(state, repr((uses_quick_gelu(clip), heads, pictures if side == "video" else None)))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``model.safetensors`` and ``config.json``; files that are already there stay until they are replaced.

        Raises:
            ValueError: a CLIP without an open_clip name that its weights alone do not describe.
        """
        # A CLIP without a name is rebuilt from its weights in OpenAI's form; any other would silently score otherwise.
        if self.clip_name is None and not (has_openai_heads(self.clip) and uses_quick_gelu(self.clip)):
            raise ValueError(
                "clip must have an open_clip name, or OpenAI's form with heads 64 wide and QuickGELU, to be saved; "
                "register it with open_clip.add_model_config and build DRL by that name"
            )
        pretrained.save_folder(folder, self.state_dict(), self.describe_config())

    def to_upstream(self) -> dict[str, Tensor]:
        """Return the state dict under the public code's names, which :meth:`from_upstream` reads.

        Raises:
            ValueError: an interaction that the public code does not have.
        """
        return upstream.to_upstream(self.state_dict())

    def load_weights(self, source: str | os.PathLike[str]) -> None:
        """Replace all weights by those of another model of the same architecture; options such as CDCR's stay.

        Args:
            source: a folder of :meth:`save_pretrained`, a run's folder, or a checkpoint file of the public code.

        Raises:
            ValueError: nothing readable there, or another architecture; every difference is named.
        """
        path = Path(source)
        state, theirs = read_source(path)
        if theirs.get("sizes") is not None:
            raise ValueError(
                f"{path} must hold a DRL, got a Head without a CLIP; join them first: DRL.from_head({str(path)!r}, "
                "towers).save_pretrained(folder)"
            )
        ours = self.describe_config()
        differences = architecture_differences(ours, theirs, "quick_gelu", "mean", "std", *Pictures._field_defaults)
        if theirs["clip"] is None:
            if not has_openai_heads(self.clip):
                differences.insert(0, "a CLIP with attention heads 64 wide there and others here")
        # The names without the activation, which is compared by itself.
        elif theirs["clip"].removesuffix(QUICK) != (self.clip_name or "").removesuffix(QUICK):
            differences.insert(0, f"clip {theirs['clip']!r} there and {self.clip_name!r} here")
        if differences:
            raise ValueError(f"{path} must hold a model of this architecture, got {'; '.join(differences)}")
        load_strictly(self, state, str(path))

    def describe_config(self) -> dict[str, Any]:
        """Return all that, besides the weights, describes the model; JSON holds it."""
        return {
            "clip": self.clip_name,
            "quick_gelu": uses_quick_gelu(self.clip),
            "mean": self.mean.flatten().tolist(),
            "std": self.std.flatten().tolist(),
            "resize": self.pictures.resize,
            "interpolation": self.pictures.interpolation,
            **asdict(self.config),
            "inputs": None if self.inputs is None else asdict(self.inputs),
        }

    def tokenizer(self) -> Callable[..., Tensor]:
        """Return the CLIP's tokenizer: ``tokenizer(texts, context_length=n) -> ids (texts, n)``.

        Raises:
            ValueError: a CLIP without an open_clip name whose vocabulary is not OpenAI's, or a tokenizer that cannot be
                had.
        """
        if self.clip_name is not None:
            return load_tokenizer(self.clip_name)
        vocabulary = towers.vocabulary(self.clip)
        tokenizer = open_clip.SimpleTokenizer(context_length=towers.context(self.clip))
        if tokenizer.vocab_size != vocabulary:
            raise ValueError(
                f"clip must have OpenAI's {tokenizer.vocab_size} tokens, got {vocabulary}; use the tokenizer that it "
                "was trained with"
            )
        return tokenizer

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width of the CLIP's pictures, pixels."""
        size = self.clip.visual.image_size
        return size if isinstance(size, tuple) else (size, size)

    def words(self, max_words: int) -> int:
        """Return ``max_words``, or the CLIP's context, in tokens, where that is less."""
        return min(max_words, towers.context(self.clip))

    @property
    def stored_scale(self) -> nn.Parameter:
        """CLIP's own temperature, the logarithm of the logits' factor."""
        return self.clip.logit_scale

    def train(self, mode: bool = True) -> DRL:
        """Set training mode, except for frozen towers: they stay without dropout, and their batch norms as they are."""
        super().train(mode)
        parameters = (p for name, p in self.clip.named_parameters() if name not in towers.OF_LOSS)
        if not any(p.requires_grad for p in parameters):
            self.clip.eval()
        return self

    def encode_text(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Encode token ids (A, Nt), Nt <= the context, to tokens (A, Nt, D) and mask (A, Nt) bool.

        The last real token is the sentence token, which equals the CLIP's own ``encode_text``; see
        :mod:`drl_fast.model.towers`. In the original CLIP it is the end token, the largest id of a row. Tokens that are
        not real are 0. With ``query_expansion`` all positions are real, and ids after the end token become 0, CLIP's
        padding. Longer captions are cut to the context and keep their end token, with one warning.

        Raises:
            ValueError, TypeError: ids that are not (A, Nt) integers, or lie outside the vocabulary (CPU only).
        """
        ids = self._check_ids(ids)
        if len(ids) == 0:  # with a graph: over a group every rank's loss must have gradients
            some = ids.new_full((1, ids.shape[1]), towers.pad_id(self.clip) + 1)
            return towers.encode_text(self.clip, some)[0][:0], torch.zeros_like(ids, dtype=torch.bool)
        tokens, mask = towers.encode_text(self.clip, ids, expand=self.config.query_expansion)
        return tokens.masked_fill(~mask[..., None], 0), mask

    def _check_ids(self, ids: Tensor) -> Tensor:
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] == 0:
            raise ValueError(f"ids must be (A, Nt) token ids, got {describe(ids)}; tokenize captions first")
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise TypeError(f"ids must be integers, got {ids.dtype}; pass what the tokenizer returns")
        vocabulary, context = towers.vocabulary(self.clip), towers.context(self.clip)
        if ids.device.type == "cpu" and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise ValueError(
                f"ids must lie in 0..{vocabulary - 1}, the CLIP's vocabulary, got {int(ids.min())}..{int(ids.max())}; "
                "use this model's tokenizer"
            )
        if ids.shape[1] <= context:
            return ids
        cut, lengths = ids[:, :context].clone(), towers.word_lengths(self.clip, ids)
        late = lengths > context
        cut[late, -1] = ids.gather(1, lengths.clamp(min=1)[:, None] - 1)[late, 0]
        if not bool(late.any()):
            return cut
        warnings.warn(
            f"drl_fast: {int(late.sum())} of {len(ids)} captions are longer than the CLIP's context of {context} "
            "tokens and were cut there; their end token is kept. Later cuts are not reported.",
            RuntimeWarning,
            stacklevel=3,
        )
        return cut

    def encode_video(self, frames: Tensor, mask: Tensor | None = None) -> Tensor:
        """Encode frames (B, Nv, 3, H, W) with mask (B, Nv) to tokens (B, Nv, D).

        Masked frames never enter the image tower; their tokens are 0.

        Args:
            frames: uint8 pictures, which are normalized here, or floating point ones that are normalized already.
            mask: non-zero = real, any dtype, holes allowed; None: all real.

        Raises:
            ValueError, TypeError: frames of another rank, size or type, a mask of another shape.
        """
        real = self._check_frames(frames, mask)
        features = self.frame_features(frames[real])
        return self.video_tokens(features.new_zeros((*real.shape, self.dim)).index_put((real,), features), real)[0]

    def frame_features(self, pictures: Tensor) -> Tensor:
        """Encode pictures (N, 3, H, W), uint8 or normalized, to (N, D) with the image tower."""
        if pictures.dtype == torch.uint8:
            pictures = (pictures.to(self.mean.dtype) / 255 - self.mean) / self.std
        pictures = pictures.to(next(self.clip.visual.parameters()).dtype)
        if len(pictures) == 0:  # CLIP's reshapes fail without rows; with a graph, as in encode_text
            return self.clip.encode_image(pictures.new_zeros((1, *pictures.shape[1:])))[:0]
        return self.clip.encode_image(pictures)

    def _check_frames(self, frames: Tensor, mask: Tensor | None) -> Tensor:
        height, width = self.picture_size
        if not isinstance(frames, Tensor) or frames.dim() != 5 or tuple(frames.shape[2:]) != (3, height, width):
            raise ValueError(
                f"frames must be (B, Nv, 3, {height}, {width}), the CLIP's picture size, got {describe(frames)}; "
                "prepare them as drl_fast.data.video does"
            )
        if frames.shape[1] == 0:
            raise ValueError(f"frames must hold at least one frame a video, got {describe(frames)}")
        if frames.dtype != torch.uint8 and not frames.is_floating_point():
            raise TypeError(f"frames must be uint8, or floating point and normalized, got {frames.dtype}")
        if mask is None:
            return torch.ones(frames.shape[:2], dtype=torch.bool, device=frames.device)
        if not isinstance(mask, Tensor) or mask.shape != frames.shape[:2]:
            raise ValueError(f"mask must be (B, Nv) = {tuple(frames.shape[:2])} to match frames, got {describe(mask)}")
        return mask != 0

    def _before_interaction(self, side: str) -> Iterator[nn.Parameter]:
        yield from super()._before_interaction(side)
        for name, p in self.clip.named_parameters():
            if name not in towers.OF_LOSS and name.startswith("visual.") == (side == "video"):
                yield p

    def encode(self, batch: Mapping[str, Tensor]) -> Encoded:
        """Encode the captions and the videos of a batch; their numbers may differ.

        Args:
            batch: ``text_ids`` (A, Nt) and ``video`` (B, Nv, 3, H, W). Optional: ``video_mask`` (B, Nv), and
                ``text_mask`` (A, Nt; default: up to the end token).

        Raises:
            ValueError, TypeError: an entry that is missing, or of another shape or type.
        """
        require(batch, "text_ids", "video")
        video_mask = self._check_frames(batch["video"], batch.get("video_mask"))
        text, text_mask = self.encode_text(batch["text_ids"])
        if "text_mask" in batch:
            text_mask = batch["text_mask"] != 0
        return Encoded(text, self.encode_video(batch["video"], video_mask), text_mask, video_mask)

    def forward(self, batch: Mapping[str, Tensor], process_group: ProcessGroup | None = None) -> dict[str, Tensor]:
        """Compute the losses of a batch: ``total`` = ``info_nce`` + lambda ``cdcr``, scalars.

        Args:
            batch: see :meth:`encode`, row by row pairs. Optional: ``owner`` (B,), the id of each caption's video; or
                ``video_of`` (A,), the row of ``video`` that each caption describes, if several captions share a row.
            process_group: see :meth:`losses`.

        Raises:
            ValueError: missing entries, or options that the interaction does not support.
        """
        if not self.needs_padding:
            return super().forward(batch, process_group)
        require(batch, "text_ids", "video")
        if "video_of" in batch:
            raise ValueError("video_of must be left out with cdcr_padding='competes'; use 'never'")
        ids, frames = self._check_ids(batch["text_ids"]), batch["video"]
        video_mask = self._check_frames(frames, batch.get("video_mask"))
        text_mask = torch.arange(ids.shape[1], device=ids.device) < towers.word_lengths(self.clip, ids)[:, None]
        features = self.frame_features(frames.flatten(0, 1)).view(*video_mask.shape, -1)
        padded = towers.hidden_states(self.clip, ids), padding.add_temporal(features, self.temporal, video_mask)
        text = padded[0].masked_fill(~text_mask[..., None], 0)
        video = padded[1].masked_fill(~video_mask[..., None], 0)
        if "text_mask" in batch:
            text_mask = batch["text_mask"] != 0
        return self.losses(text, video, text_mask, video_mask, batch.get("owner"), process_group, padded=padded)


def _clip_part(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("clip."): x for name, x in state.items() if name.startswith("clip.")}
