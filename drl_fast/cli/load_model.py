"""Load the model of a checkpoint of any kind, or build the configured one untrained; find its configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..data.loading import Tokenizer
from ..engine.config import RunConfig, build_model, merge, read_values
from ..engine.train import CONFIG
from ..model import upstream
from ..model.drl import DRL
from ..model.pretrained import BEST, WEIGHTS, read_saved

# What a checkpoint brings and no option replaces.
OF_CHECKPOINT = ("clip", "pretrained", "init_from")
# Options of a model that change its scores; a configuration that names them must agree with the checkpoint.
OF_MODEL = ("interaction", "temporal", "wti_arch", "masking")
# Interactions whose weights are not CLIP's.
OWN_WEIGHTS = ("wti", "mlp", "xti", "hi")


class Settings(NamedTuple):
    """A configuration, and what its file and options name: the other fields are defaults."""

    config: RunConfig
    named: Mapping[str, Any]
    source: str
    """Where the names stand, for errors."""


def settings_of(
    checkpoint: Path | None, config: Path | None, overrides: Sequence[str], dataset: str | None
) -> Settings:
    """Read the named configuration, or else the run's, or else what the saved model says of its inputs.

    Raises:
        ValueError: none of them exists, an override that a checkpoint excludes, or what
            :func:`drl_fast.engine.config.read_config` rejects.
    """
    for override in overrides:
        key = override.partition("=")[0].strip()
        if checkpoint is not None and key in OF_CHECKPOINT:
            raise ValueError(
                f"set must leave {key} as the checkpoint has it, got {override}; drop it or the checkpoint"
            )
        if key == "precision":
            raise ValueError(f"set must leave precision, which is of training, got {override}; use --precision")
    if checkpoint is not None and not checkpoint.exists():
        raise ValueError(f"checkpoint not found: {checkpoint}")
    if config is not None:
        named = read_values(config, overrides, dataset)
        return Settings(RunConfig(**named), named, str(config))
    if checkpoint is not None:
        run = checkpoint.parent if checkpoint.name == BEST else checkpoint
        if (run / CONFIG).is_file():
            named = read_values(run / CONFIG, overrides, dataset)
            return Settings(RunConfig(**named), named, str(run / CONFIG))
        if (checkpoint / WEIGHTS).is_file():
            named = merge({}, str(checkpoint), overrides, dataset)
            return Settings(_config_of_saved(checkpoint, named), named, "set")
    found = "" if checkpoint is None else f", and {checkpoint} is no run's folder"
    raise ValueError(
        f"config must be a row or a YAML file, got none{found}; for instance --config wti --dataset msrvtt"
    )


def _config_of_saved(folder: Path, named: Mapping[str, Any]) -> RunConfig:
    saved = read_saved(folder)
    if saved.inputs is None:
        raise ValueError(
            f"config must be a row or a YAML file, got none, and {folder} does not say how its inputs were prepared; "
            "for instance --config wti --dataset msrvtt"
        )
    inputs = {name: getattr(saved.inputs, name) for name in ("max_words", "rate", "max_frames")}
    options = {f.name: saved.options[f.name] for f in dataclasses.fields(RunConfig) if f.name in saved.options}
    return RunConfig(**{"clip": saved.clip or RunConfig.clip, "pretrained": None, **options, **inputs, **named})


def load_model(checkpoint: Path | None, settings: Settings) -> tuple[DRL, Tokenizer]:
    """Load the model on the CPU; return it with its tokenizer.

    Raises:
        ValueError: a checkpoint that is missing, of another kind, does not fit, or is of another model than the
            configuration names.
    """
    if checkpoint is None:
        torch.manual_seed(settings.config.seed)  # all processes get the same new weights
        return build_model(settings.config)
    if checkpoint.is_dir():
        model = DRL.from_pretrained(checkpoint)
        _check_same(dataclasses.asdict(model.config), checkpoint, settings)
    else:
        model = _from_public(checkpoint, settings)
    return model, model.tokenizer()


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
        if named["interaction"] == "ti":
            inferred["interaction"] = "ti"
    _check_same(inferred, checkpoint, settings)
    options = {name: named[name] for name in ("masking",) if name in named}
    return DRL.from_upstream(state, interaction=inferred["interaction"], **options)


def _check_same(found: Mapping[str, Any], checkpoint: Path, settings: Settings) -> None:
    """Check that a checkpoint's options are those that the configuration names."""
    keys = [name for name in OF_MODEL if name in found and name in settings.named]
    if found["interaction"] != "wti" or settings.named.get("interaction", "wti") != "wti":
        keys = [name for name in keys if name != "wti_arch"]
    other = {name: settings.named[name] for name in keys if settings.named[name] != found[name]}
    if other:
        differences = "; ".join(f"{name} {found[name]!r} there and {value!r} here" for name, value in other.items())
        remedy = " ".join(f"--set {name}={'null' if found[name] is None else found[name]}" for name in other)
        raise ValueError(
            f"checkpoint {checkpoint} and {settings.source} must name one model, got {differences}; take the "
            f"checkpoint's row, or add {remedy}"
        )


def untrained(config: RunConfig) -> str | None:
    """Return a warning that names the untrained parts of a newly built model; None if all of it is CLIP's."""
    if config.init_from is not None:
        return None
    if config.pretrained is None:
        return (
            "Untrained: all weights are random, and the scores mean nothing; pass --checkpoint, or CLIP's weights with "
            "--set pretrained=openai."
        )
    new = [f"the interaction {config.interaction}"] * (config.interaction in OWN_WEIGHTS)
    new += [f"the temporal module {config.temporal}"] * (config.temporal is not None)
    if not new:
        return None
    return (
        f"Untrained: CLIP has no weights for {' and '.join(new)}. Its own zero-shot retrieval is --set interaction=dp "
        "--set temporal=null."
    )
