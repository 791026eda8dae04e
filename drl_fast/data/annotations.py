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
    stands_in: bool = False
    """Whether the part is missing, and val or test was read as the other."""


def find_file(folder: Path, *names: str) -> Path:
    """Return the first of ``names`` that exists in the annotations folder; ValueError if none does."""
    if not folder.is_dir():
        raise ValueError(f"annotations folder not found: {folder}; it must hold {names[0]}")
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
    """Read a JSON file whose outermost value is a ``kind``; an object that holds a key twice is an error."""
    return checked(parse_json(read_text(path), str(path)), kind, str(path))


def parse_json(text: str, place: str, remedy: str = AS_RELEASED) -> Any:
    """Parse JSON in which every object holds a key once.

    Raises:
        ValueError: no JSON, or a key twice; ``place`` and ``remedy`` are named.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _check_once((key for key, _ in pairs), f"{place} must hold each key", remedy)
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=once)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{place} must be JSON, got {error}; {remedy}") from error


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


def read_table(path: Path, columns: Sequence[str], remedy: str = AS_RELEASED) -> list[dict[str, str]]:
    """Read the rows of a comma-separated file, which must have ``columns``.

    Reading is strict: an error is better than a caption that swallows the lines after an open quote, or that ends at a
    comma.

    Raises:
        ValueError: a column that is missing or there twice, a row with another number of fields, text around quotes, a
            quote that is not closed, a field of more than 131,072 characters; the line is named.
    """
    rows = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    table: list[dict[str, str]] = []
    names: list[str] = []
    line = 1
    try:
        for fields in rows:
            # Spreadsheets fill rows up with empty fields to the width of the widest.
            while len(fields) > len(names) and not fields[-1]:
                fields.pop()
            if fields and not names:
                names = [name.strip() for name in fields]
                _check_once(names, f"{path} must hold each column", remedy)
                if set(columns) - set(names):
                    wanted = ", ".join(columns)
                    raise ValueError(f"{path} must have the columns {wanted}, got {', '.join(names)}; {remedy}")
            elif fields:
                if len(fields) != len(names):
                    raise ValueError(
                        f"{path}, line {line} must have {len(names)} fields ({', '.join(names)}), got {len(fields)}; "
                        f"put a field that holds a comma in double quotes; {remedy}"
                    )
                table.append(dict(zip(names, fields, strict=True)))
            line = rows.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {line} must be comma-separated text, got: {error}; put a field that holds a double quote in "
            f"double quotes, and write the quote twice; {remedy}"
        ) from error
    if not names:
        raise ValueError(f"{path} must have the columns {', '.join(columns)}, got an empty file; {remedy}")
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


def pairs(entries: list[Any], first: str, second: str, place: str) -> list[tuple[str, str]]:
    """Return each entry's two strings; errors name ``place`` and the entry's number."""
    places = ((entry, f"{place} {number}") for number, entry in enumerate(entries, 1))
    return [(field(entry, first, str, where), field(entry, second, str, where)) for entry, where in places]


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
    _check_once(listed, f"{path} must list each video", "remove one")
    return listed


def _check_once(names: Iterable[str], expected: str, remedy: str) -> None:
    seen = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{expected} once, got {name!r} twice; {remedy}")
        seen.add(name)
