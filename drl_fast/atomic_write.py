"""Write files whole or not at all: beside their place in the same folder, then renamed."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path

PART = ".part"


def write_atomically(path: str | os.PathLike[str], write: Callable[[str], object]) -> None:
    """Let ``write(name)`` fill a file beside ``path``, then rename it: a reader sees the old file or the new one.

    The file gets the mode that the umask allows, whatever mode the writer chose.

    Raises:
        OSError: a full disk, for example; ``path`` is unchanged and nothing is left beside it.
    """
    path = Path(path)
    # The name is unique, since several processes and threads may write one path.
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}{PART}")
    try:
        # Created here, so that the mode is that of any new file: safetensors would make it readable by its owner only.
        aside.touch(exist_ok=False)
        mode = aside.stat().st_mode
        try:
            write(str(aside))
        except Exception as error:
            # torch (RuntimeError) and safetensors have errors of their own for a full disk.
            if isinstance(error, RuntimeError) or type(error).__name__ == "SafetensorError":
                raise OSError(f"{path} could not be written, perhaps because the disk is full: {error}") from error
            raise
        aside.chmod(mode)
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def remove_parts(folder: Path) -> None:
    """Remove what killed writers left in ``folder``; nobody else may be writing there."""
    for part in folder.glob(f".*{PART}"):
        part.unlink(missing_ok=True)
