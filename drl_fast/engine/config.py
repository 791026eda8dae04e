"""What a run trains, on what and how: one dataclass, read from YAML files and ``key=value`` options."""

from __future__ import annotations

import dataclasses
import difflib
import json
import reprlib
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from .. import validation
from ..data.datasets import DATASETS
from ..data.feature_store import FeatureStore, read_about
from ..data.video import Sampling
from ..model.clip import build_clip, load_tokenizer
from ..model.config import Config, Encoders, Inputs
from ..model.drl import DRL
from ..model.head import Head
from .precision import PRECISIONS

PARALLEL = ("ddp", "fsdp")
# How inputs are prepared; features and saved models know it.
OF_INPUTS = ("max_words", "rate", "max_frames")
# How the towers train, and their values where they train as usual.
OF_TOWERS = {"lora": 0, "freeze_layers": None, "checkpoint_towers": False, "compile": False}
# A head's positions on imported tokens, unless a video has more.
POSITIONS = 77
# What other codebases call our keys; difflib finds misspellings, but not these.
ALIASES = {
    "agg_module": "temporal",
    "backbone": "clip",
    "batch_size": "batch",
    "fps": "rate",
    "freeze_layer_num": "freeze_layers",
    "grad_checkpointing": "checkpoint_towers",
    "gradient_checkpointing": "checkpoint_towers",
    "learning_rate": "lr",
    "lora_r": "lora",
    "lora_rank": "lora",
    "max_epochs": "epochs",
    "max_grad_norm": "clip_grad",
    "max_length": "max_words",
    "model": "clip",
    "num_epochs": "epochs",
    "num_frames": "max_frames",
    "num_workers": "workers",
    "torch_compile": "compile",
    "warmup_ratio": "warmup",
}


CHECKS: dict[str, Callable[[str, object, str], object]] = {
    **dict.fromkeys(("epochs", "batch", "checkpoint_every", "max_words", "max_frames", "dim"), validation.positive_int),
    **dict.fromkeys(
        ("captions_per_video", "chunk", "workers", "seed", "lora", "freeze_layers"), validation.non_negative_int
    ),
    **dict.fromkeys(("lr", "clip_grad", "rate"), validation.positive_number),
    **dict.fromkeys(("clip_lr", "weight_decay", "cdcr_weight"), validation.non_negative_number),
    "warmup": validation.fraction,
}


