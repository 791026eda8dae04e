"""One part of a data set, as training and evaluation use it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

SHOWN = 5


@dataclass(frozen=True)
class Split:
    """Captions, the videos they describe, and listed entries that cannot be used."""

    dataset: str
    part: str
    """``"train"``, ``"val"`` or ``"test"``."""
    captions: tuple[str, ...]
    owner: tuple[int, ...]
    """Each caption's index into ``videos``."""
    videos: tuple[Path, ...]
    names: tuple[str, ...]
    """The videos' ids in the annotation files."""
    missing: tuple[str, ...] = ()
    """Listed ids without a file; they and their captions are left out."""
    uncaptioned: tuple[str, ...] = ()
    """Listed ids without a caption, left out too."""
    stands_in: bool = False
    """Whether this is val or test read as the other, which the data set does not have."""
    empty_captions: int = 0
    """The number of captions without a word, left out too."""

    def left_out(self) -> list[str]:
        """Return one sentence for each reason why something listed is not used."""
        listed = len(self.names) + len(self.missing) + len(self.uncaptioned)
        reasons = []
        for names, lacking in ((self.missing, "file"), (self.uncaptioned, "caption")):
            if names:
                reasons.append(f"{len(names)} of {listed} videos listed have no {lacking}: {some(names)}")
        if self.empty_captions:
            reasons.append(f"{self.empty_captions} captions have no words")
        return reasons


def some(names: tuple[str, ...] | list[str]) -> str:
    """List the first few names, and how many more there are."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
