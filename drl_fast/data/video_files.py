"""Find each id's video file: walk the folder once, then look up."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

# Thumbnails, subtitles and sound tracks often share a video's stem.
VIDEO_SUFFIXES = {
    ".3gp",
    ".avi",
    ".f4v",
    ".flv",
    ".m2ts",
    ".m4v",
    ".mkv",
    ".mov",
    ".mp4",
    ".mpeg",
    ".mpg",
    ".mts",
    ".ogv",
    ".ts",
    ".vob",
    ".webm",
    ".wmv",
}


class VideoFiles:
    """The files below a folder, by path, name and stem.

    Hidden folders are skipped; links to folders are followed, each folder once.

    Raises:
        ValueError: no such folder, or one below it that cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ValueError(f"videos must be a folder, not a folder: {folder}")
        self.folder = folder
        self.paths: dict[str, Path] = {}
        self.by_name: dict[str, list[Path]] = defaultdict(list)
        self.by_stem: dict[str, list[Path]] = defaultdict(list)
        self.videos = 0
        self._walk()

    def _walk(self) -> None:
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
                self.paths[path.relative_to(self.folder).as_posix()] = path
                self.by_name[name].append(path)
                if path.suffix.lower() in VIDEO_SUFFIXES:
                    self.videos += 1
                    self.by_stem[path.stem].append(path)

    def find(self, name: str) -> Path | None:
        """Return the file of an id or file name, or None.

        Tries, in this order: the path below the folder; a file of that name; a video with that stem
        (``video7``: ``video7.mp4``; ``a.mov``: ``a.mov.mp4``); a video with another suffix (``a.mov``: ``a.mp4``).

        Raises:
            ValueError: two files match, and neither by its path.
        """
        exact = self.paths.get(os.path.normpath(name).replace(os.sep, "/"))
        if exact is not None:
            return exact
        stem, suffix = os.path.splitext(name)
        found = self.by_name.get(name) or self.by_stem.get(name)
        if not found and suffix.lower() in VIDEO_SUFFIXES:
            found = self.by_stem.get(stem)
        if not found:
            return None
        if len(found) > 1:
            names = " and ".join(str(path) for path in found[:2])
            raise ValueError(f"{self.folder} must hold one file for {name}, got {names}; remove or rename all but one")
        return found[0]


def _unreadable(error: OSError) -> None:
    raise ValueError(f"{error.filename} must be readable, got: {error.strerror}; change its permissions") from error
