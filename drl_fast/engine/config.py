"""What a run trains, on what and how: the YAML files under configs/, read into one dataclass."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import open_clip
import yaml
from torch import Tensor

from ..data.datasets import DATASETS
from ..data.video import Sampling
from ..model.drl import DRL, Config
from ..validation import option
from .precision import PRECISIONS

PARALLEL = ("ddp", "fsdp")


@dataclass(frozen=True)
class RunConfig:
    """One row of the ablation. What a file leaves out is the paper's recipe (arXiv 2203.07111, section 4.1, and the
    public code's scripts).

    Args:
        dataset: a name of :data:`drl_fast.data.datasets.DATASETS`.
        videos, annotations: folders of the video files and of the public annotation files.
        clip, pretrained: as of :class:`drl_fast.DRL`. ``drl-small`` is a toy that trains on a CPU.
        interaction, temporal, wti_arch, cdcr, cdcr_alpha_on, cdcr_alpha_off, cdcr_weight: as of
            :class:`drl_fast.model.drl.Config`.
        epochs: passes over the training captions.
        batch: pairs a step, over all processes; each is a negative of all others.
        lr, clip_lr: peak learning rates of new modules and of CLIP.
        weight_decay: of matrices; none of biases, norms and the temperature.
        warmup: share of the steps in which the rate rises, before it falls along half a cosine.
        clip_grad: largest norm of a step's gradient.
        precision: ``"bf16"`` runs towers under autocast, ``"fp32"`` does not. Losses are float32 in both.
        chunk: pairs that a process's towers hold a graph of at a time; 0: all its own. It bounds memory and changes
            neither negatives nor gradients, but runs the towers' forward twice.
        skip_same_video: captions of one video are no negatives of each other (the paper lets them be).
        parallel: over several processes: ``"ddp"`` keeps whole replicas, ``"fsdp"`` shards parameters and optimizer.
        max_words, max_frames: tokens a caption and frames a video; None: the data set's own.
        rate: frames a second before thinning.
        seed: of new weights, the order of captions and dropout.
        workers: processes that decode, for each training process.
        checkpoint_every: steps between checkpoints; the end of an epoch makes one in any case.

    Raises:
        ValueError: a name that is none of these, a number out of range; the field, its value and a remedy are named.
    """

    dataset: str
    videos: str | None = None
    annotations: str | None = None
    clip: str = "ViT-B-32"
    pretrained: str | None = "openai"
    interaction: str = Config.interaction
    temporal: str | None = Config.temporal
    wti_arch: int = Config.wti_arch
    cdcr: int = Config.cdcr
    cdcr_alpha_on: float = Config.cdcr_alpha_on
    cdcr_alpha_off: float = Config.cdcr_alpha_off
    cdcr_weight: float = Config.cdcr_weight
    epochs: int = 5
    batch: int = 128
    lr: float = 1e-4
    clip_lr: float = 1e-7
    weight_decay: float = 0.2
    warmup: float = 0.1
    clip_grad: float = 1.0
    precision: str = "bf16"
    chunk: int = 0
    skip_same_video: bool = False
    parallel: str = "ddp"
    max_words: int | None = None
    max_frames: int | None = None
    rate: float = 1.0
    seed: int = 0
    workers: int = 8
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        option("dataset", self.dataset, tuple(DATASETS))
        option("precision", self.precision, PRECISIONS)
        option("parallel", self.parallel, PARALLEL)
        for name in ("epochs", "batch", "lr", "clip_grad", "rate", "checkpoint_every", "max_words", "max_frames"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}; {_default(name)}")
        for name in ("clip_lr", "weight_decay", "chunk", "workers", "seed", "cdcr_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}; {_default(name)}")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup must be a share of the steps in 0..1, got {self.warmup}; {_default('warmup')}")
        self.model_options()

    def model_options(self) -> dict[str, Any]:
        """:class:`drl_fast.model.drl.Config`'s fields."""
        names = [f.name for f in dataclasses.fields(Config) if hasattr(self, f.name)]
        options = {name: getattr(self, name) for name in names}
        Config(**options)  # its own errors, before any weights are loaded
        return options

    @property
    def words(self) -> int:
        """Tokens a caption is cut to."""
        return self.max_words or DATASETS[self.dataset].max_words

    def sampling(self, size: int) -> Sampling:
        """Which frames are taken, at a CLIP's picture size."""
        spec = DATASETS[self.dataset]
        return Sampling(self.rate, self.max_frames or spec.max_frames, size, spec.seconds)


