"""Files that are whole or not there: written aside in the same folder, then renamed."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path

PART = ".part"


def write_atomically(path: str | os.PathLike[str], write: Callable[[str], object]) -> None:
    """Let ``write(name)`` fill a file beside ``path``, then rename it: a reader sees the old file or the new one.

    Raises:
        OSError: a full disk among others; ``path`` is as it was and nothing is left beside it.
    """
    path = Path(path)
    # Several processes and threads may write one path, a feature's for instance. Not by tempfile, whose files nobody
    # else may read.
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}{PART}")
    try:
        write(str(aside))
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def remove_parts(folder: Path) -> None:
    """Remove what writers of ``folder`` that were killed left behind; nobody else may be writing there."""
    for part in folder.glob(f".*{PART}"):
        part.unlink(missing_ok=True)
