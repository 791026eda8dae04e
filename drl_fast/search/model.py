"""The model of an index: load it, and tell whether it is the one that the index was made with."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import WTI
from ..data.loading import Tokenizer
from ..data.video import Sampling
from ..engine.config import RunConfig
from ..engine.load_model import load_model, settings_of
from ..engine.train import CONFIG
from ..model.clip import load_tokenizer
from ..model.config import Pictures
from ..model.drl import DRL
from ..model.pretrained import BEST
from ..model.weight_files import weights_hash
from .table import About
from .windows import stride

# Of random weights, so that a later process finds the same ones.
SEED = 0


@dataclass(frozen=True)
class Loaded:
    """A model, and how its inputs are prepared."""

    model: DRL
    tokenizer: Tokenizer
    about: About


def load_run(run: str | os.PathLike[str], device: torch.device) -> Loaded:
    """Load the model of a run, or of a folder that ``save_pretrained`` wrote, with its own frame rate and lengths.

    Raises:
        ValueError: no such folder, or one without a model; a model whose tokens were imported, so that no tower encodes
            videos.
    """
    folder = Path(run).absolute()
    if not folder.is_dir():
        raise ValueError(f"model must be the folder of a run, or one that save_pretrained wrote, not found: {run}")
    trained = folder.parent if folder.name == BEST else folder
    settings = settings_of(folder, None, (), None if (trained / CONFIG).is_file() else "folder", on_videos=True)
    model, tokenizer = load_model(folder, settings)
    config = settings.config
    sampling = config.sampling(*model.pictures)
    return _loaded(model, tokenizer, {"run": str(folder)}, sampling.rate, sampling.max_frames, config.words, device)


def load_clip(name: str, pretrained: str | None, device: torch.device) -> Loaded:
    """Load a CLIP without trained parts: TI ranks and explains, frames are not mixed over time.

    Args:
        pretrained: a tag, a weight file, or None: random weights, whose hits mean nothing.

    Raises:
        ValueError: an unknown name or tag, or weights that cannot be loaded.
    """
    tokenizer = load_tokenizer(name, pretrained)  # before the weights, which may be gigabytes
    torch.manual_seed(SEED)
    model = DRL(name, pretrained=pretrained, interaction="ti", temporal=None)
    if pretrained is not None and Path(pretrained).is_file():
        pretrained = str(Path(pretrained).absolute())
    config = RunConfig("folder", clip=name, pretrained=pretrained)
    sampling = config.sampling(*model.pictures)
    source = {"clip": name, "pretrained": pretrained}
    return _loaded(model, tokenizer, source, sampling.rate, sampling.max_frames, config.words, device)


def load_recorded(about: About, device: torch.device) -> Loaded:
    """Load the model that an index records."""
    source = about.source
    if "run" in source:
        return load_run(source["run"], device)
    return load_clip(source["clip"], source["pretrained"], device)


def check_same(found: About, loaded: Loaded, uri: str) -> None:
    """Check that an index was made with this model.

    Raises:
        ValueError: it was made with another one.
    """
    if found.model != loaded.about.model:
        raise ValueError(
            f"{uri} was made with another model ({describe(found.source)}) than this one "
            f"({describe(loaded.about.source)}); take that model, or index the videos into a new folder"
        )


def describe(source: dict[str, Any]) -> str:
    """Name a model in a few words."""
    if "run" in source:
        return str(source["run"])
    return f"{source['clip']}, {source['pretrained'] or 'random weights'}, TI"


def sampling_of(about: About, model: DRL) -> Sampling:
    """Return how all frames of a video are taken."""
    return Sampling(about.rate, MOST_FRAMES, **model.pictures._asdict())


# More than any video has.
MOST_FRAMES = 2**31


def _loaded(
    model: DRL,
    tokenizer: Tokenizer,
    source: dict[str, Any],
    rate: float,
    max_frames: int,
    max_words: int,
    device: torch.device,
) -> Loaded:
    # Older indices, of before these were recorded, stay valid: defaults have no part in the identity.
    defaults = Pictures._field_defaults.items()
    described = model.describe_config().items()
    options = [(name, value) for name, value in described if name != "inputs" and (name, value) not in defaults]
    identity = weights_hash(dict(sorted(model.state_dict().items())), repr(sorted(options)))
    weighted = isinstance(model.interaction, WTI) and model.interaction.video_weight_fc is not None
    words = model.words(max_words)
    about = About(identity, source, rate, max_frames, stride(max_frames), words, model.dim, weighted)
    return Loaded(model.to(device).eval(), tokenizer, about)
