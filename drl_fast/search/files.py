"""Which files are indexed: those below the given paths, named relative to a root."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.video_files import VIDEO_SUFFIXES, NameIndex, walk
from .lance import pa
from .windows import File

# The columns of a table that may name the video.
NAMING = ("video", "path")


def find_files(paths: Sequence[str | os.PathLike[str]], root: Path | None) -> list[File]:
    """List video files; a folder stands for all videos below it, a file for itself.

    Args:
        root: names are relative to it; None: the folder that holds all the paths.

    Raises:
        ValueError: a path that does not exist or lies outside the root, or no videos.
    """
    if isinstance(paths, str | os.PathLike):
        paths = [paths]
    found: dict[Path, None] = {}
    for path in map(_absolute, paths):
        if path.is_dir():
            found.update(dict.fromkeys(file for file in walk(path) if file.suffix.lower() in VIDEO_SUFFIXES))
        elif path.exists():
            found[path] = None
        else:
            raise ValueError(f"videos must be files or folders, not found: {path}")
    if not found:
        raise ValueError(
            f"{', '.join(map(str, paths)) or 'the paths'} must hold videos (.mp4, .mkv, .webm and so on), got none"
        )
    base = common_root(paths) if root is None else _absolute(root)
    outside = next((path for path in found if base not in path.parents), None)
    if outside is not None:
        raise ValueError(f"{outside} must lie below the root {base}; choose a --root that holds all the paths")
    return [File(path.relative_to(base).as_posix(), str(base)) for path in found]


def common_root(paths: Sequence[str | os.PathLike[str]]) -> Path:
    """Return the folder that holds all paths: a single folder itself, a single file's folder."""
    folders = [path if path.is_dir() else path.parent for path in map(_absolute, paths)]
    return Path(os.path.commonpath(folders))


def _absolute(path: str | os.PathLike[str]) -> Path:
    return Path(os.path.abspath(os.path.expanduser(path)))


def select(names: Mapping[str, str], paths: Iterable[str | os.PathLike[str]]) -> list[str]:
    """Return the videos of the index that paths name: files, folders or names in the index; none needs to exist.

    Args:
        names: the index's videos, each with its root.

    Raises:
        ValueError: a path that names none of them.
    """
    places = {name: Path(root, name) for name, root in names.items()}
    found: dict[str, None] = {}
    for given in paths:
        path, plain = _absolute(given), Path(given).as_posix()
        under = [
            name
            for name, place in places.items()
            if place == path or path in place.parents or name == plain or name.startswith(f"{plain}/")
        ]
        if not under:
            raise ValueError(f"{given} must be a video of the index or a folder of its videos, got a path outside it")
        found.update(dict.fromkeys(under))
    return list(found)


class Columns:
    """The user's columns: typed, a row a video.

    Args:
        source: a CSV file with a column ``video`` or ``path``, or values by video.
    """

    def __init__(self, source: str | os.PathLike[str] | Mapping[str, Mapping[str, Any]]) -> None:
        if isinstance(source, Mapping):
            self.source = "columns"
            names = list(dict.fromkeys(name for values in source.values() for name in values))
            rows = [
                {NAMING[0]: video, **{name: values.get(name) for name in names}} for video, values in source.items()
            ]
            try:
                table = pa.Table.from_pylist(rows)
            except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
                raise ValueError(f"columns must hold values of one type each, got: {_line(error)}") from error
        else:
            self.source = str(source)
            table = _read_csv(Path(source))
        key = next((name for name in NAMING if name in table.column_names), None)
        if key is None:
            raise ValueError(
                f"{self.source} must have a column video, the file's path or name, got {', '.join(table.column_names)}"
            )
        twice = next((name for name in table.column_names if table.column_names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"{self.source} must name each column once, got {twice!r} twice; rename one")
        self.fields = [field for field in table.schema if field.name != key]
        rows = table.to_pylist()
        self._rows = [(str(row.pop(key)), row) for row in rows]

    def by_path(self, names: Iterable[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """Return values by path, and the videos that are not among ``names``.

        A video is named by its path below the root, its file name, or either without its suffix.

        Raises:
            ValueError: a name that fits two videos, or two rows of one video.
        """
        index = NameIndex(Path(self.source))
        for name in names:
            index.add(Path(name), name, os.path.splitext(name)[0])
        found, missing = {}, []
        for video, values in self._rows:
            path = index.find(video)
            if path is None:
                missing.append(video)
            elif path.as_posix() in found:
                raise ValueError(f"{self.source} must have one row for each video, got two for {path.as_posix()}")
            else:
                found[path.as_posix()] = values
        return found, missing


def _read_csv(path: Path) -> pa.Table:
    from pyarrow import csv

    if not path.is_file():
        raise ValueError(f"columns must be a CSV file, not found: {path}")
    try:
        # File names that are numbers stay as they are written.
        names = csv.ConvertOptions(column_types=dict.fromkeys(NAMING, pa.string()), strings_can_be_null=True)
        return csv.read_csv(path, convert_options=names)
    except (pa.ArrowInvalid, pa.ArrowKeyError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be a CSV file in UTF-8 with a header, got: {_line(error)}") from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
