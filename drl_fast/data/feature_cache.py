"""Frame features on disk, keyed by the video's content, how it was sampled and what encoded it."""

from __future__ import annotations

import errno
import hashlib
import os
from dataclasses import asdict
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..atomic_write import write_atomically
from ..validation import tensor
from .video import Sampling

# Bytes that are hashed at a time.
CHUNK = 2**20
# Bump it when decoding, resizing or the file format changes: older features are then no longer found.
FORMAT = "drl-fast-features-2"
ENTRY, DIGEST = "features", "blake2b"


class FeatureCache:
    """One safetensors file per video below ``folder``, which the first entry creates; processes may share it."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        # By path, with the file's stat, which changes when the file does.
        self._hashes: dict[Path, tuple[tuple[int, ...], str]] = {}

    def key(self, video: str | Path, sampling: Sampling, encoder: str) -> str:
        """Hash the file's content (not its name or date), the sampling and the encoder's fingerprint.

        Raises:
            ValueError: a file that cannot be read.
        """
        parts = [FORMAT, self._content(Path(video)), repr(sorted(asdict(sampling).items())), encoder]
        return _blake2b("\0".join(parts).encode()).hexdigest()

    def _content(self, path: Path) -> str:
        try:
            if path.exists() and not path.is_file():  # opening a named pipe would wait for its writer
                raise OSError(errno.EINVAL, "not a regular file")
            with path.open("rb") as file:
                found = os.fstat(file.fileno())
                state = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
                known = self._hashes.get(path)
                if known is not None and known[0] == state:
                    return known[1]
                digest = _blake2b()
                while chunk := file.read(CHUNK):
                    digest.update(chunk)
        except OSError as error:
            raise ValueError(f"{path} must be a readable video, got: {error.strerror}; check the path") from error
        self._hashes[path] = state, digest.hexdigest()
        return digest.hexdigest()

    def path(self, key: str) -> Path:
        """Return an entry's file, in one of 256 folders: some file systems are slow with large ones."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def get(self, key: str) -> Tensor | None:
        """Return the features stored under ``key``, bit for bit; None if they are missing or damaged."""
        try:
            # One read: safetensors opens a path twice, and another process may replace the file in between.
            found = safetensors.torch.load(self.path(key).read_bytes())
        except OSError:
            return None
        except Exception:  # a damaged header leads safetensors to errors of many types
            return None
        # safetensors checks sizes only.
        features, digest = found.get(ENTRY), found.get(DIGEST)
        whole = features is not None and digest is not None and digest.equal(_digest(features))
        return features if whole else None

    def put(self, key: str, features: Tensor) -> None:
        """Store ``features`` under ``key``, atomically.

        Raises:
            OSError: a folder that cannot be written, or a full disk; no partial entry is left.
        """
        features = tensor("features", features).detach().cpu().contiguous()
        data = safetensors.torch.save({ENTRY: features, DIGEST: _digest(features)})
        path = self.path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lambda name: Path(name).write_bytes(data))
        except OSError as error:
            raise OSError(
                f"features could not be kept in {self.folder}, got: {error.strerror or error}; make room there, or "
                "name another folder"
            ) from error


def _digest(features: Tensor) -> Tensor:
    """Hash the features' dtype, shape and bytes: (20,) uint8."""
    data = features.reshape(-1).view(torch.uint8).numpy().tobytes()
    found = _blake2b(f"{features.dtype} {tuple(features.shape)} ".encode() + data).digest()
    return torch.tensor(list(found), dtype=torch.uint8)


def _blake2b(data: bytes = b"") -> hashlib.blake2b:
    return hashlib.blake2b(data, digest_size=20)
