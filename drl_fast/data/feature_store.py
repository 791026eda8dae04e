"""Store the tokens of a data set on disk, and read them through a memory map.

A store is a folder. ``features.json`` says what encoded the tokens and how, ``splits.json`` holds captions and videos,
and ``start.safetensors`` what a head starts from. For each side (``text``, ``video``) and each process that wrote there
are two files: ``text-0.tokens`` has the real tokens of its items one after another, and ``text-0.index`` one
:data:`RECORD` for each item.

Items are written in chunks. A chunk's tokens reach the disk before its records. Opening a store for writing truncates
each file to its last complete chunk. So a killed encoding can be continued, and one process writes the same bytes as
without the kill.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from .. import validation
from ..atomic_write import remove_parts, write_atomically
from .annotations import read_json
from .loading import Unreadable
from .split import Split, some

FORMAT = "drl-fast features 1"
ABOUT, SPLITS, START, LOCK = "features.json", "splits.json", "start.safetensors", ".lock"
# Where an item's tokens begin, in rows of its shard; how many they are; which item it is; the CRC-32 of their bytes.
RECORD = np.dtype([("start", "<i8"), ("count", "<i4"), ("item", "<i4"), ("checksum", "<u4")])
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# bfloat16 has no numpy type: its bits are stored as 16-bit integers.
STORED = {"fp16": "<f2", "bf16": "<i2", "fp32": "<f4"}
SIDES = ("text", "video")
# What an error says where a hash differs.
NAMED = {
    "splits": "other captions, videos or parts",
    "start": "another start of the head: the CLIP's text blocks or its logit scale",
    "video.source": "other or changed files of videos",
    "text.source": "other or changed files of captions",
}
AGAIN = "encode the features again, into another folder"


@dataclass(frozen=True)
class Side:
    """One side of a store."""

    items: int
    width: int
    """Channels of a token."""
    chunk: int
    """Items that are written at a time."""
    length: int | None
    """Tokens that an item is cut to; None: as many as it has."""
    encoder: dict[str, Any] | None
    """The CLIP that encoded it: name, weights and their hash; None: tokens that were imported."""
    source: str = ""
    """Hash of the names, sizes and times of the files that were encoded, see :func:`files_hash`."""

    def __post_init__(self) -> None:
        validation.use_plain_values(self)
        for name in ("items", "width", "chunk"):
            validation.positive_int(name, getattr(self, name))
        if self.length is not None:
            validation.positive_int("length", self.length)

    def chunks(self) -> list[range]:
        """Return the items of every chunk."""
        return [range(first, min(first + self.chunk, self.items)) for first in range(0, self.items, self.chunk)]


@dataclass(frozen=True)
class About:
    """What ``features.json`` says."""

    dataset: str
    dtype: str
    """Of the stored tokens, a key of :data:`DTYPES`."""
    precision: str
    """Of the towers that encoded them."""
    inputs: dict[str, Any] | None
    """How captions and frames were prepared, as :class:`drl_fast.model.config.Inputs` has it; None: imported."""
    splits: str
    """Hash of ``splits.json``."""
    start: str
    """Hash of ``start.safetensors``."""
    text: Side
    video: Side
    finished: bool = False

    def __post_init__(self) -> None:
        validation.option("dtype", self.dtype, tuple(DTYPES))
        validation.flag("finished", self.finished)

    def side(self, name: str) -> Side:
        return self.text if name == "text" else self.video


@dataclass(frozen=True)
class Contents:
    """The items of a store and the parts of the data set that they make up."""

    texts: tuple[str, ...]
    """Captions, each text once."""
    videos: tuple[str, ...]
    """Names, each video once."""
    parts: dict[str, dict[str, Any]]
    """For each part: the items of its texts and videos, texts' owners, and what :class:`Split` lists as left out."""
    paths: tuple[Path, ...] = ()
    """The videos' files, while they are encoded."""

    @classmethod
    def of(cls, splits: Mapping[str, Split]) -> Contents:
        """Number the texts and the videos of all parts; equal texts and equal paths are one item."""
        texts = {text: None for split in splits.values() for text in split.captions}
        paths = {path: name for split in splits.values() for path, name in zip(split.videos, split.names, strict=True)}
        text_item, video_item = ({key: item for item, key in enumerate(keys)} for keys in (texts, paths))
        parts = {
            part: {
                "texts": [text_item[text] for text in split.captions],
                "videos": [video_item[path] for path in split.videos],
                "owner": list(split.owner),
                "missing": list(split.missing),
                "uncaptioned": list(split.uncaptioned),
                "stands_in": split.stands_in,
                "empty_captions": split.empty_captions,
            }
            for part, split in splits.items()
        }
        return cls(tuple(texts), tuple(paths.values()), parts, tuple(paths))

    def to_json(self) -> str:
        return json.dumps({"texts": self.texts, "videos": self.videos, "parts": self.parts}, ensure_ascii=False) + "\n"

    def digest(self) -> str:
        return _hash(self.to_json().encode())


