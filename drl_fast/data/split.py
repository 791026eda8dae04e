"""One part of a data set, as everything that trains or evaluates sees it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

SHOWN = 5


@dataclass(frozen=True)
class Split:
    """Captions, the videos they describe, and what the annotations list but could not be used."""

    dataset: str
    part: str
    """``"train"``, ``"val"`` or ``"test"``."""
    captions: tuple[str, ...]
    owner: tuple[int, ...]
    """Each caption's index into ``videos``."""
    videos: tuple[Path, ...]
    names: tuple[str, ...]
    """The annotation files' ids, one a video."""
    missing: tuple[str, ...] = ()
    """Ids listed without a file; they and their captions are left out."""
    uncaptioned: tuple[str, ...] = ()
    """Ids listed without a caption; left out too."""
    empty_captions: int = 0
    """Captions that hold no word, which are left out."""

    def left_out(self) -> list[str]:
        """One sentence for each kind of thing that is listed and not used; an empty list where nothing is missing."""
        listed = len(self.names) + len(self.missing) + len(self.uncaptioned)
        told = []
        if self.missing:
            told.append(f"{len(self.missing)} of {listed} videos listed have no file: {some(self.missing)}")
        if self.uncaptioned:
            told.append(f"{len(self.uncaptioned)} of {listed} videos listed have no caption: {some(self.uncaptioned)}")
        if self.empty_captions:
            told.append(f"{self.empty_captions} captions hold no word")
        return told


def some(names: tuple[str, ...] | list[str]) -> str:
    """The first few of many names."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