@dataclass(frozen=True)
class RunConfig:
    """The configuration of a run. Defaults are the paper's recipe (arXiv 2203.07111, section 4.1, and the public code's
    scripts). ``pathlib`` paths are kept as strings, NumPy numbers as Python's.

    Args:
        dataset: a name of :data:`drl_fast.data.datasets.DATASETS`.
        videos, annotations: folders of the video files and of the public annotation files.
        features: train on the tokens in this folder, which ``drl-fast features`` wrote, instead of on videos.
        clip, pretrained: see :class:`drl_fast.DRL`. ``drl-small`` is a toy that trains on a CPU. On features they are
            those that encoded them; None: imported tokens.
        dim: D, the width of temporal module and interaction, on features; None: the text tokens' width.
        interaction, temporal, wti_arch, masking, cdcr, cdcr_alpha_on, cdcr_alpha_off, cdcr_weight, query_expansion,
            loss, pooling, pooling_temperature: see :class:`drl_fast.model.config.Config`.
        epochs: passes over the training captions.
        batch: pairs per step, over all processes; each is a negative of all others.
        lr, clip_lr: peak learning rates of new modules and of CLIP.
        weight_decay: of matrices; biases, norms and the temperature have none.
        warmup: fraction of the steps in which the rate rises, before it falls along half a cosine.
        clip_grad: largest norm of a step's gradient.
        precision: of training: ``"bf16"`` runs the towers under autocast, ``"fp32"`` does not. Losses are float32 in
            both, and evaluations run in float32.
        chunk: gradient caching (GradCache): pairs encoded per chunk and process; 0 = off. It bounds memory, keeps
            negatives and gradients, and runs the towers' forward twice. The default is the data set's own.
        captions_per_video: 0 draws captions at random, as the paper does. k > 0 draws groups of up to k captions of one
            video; a batch encodes every video once, and captions of one video are not negatives of each other.
        freeze: ``"clip"`` freezes CLIP's weights; the temperature still trains, at ``lr``. null freezes nothing.
        freeze_layers: n freezes the embeddings and the first n blocks of both towers, as CLIP4Clip's
            ``freeze_layer_num`` does; null freezes nothing.
        lora: rank of adapters (LoRA) on all linear layers of both towers' blocks; 0 = off. CLIP's own weights are
            frozen. Adapters and temperature train at ``lr``, since ``clip_lr`` would hardly move them. The best model
            is saved with the adapters merged.
        checkpoint_towers: keep only the inputs of the towers' blocks for the backward, which computes the rest again.
        compile: compile the towers' blocks with torch.compile.
        skip_same_video: do not use captions of one video as negatives of each other (the paper does).
            :func:`read_config` sets it to True for features, unless told otherwise.
        parallel: over several processes, ``"ddp"`` keeps whole replicas, ``"fsdp"`` shards parameters and optimizer.
        max_words, max_frames: tokens per caption and frames per video; None: the data set's own.
        rate: frames per second before thinning.
        seed: of new weights, the order of captions and dropout.
        workers: decoding processes per training process.
        checkpoint_every: steps between checkpoints; every epoch ends with one, too.
        init_from: start from the weights of this run, ``save_pretrained`` folder or public checkpoint file instead of
            ``pretrained``, whose activation and picture statistics still count.

    Raises:
        ValueError: an unknown name or a number out of range; field, value and remedy are named.
    """

    dataset: str
    videos: str | None = None
    annotations: str | None = None
    features: str | None = None
    clip: str | None = "ViT-B-32"
    pretrained: str | None = "openai"
    interaction: str = Config.interaction
    temporal: str | None = Config.temporal
    dim: int | None = None
    wti_arch: int = Config.wti_arch
    masking: str = Config.masking
    cdcr: int = Config.cdcr
    cdcr_alpha_on: float = Config.cdcr_alpha_on
    cdcr_alpha_off: float = Config.cdcr_alpha_off
    cdcr_weight: float = Config.cdcr_weight
    query_expansion: bool = Config.query_expansion
    loss: str = Config.loss
    pooling: str = Config.pooling
    pooling_temperature: float = Config.pooling_temperature
    epochs: int = 5
    batch: int = 128
    lr: float = 1e-4
    clip_lr: float = 1e-7
    weight_decay: float = 0.2
    warmup: float = 0.1
    clip_grad: float = 1.0
    precision: str = "bf16"
    chunk: int = 0
    captions_per_video: int = 0
    freeze: str | None = None
    freeze_layers: int | None = None
    lora: int = 0
    checkpoint_towers: bool = False
    compile: bool = False
    skip_same_video: bool = False
    parallel: str = "ddp"
    max_words: int | None = None
    max_frames: int | None = None
    rate: float = 1.0
    seed: int = 0
    workers: int = 8
    checkpoint_every: int = 500
    init_from: str | None = None

    def __post_init__(self) -> None:
        validation.use_plain_values(self)
        validation.option("dataset", self.dataset, tuple(DATASETS))
        validation.option("precision", self.precision, PRECISIONS)
        validation.option("parallel", self.parallel, PARALLEL)
        if self.freeze is not None:
            validation.option("freeze", self.freeze, (None, "clip"))
        for name, check in CHECKS.items():
            if getattr(self, name) is not None:
                check(name, getattr(self, name), _default(name))
        if self.features is None and self.clip is None:
            raise ValueError("clip must be a model name without features, got None; the paper's recipe has ViT-B-32")
        if self.features is None and self.dim is not None:
            raise ValueError(f"dim must be None without features, got {self.dim}; CLIP's width is that of its tokens")
        self._check_towers()
        self.model_options()

    def _check_towers(self) -> None:
        """Reject options of the towers that do not go together, or would do nothing."""
        chosen = {name: getattr(self, name) for name, off in OF_TOWERS.items() if getattr(self, name) != off}
        if self.features is not None and chosen:
            got = ", ".join(f"{name}={value}" for name, value in chosen.items())
            off = " ".join(f"--set {name}={json.dumps(OF_TOWERS[name])}" for name in chosen)
            raise ValueError(
                f"{' and '.join(chosen)} must be left out on features, whose towers do not run, got {got}; add {off}, "
                "or train on videos"
            )
        for name in chosen if self.freeze == "clip" else ():
            if name != "compile":
                why = "leaves nothing to train in the towers" if name != "checkpoint_towers" else "keeps no activations"
                raise ValueError(
                    f"{name} must be left out with freeze='clip', which {why}, got {chosen[name]}; drop one of them"
                )
        if "lora" in chosen and "freeze_layers" in chosen:
            raise ValueError(
                f"freeze_layers must be left out with lora={self.lora}, which freezes all of CLIP's weights, got "
                f"{self.freeze_layers}; drop one of them"
            )

    def model_options(self) -> dict[str, Any]:
        """Return :class:`drl_fast.DRL`'s options, besides the CLIP."""
        names = [f.name for f in dataclasses.fields(Config) if hasattr(self, f.name)]
        options = {name: getattr(self, name) for name in names}
        Config(**options)  # raises before any weights are loaded
        return options

    @property
    def words(self) -> int:
        """The number of tokens that a caption is cut to."""
        return self.max_words or DATASETS[self.dataset].max_words

    def sampling(self, size: int, resize: str = "shortest", interpolation: str = "bicubic") -> Sampling:
        """Return how frames are sampled; pass a model's ``pictures``."""
        spec = DATASETS[self.dataset]
        return Sampling(self.rate, self.max_frames or spec.max_frames, size, spec.seconds, resize, interpolation)


