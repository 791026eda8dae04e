"""The data sets by name: how each is read, and how long its captions and videos are taken to be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..validation import option
from . import formats
from .annotations import Listing
from .split import Split, some
from .video_files import VideoFiles


@dataclass(frozen=True)
class DatasetSpec:
    """What sets one data set apart."""

    title: str
    read: Callable[[Path, str], Listing]
    max_words: int = 32
    """Tokens a caption, start and end included."""
    max_frames: int = 12
    seconds: float | None = None
    """Only so much of a video's beginning is looked at; None: all of it."""
    prefix: str = ""
    """What ids begin with, and file names may lack."""


DATASETS: dict[str, DatasetSpec] = {
    "msrvtt": DatasetSpec("MSR-VTT (1k-A)", formats.msrvtt),
    "msvd": DatasetSpec("MSVD", formats.msvd),
    "lsmdc": DatasetSpec("LSMDC", formats.lsmdc),
    "vatex": DatasetSpec("VATEX", formats.vatex),
    "activitynet": DatasetSpec("ActivityNet Captions", formats.activitynet, 64, 64, prefix="v_"),
    # Annotators saw 30 seconds of each video, and the public code takes 31.
    "didemo": DatasetSpec("DiDeMo", formats.didemo, 64, 64, seconds=31),
    "folder": DatasetSpec("a folder of videos", formats.folder),
}


def load_split(dataset: str, part: str, *, videos: str | Path, annotations: str | Path, strict: bool = False) -> Split:
    """One part of a data set: its captions, and the files of the videos they describe.

    Args:
        dataset: a key of :data:`DATASETS`.
        part: ``"train"``, ``"val"`` or ``"test"``. MSR-VTT and ActivityNet test on their val part.
        videos: the folder of the video files; folders within are searched too.
        annotations: the folder of the annotation files, under the names of their release.
        strict: raise where a listed video has no file or no caption, instead of leaving it out.

    Raises:
        ValueError: an unknown data set or part; a file that is missing or of another form; an id listed twice; two
            files for one video; nothing left. File, entry and remedy are named.
    """
    option("dataset", dataset, tuple(DATASETS))
    option("part", part, formats.PARTS)
    videos, annotations, spec = Path(videos), Path(annotations), DATASETS[dataset]
    listing = spec.read(annotations, part)
    listed = set(listing.ids)
    captions = [(name, text.strip()) for name, text in listing.captions if name in listed]
    worded = [(name, text) for name, text in captions if text]
    described = {name for name, _ in worded}
    if not described:
        raise ValueError(
            f"annotations must have a caption for the {len(listed)} videos that {dataset}'s {part} part lists "
            f"({some(listing.ids)}), got none in {annotations}, where captions are of "
            f"{some(list(dict.fromkeys(name for name, _ in listing.captions))) or 'no video'}; take both files from "
            "one release"
        )
    files = VideoFiles(videos, spec.prefix)
    paths = {name: path for name in listing.ids if (path := files.find(name)) is not None}
    # One file under several spellings is one video: two would tie for every caption.
    numbers = {path: n for n, path in enumerate(dict.fromkeys(p for name, p in paths.items() if name in described))}
    first = {path: name for name, path in reversed(paths.items()) if name in described}
    kept = [(text, numbers[paths[name]]) for name, text in worded if name in paths]
    split = Split(
        dataset,
        part,
        captions=tuple(text for text, _ in kept),
        owner=tuple(number for _, number in kept),
        videos=tuple(numbers),
        names=tuple(first[path] for path in numbers),
        missing=tuple(name for name in listing.ids if name not in paths),
        uncaptioned=tuple(name for name in listing.ids if name in paths and name not in described),
        empty_captions=len(captions) - len(worded),
    )
    _check(split, files, strict)
    return split


def _check(split: Split, files: VideoFiles, strict: bool) -> None:
    what = f"the videos that {split.dataset}'s {split.part} part lists"
    if not split.names:
        there = f"{len(files.videos)} other videos, such as {files.videos[0]}" if files.videos else "no video file"
        raise ValueError(
            f"videos must hold {what} ({some(split.missing)}), got {files.folder}, where there is {there}; pass the "
            "folder of this data set's videos, named by their ids"
        )
    if strict and (split.missing or split.uncaptioned):
        told = "; ".join(split.left_out())
        raise ValueError(f"videos must hold all {what}, got {files.folder}: {told}; add them, or leave strict out")
