"""Read files of weights: torch.save's, and OpenAI's TorchScript archives. No other pickle is read."""

from __future__ import annotations

import hashlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

# Entries of OpenAI's files that are not weights; no other file has them.
SIZES_IN_STATE = ("input_resolution", "context_length", "vocab_size")


def read_file(path: Path) -> Any:
    """Read what torch.save wrote, with ``weights_only=True``, or the state dict of a TorchScript archive.

    Raises:
        ValueError: a file that is empty, damaged, of another kind, or holds Python objects besides tensors.
    """
    try:
        check_zip(path)
        with warnings.catch_warnings():
            # torch announces TorchScript's end, and doubts old pickles.
            warnings.simplefilter("ignore")
            if _is_torchscript(path):
                return dict(torch.jit.load(str(path), map_location="cpu").state_dict())
            return torch.load(path, map_location="cpu", weights_only=True)
    # A broken file raises errors of torch, pickle, zipfile or the operating system.
    except Exception as error:
        raise ValueError(f"{path} {_reason(path, error)}") from error


def check_zip(path: Path) -> None:
    """Check the CRC of every entry of a zip archive; torch writes them and does not check them.

    Raises:
        zipfile.BadZipFile: a damaged entry, which is named. A file that is no zip archive passes.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"{damaged} is damaged")


def read_weights(path: Path) -> Any:
    """Read a weight file of any kind, without ``state_dict`` around the weights and ``module.`` before their names.

    Raises:
        ValueError: as :func:`read_file`.
    """
    if path.suffix.lower() == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except Exception as error:
            raise ValueError(f"{path} must be a whole safetensors file, and could not be read ({error})") from error
    state = read_file(path)
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if isinstance(state, Mapping) and all(isinstance(name, str) for name in state):
        return {name.removeprefix("module."): x for name, x in state.items()}
    return state


def weights_hash(state: Mapping[str, Tensor], build: str = "") -> str:
    """Hash tensors' names, types, shapes and bytes."""
    digest = hashlib.blake2b(build.encode(), digest_size=20)
    for name, x in state.items():
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def is_from_openai(state: Any) -> bool:
    """Return whether a state dict is from OpenAI's own files, whose towers use QuickGELU."""
    return isinstance(state, Mapping) and any(name in state for name in SIZES_IN_STATE)


def has_openai_precision(state: Any) -> bool:
    """Return whether matrices are float16 and vectors float32, as in the state dict of OpenAI's loaded models.

    No other weights of the original CLIP's form are published so, as far as we know; it is a strong sign, not a proof.
    """
    if not isinstance(state, Mapping) or not all(isinstance(x, Tensor) for x in state.values()):
        return False
    matrix, norm = state.get("visual.conv1.weight"), state.get("ln_final.weight")
    return matrix is not None and norm is not None and (matrix.dtype, norm.dtype) == (torch.float16, torch.float32)


def without_sizes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a state dict of OpenAI's, without the entries that give sizes."""
    return {name: x for name, x in state.items() if name not in SIZES_IN_STATE}


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


def _reason(path: Path, error: Exception) -> str:
    """Say in our words why a file was not read: torch's message advises to read pickles that are not trusted."""
    if not path.stat().st_size:
        return "is empty; copy it again"
    unsafe = (
        re.search(r"(?:GLOBAL|global|class) ([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError)
        else None
    )
    if unsafe is not None and "Unsupported" in str(error):
        return (
            f"must hold tensors alone, and holds Python objects ({unsafe[1]}); if you trust the file, load it and "
            "save its state dict with torch.save(model.state_dict(), ...)"
        )
    if isinstance(error, zipfile.BadZipFile):
        return f"must be a whole file, and {error}; copy it again"
    return (
        f"must hold tensors alone, written by torch.save, and could not be read ({type(error).__name__}); it is "
        "damaged or of another kind: copy it again"
    )
