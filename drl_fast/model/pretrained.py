"""Folders of a model: ``model.safetensors`` with the configuration inside, and ``config.json`` for people."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from ..atomic_write import write_atomically
from .config import Config, Encoders, Inputs, Pictures, Sizes
from .weight_files import weights_hash

WEIGHTS, CONFIG = "model.safetensors", "config.json"
FORMAT = "drl-fast 2"
# The subfolder of a training run that holds its best model.
BEST = "best"


def save_folder(folder: str | os.PathLike[str], state: Mapping[str, Tensor], config: dict[str, Any]) -> None:
    """Write weights and configuration; files that are already there stay whole until they are replaced."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format": FORMAT, **config}, indent=2) + "\n"
    tensors = {name: x.detach().contiguous() for name, x in state.items()}
    metadata = {"config": text, "digest": _digest(tensors)}
    # The configuration is stored with the weights, so that the two always come from one save.
    write_atomically(path / WEIGHTS, lambda file: safetensors.torch.save_file(tensors, file, metadata))
    write_atomically(path / CONFIG, lambda file: Path(file).write_text(text))


@dataclass(frozen=True)
class Saved:
    """The model's configuration, as read from the folder."""

    clip: str | None
    """The CLIP's name in open_clip; None: a CLIP in OpenAI's form, or a head without one."""
    quick_gelu: bool
    statistics: dict[str, list[float]]
    """``mean`` and ``std`` of pictures, three numbers each."""
    options: dict[str, Any]
    """:class:`drl_fast.model.config.Config`'s, not checked."""
    inputs: Inputs | None
    sizes: Sizes | None = None
    """Of a head; None: a DRL."""
    encoders: Encoders | None = None
    """Of a head's tokens."""
    pictures: dict[str, str] = field(default_factory=dict)
    """``resize`` and ``interpolation`` of a DRL's pictures."""


def read_folder(folder: str | os.PathLike[str]) -> tuple[dict[str, Tensor], Saved]:
    """Read weights and configuration from a folder that :func:`save_folder` wrote, or from a run's folder.

    Raises:
        ValueError: a file that is missing, damaged or was not written by :func:`save_folder`.
    """
    path = _weights(folder)
    with _opened(path) as file:
        state, saved = {name: file.get_tensor(name) for name in file.keys()}, _saved(path, file.metadata())  # noqa: SIM118
        written = (file.metadata() or {}).get("digest")
    if written != _digest(state):
        raise ValueError(f"{path} must hold the weights that were written, got others; copy the file again")
    return state, saved


def read_saved(folder: str | os.PathLike[str]) -> Saved:
    """Read a folder's configuration alone.

    Raises:
        ValueError: as :func:`read_folder`.
    """
    path = _weights(folder)
    with _opened(path) as file:
        return _saved(path, file.metadata())


def _digest(state: Mapping[str, Tensor]) -> str:
    # Sorted: safetensors does not keep the order. It checks sizes only.
    return weights_hash(dict(sorted(state.items())))


def _weights(folder: str | os.PathLike[str]) -> Path:
    paths = [place / WEIGHTS for place in (Path(folder), Path(folder) / BEST) if (place / WEIGHTS).is_file()]
    if not paths:
        raise ValueError(
            f"{folder} must hold {WEIGHTS}, as save_pretrained writes it, or {BEST}/{WEIGHTS}, as a run of drl-fast "
            "train does after its first epoch; found neither"
        )
    return paths[0]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            yield file
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"{path} must be a whole safetensors file, and could not be read ({error})") from error


def _saved(path: Path, metadata: Mapping[str, str] | None) -> Saved:
    try:
        config = json.loads((metadata or {}).get("config", "{}"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must hold its configuration as JSON, and it could not be read ({error})") from error
    if not isinstance(config, dict) or config.pop("format", None) != FORMAT:
        raise ValueError(f"{path} must be written by save_pretrained, got a file without its configuration")
    if "sizes" in config:
        return _saved_head(path, config)
    # A missing name must not pass for None, which means a CLIP in OpenAI's form.
    clip, quick_gelu, inputs = config.pop("clip", 0), config.pop("quick_gelu", None), config.pop("inputs", None)
    statistics = {key: config.pop(key) for key in ("mean", "std") if key in config}
    # Older files lack these; their pictures were prepared in the default way.
    pictures = {key: config.pop(key, default) for key, default in Pictures._field_defaults.items()}
    numbers = all(
        isinstance(values, list)
        and len(values) == 3
        and all(isinstance(x, int | float) and math.isfinite(x) and (x > 0 or key == "mean") for x in values)
        for key, values in statistics.items()
    )
    known = {f.name for f in fields(Config)}
    if not (isinstance(clip, str | None) and isinstance(quick_gelu, bool) and numbers and config.keys() <= known):
        unknown = ", ".join(sorted(str(key)[:40] for key in config.keys() - known))
        raise ValueError(
            f"{path} must hold the configuration of a model of this version of drl-fast, got "
            + (f"unknown options: {unknown}" if unknown else "clip, quick_gelu, mean or std with a wrong value")
        )
    try:
        inputs = None if inputs is None else Inputs(**inputs)
        return Saved(clip, quick_gelu, statistics, config, inputs, pictures=pictures)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} must say how inputs are prepared, got: {error}") from error


def _saved_head(path: Path, config: dict[str, Any]) -> Saved:
    try:
        sizes, encoders, inputs = Sizes(**config.pop("sizes")), config.pop("encoders"), config.pop("inputs")
        return Saved(
            clip=None,
            quick_gelu=False,
            statistics={},
            options=config,
            inputs=None if inputs is None else Inputs(**inputs),
            sizes=sizes,
            encoders=None if encoders is None else Encoders(**encoders),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} must hold the configuration of a head, got: {error}") from error
