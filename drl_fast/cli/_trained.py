"""The model that a checkpoint holds, whoever wrote it; or the configured one as it is built."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import open_clip
import torch
from torch import Tensor

from ..engine.config import RunConfig, build_model, read_config
from ..engine.train import BEST, CONFIG
from ..model.checkpoint import WEIGHTS
from ..model.drl import DRL, Config

# What a checkpoint says of itself.
OF_THE_MODEL = {"clip", "pretrained", *(field.name for field in dataclasses.fields(Config))}
# Interactions with weights that CLIP does not bring.
OWN_WEIGHTS = ("wti", "mlp", "xti", "hi")

Tokenizer = Callable[..., Tensor]


def settings(checkpoint: Path | None, config: Path | None, overrides: Sequence[str]) -> RunConfig:
    """The configuration named, else the run folder's own.

    Raises:
        ValueError: neither is there; an override of the model that a checkpoint brings; what :func:`read_config` finds.
    """
    if checkpoint is not None:
        for override in overrides:
            if override.partition("=")[0].strip() in OF_THE_MODEL:
                raise ValueError(
                    f"set must leave the model as the checkpoint has it, got {override}; leave it or the checkpoint out"
                )
    if checkpoint is not None and not checkpoint.exists() and checkpoint.suffix != Path(WEIGHTS).suffix:
        raise ValueError(f"checkpoint must be a folder or a file, got {checkpoint}, where neither is")
    if config is None:
        if checkpoint is None or not (checkpoint / CONFIG).is_file():
            where = "" if checkpoint is None else f", and {checkpoint} holds no {CONFIG}"
            raise ValueError(f"config must name a YAML file, got none{where}; see configs/msrvtt_wti.yaml")
        config = checkpoint / CONFIG
    return read_config(config, overrides)


def load_model(checkpoint: Path | None, config: RunConfig) -> tuple[DRL, Tokenizer]:
    """The model on the CPU, and its tokenizer.

    Raises:
        ValueError: a checkpoint that is not there, of none of the forms, or does not fit.
    """
    if checkpoint is None:
        torch.manual_seed(config.seed)  # new weights are the same on all processes
        return build_model(config)
    if checkpoint.is_dir():
        folders = [folder for folder in (checkpoint / BEST, checkpoint) if (folder / WEIGHTS).is_file()]
        if not folders:
            raise ValueError(
                f"checkpoint must hold {BEST}/{WEIGHTS}, as drl-fast train writes it, or {WEIGHTS}, as save_pretrained "
                f"does, got {checkpoint}, where neither is; the best model is there after the first epoch"
            )
        model = DRL.from_pretrained(folders[0])
    elif checkpoint.suffix == Path(WEIGHTS).suffix:
        raise ValueError(f"checkpoint must be a folder or a file of torch.save, got {checkpoint}; name its folder")
    elif checkpoint.is_file():
        model = DRL.from_upstream(checkpoint)
    else:
        raise ValueError(f"checkpoint must be a folder or a file, got {checkpoint}, where neither is")
    return model, tokenizer_of(model)


def tokenizer_of(model: DRL) -> Tokenizer:
    """The tokenizer of the model's CLIP: by its name, or OpenAI's where a CLIP has none."""
    if model.clip_name is not None:
        return open_clip.get_tokenizer(model.clip_name)
    vocabulary, context = model.clip.token_embedding.weight.shape[0], model.clip.positional_embedding.shape[0]
    tokenizer = open_clip.SimpleTokenizer(context_length=context)
    if tokenizer.vocab_size != vocabulary:
        raise ValueError(
            f"checkpoint must be of a CLIP with OpenAI's {tokenizer.vocab_size} tokens, got one with {vocabulary}; "
            "evaluate it from Python, with its own tokenizer"
        )
    return tokenizer


def untrained(config: RunConfig) -> str | None:
    """What of the model, as it is built, nobody has trained; None: all is CLIP's own."""
    if config.pretrained is None:
        return (
            "Untrained: all weights are random, and the scores mean nothing; name a --checkpoint, or weights of CLIP "
            "with --set pretrained=openai."
        )
    new = [f"the interaction {config.interaction}"] * (config.interaction in OWN_WEIGHTS)
    new += [f"the temporal module {config.temporal}"] * (config.temporal is not None)
    if not new:
        return None
    return (
        f"Untrained: {' and '.join(new)} have weights that CLIP does not bring, and are scored as they are built. "
        "CLIP's own zero-shot retrieval is --set interaction=dp --set temporal=null."
    )
