"""LanceDB, the extra ``search``: connect, and say in one line what went wrong."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Its warnings are about LanceDB's own future; it reads this when it is loaded.
os.environ.setdefault("LANCEDB_LOG", "error")

try:
    import lancedb
    import pyarrow as pa
    from lancedb.index import IvfPq
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f'searching needs {error.name}; install it with pip install "drl-fast[search]"', name=error.name
    ) from error

__all__ = ["IvfPq", "connect", "create_table", "drop_table", "first_sentence", "is_local", "open_table", "pa"]
TABLE = "windows"
# An index of one process alone, gone when it ends.
IN_MEMORY = "memory://"


def is_local(uri: str) -> bool:
    """Return whether an index is a folder of this machine."""
    return "://" not in uri


def connect(uri: str) -> lancedb.DBConnection:
    """Connect to a folder, ``memory://``, or an object store such as ``s3://bucket/path``.

    LanceDB reads an object store's keys, region and endpoint from the environment (``AWS_ACCESS_KEY_ID`` and so on).
    """
    with plain_errors(f"the index {uri} cannot be opened"):
        return lancedb.connect(os.path.abspath(uri) if is_local(uri) else uri)


def open_table(uri: str) -> lancedb.table.Table | None:
    """Open an index's table; None if there is none. Nothing is created."""
    if is_local(uri) and not Path(uri).is_dir():
        return None
    database = connect(uri)
    with plain_errors(f"the index {uri} cannot be read"):
        return database.open_table(TABLE) if TABLE in _names(database) else None


def create_table(uri: str, schema: pa.Schema) -> lancedb.table.Table:
    """Create an index's table, without rows."""
    database = connect(uri)
    with plain_errors(f"the index {uri} cannot be written"):
        return database.create_table(TABLE, schema=schema)


def drop_table(uri: str) -> None:
    """Remove an index's table."""
    with plain_errors(f"the index {uri} cannot be written"):
        connect(uri).drop_table(TABLE)


def _names(database: Any) -> list[str]:
    return list(database.list_tables().tables)


@contextlib.contextmanager
def plain_errors(what: str) -> Iterator[None]:
    """Turn LanceDB's errors, which span lines and name its source files, into OSErrors of one line."""
    try:
        yield
    except (RuntimeError, ValueError, OSError) as error:
        raise OSError(f"{what}: {first_sentence(error)}") from error


def first_sentence(error: BaseException) -> str:
    """Return the beginning of a message, on one line, without places in LanceDB's source."""
    text = " ".join(str(error).partition(", /")[0].split())
    if "No space left on device" in str(error):
        return "the disk is full; make room and repeat the command, which continues from the last commit"
    return text if len(text) <= 300 else text[:297] + "..."