def _default(name: str) -> str:
    default = next(f.default for f in dataclasses.fields(RunConfig) if f.name == name)
    if name in OF_TOWERS:
        return "leave it out to train the towers as usual"
    return "leave it out for the data set's own" if default is None else f"the paper's recipe has {default}"


def read_config(
    path: str | Path, overrides: Sequence[str] = (), dataset: str | None = None, features: Path | None = None
) -> RunConfig:
    """Read a YAML file of :class:`RunConfig`'s fields.

    Args:
        path: the file, or the name of a shipped row: ``"wti_cdcr"``.
        overrides: ``"key=value"``, values in YAML; later ones win over earlier ones and over the file.
        dataset: the data set, for a file that does not name one.
        features: folder of features, which say what the data set and its encoder are.

    Raises:
        ValueError: a missing file, bad YAML, an unknown key (the nearest is named), a value of another type or out of
            range, no data set or two, or a value that the features do not have.
    """
    return RunConfig(**read_values(path, overrides, dataset, features))


def read_values(
    path: str | Path, overrides: Sequence[str] = (), dataset: str | None = None, features: Path | None = None
) -> dict[str, Any]:
    """Read the fields that a YAML file and options name, as :func:`read_config` does, without the other defaults.

    Raises:
        ValueError: as :func:`read_config`, except that ranges are not checked.
    """
    return merge(*_read_map(Path(path)), overrides, dataset, features)


def merge(
    values: dict[str, Any], path: str, overrides: Sequence[str], dataset: str | None, features: Path | None = None
) -> dict[str, Any]:
    """Check the fields ``values``, read from ``path``, and add those of options, as :func:`read_values` does."""
    pairs = [override.partition("=") for override in overrides]
    for override, (key, equals, _) in zip(overrides, pairs, strict=True):
        if not equals or not key.strip():
            raise ValueError(f"set must be key=value, got {override!r}; for instance --set batch=64")
    # Names first: a wrong name's value says nothing.
    _check_names(values, path)
    _check_names([key.strip() for key, _, _ in pairs], "--set")
    checked = {name: _typed(name, value, path) for name, value in values.items()}
    for override, (key, _, text) in zip(overrides, pairs, strict=True):
        checked[key.strip()] = _typed(key.strip(), parse_yaml(text, f"the value in --set {override}"), "--set")
    if features is not None:
        checked["features"] = str(features)
    if checked.get("features") is not None:
        checked["features"] = str(Path(checked["features"]).resolve())
        return _with_features(checked, path, dataset)
    named = checked.setdefault("dataset", dataset)
    if named is None:
        raise ValueError(f"no data set given, and {path} names none; add --dataset with one of {', '.join(DATASETS)}")
    if dataset not in (None, named):
        raise ValueError(
            f"dataset must be the configuration's own, {named}, got {dataset}; leave --dataset out, or change the "
            f"configuration's with --set dataset={dataset}"
        )
    if named in DATASETS:
        checked.setdefault("chunk", DATASETS[named].chunk)
    return checked


