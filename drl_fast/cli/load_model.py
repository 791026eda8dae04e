"""Load the model of a checkpoint of any kind, or build the configured one untrained; find its configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from ..data.loading import Tokenizer
from ..engine.config import RunConfig, build_model, read_config
from ..engine.train import CONFIG
from ..model.config import Config
from ..model.drl import DRL
from ..model.pretrained import BEST

# Keys that a checkpoint decides.
MODEL_KEYS = {"clip", "pretrained", "init_from", *(field.name for field in dataclasses.fields(Config))}
# Interactions whose weights are not CLIP's.
OWN_WEIGHTS = ("wti", "mlp", "xti", "hi")


def settings_of(
    checkpoint: Path | None, config: Path | None, overrides: Sequence[str], dataset: str | None
) -> RunConfig:
    """Read the named configuration, or else the run's own.

    Raises:
        ValueError: neither exists, an override of the model that a checkpoint brings, or what :func:`read_config`
            rejects.
    """
    if checkpoint is not None:
        for override in overrides:
            if override.partition("=")[0].strip() in MODEL_KEYS:
                raise ValueError(
                    f"set must leave the model as the checkpoint has it, got {override}; drop it or the checkpoint"
                )
        if not checkpoint.exists():
            raise ValueError(f"checkpoint not found: {checkpoint}")
    if config is None:
        run = checkpoint and (checkpoint.parent if checkpoint.name == BEST else checkpoint)
        if run is None or not (run / CONFIG).is_file():
            found = "" if checkpoint is None else f", and {checkpoint} belongs to no run"
            raise ValueError(
                f"config must be a row or a YAML file, got none{found}; for instance --config wti --dataset msrvtt"
            )
        config = run / CONFIG
    return read_config(config, overrides, dataset)


def load_model(checkpoint: Path | None, config: RunConfig) -> tuple[DRL, Tokenizer]:
    """Load the model on the CPU; return it with its tokenizer.

    Raises:
        ValueError: a checkpoint that is missing, of another kind, or does not fit.
    """
    if checkpoint is None:
        torch.manual_seed(config.seed)  # all processes get the same new weights
        return build_model(config)
    model = DRL.from_pretrained(checkpoint) if checkpoint.is_dir() else DRL.from_upstream(checkpoint)
    return model, model.tokenizer()


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
