"""The parts of a data set whose tokens other encoders wrote: captions of a file, each with its video's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .annotations import Listing
from .datasets import split_of
from .folder import read_captions
from .formats import captions_of_part
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
    rows = [row._replace(id=row.id or str(number)) for number, row in enumerate(read_captions(captions))]
    entries: dict[str, Path] = {}
    absent = []
    if texts is not None:
        for row in rows:
            entry = texts.find(row.id)
            if entry is None:
                absent.append(row.id)
            else:
                entries.setdefault(row.text, entry)
        if not entries:
            raise ValueError(
                f"text-from must hold tokens of the captions in {captions}, by id ({some(absent)}), got {texts.folder} "
                f"with {some(texts.names)}"
            )
        rows = [row for row in rows if row.text in entries]
    splits = {}
    for part in parts:
        own, stands_in = captions_of_part(rows, captions, part)
        pairs = [(row.video, row.text) for row in own]
        listing = Listing(list(dict.fromkeys(video for video, _ in pairs)), pairs, stands_in=stands_in)
        splits[part] = split_of("folder", part, listing, videos)
        if not splits[part].names:
            raise ValueError(
                f"from must hold tokens of the videos in {captions} ({some(listing.ids)}), got {videos.folder} with "
                f"{some(videos.names)}; name the files by the captions' video"
            )
    return Imported(splits, entries, absent)