def _with_features(values: dict[str, Any], path: str, dataset: str | None) -> dict[str, Any]:
    """Add what the features say; raise ValueError if the configuration says otherwise."""
    about = read_about(values["features"])
    encoder = about.video.encoder or about.text.encoder or {"clip": None, "pretrained": None}
    stored = {"dataset": about.dataset, "clip": encoder["clip"], "pretrained": encoder["pretrained"]}
    stored |= {name: (about.inputs or {}).get(name, getattr(RunConfig, name)) for name in OF_INPUTS}
    if about.text.encoder is not None:
        stored["query_expansion"] = about.text.encoder.get("query_expansion", False)
    configured = {**values, "dataset": values.get("dataset", dataset or about.dataset)}
    weights = configured.get("pretrained")
    if weights is not None and Path(weights).is_file():
        configured["pretrained"] = str(Path(weights).resolve())
    different = [name for name, value in stored.items() if configured.get(name, value) not in (value, None)]
    if different:
        raise ValueError(
            f"{path} must agree with the features in {values['features']}, which have "
            + ", ".join(f"{name} {stored[name]!r}" for name in different)
            + "; got "
            + ", ".join(f"{name} {configured[name]!r}" for name in different)
            + "; change the configuration, or take other features"
        )
    return {"skip_same_video": True, **values, **stored}


def read_recorded(path: Path) -> dict[str, Any]:
    """Read the fields of a run's configuration as they were recorded; folders that it names need not exist.

    Raises:
        ValueError: a file that is no configuration.
    """
    return _read_map(path)[0]


def parse_yaml(text: str, source: str) -> Any:
    """Parse YAML without aliases, which can expand a short file to any size.

    Raises:
        ValueError: text that is no YAML, has an alias, or is nested too deeply; ``source`` is named.
    """
    try:
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise ValueError(f"{source} must be YAML without aliases (*name), got one; write the value out")
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{source} must be YAML, got {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ValueError(f"{source} must be YAML of names and values, got lists or maps nested too deeply") from error


def _read_map(path: Path) -> tuple[dict[str, Any], str]:
    """Read the fields of a configuration file or a shipped row, and return its name for errors."""
    name, text = _text(path)
    values = parse_yaml(text, name)
    if not isinstance(values, dict):
        raise ValueError(f"{name} must map names to values, got {type(values).__name__}; for instance batch: 64")
    return values, name


def _text(path: Path) -> tuple[str, str]:
    """Read a configuration file or a shipped row; return its name for errors, and its text."""
    if path.is_file():
        try:
            return str(path), path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} must be YAML in UTF-8, got {error}; save it as UTF-8") from error
    files = resources.files("drl_fast.configs").iterdir()
    rows = {Path(file.name).stem: file for file in files if file.name.endswith(".yaml")}
    if path.name in rows and path.parent == Path("."):
        return path.name, rows[path.name].read_text(encoding="utf-8")
    dataset, _, row = path.stem.partition("_")
    if dataset in DATASETS and row in rows:
        raise ValueError(f"config must be a YAML file or a row, got {path}; write --config {row} --dataset {dataset}")
    near = difflib.get_close_matches(path.stem, rows, n=3, cutoff=0.4)
    raise ValueError(
        f"config must be a YAML file or a row ({', '.join(sorted(rows))}), got {path}, which is neither"
        + (f"; nearest: {', '.join(near)}" if near else "")
    )


def _check_names(names: Iterable[Any], source: str) -> None:
    known = [f.name for f in dataclasses.fields(RunConfig)]
    for name in names:
        if name not in known:
            nearest = ALIASES.get(str(name).lower()) or difflib.get_close_matches(str(name), known, n=1, cutoff=0)[0]
            raise ValueError(f"unknown key {name!r} in {source}; did you mean {nearest}?")


