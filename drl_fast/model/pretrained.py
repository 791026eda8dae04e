"""Folders of a model: ``model.safetensors`` with the configuration inside, and ``config.json`` for people."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from ..atomic_write import write_atomically

WEIGHTS, CONFIG = "model.safetensors", "config.json"
FORMAT = "drl-fast 1"
# The subfolder of a training run that holds its best model.
BEST = "best"


def save_folder(folder: str | os.PathLike[str], state: Mapping[str, Tensor], config: dict[str, Any]) -> None:
    """Write weights and configuration; files that are already there stay whole until they are replaced."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format": FORMAT, **config}, indent=2) + "\n"
    tensors = {name: x.detach().contiguous() for name, x in state.items()}
    # The configuration is stored with the weights, so that the two always come from one save.
    write_atomically(path / WEIGHTS, lambda file: safetensors.torch.save_file(tensors, file, {"config": text}))
    write_atomically(path / CONFIG, lambda file: Path(file).write_text(text))


def read_folder(folder: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read weights and configuration from a folder that :func:`save_folder` wrote, or from a run's folder.

    Raises:
        ValueError: a file that is missing, damaged or was not written by :func:`save_folder`.
    """
    paths = [place / WEIGHTS for place in (Path(folder), Path(folder) / BEST) if (place / WEIGHTS).is_file()]
    if not paths:
        raise ValueError(
            f"{folder} must hold {WEIGHTS}, as save_pretrained writes it, or {BEST}/{WEIGHTS}, as a run of drl-fast "
            "train does after its first epoch; found neither"
        )
    path = paths[0]
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            config = json.loads((file.metadata() or {}).get("config", "{}"))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise ValueError(f"{path} must be a whole safetensors file, and could not be read ({error})") from error
    if config.pop("format", None) != FORMAT:
        raise ValueError(f"{path} must be written by save_pretrained, got a file without its configuration")
    return state, config
