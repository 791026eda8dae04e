"""Load the model of a checkpoint of any kind, or build the configured one untrained; find its configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch

from ..data.feature_store import SIDES, FeatureStore
from ..data.loading import Tokenizer
from ..model import upstream
from ..model.clip import QUICK, check_name, example_tag
from ..model.config import Encoders
from ..model.drl import DRL
from ..model.head import Head
from ..model.pretrained import BEST, Saved, read_saved
from .config import OF_INPUTS, OF_TOWERS, RunConfig, build_head, build_model, check_positions, merge, read_values
from .train import CONFIG

# What a checkpoint brings and no option replaces.
OF_CHECKPOINT = ("clip", "pretrained", "init_from")
# Options of a model that change its scores; a configuration that names them must agree with the checkpoint.
OF_MODEL = (
    "clip",
    "interaction",
    "temporal",
    "wti_arch",
    "masking",
    "query_expansion",
    "pooling",
    "pooling_temperature",
)
# Interactions whose weights are not CLIP's.
OWN_WEIGHTS = ("wti", "mlp", "xti", "hi", "mean_maxsim")


class Settings(NamedTuple):
    """A configuration, and what its file and options name: the other fields are defaults."""

    config: RunConfig
    named: Mapping[str, Any]
    source: str
    """The file of the names, for errors."""
    overridden: frozenset[str]
    """Names that --set gave."""


def settings_of(
    checkpoint: Path | None,
    config: Path | None,
    overrides: Sequence[str],
    dataset: str | None,
    *,
    features: Path | None = None,
    on_videos: bool = False,
) -> Settings:
    """Read the named configuration, or else the run's. Where it is silent, a saved model says how inputs are prepared.

    Args:
        features: folder of features that are scored instead of videos.
        on_videos: score videos, even if the run trained on features.

    Raises:
        ValueError: none of them exists, an override that a checkpoint excludes, or what
            :func:`drl_fast.engine.config.read_config` rejects.
    """
    keys = [override.partition("=")[0].strip() for override in overrides]
    for key, override in zip(keys, overrides, strict=True):
        # The weights of a head's CLIP may have moved; their hash is compared.
        moved = key == "pretrained" and checkpoint is not None and _is_head(checkpoint)
        if checkpoint is not None and key in OF_CHECKPOINT and not moved:
            raise ValueError(
                f"set must leave {key} as the checkpoint has it, got {override}; drop it or the checkpoint"
            )
        if key == "precision":
            raise ValueError(f"set must leave precision, which is of training, got {override}; use --precision")
    if checkpoint is not None and not checkpoint.exists():
        raise ValueError(f"checkpoint not found: {checkpoint}")
    saved = read_saved(checkpoint) if checkpoint is not None and checkpoint.is_dir() else None
    if on_videos:
        if saved is not None and saved.sizes is not None:
            _video_encoder(saved.encoders, checkpoint)
        overrides = ["features=null", "dim=null", *overrides]
    if checkpoint is not None and checkpoint.is_dir():
        run = checkpoint.parent if checkpoint.name == BEST else checkpoint
        if config is None and (run / CONFIG).is_file():
            config = run / CONFIG
    if config is not None:
        named = read_values(config, overrides, dataset, features)
    elif saved is not None and (saved.inputs is not None or saved.sizes is not None):
        named = merge({}, str(checkpoint), overrides, dataset, features)
    else:
        found = "" if checkpoint is None else f", and {checkpoint} does not say how its inputs were prepared"
        raise ValueError(
            f"config must be a row or a YAML file, got none{found}; for instance --config wti --dataset msrvtt"
        )
    # A run's file names every field, and null is the data set's own: the model knows better. No tower trains here.
    named = {k: value for k, value in named.items() if k not in OF_TOWERS and (value is not None or k not in OF_INPUTS)}
    known = {} if saved is None else _known(saved)
    return Settings(RunConfig(**{**known, **named}), named, str(config or checkpoint), frozenset(keys))


def _known(saved: Saved) -> dict[str, Any]:
    """Return the fields that a saved model knows."""
    encoder = saved.encoders.video if saved.encoders is not None else None
    of_clip = encoder or {"clip": saved.clip or RunConfig.clip, "pretrained": None}
    known: dict[str, Any] = {name: of_clip[name] for name in ("clip", "pretrained")}
    known |= {f.name: saved.options[f.name] for f in dataclasses.fields(RunConfig) if f.name in saved.options}
    if saved.inputs is not None:
        known |= {name: getattr(saved.inputs, name) for name in OF_INPUTS}
    return known


def load_head(checkpoint: Path | None, settings: Settings, store: FeatureStore) -> Head:
    """Load the model for stored tokens, on the CPU: a head, or a DRL of which the towers are not used.

    Raises:
        ValueError: as :func:`load_model`, or a model for the tokens of another encoder.
    """
    if checkpoint is None:
        return build_head(settings.config, store)
    if _is_head(checkpoint):
        model = Head.from_pretrained(checkpoint)
        _check_same(dataclasses.asdict(model.config), checkpoint, settings)
    else:
        model = load_model(checkpoint, settings)[0]
    for side in SIDES:
        stored = store.about.side(side)
        known = dataclasses.asdict(model.encoders)[side] if model.encoders is not None else None
        own = model.encoder_hash(side) if isinstance(model, DRL) else known and known["weights"]
        width = model.sizes.text_dim if side == "text" else model.sizes.video_dim
        if stored.width != width or (stored.encoder and stored.encoder["weights"]) != own:
            there = "imported tokens" if stored.encoder is None else f"tokens by {stored.encoder['clip']}"
            raise ValueError(
                f"features must be of the {side} encoder that {checkpoint} was trained with (width {width}), got "
                f"{store.folder} with {there} of width {stored.width} and other weights; encode the data with that one"
            )
    check_positions(model, store)
    return model


def load_model(checkpoint: Path | None, settings: Settings) -> tuple[DRL, Tokenizer]:
    """Load the model on the CPU; return it with its tokenizer. A head is joined with the CLIP that it was trained on.

    Raises:
        ValueError: a checkpoint that is missing, of another kind, does not fit, or is of another model than the
            configuration names.
    """
    if checkpoint is None:
        return build_model(settings.config)
    if checkpoint.is_dir():
        model = _with_towers(checkpoint, settings) if _is_head(checkpoint) else DRL.from_pretrained(checkpoint)
        name = {} if model.clip_name is None else {"clip": model.clip_name}
        _check_same({**dataclasses.asdict(model.config), **name}, checkpoint, settings)
    else:
        model = _from_public(checkpoint, settings)
    return model, model.tokenizer()


def _is_head(checkpoint: Path) -> bool:
    """Return whether a checkpoint is a head without a CLIP, from a run on features."""
    return checkpoint.is_dir() and read_saved(checkpoint).sizes is not None


def _video_encoder(encoders: Encoders | None, checkpoint: Path | None) -> dict[str, Any]:
    """Return the record of the CLIP that encoded a head's frames; ValueError if they were imported."""
    if encoders is None or encoders.video is None:
        raise ValueError(f"{checkpoint} was trained on imported tokens, not on a CLIP's; score it with --features")
    return encoders.video


