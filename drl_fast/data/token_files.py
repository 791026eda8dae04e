"""Read the tokens that other encoders wrote: an array a video, or collections keyed by id. Pickles are refused."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..validation import FEATURE_DTYPES
from .video_files import VIDEO_SUFFIXES, NameIndex, walk

NAMES = ("features", "last_hidden_state")
ARRAYS, HDF5, PICKLES = (".npy", ".npz"), (".h5", ".hdf5"), (".pt", ".pth", ".pkl", ".pickle")
KINDS = ", ".join((*ARRAYS, ".safetensors", *HDF5, "uncompressed .tar"))
WHOLE = "be a whole, uncompressed file of its kind"
TOKENS = f"hold an array of tokens (N, D), called {' or '.join(NAMES)} if it is not the only one"
# Bytes behind a tar file's last member that must be zeros.
CHUNK = 2**20
Loader = Callable[[], Tensor]


class TokenFiles:
    """The tokens of other encoders below a folder, one entry per id; names are compared as those of videos are.

    An entry is a file ``<id>.npy``, ``<id>.npz`` or ``<id>.safetensors`` (its array ``features`` or
    ``last_hidden_state``, or its only one), or it lies in a collection: a tensor of a safetensors file with several, a
    dataset of an HDF5 file (or its group's dataset ``features`` or ``last_hidden_state``), or a member ``<id>.npy``,
    ``<id>.npz`` or ``<id>.features.npy`` of a tar file. Collections are indexed when the folder is opened, arrays are
    read one at a time. Files and members of other kinds, and hidden ones, are left out.

    Args:
        folder: a folder, searched with its subfolders, or one file.

    Raises:
        ValueError: nothing there, no entry, a damaged collection, or HDF5 without h5py.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.exists():
            raise ValueError(f"tokens folder or file not found: {folder}; check the path")
        self.names: list[str] = []
        self._loaders: dict[Path, Loader] = {}
        self._ids, self._tensors, self._pickles = (NameIndex(self.folder, kind="entry") for _ in range(3))
        root, paths = self.folder.parent, [self.folder]
        if self.folder.is_dir():
            root, paths = self.folder, [path for path in walk(self.folder) if not path.name.startswith(".")]
        for path in paths:
            self._index(path, path.relative_to(root).as_posix())
        pickles = [path for path in paths if path.suffix.lower() in PICKLES]
        if pickles and not self.names:
            raise _pickled(pickles[0])
        if not self.names:
            raise ValueError(f"{folder} must hold tokens ({KINDS}), got none; check the path")

    def _index(self, path: Path, name: str) -> None:
        stem, kind = os.path.splitext(name)
        kind = kind.lower()
        if kind in PICKLES:
            self._pickles.add(path, name, *_ids(stem))
        elif kind in ARRAYS:
            self._add(path, stem, partial(_read_numpy, path), name)
        elif kind in COLLECTIONS:
            loaders = COLLECTIONS[kind](path)
            only = list(loaders) if kind == ".safetensors" and len(loaders) == 1 else []
            tokens = next((key for key in (*NAMES, *only) if key in loaders), None)
            if tokens is not None:
                self._add(path, stem, loaders[tokens], name)
                self._tensors.add(path, None, *only)
            else:
                for key, load in loaders.items():
                    self._add(Path(f"{path}/{key}"), key, load)

    def _add(self, entry: Path, stem: str, load: Loader, name: str | None = None) -> None:
        self.names.append(stem)
        self._ids.add(entry, name, *_ids(stem))
        self._loaders[entry] = load

    def __len__(self) -> int:
        return len(self.names)

    def find(self, name: str) -> Path | None:
        """Return the entry of an id or file name, or None: a file's path, or a collection's path and the key in it.

        The only tensor of a safetensors file is found by the file's name, or else by its own.

        Raises:
            ValueError: two entries match, or only a pickle does.
        """
        found = self._ids.find(name) or self._tensors.find(name)
        pickled = None if found else self._pickles.find(name)
        if pickled is not None:
            raise _pickled(pickled)
        return found

    def read(self, entry: Path) -> Tensor:
        """Return an entry's tokens (N, D) on the CPU, in memory of their own and in the dtype in which they are stored.

        Raises:
            ValueError: a file that is damaged or cannot be read; no array of tokens, or several; another rank or dtype;
                no token or channel; NaN or Inf.
        """
        load = self._loaders[entry]
        with _errors(entry, TOKENS):
            tokens = load()
        shape = tuple(tokens.shape)
        if len(shape) != 2:
            batch_of_one = len(shape) == 3 and shape[0] == 1
            remedy = "save array.squeeze(0)" if batch_of_one else "save one token per frame or word, each a row"
            raise ValueError(f"{entry} must hold tokens (N, D), got shape {shape}; {remedy}")
        if tokens.dtype not in FEATURE_DTYPES:
            wanted = "float32, float16, bfloat16 or float64"
            raise ValueError(f"{entry} must be {wanted}, got {tokens.dtype}; save the encoder's features as float32")
        if 0 in shape:
            wanted = "at least one token and one channel"
            raise ValueError(f"{entry} must hold {wanted}, got shape {shape}; encode it again or remove it")
        if not tokens.isfinite().all():
            nans, infs = int(tokens.isnan().sum()), int(tokens.isinf().sum())
            raise ValueError(f"{entry} must be finite, got {nans} NaN and {infs} Inf; encode it again, in float32")
        return tokens


@contextlib.contextmanager
def _errors(place: Path, expected: str) -> Iterator[None]:
    """Turn any error of a reader into one ValueError: damaged headers lead to errors of many types."""
    try:
        yield
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        reason = " ".join(reason.split()) or type(error).__name__
        raise ValueError(f"{place} must {expected}, got: {reason}; check or rewrite the file") from error


def _pickled(path: Path) -> ValueError:
    return ValueError(
        f"{path} must be an array file, got a pickle, which could run code when it is read; convert it where you trust "
        "it: numpy.save(id + '.npy', tokens.numpy()) for each video, or safetensors.torch.save_file({id: tokens}, file)"
    )


def _ids(stem: str) -> list[str]:
    """Return what annotations may call an entry: ``a.mp4`` also stands for ``a``."""
    stem = os.path.normpath(stem)
    rest, suffix = os.path.splitext(stem)
    return [stem, rest] if suffix.lower() in VIDEO_SUFFIXES else [stem]


def _tokens_among(keys: Iterable[str]) -> str:
    """Return the key of a video's tokens: a known name, or else the only key."""
    keys = sorted(keys)
    for name in (*NAMES, *keys[: len(keys) == 1]):
        if name in keys:
            return name
    raise ValueError(f"{len(keys)} arrays: {', '.join(keys)}" if keys else "no array")


def _regular(path: Path) -> Path:
    """Return ``path``; OSError unless it is a regular file: opening a named pipe would wait for its writer."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file")
    return path


def _read_bytes(path: Path, offset: int, size: int) -> bytes:
    with _regular(path).open("rb") as file:
        file.seek(offset)
        data = file.read(size)
    if 0 <= size != len(data):
        raise EOFError("unexpected end of file")
    return data


def _read_numpy(path: Path, offset: int = 0, size: int = -1) -> Tensor:
    """Read an array of numpy.save, or the one of numpy.savez."""
    data = _read_bytes(path, offset, size)
    if data.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {name.removesuffix(".npy"): name for name in archive.namelist()}
            data = archive.read(members[_tokens_among(members)])  # checks its CRC
    file = io.BytesIO(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # arrays of Python 2 load, with advice to save them again
        array = np.lib.format.read_array(file, allow_pickle=False)
    if file.read(1):
        raise ValueError("more bytes than its shape needs")
    return _tensor(array)


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(array, array.dtype.newbyteorder("="), order="C"))


def _tensors(path: Path) -> dict[str, Loader]:
    with _errors(path, WHOLE):
        # Checks header and size. (With framework="pt" it would map the file writable, which fails beyond the memory.)
        with safetensors.safe_open(_regular(path), framework="np"):
            pass
        length = int.from_bytes(_read_bytes(path, 0, 8), "little")
        header = json.loads(_read_bytes(path, 8, length))
        header.pop("__metadata__", None)
        return {name: partial(_read_tensor, path, 8 + length, info) for name, info in header.items()}


def _read_tensor(path: Path, start: int, info: dict[str, Any]) -> Tensor:
    """Read one tensor as a safetensors file of its own."""
    first, end = info["data_offsets"]
    header = json.dumps({NAMES[0]: {**info, "data_offsets": [0, end - first]}}).encode()
    data = _read_bytes(path, start + first, end - first)
    return safetensors.torch.load(len(header).to_bytes(8, "little") + header + data)[NAMES[0]]


def _datasets(path: Path) -> dict[str, Loader]:
    try:
        import h5py
    except ImportError as error:
        raise ValueError(f"{path} needs h5py ({error}); install it with pip install 'drl-fast[hdf5]'") from error
    with _errors(path, WHOLE), h5py.File(_regular(path)) as file:
        # A key that is not UTF-8 is bytes.
        return {os.fsdecode(key): partial(_read_dataset, path, key) for key in file}


def _read_dataset(path: Path, key: str) -> Tensor:
    import h5py

    with h5py.File(_regular(path)) as file:
        found = file[key]
        if isinstance(found, h5py.Group):
            found = found[_tokens_among(found)]
        return _tensor(np.asarray(found[()]))


def _members(path: Path) -> dict[str, Loader]:
    """Find a tar file's arrays, without reading them."""
    found: dict[str, Loader] = {}
    with _errors(path, WHOLE), _regular(path).open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        size = os.fstat(file.fileno()).st_size
        for member in tar:
            if member.size < 0 or member.offset_data + member.size > size:
                raise EOFError(f"unexpected end of file in {member.name}")
            key, suffix = os.path.splitext(os.path.normpath(member.name))
            hidden = any(part.startswith(".") for part in key.split("/"))
            if hidden or suffix.lower() not in ARRAYS or not member.isfile():
                continue
            key = key.removesuffix(".features")
            if key in found or member.issparse():
                raise ValueError(f"{member.name}, which is sparse or the second array of {key}")
            found[key] = partial(_read_numpy, path, member.offset_data, member.size)
        # tarfile takes a damaged header for the end, which is one block of zeros or more.
        file.seek(tar.offset)
        end = file.read(CHUNK)
        if len(end) < tarfile.BLOCKSIZE or end.strip(b"\0"):
            raise EOFError("no end of the archive, or a damaged header")
    return found


COLLECTIONS = {".safetensors": _tensors, ".tar": _members, **dict.fromkeys(HDF5, _datasets)}
