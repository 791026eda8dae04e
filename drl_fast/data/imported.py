"""The parts of a data set whose tokens other encoders wrote: captions of a file, each with its video's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from .datasets import split_of
from .folder import Caption, read_captions
from .formats import captions_of_part, listing_of
from .split import Split, some
from .token_files import TokenFiles


class Imported(NamedTuple):
    """Parts of a data set, and where the captions' tokens are."""

    splits: dict[str, Split]
    """``videos`` are entries of the videos' token files."""
    text_entries: dict[str, Path]
    """By caption, where captions' tokens are imported."""
    absent: list[str]
    """Captions without tokens, by id; they are left out."""


def read_splits(captions: Path, videos: TokenFiles, texts: TokenFiles | None, parts: Sequence[str]) -> Imported:
    """Read a captions file and look up the tokens that it names.

    Raises:
        ValueError: a malformed captions file, or one of which no caption or no video has tokens.
    """
    if captions.is_dir() and not any((captions / f"captions.{kind}").is_file() for kind in ("csv", "jsonl")):
        raise ValueError(f"captions must be named, got {captions} without captions.csv; add --captions FILE")
    if not captions.exists():
        raise ValueError(f"captions not found: {captions}; name a CSV or JSONL file with --captions")
    rows = read_captions(captions)
    entries: dict[str, Path] = {}
    absent: list[str] = []
    if texts is not None:
        entries, absent = _text_entries(_with_ids(rows, captions), texts)
        if not entries:
            raise ValueError(
                f"text-from must hold tokens of the captions in {captions}, by id ({some(absent)}), got {texts.folder} "
                f"with {some(texts.names)}"
            )
        rows = [row for row in rows if row.text in entries]
    splits = {}
    for part in parts:
        listing = listing_of(*captions_of_part(rows, captions, part))
        splits[part] = split_of("folder", part, listing, videos)
        if not splits[part].names:
            raise ValueError(
                f"from must hold tokens of the {part} part's videos ({some(listing.ids)}), got {videos.folder} with "
                f"{some(videos.names)}; name the files by the captions' video, or import other parts alone with --split"
            )
    return Imported(splits, entries, absent)


def _with_ids(rows: list[Caption], captions: Path) -> list[Caption]:
    """Return captions with their own ids, or numbered from 0 if none has an id.

    Raises:
        ValueError: an id that is missing or there twice.
    """
    if not any(row.id for row in rows):
        return [row._replace(id=str(number)) for number, row in enumerate(rows)]
    seen: set[str] = set()
    for number, row in enumerate(rows, start=1):
        if not row.id or row.id in seen:
            found = f"{row.id!r} twice" if row.id else f"none for caption {number}"
            raise ValueError(
                f"{captions} must have a different id for every caption, or no column id, got {found}; correct it"
            )
        seen.add(row.id)
    return rows


def _text_entries(rows: list[Caption], texts: TokenFiles) -> tuple[dict[str, Path], list[str]]:
    """Return the entry of every caption that has tokens, and the ids of the captions that have none.

    Equal captions are stored once.

    Raises:
        ValueError: equal captions with different tokens.
    """
    found: dict[str, tuple[str, Path]] = {}
    for row in rows:
        entry = texts.find(row.id)
        if entry is None:
            continue
        other, before = found.setdefault(row.text, (row.id, entry))
        if before != entry and not torch.equal(texts.read(before), texts.read(entry)):
            raise ValueError(
                f"text-from must hold equal tokens for equal captions, got different ones for {other} and {row.id} "
                f"({row.text!r}); encode them alike"
            )
    entries = {text: entry for text, (_, entry) in found.items()}
    return entries, [row.id for row in rows if row.text not in entries]
