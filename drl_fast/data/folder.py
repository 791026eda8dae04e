"""A folder of a user's videos, with captions.csv or captions.jsonl in it."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

HOW = (
    "put captions.csv (columns video,caption) or captions.jsonl (one object per line, the same keys) beside the videos"
)


class Caption(NamedTuple):
    """One line of the captions file."""

    video: str
    """File name, relative to the folder."""
    text: str
    split: str = ""
    """The line's ``split``, or an empty string."""


def read_captions(folder: str | Path) -> list[Caption]:
    """Read a folder's captions in the file's order; a video may have several.

    Raises:
        ValueError: no such folder, no captions file or two, a missing column, a line without video or caption.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"videos must be a folder, not a folder: {folder}; {HOW}")
    found = [path for path in (folder / "captions.csv", folder / "captions.jsonl") if path.is_file()]
    if len(found) != 1:
        names = " and ".join(path.name for path in found) or "neither"
        raise ValueError(f"{folder} must hold one of captions.csv and captions.jsonl, got {names}; {HOW}")
    try:
        # "utf-8-sig" drops the byte order mark that spreadsheet programs put before the first column's name.
        with found[0].open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file) if found[0].suffix == ".csv" else _json_lines(found[0], file)
            captions = [_caption(found[0], number, row) for number, row in enumerate(rows, start=1)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{found[0]} must be UTF-8 text, got {error}; save it as UTF-8") from error
    if not captions:
        raise ValueError(f"{found[0]} must hold at least one caption, got none; {HOW}")
    return captions


def _json_lines(path: Path, file: Iterable[str]) -> Iterable[dict]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} must be a JSON object, got {error}; {HOW}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} must be a JSON object, got {type(row).__name__}; {HOW}")
        yield row


def _caption(path: Path, number: int, row: dict) -> Caption:
    video, text = row.get("video"), row.get("caption")
    if not isinstance(video, str) or not isinstance(text, str) or not video.strip() or not text.strip():
        keys = ", ".join(str(key) for key in row)
        raise ValueError(
            f"{path}, caption {number} must have a non-empty video and caption, got video={video!r}, caption={text!r} "
            f"among columns {keys}; {HOW}"
        )
    return Caption(video.strip(), text.strip(), str(row.get("split") or "").strip())