def _default(name: str) -> str:
    default = next(f.default for f in dataclasses.fields(RunConfig) if f.name == name)
    return "leave it out for the data set's own" if default is None else f"the paper's recipe has {default}"


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file of :class:`RunConfig`'s fields.

    Args:
        path: the file, or the bare name of a row that is shipped: ``"msrvtt_wti_cdcr"``.
        overrides: ``"key=value"``, values in YAML; later ones win over earlier ones and over the file.

    Raises:
        ValueError: no such file, no YAML, unknown keys (the nearest is named), values of another type or out of range.
    """
    path, text = _text(Path(path))
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} must be YAML, got {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must map names to values, got {type(values).__name__}; see configs/msrvtt_wti.yaml")
    set_here: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ValueError(f"set must be key=value, got {override!r}; for instance --set batch=64")
        try:
            set_here[key.strip()] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"set must be key=value in YAML, got {override!r}") from error
    checked = _checked(values, path) | _checked(set_here, "set")
    if "dataset" not in checked:
        raise ValueError(f"{path} must name its dataset, got none; one of {', '.join(DATASETS)}")
    return RunConfig(**checked)


def _text(path: Path) -> tuple[str, str]:
    """A configuration's name, for errors, and text: of a file, or of a row that is shipped, by its bare name."""
    if path.is_file():
        try:
            return str(path), path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} must be YAML in UTF-8, got {error}; save it as UTF-8") from error
    rows = resources.files("drl_fast.configs").iterdir()
    shipped = {Path(row.name).stem: row for row in rows if row.name.endswith(".yaml")}
    if path.name in shipped and path.parent == Path("."):
        return path.name, shipped[path.name].read_text(encoding="utf-8")
    near = difflib.get_close_matches(path.stem, shipped, n=3, cutoff=0.4)
    raise ValueError(
        f"config must be a YAML file or the name of a row that is shipped, got {path}, which is neither"
        + (f"; nearest: {', '.join(near)}" if near else "; msrvtt_wti, for instance")
    )


def _checked(values: dict[str, Any], source: str) -> dict[str, Any]:
    """Names and types of what a file, or ``set``, says."""
    hints = typing.get_type_hints(RunConfig)
    for name in values:
        if name not in hints:
            near = difflib.get_close_matches(str(name), hints, n=1, cutoff=0)
            raise ValueError(f"{source} must hold known names, got {name!r}; nearest: {near[0]}")
    return {name: _typed(name, value, hints[name], source) for name, value in values.items()}


def _typed(name: str, value: Any, hint: Any, source: str) -> Any:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value == "None" and types.NoneType in kinds:  # Python's word for YAML's null
        return None
    if float in kinds and not isinstance(value, bool):
        # YAML takes 1e-4 for a word: it wants 1.0e-4.
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    elif isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool)):
        return value
    allowed = " or ".join("null" if kind is types.NoneType else kind.__name__ for kind in kinds)
    raise ValueError(f"{source}: {name} must be {allowed}, got {value!r}")


def build_model(config: RunConfig) -> tuple[DRL, Callable[..., Tensor]]:
    """The configured model and its CLIP's tokenizer (``tokenizer(texts, context_length=32) -> ids``).

    Raises:
        ValueError: a CLIP that is unknown or whose weights cannot be had.
    """
    model = DRL(config.clip, config.pretrained, **config.model_options())
    # The tokenizer last: those of other kinds of text tower would have to be fetched.
    return model, open_clip.get_tokenizer(config.clip)
