"""A folder of a user's videos, with captions.csv or captions.jsonl in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .annotations import parse_json, read_table, read_text

HOW = (
    "put captions.csv (columns video,caption) or captions.jsonl (one object per line, the same keys) beside the videos"
)
FIX = "correct the file: columns video,caption, or in captions.jsonl one object with these keys per line"


class Caption(NamedTuple):
    """One line of the captions file."""

    video: str
    """File name, relative to the folder."""
    text: str
    split: str = ""
    """The line's ``split``, or an empty string."""
    id: str = ""
    """The line's ``id``, or an empty string."""


def read_captions(folder: str | Path) -> list[Caption]:
    """Read a folder's captions in the file's order; a video may have several.

    Args:
        folder: the folder of the captions file, or the file itself.

    Raises:
        ValueError: no such folder, none or two captions files, a file that is not well-formed (see
            :func:`~drl_fast.data.annotations.read_table`), a line without video or caption.
    """
    folder = Path(folder)
    found = [path for path in (folder / "captions.csv", folder / "captions.jsonl") if path.is_file()]
    if folder.is_file() and folder.suffix in (".csv", ".jsonl"):
        found = [folder]
    elif not folder.is_dir():
        raise ValueError(f"captions folder not found: {folder}; it is --annotations, or else --videos; {HOW}")
    if len(found) != 1:
        names = " and ".join(path.name for path in found) or "neither"
        raise ValueError(f"{folder} must hold one of captions.csv and captions.jsonl, got {names}; {HOW}")
    rows = read_table(found[0], ("video", "caption"), FIX) if found[0].suffix == ".csv" else _json_lines(found[0])
    captions = [_caption(found[0], number, row) for number, row in enumerate(rows, start=1)]
    if not captions:
        raise ValueError(f"{found[0]} must hold at least one caption, got none; {FIX}")
    return captions


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            row = parse_json(line, f"{path}, line {number}", FIX)
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number} must be a JSON object, got {type(row).__name__}; {FIX}")
            yield row


def _caption(path: Path, number: int, row: Mapping[str, Any]) -> Caption:
    video, text = row.get("video"), row.get("caption")
    if not isinstance(video, str) or not isinstance(text, str) or not video.strip() or not text.strip():
        keys = ", ".join(str(key) for key in row)
        raise ValueError(
            f"{path}, caption {number} must have a non-empty video and caption, got video={video!r}, caption={text!r} "
            f"among columns {keys}; {FIX}"
        )
    split, own = ("" if row.get(key) is None else str(row[key]).strip() for key in ("split", "id"))
    return Caption(video.strip(), text.strip(), split, own)
