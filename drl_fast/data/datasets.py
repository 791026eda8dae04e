"""The data sets by name: how each is read, and what it needs of a model's sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..validation import option
from . import formats
from .annotations import Listing
from .split import Split, some
from .video_files import VideoFiles


@dataclass(frozen=True)
class DatasetSpec:
    """What is particular to one data set."""

    title: str
    read: Callable[[Path, str], Listing]
    max_words: int = 32
    """Tokens per caption, start and end included."""
    max_frames: int = 12
    seconds: float | None = None
    """Only this much of a video's beginning is used; None: all of it."""
    prefix: str = ""
    """Ids begin with this; file names may lack it."""
    chunk: int = 0
    """Pairs encoded per chunk in training (GradCache), where a batch's graph exceeds one GPU; 0 = off."""


DATASETS: dict[str, DatasetSpec] = {
    "msrvtt": DatasetSpec("MSR-VTT (1k-A)", formats.msrvtt),
    "msvd": DatasetSpec("MSVD", formats.msvd),
    "lsmdc": DatasetSpec("LSMDC", formats.lsmdc),
    "vatex": DatasetSpec("VATEX", formats.vatex),
    "activitynet": DatasetSpec("ActivityNet Captions", formats.activitynet, 64, 64, prefix="v_", chunk=16),
    # Annotators saw 30 seconds of each video; the public code uses 31.
    "didemo": DatasetSpec("DiDeMo", formats.didemo, 64, 64, seconds=31, chunk=16),
    "folder": DatasetSpec("a folder of videos", formats.folder),
}


def load_split(dataset: str, part: str, *, videos: str | Path, annotations: str | Path, strict: bool = False) -> Split:
    """Load one part of a data set: its captions, and the files of the videos they describe.

    Args:
        dataset: a key of :data:`DATASETS`.
        part: ``"train"``, ``"val"`` or ``"test"``. MSR-VTT and ActivityNet use their val part as test.
        videos: the folder of the video files, searched with its subfolders.
        annotations: the folder of the annotation files, named as they were released.
        strict: raise if a listed video has no file or no caption, instead of leaving it out.

    Raises:
        ValueError: an unknown data set or part; a missing or malformed file; an id listed twice; two files for one
            video; nothing left. File, entry and remedy are named.
    """
    option("dataset", dataset, tuple(DATASETS))
    option("part", part, formats.PARTS)
    videos, annotations, spec = Path(videos), Path(annotations), DATASETS[dataset]
    listing = spec.read(annotations, part)
    listed = set(listing.ids)
    if not any(name in listed and text.strip() for name, text in listing.captions):
        raise ValueError(
            f"annotations must have a caption for the {len(listed)} videos that {dataset}'s {part} part lists "
            f"({some(listing.ids)}), but the captions in {annotations} describe "
            f"{some(list(dict.fromkeys(name for name, _ in listing.captions))) or 'no video'}; take both files from "
            "one release"
        )
    files = VideoFiles(videos, spec.prefix)
    split = split_of(dataset, part, listing, files)
    _check(split, files, strict)
    return split


class Files(Protocol):
    """Find a video's file, or its tokens, by the video's id."""

    def find(self, name: str) -> Path | None: ...


def split_of(dataset: str, part: str, listing: Listing, files: Files) -> Split:
    """Find the files of a part's videos; what lacks a file or a caption is left out and named."""
    listed = set(listing.ids)
    captions = [(name, text.strip()) for name, text in listing.captions if name in listed]
    worded = [(name, text) for name, text in captions if text]
    described = {name for name, _ in worded}
    paths = {name: path for name in listing.ids if (path := files.find(name)) is not None}
    # One file under several spellings is one video: two would tie for every caption.
    numbers = {path: n for n, path in enumerate(dict.fromkeys(p for name, p in paths.items() if name in described))}
    first = {path: name for name, path in reversed(paths.items()) if name in described}
    kept = [(text, numbers[paths[name]]) for name, text in worded if name in paths]
    return Split(
        dataset,
        part,
        captions=tuple(text for text, _ in kept),
        owner=tuple(number for _, number in kept),
        videos=tuple(numbers),
        names=tuple(first[path] for path in numbers),
        missing=tuple(name for name in listing.ids if name not in paths),
        uncaptioned=tuple(name for name in listing.ids if name in paths and name not in described),
        stands_in=listing.stands_in,
        empty_captions=len(captions) - len(worded),
    )


def _check(split: Split, files: VideoFiles, strict: bool) -> None:
    wanted = f"the videos that {split.dataset}'s {split.part} part lists"
    if not split.names:
        found = f"other videos, such as {files.videos[0]} (of {len(files.videos)})" if files.videos else "no video file"
        raise ValueError(
            f"videos must hold {wanted} ({some(split.missing)}), got {files.folder} with {found}; pass the folder of "
            "this data set's videos, named by their ids"
        )
    if strict and (split.missing or split.uncaptioned):
        left_out = "; ".join(split.left_out())
        raise ValueError(f"videos must hold all {wanted}, got {files.folder}: {left_out}; add them, or drop --strict")
