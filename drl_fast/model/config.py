"""The options of a DRL model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from ..modules import INTERACTIONS, SeqLSTM, SeqTransf
from ..validation import (
    MASKINGS,
    flag,
    non_negative_int,
    non_negative_number,
    option,
    pooling,
    positive_int,
    positive_number,
    use_plain_values,
)

# Tokens of a row that the kernels serve.
MOST_TOKENS = 32767
TEMPORAL = {"seqLSTM": SeqLSTM, "seqTransf": SeqTransf}


@dataclass(frozen=True)
class Inputs:
    """How a model's captions and frames were prepared in training; scoring prepares them in the same way.

    Args:
        max_words: tokens that a caption is cut to, start and end included.
        rate: frames per second of video, before thinning.
        max_frames: frames per video.
        seconds: only the video's beginning of this length is used; None: all of it.

    Raises:
        ValueError: a number out of range.
    """

    max_words: int
    rate: float
    max_frames: int
    seconds: float | None = None

    def __post_init__(self) -> None:
        use_plain_values(self)
        for name in ("max_words", "max_frames"):
            if positive_int(name, getattr(self, name)) > MOST_TOKENS:
                raise ValueError(f"{name} must be at most {MOST_TOKENS}, got {getattr(self, name)}")
        positive_number("rate", self.rate)
        if self.seconds is not None:
            positive_number("seconds", self.seconds)


class Pictures(NamedTuple):
    """How the CLIP's pictures are prepared, besides ``mean`` and ``std``; see :class:`drl_fast.data.video.Sampling`."""

    size: int
    """Height and width, pixels."""
    resize: str = "shortest"
    interpolation: str = "bicubic"


@dataclass(frozen=True)
class Sizes:
    """The widths of a head, in channels, and its largest number of video tokens.

    Raises:
        ValueError, TypeError: a number below 1, or none.
    """

    text_dim: int
    video_dim: int
    dim: int
    """Of temporal module and interaction."""
    max_positions: int

    def __post_init__(self) -> None:
        use_plain_values(self)
        for name in ("text_dim", "video_dim", "dim", "max_positions"):
            positive_int(name, getattr(self, name))


@dataclass(frozen=True)
class Encoders:
    """What encoded the tokens that a head was trained on, by side; None: imported tokens, whose encoder is unknown.

    Each is a dict of ``clip`` (the model's name), ``pretrained`` or ``init_from`` (its weights) and ``weights``, the
    hash of that tower.
    """

    text: dict[str, Any] | None
    video: dict[str, Any] | None


@dataclass(frozen=True)
class Config:
    """What a DRL model consists of, besides its CLIP. Defaults are the paper's for MSR-VTT.

    Args:
        interaction: ``"dp"``, ``"hi"``, ``"mlp"``, ``"xti"``, ``"ti"``, ``"wti"`` or ``"mean_maxsim"``.
        temporal: module over frames: None, ``"seqLSTM"`` or ``"seqTransf"``. ``"mean_maxsim"`` has its own: None.
        wti_arch: layers of WTI's weight heads, 1 to 3.
        masking: what TI and WTI do with padding: ``"drl"``, ``"exclude"`` or ``"none"``; see
            :func:`drl_fast.token_interaction`.
        cdcr: channel decorrelation, by the public code's number: 0 none, 1 pooled vectors, 2 tokens, 3 weighted tokens.
        cdcr_alpha_on: weight of the correlation's diagonal.
        cdcr_alpha_off: weight of all its other entries.
        cdcr_weight: lambda, the factor of the regularizer in the total loss.
        cdcr_padding: ``"never"`` leaves padding out of CDCR. ``"competes"`` reproduces a bug of the public code, and is
            the default for its checkpoints; see :mod:`drl_fast.model.padding`. It makes training encode padding too.
        query_expansion: the padding after a caption's end token counts as words, which the text tower encodes and
            ``"mean_maxsim"`` matches. Pass ids of one length, ``max_words``, in training and scoring. A head reads the
            words that it is given; for it this is a record.
        loss: ``"softmax"``: InfoNCE. ``"sigmoid"``: SigLIP's loss with a learned bias; with ``"mean_maxsim"`` the sum
            of one loss per level, with the same factor and bias (Video-ColBERT's dual sigmoid loss).
        pooling: what TI and WTI take over a token's similarities: ``"max"``, ``"softmax"`` or ``"logsumexp"``; see
            :func:`drl_fast.token_interaction`.
        pooling_temperature: of ``"softmax"`` and ``"logsumexp"``.

    Raises:
        ValueError: an unknown value, or options that do not go together.
        TypeError: ``query_expansion`` is not a bool.
    """

    interaction: str = "wti"
    temporal: str | None = "seqTransf"
    wti_arch: int = 2
    masking: str = "drl"
    cdcr: int = 0
    cdcr_alpha_on: float = 0.11
    cdcr_alpha_off: float = 0.0
    cdcr_weight: float = 0.001
    cdcr_padding: str = "never"
    query_expansion: bool = False
    loss: str = "softmax"
    pooling: str = "max"
    pooling_temperature: float = 1.0

    def __post_init__(self) -> None:
        use_plain_values(self)
        for name in ("cdcr_alpha_on", "cdcr_alpha_off", "cdcr_weight"):
            non_negative_number(name, getattr(self, name))
        option("wti_arch", positive_int("wti_arch", self.wti_arch), (1, 2, 3))
        option("interaction", self.interaction, tuple(INTERACTIONS))
        if self.temporal is not None:
            option("temporal", self.temporal, (None, *TEMPORAL))
            if self.interaction == "mean_maxsim":
                raise ValueError(
                    f"temporal must be None with interaction='mean_maxsim', which mixes frames itself and also reads "
                    f"them unmixed, got {self.temporal!r}; use temporal=None"
                )
        option("masking", self.masking, MASKINGS)
        option("loss", self.loss, ("softmax", "sigmoid"))
        if self.masking != "drl" and self.interaction not in ("ti", "wti"):
            raise ValueError(
                f"masking must be left out with interaction={self.interaction!r}, whose rule is fixed (padding takes "
                f"no part), got {self.masking!r}; use interaction='ti' or 'wti' to choose one"
            )
        pooling(self.pooling, self.pooling_temperature, "pooling_temperature")
        if self.pooling != "max" and self.interaction not in ("ti", "wti"):
            raise ValueError(
                f"pooling must be 'max' with interaction={self.interaction!r}, which has no other, got "
                f"{self.pooling!r}; leave it out, or use interaction='ti' or 'wti'"
            )
        option("cdcr", non_negative_int("cdcr", self.cdcr), (0, 1, 2, 3))
        option("cdcr_padding", self.cdcr_padding, ("never", "competes"))
        if self.cdcr == 3 and self.interaction != "wti":
            raise ValueError(
                f"cdcr must be 0, 1 or 2 with interaction={self.interaction!r}, got 3, which needs WTI's weights; "
                "use interaction='wti'"
            )
        flag("query_expansion", self.query_expansion)
        if self.query_expansion:
            if self.interaction != "mean_maxsim":
                raise ValueError(
                    f"query_expansion must be False with interaction={self.interaction!r}, got True; use "
                    "interaction='mean_maxsim'"
                )
            if self.cdcr != 0:
                raise ValueError(
                    f"cdcr must be 0 with query_expansion, whose padding it would read as words, got {self.cdcr}; use "
                    "cdcr=0 or query_expansion=False"
                )