@dataclass(frozen=True)
class Part:
    """A part of the data set, without what could not be encoded."""

    split: Split
    """``videos`` are names, not files."""
    texts: np.ndarray
    """(A,) the item of each caption."""
    videos: np.ndarray
    """(B,) the item of each video."""
    unreadable: list[Unreadable]
    """Videos that could not be decoded; they and their captions are left out."""


def files_hash(paths: Sequence[Path]) -> str:
    """Hash files by name, size and time of change; an entry of a collection counts as its file and its name."""
    found = []
    for path in paths:
        file = next(place for place in (path, *path.parents) if place.exists())
        status = file.stat()
        found.append(f"{path.name}\0{file.name}\0{status.st_size}\0{status.st_mtime_ns}\0")
    return _hash("".join(found).encode(errors="replace"))


def start_bytes(start: Mapping[str, Tensor]) -> tuple[bytes, str]:
    """Return what ``start.safetensors`` holds, and its hash."""
    data = safetensors.torch.save({name: x.detach().cpu().contiguous() for name, x in sorted(start.items())})
    return data, _hash(data)


def begin(folder: Path, about: About, contents: Contents, start: bytes) -> None:
    """Make a store's folder and description, or check that a store there is of the same features.

    Half-written chunks of all shards are removed. Nobody else may be writing.

    Args:
        start: what a head starts from, see :func:`start_bytes` and :meth:`FeatureStore.start`; no tensors for imported
            tokens.

    Raises:
        ValueError: a store of other features, or a folder with something else.
        OSError: files that cannot be written.
    """
    if (folder / ABOUT).exists():
        then = _plain(read_about(folder))
        now = _plain(about)
        changed = [
            NAMED.get(key, f"{key} {then.get(key)!r} then and {now.get(key)!r} now")
            for key in {**then, **now}
            if key != "finished" and then.get(key) != now.get(key)
        ]
        if changed:
            raise ValueError(
                f"out must be a new folder or the same features, got {folder} with {'; '.join(changed)}; name another"
            )
        remove_parts(folder)
        for name in SIDES:
            for path in folder.glob(f"{name}-*.index"):
                _truncate(path, about.side(name), about.dtype)
        return
    others = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    others = [name for name in others if name not in (SPLITS, START, LOCK) and not name.endswith(".part")]
    if folder.exists() and (others or not folder.is_dir()):
        raise ValueError(f"out must be a new or an empty folder, got {folder} with other files; name another")
    folder.mkdir(parents=True, exist_ok=True)
    remove_parts(folder)
    text = contents.to_json()
    write_atomically(folder / SPLITS, lambda name: Path(name).write_text(text, encoding="utf-8"))
    write_atomically(folder / START, lambda name: Path(name).write_bytes(start))
    write_about(folder, about)  # written last: if it exists, so do the other two


def write_about(folder: Path, about: About) -> None:
    """Write ``features.json``."""
    text = json.dumps({"format": FORMAT, **asdict(about)}, indent=2, ensure_ascii=False) + "\n"
    write_atomically(folder / ABOUT, lambda name: Path(name).write_text(text, encoding="utf-8"))


def read_about(folder: str | Path) -> About:
    """Read ``features.json``.

    Raises:
        ValueError: a folder without it, or one that is damaged or of another version.
    """
    path = Path(folder) / ABOUT
    if not Path(folder).exists():
        raise ValueError(f"features not found: {folder}; check the path")
    if not path.is_file():
        raise ValueError(
            f"features must be a folder that drl-fast features wrote, got {folder} without {ABOUT}; to encode "
            "videos run drl-fast features"
        )
    try:
        values = dict(read_json(path, dict))
        if values.pop("format", None) != FORMAT:
            raise ValueError(f"another format than {FORMAT!r}")
        text, video = (Side(**values.pop(name)) for name in SIDES)
        return About(**values, text=text, video=video)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} must describe features of drl-fast, got: {error}; {AGAIN}") from error