def _with_towers(checkpoint: Path, settings: Settings) -> DRL:
    """Load a head and the CLIP whose tokens it was trained on."""
    head = Head.from_pretrained(checkpoint)
    encoder = _video_encoder(head.encoders, checkpoint)
    source, pretrained = encoder["init_from"], settings.config.pretrained
    if source is not None:
        towers = DRL.from_pretrained(source) if Path(source).is_dir() else DRL.from_upstream(source)
        towers.clip_name = encoder["clip"]
    else:
        torch.manual_seed(encoder["seed"])  # random weights are those of the seed
        towers = DRL(encoder["clip"], pretrained=pretrained, temporal=None, interaction="dp")
    return DRL.from_head(head, towers)


def _from_public(checkpoint: Path, settings: Settings) -> DRL:
    """Load a public checkpoint as the model that the configuration names: its entries do not tell TI from DP."""
    state = upstream.read_state(checkpoint)
    named, inferred = settings.named, upstream.infer_options(state)
    if inferred["interaction"] == "dp":
        if "interaction" not in named:
            raise ValueError(
                f"interaction must be named: {checkpoint} has no weights for one, and neither DP nor TI has any; add "
                "--set interaction=dp or --set interaction=ti"
            )
        inferred["interaction"] = "ti" if named["interaction"] == "ti" else "dp"
    _check_same(inferred, checkpoint, settings)
    options = {name: named[name] for name in ("masking", "pooling", "pooling_temperature") if name in named}
    try:
        model = DRL.from_upstream(state, interaction=inferred["interaction"], **options)
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}") from error
    if "clip" in named:
        _check_towers(model, named["clip"], checkpoint)
    return model


