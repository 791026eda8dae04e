"""Readers of annotation files: lists of ids, tables, JSON, plain pickles. Errors name file, entry and remedy."""

from __future__ import annotations

import csv
import io
import json
import pickle
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ..validation import describe

AS_RELEASED = "take the file as it was released"
T = TypeVar("T")


class Listing(NamedTuple):
    """One part of a data set, as its annotation files list it."""

    ids: list[str]
    """Every video once."""
    captions: list[tuple[str, str]]
    """Id and caption; captions of unlisted ids may be among them."""


def find_file(folder: Path, *names: str) -> Path:
    """Return the first of ``names`` that exists in the annotations folder; ValueError if none does."""
    if not folder.is_dir():
        raise ValueError(f"annotations must be a folder that holds {names[0]}, not a folder: {folder}")
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"annotations must hold {' or '.join(names)}, got {folder} without it; copy it there")


def read_text(path: Path) -> str:
    """Read UTF-8 text, without the byte order mark that spreadsheet programs put first."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8 text, got {error}; save it as UTF-8") from error


def read_json(path: Path, kind: type[T]) -> T:
    """Read a JSON file whose outermost value is a ``kind``; a repeated key is an error."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            repeated = _first_repeated(key for key, _ in pairs)
            raise ValueError(f"{path} must hold each key once, got {repeated!r} twice; {AS_RELEASED}")
        return entries

    try:
        value = json.loads(read_text(path), object_pairs_hook=once)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON, got {error}; {AS_RELEASED}") from error
    return checked(value, kind, str(path))


def read_ids(path: Path) -> list[str]:
    """Read ids: one per line (.txt), a list (.json) or an array of strings (.npy).

    Raises:
        ValueError: no ids, a repeated id, or one that is not a string.
    """
    if path.suffix == ".json":
        ids = read_json(path, list)
    elif path.suffix == ".npy":
        ids = _read_array(path)
    else:
        ids = read_text(path).split("\n")
    for number, name in enumerate(ids, start=1):
        checked(name, str, f"{path}, id {number}")
    return unique((name.strip() for name in ids if name.strip()), path)


def _read_array(path: Path) -> list[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # arrays of Python 2 load, with advice to save them again
            array = np.load(path, allow_pickle=False)
        if array.ndim != 1 or array.dtype.kind not in "US":
            raise ValueError(f"{array.dtype} of shape {array.shape}")
        return [name.decode() if isinstance(name, bytes) else name for name in array.tolist()]
    # numpy raises many types for a damaged header, and refuses object arrays: those are pickles, which could run code.
    except Exception as error:
        raise ValueError(
            f"{path} must be an array of strings, got: {error}; write the ids to a .txt file, one per line"
        ) from error


def read_table(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Read the rows of a comma-separated file that has ``columns``."""
    rows = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        got = rows.fieldnames or []
        absent = [name for name in columns if name not in got]
        if absent:
            raise ValueError(
                f"{path} must have the columns {', '.join(columns)}, got {', '.join(got) or 'none'}; {AS_RELEASED}"
            )
        table = []
        for number, row in enumerate(rows, start=1):
            if any(row[name] is None for name in columns) or None in row:
                raise ValueError(f"{path}, row {number} must have {len(got)} fields, got another number; {AS_RELEASED}")
            table.append(row)
    except csv.Error as error:
        raise ValueError(
            f"{path} must be comma-separated text, got an error after line {rows.line_num}: {error}; {AS_RELEASED}"
        ) from error
    return table


class _PlainUnpickler(pickle.Unpickler):
    """Unpickle lists, dicts, strings and numbers alone: a pickle that imports anything could run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"an object of {module}.{name}")


def read_pickle(path: Path) -> dict:
    """Read a pickled dict of plain lists and strings, from Python 2 or 3."""
    try:
        with path.open("rb") as file:
            value = _PlainUnpickler(file, encoding="utf-8").load()
    # A damaged pickle can raise anything: its bytes are a program.
    except Exception as error:
        raise ValueError(
            f"{path} must be a pickle of plain lists, dicts and strings, got {error or type(error).__name__}; "
            f"{AS_RELEASED}"
        ) from error
    return checked(value, dict, str(path))


def checked(value: object, kind: type[T], place: str) -> T:
    """Return ``value`` if it is a ``kind``; ValueError otherwise."""
    if not isinstance(value, kind):
        raise ValueError(f"{place} must be a {kind.__name__}, got {describe(value)}; {AS_RELEASED}")
    return value


def field(entry: object, key: str, kind: type[T], place: str) -> T:
    """Return ``entry[key]`` of a dict, checked to be a ``kind``."""
    entries = checked(entry, dict, place)
    if key not in entries:
        raise ValueError(f"{place} must have the key {key!r}, got {', '.join(map(repr, entries))}; {AS_RELEASED}")
    return checked(entries[key], kind, f"{place}, {key}")


def strings(value: object, place: str) -> list[str]:
    """Return ``value`` if it is a list of strings; ValueError otherwise."""
    return [checked(text, str, f"{place}, {number}") for number, text in enumerate(checked(value, list, place), 1)]


def paragraph(sentences: Iterable[str]) -> str:
    """Join sentences by spaces, without the empty ones."""
    return " ".join(text for text in (sentence.strip() for sentence in sentences) if text)


def unique(names: Iterable[str], path: Path) -> list[str]:
    """Return ``names`` as a list; ValueError if it is empty or a name is repeated."""
    listed = list(names)
    if not listed:
        raise ValueError(f"{path} must list at least one video, got none; {AS_RELEASED}")
    if len(set(listed)) != len(listed):
        raise ValueError(f"{path} must list each video once, got {_first_repeated(listed)!r} twice; remove one")
    return listed


def _first_repeated(names: Iterable[str]) -> str:
    seen: set[str] = set()
    return next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