def done_chunks(folder: Path, name: str, side: Side) -> set[int]:
    """Return the numbers of the chunks that are whole in some shard."""
    done: set[int] = set()
    for path in folder.glob(f"{name}-*.index"):
        done.update((_whole_chunks(_read_records(path), side)["item"] // side.chunk).tolist())
    return done


class Writer:
    """Append chunks of one side to a process's shard; a half-written chunk at its end is removed first.

    Raises:
        ValueError: tokens that are missing from the shard.
    """

    def __init__(self, folder: Path, name: str, side: Side, dtype: str, shard: int) -> None:
        self.side, self.dtype = side, dtype
        index = folder / f"{name}-{shard}.index"
        self._rows = _truncate(index, side, dtype)
        self._index, self._tokens = (_open_end(path) for path in (index, index.with_suffix(".tokens")))

    def append(self, items: range, tokens: Sequence[Tensor], names: Sequence[str]) -> None:
        """Write a chunk.

        Args:
            items: the chunk's items.
            tokens: each item's (count, width); no rows stand for an item that could not be read.
            names: of the items, for errors.

        Raises:
            ValueError: tokens of another width, or that the stored dtype cannot hold; the item is named.
            OSError: a full disk, for example.
        """
        data = [self._stored(found, name) for found, name in zip(tokens, names, strict=True)]
        records, row = [], self._rows
        for item, found, stored in zip(items, tokens, data, strict=True):
            records.append((row, len(found), item, zlib.crc32(stored)))
            row += len(found)
        for file, written in ((self._tokens, b"".join(data)), (self._index, np.array(records, RECORD).tobytes())):
            file.write(written)
            file.flush()
            os.fsync(file.fileno())
        self._rows = row

    def _stored(self, tokens: Tensor, name: str) -> bytes:
        if tokens.dim() != 2 or tokens.shape[1] != self.side.width:
            raise ValueError(
                f"{name} must have tokens of shape (count, {self.side.width}) like the others, got "
                f"{tuple(tokens.shape)}; encode all items with one encoder"
            )
        tokens = tokens.detach().cpu()
        kept = tokens.to(DTYPES[self.dtype])
        if not bool(kept.isfinite().all()):
            if not bool(tokens.isfinite().all()):
                raise ValueError(f"{name} must have finite tokens, got NaN or infinity; correct it or leave it out")
            raise ValueError(
                f"{name} must have tokens that {self.dtype} can hold, got {float(tokens.abs().max()):.3g}; store them "
                "with --dtype fp32"
            )
        return (kept.view(torch.int16) if self.dtype == "bf16" else kept).contiguous().numpy().tobytes()

    def close(self) -> None:
        self._index.close()
        self._tokens.close()


class FeatureStore:
    """Read a finished store; tokens are memory-mapped.

    Raises:
        ValueError: no store there, one that is unfinished, or one that is damaged; the file is named.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.about = read_about(self.folder)
        if not self.about.finished:
            raise ValueError(
                f"features must be finished, got {folder}, whose encoding was stopped; run the same drl-fast features "
                "command again"
            )
        self._sides = {name: _Shards(self.folder, name, self.about) for name in SIDES}
        self._contents = self._read_contents()

    def _read_contents(self) -> Contents:
        path = self.folder / SPLITS
        try:
            values = read_json(path, dict)
            contents = Contents(tuple(values["texts"]), tuple(values["videos"]), values["parts"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} must list captions and videos, got: {error}; copy the features again") from error
        if _hash(path.read_bytes()) != self.about.splits:
            raise ValueError(f"{path} must be the file that was written, got another; copy the features again")
        return contents

    def length(self, side: str) -> int:
        """Return the number of tokens that :meth:`read` pads items to."""
        return self._sides[side].length

    def counts(self, side: str) -> np.ndarray:
        """Return the number of tokens of every item; 0: the video could not be decoded."""
        return self._sides[side].count

    def longest(self, side: str) -> tuple[int, str]:
        """Return the largest number of tokens of an item, and the item's name."""
        item = int(self._sides[side].count.argmax())
        return int(self._sides[side].count[item]), self._name(side, item)

    def _name(self, side: str, item: int) -> str:
        return (self._contents.texts if side == "text" else self._contents.videos)[item]

    def start(self) -> dict[str, Tensor]:
        """Return what a head starts from: CLIP's ``positional_embedding``, its first text blocks and ``logit_scale``.

        The blocks' names begin with ``blocks.``. Text towers of other forms lack positions or blocks. ``logit_bias`` is
        there if the CLIP has one, and ``max_positions`` if it is not the number of positions. Imported tokens have none
        of these.

        Raises:
            ValueError: a damaged file.
        """
        path = self.folder / START
        data = path.read_bytes() if path.is_file() else b""
        if _hash(data) != self.about.start:
            raise ValueError(f"{path} must be the file that was written, got another; copy the features again")
        return safetensors.torch.load(data)

    @cached_property
    def digest(self) -> str:
        """Hash of all tokens, by their checksums."""
        values = [x.tobytes() for side in self._sides.values() for x in (side.count, side.checksum)]
        return _hash(b"".join([self.about.splits.encode(), *values]))

    def part(self, name: str, *, strict: bool = False) -> Part:
        """Return a part of the data set.

        Args:
            strict: raise if a listed video is missing or unreadable, instead of leaving it out.

        Raises:
            ValueError: a part that was not encoded, or one of which nothing is left.
        """
        if name not in self._contents.parts:
            raise ValueError(
                f"split must be one of {', '.join(self._contents.parts)}, which {self.folder} holds, got {name}; "
                f"encode {name} into another folder"
            )
        values = self._contents.parts[name]
        found = self._sides["video"].count[values["videos"]] > 0
        column = np.cumsum(found) - 1
        owner = np.asarray(values["owner"], np.int64)
        kept = found[owner]
        unreadable = [
            Unreadable(self._name("video", item), "it could not be decoded when the features were encoded")
            for item in np.asarray(values["videos"])[~found]
        ]
        absent = [*values["missing"], *values["uncaptioned"], *(video.name for video in unreadable)]
        if not kept.any() or (strict and absent):
            wanted = "all videos" if strict else "at least one video with a caption"
            raise ValueError(
                f"{self.folder} must hold {wanted} of {self.about.dataset}'s {name} part, got it without "
                f"{some(absent)}; encode them" + ", or drop --strict" * strict
            )
        texts, videos = np.asarray(values["texts"])[kept], np.asarray(values["videos"])[found]
        names = tuple(self._name("video", item) for item in videos)
        split = Split(
            self.about.dataset,
            name,
            captions=tuple(self._name("text", item) for item in texts),
            owner=tuple(column[owner[kept]].tolist()),
            videos=tuple(map(Path, names)),
            names=names,
            missing=tuple(values["missing"]),
            uncaptioned=tuple(values["uncaptioned"]),
            stands_in=values["stands_in"],
            empty_captions=values["empty_captions"],
        )
        return Part(split, texts, videos, unreadable)

    def read(self, side: str, items: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return the tokens of some items, padded with zeros, and their mask.

        Returns:
            tokens (rows, length, width) float32, mask (rows, length) bool.

        Raises:
            ValueError: an item whose bytes are not those that were written.
        """
        return self._sides[side].read(np.asarray(items, np.int64))


class _Shards:
    """All shards of one side."""

    def __init__(self, folder: Path, name: str, about: About) -> None:
        self.name, self.side, self.dtype = name, about.side(name), about.dtype
        items = self.side.items
        self.count, self.start = np.full(items, -1, np.int64), np.zeros(items, np.int64)
        self.shard, self.checksum = np.zeros(items, np.int64), np.zeros(items, np.uint32)
        self.paths: list[Path] = []
        self.maps: list[np.ndarray] = []
        for number, path in enumerate(sorted(folder.glob(f"{name}-*.index"))):
            records = _read_records(path)
            at = records["item"]
            if len(at) and not 0 <= at.min() <= at.max() < items:
                raise ValueError(f"{path} must name items below {items}, got others; copy the features again")
            self.count[at], self.start[at], self.checksum[at] = records["count"], records["start"], records["checksum"]
            self.shard[at] = number
            self.paths.append(path.with_suffix(".tokens"))
            self.maps.append(self._map(self.paths[-1], records))
        lacking = np.flatnonzero(self.count < 0)
        if len(lacking):
            raise ValueError(
                f"{folder} must hold all {items} {name} items, got {items - len(lacking)}; copy the features again"
            )
        self.length = self.side.length or max(1, int(self.count.max()))
        self.checked = np.zeros(items, bool)

    def _map(self, tokens: Path, records: np.ndarray) -> np.ndarray:
        rows = int((records["start"] + records["count"]).max()) if len(records) else 0
        size, shape = rows * _row_bytes(self.side, self.dtype), (rows, self.side.width)
        found = tokens.stat().st_size if tokens.is_file() else 0
        if found != size or (len(records) and min(records["start"].min(), records["count"].min()) < 0):
            raise ValueError(f"{tokens} must have {size} bytes as its index says, got {found}; copy the features again")
        return np.memmap(tokens, STORED[self.dtype], "r", shape=shape) if rows else np.zeros(shape, STORED[self.dtype])

    def read(self, items: np.ndarray) -> tuple[Tensor, Tensor]:
        for item in items[~self.checked[items]]:
            self._check(item)
        real = np.arange(self.length) < self.count[items, None]
        found = torch.zeros(len(items), self.length, self.side.width)
        for number, tokens in enumerate(self.maps):
            here = np.flatnonzero(self.shard[items] == number)
            rows, places = np.nonzero(real[here])
            # Only real tokens are converted: most of a batch of captions is padding.
            bits = torch.from_numpy(tokens[self.start[items[here[rows]]] + places])
            values = bits.view(torch.bfloat16) if self.dtype == "bf16" else bits
            found[torch.from_numpy(here[rows]), torch.from_numpy(places)] = values.float()
        return found, torch.from_numpy(real)

    def _check(self, item: int) -> None:
        """Compare an item with its checksum, at its first reading."""
        number, start = self.shard[item], self.start[item]
        if zlib.crc32(self.maps[number][start : start + self.count[item]]) != self.checksum[item]:
            raise ValueError(
                f"{self.paths[number]}: {self.name} item {item} must have the checksum that was written, got another; "
                "copy the features again"
            )
        self.checked[item] = True


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _row_bytes(side: Side, dtype: str) -> int:
    return side.width * np.dtype(STORED[dtype]).itemsize


def _truncate(index: Path, side: Side, dtype: str) -> int:
    """Cut a shard's two files, which may be missing, to their last complete chunk; return its rows of tokens.

    Raises:
        ValueError: tokens that are missing.
    """
    tokens = index.with_suffix(".tokens")
    index.touch()
    tokens.touch()
    records = _whole_chunks(_read_records(index), side)
    rows = int(records["start"][-1] + records["count"][-1]) if len(records) else 0
    size = rows * _row_bytes(side, dtype)
    if tokens.stat().st_size < size:
        raise ValueError(f"{tokens} must have at least {size} bytes, got {tokens.stat().st_size}; {AGAIN}")
    os.truncate(index, records.nbytes)
    os.truncate(tokens, size)
    return rows


def _open_end(path: Path) -> BinaryIO:
    return path.open("ab")


def _read_records(path: Path) -> np.ndarray:
    data = path.read_bytes()
    return np.frombuffer(data[: len(data) // RECORD.itemsize * RECORD.itemsize], RECORD)


def _whole_chunks(records: np.ndarray, side: Side) -> np.ndarray:
    """Drop the records after the last whole chunk."""
    kept = 0
    while kept < len(records):
        first = int(records["item"][kept])
        end = kept + min(side.chunk, side.items - first)
        if first % side.chunk or records["item"][kept:end].tolist() != list(range(first, first + end - kept)):
            break
        kept = end
    return records[:kept]


def _plain(about: About) -> dict[str, Any]:
    """Return the fields, those of dicts in them under names such as ``text.width``."""
    values = asdict(about)
    while nested := [name for name, value in values.items() if isinstance(value, dict)]:
        for name in nested:
            values |= {f"{name}.{key}": value for key, value in values.pop(name).items()}
    return values
