"""The model after the encoders: projections, temporal module, interaction, temperature and losses."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from .. import validation
from ..functional import Matches, PreparedVideos
from ..modules import TI, WTI, XTI, MeanMaxSim, SeqLSTM, SeqTransf, build_interaction
from ..numerics import zero_masked
from . import losses, pretrained, upstream
from .clip import load_strictly
from .config import TEMPORAL, Config, Encoders, Inputs, Sizes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

MAX_LOGIT_SCALE = 100.0
# CLIP's factor before it was trained.
FIRST_LOGIT_SCALE = 1 / 0.07
# SigLIP's factor and bias before they were trained.
FIRST_SIGMOID_SCALE, FIRST_SIGMOID_BIAS = 10.0, -10.0


class Encoded(NamedTuple):
    """Tokens of a batch as the interaction reads them: A texts and B videos."""

    text: Tensor
    """(A, Nt, D)"""
    video: Tensor
    """(B, Nv, D)"""
    text_mask: Tensor
    """(A, Nt) bool"""
    video_mask: Tensor
    """(B, Nv) bool"""


class Head(nn.Module):
    """Train an interaction on the tokens of any two encoders; :class:`drl_fast.DRL` is a head with CLIP's towers.

    >>> head = drl_fast.Head(768, 1024, dim=512)  # a text encoder and a frame encoder of other widths
    >>> losses = head({"text": text, "text_mask": text_mask, "video": video, "video_mask": video_mask})
    >>> losses["total"].backward()

    Args:
        text_dim: width of the text tokens.
        video_dim: width of the video tokens; None: ``text_dim``.
        dim: D, the width of temporal module and interaction; None: ``text_dim``. A side of another width gets a linear
            projection, without bias.
        max_positions: the largest number of video tokens.

    The other options are those of :class:`drl_fast.model.config.Config`. The factor of the logits starts at 1 / 0.07,
    with ``loss="sigmoid"`` at 10, and its bias at -10.

    Raises:
        ValueError, TypeError: a width below 1, an unknown option.

    Source: arXiv 2203.07111, section 3, behind the towers.
    """

    def __init__(
        self,
        text_dim: int,
        video_dim: int | None = None,
        dim: int | None = None,
        *,
        interaction: str = "wti",
        temporal: str | None = "seqTransf",
        wti_arch: int = 2,
        masking: str = "drl",
        cdcr: int = 0,
        cdcr_alpha_on: float = 0.11,
        cdcr_alpha_off: float = 0.0,
        cdcr_weight: float = 0.001,
        query_expansion: bool = False,
        loss: str = "softmax",
        pooling: str = "max",
        pooling_temperature: float = 1.0,
        max_positions: int = 77,
    ) -> None:
        super().__init__()
        sizes = Sizes(
            text_dim,
            text_dim if video_dim is None else video_dim,
            text_dim if dim is None else dim,
            max_positions,
        )
        options = (interaction, temporal, wti_arch, masking, cdcr, cdcr_alpha_on, cdcr_alpha_off, cdcr_weight)
        config = Config(
            *options,
            query_expansion=query_expansion,
            loss=loss,
            pooling=pooling,
            pooling_temperature=pooling_temperature,
        )
        self._build(sizes, config)
        first = FIRST_SIGMOID_SCALE if loss == "sigmoid" else FIRST_LOGIT_SCALE
        self.log_scale = nn.Parameter(torch.tensor(math.log(first)))

    def _build(self, sizes: Sizes, config: Config) -> None:
        """Make projections, temporal module, interaction, and the sigmoid loss's bias."""
        self.config, self.sizes = config, sizes
        self.inputs: Inputs | None = None
        """How captions and frames are prepared; training sets it, and saved models keep it."""
        self.encoders: Encoders | None = None
        """What encoded the tokens that the head was trained on; training on features sets it."""
        dim, max_positions = sizes.dim, sizes.max_positions
        self.text_projection = None if sizes.text_dim == dim else nn.Linear(sizes.text_dim, dim, bias=False)
        self.video_projection = None if sizes.video_dim == dim else nn.Linear(sizes.video_dim, dim, bias=False)
        self.temporal = None if config.temporal is None else TEMPORAL[config.temporal](dim, max_positions=max_positions)
        of_both = {
            "masking": config.masking,
            "pooling": config.pooling,
            "temperature": config.pooling_temperature,
        }
        options: dict[str, dict[str, Any]] = {
            "wti": {"arch": config.wti_arch, **of_both},
            "ti": of_both,
            "xti": {"max_positions": max_positions},
            "mean_maxsim": {"max_positions": max_positions},
        }
        self.interaction = build_interaction(config.interaction, dim, **options.get(config.interaction, {}))
        self.logit_bias = nn.Parameter(torch.tensor(FIRST_SIGMOID_BIAS)) if config.loss == "sigmoid" else None
        """Of the sigmoid loss, added to the scaled logits."""

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Head:
        """Read a folder that :meth:`save_pretrained` wrote, or the best model of a run on features.

        The model is in evaluation mode. ``encoders`` and ``inputs`` say what encoded the tokens that it was trained on.

        Raises:
            ValueError: files that are missing, cut short, or of another model; entries that do not fit are named.
        """
        state, saved = pretrained.read_folder(folder)
        if saved.sizes is None:
            raise ValueError(f"{folder} must hold a Head, got a DRL with its CLIP; read it with DRL.from_pretrained")
        try:
            model = cls(**asdict(saved.sizes), **saved.options)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{folder} must hold a model of this version of drl-fast, got: {error}") from error
        model.inputs, model.encoders = saved.inputs, saved.encoders
        load_strictly(model, state, str(folder))
        return model.eval()

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``model.safetensors`` and ``config.json``; files already there stay until they are replaced."""
        pretrained.save_folder(folder, self.state_dict(), self.describe_config())

    def describe_config(self) -> dict[str, Any]:
        """Return all that, besides the weights, describes the model; JSON holds it."""
        options = asdict(self.config)
        del options["cdcr_padding"]  # of towers that encode padding
        return {
            "sizes": asdict(self.sizes),
            "encoders": None if self.encoders is None else asdict(self.encoders),
            **options,
            "inputs": None if self.inputs is None else asdict(self.inputs),
        }

    def load_weights(self, source: str | os.PathLike[str]) -> None:
        """Replace all weights by those of another head of the same architecture; options such as CDCR's stay.

        Args:
            source: a folder of ``save_pretrained`` or of a run, of a Head or of a DRL, whose towers are left out; or a
                checkpoint file of the public code.

        Raises:
            ValueError: nothing readable there, or another architecture; every difference is named.
        """
        path = Path(source)
        state, theirs = read_source(path)
        differences = architecture_differences(self.describe_config(), theirs)
        if theirs.get("sizes") not in (None, self.sizes):
            differences.append(f"{theirs['sizes']} there and {self.sizes} here")
        if differences:
            raise ValueError(f"{path} must hold a model of this architecture, got {'; '.join(differences)}")
        load_strictly(self, without_towers(state), str(path))

    def init_from_clip(self, positional_embedding: Tensor, blocks: Mapping[str, Tensor]) -> None:
        """Start temporal blocks, XTI and all positions as CLIP's text blocks and positions do, if widths agree.

        Args:
            positional_embedding: (positions, D).
            blocks: the state dict of CLIP's text blocks, or of its first four.
        """
        for module in (self.temporal, self.interaction):
            if isinstance(module, SeqTransf | SeqLSTM | XTI | MeanMaxSim):
                module.init_from_clip(positional_embedding, blocks)

    @property
    def dim(self) -> int:
        """D, the width of the tokens that are compared."""
        return self.sizes.dim

    @property
    def stored_scale(self) -> nn.Parameter:
        """The logarithm of the logits' factor."""
        return self.log_scale

    @property
    def logit_scale(self) -> Tensor:
        """The factor itself (exp taken), with InfoNCE at most 100; the sigmoid loss has no limit, and SigLIP's is 117.

        Its gradient ignores the limit: CLIP's own weights lie there, and a clamp would never let them leave it.
        """
        stored = self.stored_scale.reshape(())
        if self.config.loss == "sigmoid":
            return stored.exp()
        return (stored + (stored.clamp(max=math.log(MAX_LOGIT_SCALE)) - stored).detach()).exp()

    @torch.no_grad()
    def limit_logit_scale(self) -> None:
        """Clamp InfoNCE's stored temperature, as the public code does; call it after an optimizer's step."""
        if self.config.loss == "softmax":
            self.stored_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))

    def encode(self, batch: Mapping[str, Tensor]) -> Encoded:
        """Encode the texts and the videos of a batch; their numbers may differ.

        Args:
            batch: ``text`` (A, Nt, text_dim) and ``video`` (B, Nv, video_dim). Optional: ``text_mask`` (A, Nt) and
                ``video_mask`` (B, Nv), non-zero = real.

        Raises:
            ValueError, TypeError: an entry that is missing, or of another shape or type.
        """
        require(batch, "text", "video")
        text, text_mask = self.text_tokens(batch["text"], batch.get("text_mask"))
        video, video_mask = self.video_tokens(batch["video"], batch.get("video_mask"))
        return Encoded(text, video, text_mask, video_mask)

    def text_tokens(self, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Bring a text encoder's tokens (A, Nt, text_dim) to the interaction's width (A, Nt, D); also return the mask.

        Args:
            mask: (A, Nt), non-zero = real; None: all real. Masked tokens become 0.

        Raises:
            ValueError, TypeError: another shape or type.
        """
        return _project("text", tokens, mask, self.sizes.text_dim, self.text_projection)

    def video_tokens(self, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Bring a frame encoder's tokens (B, Nv, video_dim) to the interaction's width (B, Nv, D); mix them over time.

        Args:
            mask: (B, Nv), non-zero = real; None: all real. Masked tokens become 0.

        Returns:
            tokens and mask.

        Raises:
            ValueError, TypeError: another shape or type.
        """
        video, real = _project("video", tokens, mask, self.sizes.video_dim, self.video_projection)
        return (video if self.temporal is None else zero_masked(self.temporal(video, real), real)), real

    def trains(self, side: str) -> bool:
        """Return whether the tokens of a side, ``"text"`` or ``"video"``, depend on a parameter that trains."""
        return any(p.requires_grad for p in self._before_interaction(side))

    def _before_interaction(self, side: str) -> Iterator[nn.Parameter]:
        modules = (self.text_projection,) if side == "text" else (self.video_projection, self.temporal)
        for module in modules:
            yield from () if module is None else module.parameters()

    def prepare(
        self, video: Tensor, video_mask: Tensor | None = None, *, dtype: torch.dtype | None = None
    ) -> PreparedVideos:
        """Prepare encoded videos (B, Nv, D) for many calls of :meth:`similarity`, with their weights; TI and WTI only.

        >>> prepared = head.prepare(*head.video_tokens(frames, frame_mask))
        >>> logits = head.similarity(text, prepared, text_mask)

        Args:
            video_mask: (B, Nv), non-zero = real; None: all real.
            dtype: what the tokens are stored in; see :func:`drl_fast.prepare`.

        Raises:
            ValueError: another interaction, or a shape that does not fit.
        """
        if not isinstance(self.interaction, TI | WTI):
            raise ValueError(
                f"prepare needs interaction 'ti' or 'wti', got {self.config.interaction!r}; pass the video's tokens to "
                "similarity()"
            )
        return self.interaction.prepare(video, video_mask, dtype=dtype)

    @overload
    def similarity(
        self,
        text: Tensor,
        video: Tensor | PreparedVideos,
        text_mask: Tensor | None = ...,
        video_mask: Tensor | None = ...,
    ) -> Tensor: ...
    @overload
    def similarity(
        self,
        text: Tensor,
        video: Tensor | PreparedVideos,
        text_mask: Tensor | None = ...,
        video_mask: Tensor | None = ...,
        *,
        return_matches: Literal[True],
    ) -> tuple[Tensor, Matches]: ...
    def similarity(
        self,
        text: Tensor,
        video: Tensor | PreparedVideos,
        text_mask: Tensor | None = None,
        video_mask: Tensor | None = None,
        *,
        return_matches: bool = False,
    ) -> Tensor | tuple[Tensor, Matches]:
        """Score every text against every video, without the temperature.

        Args:
            text, video: encoded tokens (A, Nt, D) and (B, Nv, D); the video may be what :meth:`prepare` returned.
            text_mask, video_mask: (A, Nt) and (B, Nv), non-zero = real; None: all real.
            return_matches: also return which frame each word chose and which word each frame chose; TI and WTI only.

        Returns:
            logits (A, B) float32, and with ``return_matches`` :class:`drl_fast.Matches`.

        Raises:
            ValueError: shapes that do not go together, or ``return_matches`` with another interaction or soft pooling.
        """
        if not return_matches:
            return self.interaction(text, video, text_mask, video_mask)
        if not isinstance(self.interaction, TI | WTI):
            raise ValueError(
                f"return_matches must be False with interaction={self.config.interaction!r}, which matches no tokens; "
                "use 'ti' or 'wti'"
            )
        return self.interaction(text, video, text_mask, video_mask, return_matches=True)

    def forward(self, batch: Mapping[str, Tensor], process_group: ProcessGroup | None = None) -> dict[str, Tensor]:
        """Compute the losses of a batch: ``total`` = ``info_nce`` + lambda ``cdcr``, scalars.

        With ``loss="sigmoid"`` the entry ``info_nce`` is the sigmoid loss.

        Args:
            batch: see :meth:`encode`, row by row pairs. Optional: ``owner`` (B,), the id of each caption's video; or
                ``video_of`` (A,), the row of ``video`` that each caption describes, if several captions share a row.
            process_group: see :meth:`losses`.

        Raises:
            ValueError: missing entries, or options that the interaction does not support.
        """
        return self.losses(*self.encode(batch), batch.get("owner"), process_group, video_of=batch.get("video_of"))

    def losses(
        self,
        text: Tensor,
        video: Tensor,
        text_mask: Tensor,
        video_mask: Tensor,
        owner: Tensor | None = None,
        process_group: ProcessGroup | None = None,
        *,
        video_of: Tensor | None = None,
        padded: tuple[Tensor, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Compute the losses of :meth:`forward` from encoded tokens (A, Nt, D), (B, Nv, D) and masks.

        Args:
            owner: (A,) integers: captions with one id are not negatives of each other. With ``video_of`` leave it out
                in one process: captions of one row of ``video`` are never negatives of each other. Over a group pass
                ids that ranks share, so that this holds for one video on two ranks as well.
            process_group: its ranks' pairs are negatives of each other. TI and WTI never form the batch's logits; with
                the others every rank gathers all videos and scores its own texts against them.
            video_of: (A,) integers, the row of ``video`` that each caption describes; None: row i describes row i. The
                losses are those of ``video[video_of]`` with ``owner=video_of``, without the repetition.
            padded: tokens of both sides that include padding's, for ``cdcr_padding="competes"``.
        """
        if self.needs_padding and padded is None:
            raise ValueError("padded must hold the tokens with padding for cdcr_padding='competes', got None")
        weights: tuple[Tensor | None, Tensor | None] = (None, None)
        if isinstance(self.interaction, WTI):
            weights = self.interaction.weights(text, video, text_mask, video_mask)
        batch = losses.Batch(text, video, *weights, text_mask, video_mask)
        if video_of is None:
            info_nce = losses.contrastive_loss(
                self.interaction, batch, self.logit_scale, self.logit_bias, owner, process_group
            )
        else:
            if owner is not None and process_group is None:
                raise ValueError("owner must be None with video_of, which says it already, got both; drop owner")
            video_of = losses.check_video_of(video_of, len(text), len(video))
            info_nce = losses.shared_videos_loss(
                self.interaction, batch, self.logit_scale, self.logit_bias, video_of, owner, process_group
            )
            batch = losses.repeat_videos(batch, video_of)
        cdcr = losses.decorrelation_loss(self.config, batch, padded, process_group)
        total = info_nce if self.config.cdcr == 0 else info_nce + self.config.cdcr_weight * cdcr
        return {"total": total, "info_nce": info_nce, "cdcr": cdcr}

    @property
    def needs_padding(self) -> bool:
        """Whether CDCR reads the features of padding."""
        return self.config.cdcr in (2, 3) and self.config.cdcr_padding == "competes"


def read_source(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read weights, and what describes their model, from a saved folder or a checkpoint file of the public code.

    Raises:
        ValueError: nothing readable there.
    """
    if not path.exists():
        raise ValueError(f"source must be a folder or a checkpoint file, not found: {path}")
    if not path.is_dir():
        state, inferred = upstream.read(path)
        return state, {"clip": None, "quick_gelu": True, **inferred}
    state, saved = pretrained.read_folder(path)
    described = {"clip": saved.clip, "quick_gelu": saved.quick_gelu, "sizes": saved.sizes}
    return state, {**described, **saved.statistics, **saved.pictures, **saved.options}


def architecture_differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], *more: str) -> list[str]:
    """Name the options in which two models' weights differ, among those that both describe.

    Args:
        more: names of further options to compare.
    """
    # Neither DP nor TI has weights: a public file of one is a file of the other.
    either = "sizes" not in theirs and (theirs["interaction"], ours["interaction"]) == ("dp", "ti")
    keys = [*more, *["interaction"] * (not either), "temporal", "loss", *["wti_arch"] * (ours["interaction"] == "wti")]
    return [
        f"{key} {theirs[key]!r} there and {ours[key]!r} here"
        for key in keys
        if key in theirs and theirs[key] != ours[key]
    ]


def without_towers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a DRL's weights as a head has them; a head's stay as they are."""
    named = {name: x for name, x in state.items() if not name.startswith("clip.")}
    return {**named, "log_scale": state["clip.logit_scale"]} if "clip.logit_scale" in state else named


def _project(
    name: str, tokens: Tensor, mask: Tensor | None, width: int, projection: nn.Linear | None
) -> tuple[Tensor, Tensor]:
    x = validation.tokens(name, tokens, "rows, tokens, D")
    if x.shape[2] != width:
        raise ValueError(
            f"{name} must have {width} channels, as the head's {name}_dim says, got {x.shape[2]}; build Head with "
            f"{name}_dim={x.shape[2]}"
        )
    real = validation.mask(f"{name}_mask", mask, x, "rows, tokens", name)
    if real is None:
        real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    # Nothing at a masked position reaches a parameter's gradient.
    x = zero_masked(x, real)
    return (x if projection is None else projection(x.to(projection.weight.dtype))), real


def require(batch: Mapping[str, Tensor], *names: str) -> None:
    """Check that a batch holds entries."""
    if not hasattr(batch, "get"):
        raise TypeError(
            f"batch must be a dict with {' and '.join(map(repr, names))}, got {validation.describe(batch)}; "
            "similarity(text, video, text_mask, video_mask) scores encoded tokens"
        )
    for name in names:
        if name not in batch:
            raise ValueError(f"batch must hold {name!r}, got {', '.join(map(repr, batch)) or 'nothing'}")