def _typed(name: str, value: Any, source: str) -> Any:
    """Return a value as its field's type; YAML reads 1e-4 as a string, and "None" is Python's word for null."""
    hint = typing.get_type_hints(RunConfig)[name]
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value in ("None", "none") and types.NoneType in kinds:
        return None
    if float in kinds and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            pass
    elif isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool)):
        return value
    allowed = " or ".join("null" if kind is types.NoneType else kind.__name__ for kind in kinds)
    raise ValueError(f"{source}: {name} must be {allowed}, got {reprlib.repr(value)}")


def build_model(config: RunConfig, *, load_weights: bool = True) -> tuple[DRL, Callable[..., Tensor]]:
    """Build the configured model; return it with its tokenizer (``tokenizer(texts, context_length=32) -> ids``).

    Args:
        load_weights: False leaves all weights random, for a checkpoint that replaces them.

    Raises:
        ValueError: an unknown CLIP, a tokenizer or weights that cannot be fetched, an ``init_from`` that is missing or
            another model.
    """
    if config.clip is None:
        raise ValueError("clip must be a model name, got None; imported features have no CLIP to score videos with")
    # Weights may be gigabytes: fail on a missing tokenizer first.
    tokenizer = load_tokenizer(config.clip, config.pretrained)
    torch.manual_seed(config.seed)
    clip = build_clip(config.clip, config.pretrained, load_weights=load_weights and config.init_from is None)
    # New weights depend on the seed alone, not on the CLIP before them: frozen and on features they start as equals.
    torch.manual_seed(config.seed + 1)
    model = DRL(clip, **config.model_options())
    model.clip_name = config.clip
    if load_weights and config.init_from is not None:
        model.load_weights(config.init_from)
    if config.freeze == "clip":
        model.clip.requires_grad_(False)
        model.clip.logit_scale.requires_grad_(True)
    sampling = config.sampling(*model.pictures)
    model.inputs = Inputs(model.words(config.words), sampling.rate, sampling.max_frames, sampling.seconds)
    return model, tokenizer


def build_head(config: RunConfig, store: FeatureStore, *, load_weights: bool = True) -> Head:
    """Build the configured head for the tokens of a store; it starts from CLIP's text blocks, if CLIP encoded both.

    Args:
        load_weights: False does not read ``init_from``, for a checkpoint that replaces all weights.

    Raises:
        ValueError: an option that a head does not have, an ``init_from`` that is missing or another model, or more
            frames in a video than the model has positions.
    """
    about, start = store.about, store.start()
    # XTI reads the text's end token before the frames.
    longest = store.longest("video")[0] + 1
    positions = max(longest, POSITIONS)
    if start:
        positions = int(start.get("max_positions", len(start.get("positional_embedding", ()))))
    options = config.model_options()
    torch.manual_seed(config.seed + 1)
    head = Head(about.text.width, about.video.width, config.dim, max_positions=positions, **options)
    if config.init_from is not None and load_weights:
        head.load_weights(config.init_from)
    elif start:
        blocks = {key.removeprefix("blocks."): x for key, x in start.items() if key.startswith("blocks.")}
        if "positional_embedding" in start:
            head.init_from_clip(start["positional_embedding"], blocks)
        # The sigmoid loss starts at its own factor and bias, unless the CLIP was trained with it.
        if config.loss == "softmax" or "logit_bias" in start:
            head.stored_scale.data.fill_(float(start["logit_scale"]))
        if head.logit_bias is not None and "logit_bias" in start:
            head.logit_bias.data.fill_(float(start["logit_bias"]))
    head.inputs = None if about.inputs is None else Inputs(**about.inputs)
    head.encoders = Encoders(about.text.encoder, about.video.encoder)
    check_positions(head, store)
    return head


def check_positions(head: Head, store: FeatureStore) -> None:
    """Check that a head has a position for every token of the store's videos.

    Raises:
        ValueError: a video that is longer; it is named.
    """
    most = head.sizes.max_positions
    if head.config.interaction == "xti":
        most -= 1  # the text's end token has one
    elif head.config.interaction != "mean_maxsim" and head.config.temporal != "seqTransf":
        return
    longest, name = store.longest("video")
    if longest > most:
        raise ValueError(
            f"{name} in {store.folder} must have at most {most} tokens, the model's positions, got {longest}; encode "
            "fewer frames"
        )
