"""Find each id's video file: walk the folder once, then look up."""

from __future__ import annotations

import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

Index = Mapping[str, list[Path]]

# Files that FFmpeg reads as videos. Thumbnails, subtitles and sound tracks often share a video's stem.
VIDEO_SUFFIXES = {
    ".3g2",
    ".3gp",
    ".asf",
    ".avi",
    ".divx",
    ".dv",
    ".f4v",
    ".flv",
    ".h264",
    ".hevc",
    ".m1v",
    ".m2t",
    ".m2ts",
    ".m2v",
    ".m4v",
    ".mjpeg",
    ".mkv",
    ".mov",
    ".mp4",
    ".mpe",
    ".mpeg",
    ".mpg",
    ".mts",
    ".mxf",
    ".nut",
    ".ogm",
    ".ogv",
    ".qt",
    ".rm",
    ".rmvb",
    ".ts",
    ".vob",
    ".webm",
    ".wmv",
}


class NameIndex:
    """Paths, found by the names that annotations give them.

    Names are compared in Unicode's composed form (NFC), since file systems and archives differ in it.

    Args:
        folder: the folder that holds the paths.
        prefix: the data set's prefix of ids, which either ids or names may lack.
        kind: what errors call a path.
    """

    def __init__(self, folder: Path, prefix: str = "", kind: str = "file") -> None:
        self.folder, self.prefix, self.kind = folder, prefix, kind
        # By path; by name; by either without its suffix.
        self._exact: tuple[Index, Index, Index] = (defaultdict(list), defaultdict(list), defaultdict(list))
        self._lower: tuple[Index, Index, Index] = (defaultdict(list), defaultdict(list), defaultdict(list))

    def add(self, path: Path, name: str | None, *stems: str) -> None:
        """Let ``path`` be found by a name, as a path below the folder, and by stems, which may begin with folders."""
        keys = [] if name is None else [(0, _composed(name)), (1, _composed(name.rpartition("/")[2]))]
        for stem in dict.fromkeys(map(_composed, stems)):
            keys += [(2, key) for key in dict.fromkeys((stem, stem.rpartition("/")[2]))]
        for number, key in keys:
            self._exact[number][key].append(path)
            self._lower[number][key.lower()].append(path)

    def find(self, name: str) -> Path | None:
        """Return the path of an id or file name, or None.

        Tries, in this order: the path below the folder; a file of that name in any folder; a video with that path or
        name before its suffix (``video7``: ``video7.mp4``; ``a.mov``: ``a.mov.mp4``); a video with another suffix
        (``a.mov``: ``a.mp4``). Then the same with slashes for backslashes, with the data set's prefix added or removed,
        and last ignoring case. An absolute name must lie in the folder, and no name leads out of it.

        Raises:
            ValueError: two paths match, and neither by its path below the folder.
        """
        spellings = [name]
        if "\\" in name:
            spellings.append(name.replace("\\", "/"))
        if self.prefix:
            spellings.append(name.removeprefix(self.prefix) if name.startswith(self.prefix) else self.prefix + name)
        for indexes in (self._exact, self._lower):
            for spelling in spellings:
                key = self._key(spelling)
                found = _look_up(key if indexes is self._exact else key.lower(), *indexes)
                if len(found) > 1:
                    names = " and ".join(str(path) for path in found[:2])
                    raise ValueError(
                        f"{self.folder} must hold one {self.kind} for {name}, got {names}; remove or rename all but one"
                    )
                if found:
                    return found[0]
        return None

    def _key(self, name: str) -> str:
        """Return a name as a path below the folder, in the form in which paths are indexed."""
        for folder in (os.path.abspath(self.folder), os.path.realpath(self.folder)):
            name = name.removeprefix(folder + os.sep)
        return _composed(os.path.normpath(name).replace(os.sep, "/"))


class VideoFiles(NameIndex):
    """The files below a folder, found by path, name or stem.

    Args:
        folder: the folder of the videos.
        prefix: the data set's prefix of ids, which either ids or file names may lack.

    Raises:
        ValueError: no such folder, or one below it that cannot be read.
    """

    def __init__(self, folder: Path, prefix: str = "") -> None:
        super().__init__(folder, prefix)
        if not folder.is_dir():
            raise ValueError(f"videos folder not found: {folder}; check the path")
        self.videos: list[Path] = []
        for path in walk(folder):
            name = path.relative_to(folder).as_posix()
            if path.suffix.lower() in VIDEO_SUFFIXES:
                self.videos.append(path)
                self.add(path, name, os.path.splitext(name)[0])
            else:
                self.add(path, name)


def walk(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder, sorted; skip hidden folders, and follow links to folders, each folder once.

    Raises:
        ValueError: a folder that cannot be read.
    """
    seen = set()
    for root, folders, files in os.walk(folder, followlinks=True, onerror=_unreadable):
        # A link may lead to a folder above.
        where = os.path.realpath(root)
        if where in seen:
            folders.clear()
            continue
        seen.add(where)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            yield Path(root, name)


def _look_up(key: str, by_path: Index, by_name: Index, by_stem: Index) -> list[Path]:
    stem, suffix = os.path.splitext(key)
    same_stem = by_stem.get(stem, []) if suffix.lower() in VIDEO_SUFFIXES else []
    return by_path.get(key) or by_name.get(key) or by_stem.get(key) or same_stem


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _unreadable(error: OSError) -> None:
    raise ValueError(f"{error.filename} must be readable, got: {error.strerror}; change its permissions") from error
