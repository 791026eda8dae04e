"""Find each id's video file: walk the folder once, then look up."""

from __future__ import annotations

import os
import unicodedata
from collections import defaultdict
from collections.abc import Mapping
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


class VideoFiles:
    """The files below a folder, found by path, name or stem.

    Names are compared in Unicode's composed form (NFC), since file systems and archives differ in it. Hidden folders
    are skipped; links to folders are followed, each folder once.

    Args:
        folder: the folder of the videos.
        prefix: the data set's prefix of ids, which either ids or file names may lack.

    Raises:
        ValueError: no such folder, or one below it that cannot be read.
    """

    def __init__(self, folder: Path, prefix: str = "") -> None:
        if not folder.is_dir():
            raise ValueError(f"videos folder not found: {folder}; check the path")
        self.folder, self.prefix = folder, prefix
        self.videos: list[Path] = []
        # By path; by name; videos by either without its suffix.
        self._exact: tuple[Index, Index, Index] = (defaultdict(list), defaultdict(list), defaultdict(list))
        self._walk(*self._exact)
        self._lower = [_lowered(index) for index in self._exact]

    def _walk(self, by_path: Index, by_name: Index, by_stem: Index) -> None:
        seen = set()
        for root, folders, files in os.walk(self.folder, followlinks=True, onerror=_unreadable):
            # A link may lead to a folder above.
            where = os.path.realpath(root)
            if where in seen:
                folders.clear()
                continue
            seen.add(where)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(files):
                path = Path(root, name)
                key = _composed(path.relative_to(self.folder).as_posix())
                by_path[key].append(path)
                by_name[_composed(name)].append(path)
                if path.suffix.lower() in VIDEO_SUFFIXES:
                    self.videos.append(path)
                    for stem in {os.path.splitext(key)[0], os.path.splitext(_composed(name))[0]}:
                        by_stem[stem].append(path)

    def find(self, name: str) -> Path | None:
        """Return the file of an id or file name, or None.

        Tries, in this order: the path below the folder; a file of that name in any folder; a video with that path or
        name before its suffix (``video7``: ``video7.mp4``; ``a.mov``: ``a.mov.mp4``); a video with another suffix
        (``a.mov``: ``a.mp4``). Then the same with slashes for backslashes, with the data set's prefix added or removed,
        and last ignoring case. An absolute name must lie in the folder, and no name leads out of it.

        Raises:
            ValueError: two files match, and neither by its path.
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
                        f"{self.folder} must hold one file for {name}, got {names}; remove or rename all but one"
                    )
                if found:
                    return found[0]
        return None

    def _key(self, name: str) -> str:
        """Return a name as a path below the folder, in the form in which paths are indexed."""
        for folder in (os.path.abspath(self.folder), os.path.realpath(self.folder)):
            name = name.removeprefix(folder + os.sep)
        return _composed(os.path.normpath(name).replace(os.sep, "/"))


def _look_up(key: str, by_path: Index, by_name: Index, by_stem: Index) -> list[Path]:
    stem, suffix = os.path.splitext(key)
    same_stem = by_stem.get(stem, []) if suffix.lower() in VIDEO_SUFFIXES else []
    return by_path.get(key) or by_name.get(key) or by_stem.get(key) or same_stem


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _lowered(index: Index) -> Index:
    found: dict[str, list[Path]] = defaultdict(list)
    for key, paths in index.items():
        found[key.lower()] += paths
    return found


def _unreadable(error: OSError) -> None:
    raise ValueError(f"{error.filename} must be readable, got: {error.strerror}; change its permissions") from error