def _check_towers(model: DRL, name: str, checkpoint: Path) -> None:
    """Check that a public checkpoint's towers have the sizes of the CLIP that the configuration names."""
    config, visual = open_clip.get_model_config(check_name(name)), model.clip.visual
    vision, text = config["vision_cfg"], config["text_cfg"]
    if config.get("custom_text") or "layers" not in text:
        raise ValueError(
            f"clip must be that of {checkpoint}, a CLIP of OpenAI's form, got {name}; drop clip from the configuration"
        )
    sizes = {
        "width": (model.dim, config["embed_dim"]),
        "patch size": (visual.patch_size[0], vision.get("patch_size")),
        "image size": (model.picture_size[0], vision.get("image_size", 224)),
        "image layers": (len(visual.transformer.resblocks), vision.get("layers")),
        "text layers": (len(model.clip.transformer.resblocks), text.get("layers")),
    }
    other = [f"{what} {own} there and {wanted} of {name}" for what, (own, wanted) in sizes.items() if own != wanted]
    if other:
        raise ValueError(f"clip must be that of {checkpoint}, got {'; '.join(other)}; drop clip from the configuration")


def _check_same(found: Mapping[str, Any], checkpoint: Path, settings: Settings) -> None:
    """Check that a checkpoint's options are those that the configuration names."""
    named = settings.named
    keys = [name for name in OF_MODEL if name in named and name in found]
    if found["interaction"] != "wti" or named.get("interaction", "wti") != "wti":
        keys = [name for name in keys if name != "wti_arch"]
    other = {name: named[name] for name in keys if _plain(named[name]) != _plain(found[name])}
    if not other:
        return
    by_option = next((name for name in other if name in settings.overridden), None)
    if by_option is not None:
        raise ValueError(
            f"--set {by_option}={other[by_option]} disagrees with {checkpoint}, which has {found[by_option]!r}; drop it"
        )
    there = {name: repr(found[name]) for name in other}
    if not checkpoint.is_dir() and found["interaction"] == "dp" and "interaction" in there:
        there["interaction"] = "'dp' or 'ti' (the file does not say which)"
    differences = "; ".join(f"{name} {there[name]} there and {value!r} here" for name, value in other.items())
    remedy = " ".join(
        "--set interaction=dp or =ti" if " or " in there[name] else f"--set {name}={_yaml(found[name])}"
        for name in other
        if name != "clip"
    )
    raise ValueError(
        f"checkpoint {checkpoint} and {settings.source} must name one model, got {differences}; take the "
        "checkpoint's row" + (f", or add {remedy}" if remedy else "")
    )


def _plain(value: Any) -> Any:
    # The activation is saved with the model.
    return value.removesuffix(QUICK) if isinstance(value, str) else value


def _yaml(value: Any) -> str:
    return "null" if value is None else str(value)


def untrained(config: RunConfig) -> str | None:
    """Return a warning that names the untrained parts of a newly built model; None if all of it is CLIP's."""
    if config.init_from is not None:
        return None
    if config.pretrained is None and (config.features is None or config.clip is not None):
        return (
            "Untrained: all weights are random, and the scores mean nothing; pass --checkpoint, or CLIP's weights with "
            f"--set pretrained={example_tag(config.clip)}."
        )
    new = [f"the interaction {config.interaction}"] * (config.interaction in OWN_WEIGHTS)
    new += [f"the temporal module {config.temporal}"] * (config.temporal is not None)
    if not new:
        return None
    if config.features is not None:
        return f"Untrained: the features bring no weights for {' and '.join(new)}; pass --checkpoint."
    return (
        f"Untrained: CLIP has no weights for {' and '.join(new)}. Its own zero-shot retrieval is --set interaction=dp "
        "--set temporal=null."
    )
