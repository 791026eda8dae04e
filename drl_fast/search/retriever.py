"""``drl_fast.Retriever``: index videos, and find moments in them by a sentence."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock

from .. import validation
from ..data.loading import Unreadable, count_cut
from ..engine.processes import Processes
from . import table as tables
from .files import Columns, common_root, find_files, select
from .lance import IN_MEMORY, drop_table, is_local, open_table
from .model import Loaded, check_same, describe, load_clip, load_recorded, load_run, sampling_of
from .scoring import Best, Query, Windows, chosen_frames, encode_query, explains, merge_overlapping, ready, score
from .table import About, Known, WindowTable
from .windows import Encoded, File, encode_files, file_state

# A commit holds whole videos: at most so many, or as many as fill so many windows.
COMMIT_VIDEOS, COMMIT_WINDOWS = 16, 256
# Windows beyond tables.EXACT that are rescored for a query.
CANDIDATES = 2000
# Default of Retriever.kept_bytes: 160,000 windows of 12 tokens with D = 512.
KEPT_BYTES = 2 * 2**30
# Windows of the sample on which recall is measured, and how many of the best must be found.
SAMPLE, RECALL_AT = 20_000, 10
# A longer text is no sentence: a pasted document.
MOST_CHARACTERS = 1000
LOCK = ".indexing.lock"

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Match:
    """A word of the query, and the frame that it chose."""

    word: str
    frame: int
    """Index into the hit's frames; -1: none."""
    time: float | None
    """Seconds from the video's beginning."""
    weight: float
    """The word's share of the query's score."""


@dataclass(frozen=True)
class Hit:
    """A moment of a video that a query found."""

    video: str
    """Path relative to the root."""
    start: float
    """Seconds."""
    end: float
    score: float
    matches: list[Match]
    """Empty if the interaction matches no words to frames."""
    path: Path
    """Where the file is."""
    times: list[float]
    """When each frame is shown, seconds."""
    columns: dict[str, Any] = field(default_factory=dict)
    """The user's columns."""
    thumbnails: list[bytes] = field(default_factory=list, repr=False)
    """A small JPEG of each frame, if the search was asked for them."""


@dataclass
class Report:
    """What indexing did, in paths relative to the root."""

    added: list[str] = field(default_factory=list)
    updated: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)
    """Found again below another root."""
    unreadable: list[Unreadable] = field(default_factory=list)
    unnamed: list[str] = field(default_factory=list)
    """Videos that the columns name and the index does not hold."""


class Retriever:
    """Find the moment in your own videos that a sentence describes.

    >>> retriever = drl_fast.Retriever.from_run("runs/wti", index="holidays.index")
    >>> retriever.index(["~/Videos"])
    >>> for hit in retriever.search("a dog catches a frisbee", k=5):
    ...     print(hit.video, hit.start, hit.end, hit.score)

    Build one with :meth:`from_run`, :meth:`from_clip` or :meth:`open`. The index is a LanceDB folder, or a place on an
    object store such as ``s3://bucket/path``.

    A search of the whole index keeps its windows for the next query, up to ``kept_bytes`` (2 GiB); 0 keeps none.
    """

    def __init__(self, loaded: Loaded, uri: str, processes: Processes | None = None) -> None:
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.uri, self.processes = uri, processes or Processes()
        self.description = describe(loaded.about.source)
        self._table = None if uri == IN_MEMORY else WindowTable.open(uri)
        if self._table is not None:
            check_same(self._table.about, loaded, uri)
        self.about: About = loaded.about if self._table is None else self._table.about
        self.kept_bytes = KEPT_BYTES
        self._kept: _Kept | None = None

    @classmethod
    def from_run(
        cls,
        run: str | os.PathLike[str],
        index: str | os.PathLike[str] | None = None,
        device: str | torch.device | None = None,
        *,
        processes: Processes | None = None,
    ) -> Retriever:
        """Search with the model of a run of ``drl-fast train``, or of a folder that ``save_pretrained`` wrote.

        Args:
            run: the folder.
            index: a new index or one of this model; None: in memory, gone with the process.
            device: default: the GPU if there is one.
            processes: this process among those that write an index together.

        Raises:
            ValueError: no model there, or an index of another model or format.
            OSError: an index that cannot be read.
        """
        return cls(load_run(run, _device(device)), _uri(index), processes)

    @classmethod
    def from_clip(
        cls,
        name: str = "ViT-B-32",
        pretrained: str | None = "openai",
        index: str | os.PathLike[str] | None = None,
        device: str | torch.device | None = None,
        *,
        processes: Processes | None = None,
    ) -> Retriever:
        """Search with a CLIP that was not trained on videos. TI ranks; it has no weights that would be random.

        Args:
            name, pretrained: see :class:`drl_fast.DRL`; None: random weights, whose hits mean nothing.

        The other arguments and errors are those of :meth:`from_run`.
        """
        return cls(load_clip(name, pretrained, _device(device)), _uri(index), processes)

    @classmethod
    def open(
        cls,
        index: str | os.PathLike[str],
        device: str | torch.device | None = None,
        *,
        processes: Processes | None = None,
    ) -> Retriever:
        """Open an index with the model that it records.

        Raises:
            ValueError: no index there, its model is gone or has changed, or another format.
        """
        table, chosen = open_index(index), _device(device)
        try:
            loaded = load_recorded(table.about, chosen)
        except ValueError as error:
            raise ValueError(
                f"{index} was made with {describe(table.about.source)}, which cannot be loaded ({error}); name the "
                "model with --model, or with Retriever.from_run(RUN, index=...)"
            ) from error
        return cls(loaded, _uri(index), processes)

    def size(self) -> tuple[int, int]:
        """Return how many videos and windows the index holds."""
        if self._table is None:
            return 0, 0
        self._table.refresh()
        return self._table.count_videos(), self._table.count()

    def index(
        self,
        videos: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
        columns: str | os.PathLike[str] | Mapping[str, Mapping[str, Any]] | None = None,
        *,
        root: str | os.PathLike[str] | None = None,
        batch_size: int = 64,
        workers: int = 2,
        on_progress: OnProgress | None = None,
        on_unreadable: Callable[[Unreadable], None] | None = None,
    ) -> Report:
        """Add new videos, update changed ones, and skip those that are there already.

        A file is taken as unchanged if its size and time of modification are, or else if its bytes are. After Ctrl-C or
        a kill the same call continues: every commit holds whole videos.

        Args:
            videos: files, and folders with all videos below them.
            columns: values of your own for ``where``: a CSV file with a column ``video`` (path or name), or values by
                video. They replace those of earlier calls.
            root: names of videos are relative to it. Default: that of the index if it holds all the paths, else their
                common folder.
            batch_size: frames that the image tower takes at a time.
            workers: threads that decode, each with a whole video in memory.
            on_progress: called with videos done and all videos.
            on_unreadable: called for a video that cannot be read, which is left out.

        Raises:
            ValueError: a path that does not exist or lies outside the root, a name that another root has already, or
                columns that do not fit.
            OSError: an index that cannot be written, because the disk is full for example; what was committed stays.
        """
        batch_size = validation.positive_int("batch_size", batch_size)
        workers = validation.non_negative_int("workers", workers)
        videos = [videos] if isinstance(videos, str | os.PathLike) else list(videos)
        own = None if columns is None else Columns(columns)
        base = _known_root(self._known(), videos) if root is None else Path(root)
        files = find_files(videos, base)
        report = Report()
        with _one_writer(self.uri, self.processes), self._created() as table:
            if self.processes.first:
                self._rename(table, Path(files[0].root))
            self.processes.wait()
            known = self._known()
            new, changed = self._compare(files, known, report)
            values: dict[str, dict[str, Any]] = {}
            if own is not None:
                values, report.unnamed = own.by_path(dict.fromkeys([*known, *(file.name for file in files)]))
            self.processes.wait()  # all have looked before the first one writes
            if self.processes.first:
                table.add_columns(own.fields if own is not None else ())
                table.move(report.moved, files[0].root)
                table.set_columns({name: row for name, row in values.items() if name in known})
            self.processes.wait()
            table.refresh()
            values = {**table.values(sorted(changed)), **values}
            self._encode(table, new, changed, values, report, batch_size, workers, on_progress, on_unreadable)
            self.processes.wait()
            if self.processes.first:
                table.finish()
        return report

    def remove(self, paths: Sequence[str | os.PathLike[str]]) -> list[str]:
        """Remove videos from the index: files, folders, or names in it. Return their names."""
        return remove(self._opened(), paths)

    def prune(self, root: str | os.PathLike[str] | None = None) -> list[str]:
        """Remove the videos whose files no longer exist. Return their names."""
        return prune(self._opened(), root)

    def search(
        self,
        text: str,
        k: int = 10,
        where: str | None = None,
        *,
        per_video: int | None = None,
        root: str | os.PathLike[str] | None = None,
        thumbnails: bool = False,
    ) -> list[Hit]:
        """Find the ``k`` moments that fit a sentence best, best first.

        A hit is a window of a video. Of windows that overlap, the best one stands for all. Up to 100,000 windows (that
        ``where`` selects) are scored exactly. Beyond, pooled vectors choose 2,000 candidates, which are scored exactly.

        Args:
            text: a sentence, at most 1,000 characters. The model reads its first tokens, see :meth:`is_cut`.
            k: hits; fewer if the index holds fewer.
            where: an SQL expression of your columns, ``path``, ``start`` and ``end``: ``"year >= 2020"``.
            per_video: hits of one video at most; 1 ranks videos by their best moments. None: no limit. Beyond 100,000
                windows, more candidates, at most 100,000, are chosen until ``k`` hits are found.
            root: the folder that the videos' root has been moved to.
            thumbnails: also return the hits' thumbnails.

        Raises:
            ValueError: an empty or overlong text, ``k`` or ``per_video`` below 1, an empty index, or an expression that
                is not SQL.
            TypeError: a text that is no string.
        """
        k = validation.positive_int("k", k)
        if per_video is not None:
            per_video = validation.positive_int("per_video", per_video)
        query = self.encode(text)
        table = self._filled()
        found = self._best(table, query, k, where, per_video)
        hits: list[Hit] = []
        for first in range(0, len(found), tables.BLOCK):
            hits += self._hits(table, query, found[first : first + tables.BLOCK], root, thumbnails)
        return hits

    def encode(self, text: str) -> Query:
        """Check and encode a query."""
        if not isinstance(text, str):
            raise TypeError(f"text must be a string, got {validation.describe(text)}")
        if not text.strip():
            raise ValueError("the query must be a sentence, got an empty one")
        if len(text) > MOST_CHARACTERS:
            raise ValueError(
                f"the query must be a sentence of at most {MOST_CHARACTERS} characters, got {len(text)}; the model "
                f"reads {self.about.max_words} tokens"
            )
        return encode_query(self.model, self.tokenizer, text, self.about.max_words)

    def is_cut(self, text: str) -> bool:
        """Return whether the model reads only the beginning of a query."""
        return count_cut(self.tokenizer, [text], self.about.max_words) > 0

    def recall(self, text: str, where: str | None = None) -> float | None:
        """Return which share of the 10 best windows of a random sample are among a query's candidates.

        None: there are no candidates, since all windows are scored. The sample has 20,000 windows. Its best ones rank
        lower among all windows than in the sample, and are harder to keep than a query's first hits.
        """
        table = self._filled()
        if table.count(where) <= tables.EXACT:
            return None
        query = self.encode(text)
        candidates = table.nearest(query.vector, where, CANDIDATES)
        ids = table.ids(where)
        sample = np.random.default_rng(0).choice(ids, min(SAMPLE, len(ids)), replace=False)
        scores = self._scores(query, self._ready(_taken(table, sample)))
        best = scores.ids[np.argsort(-scores.scores, kind="stable")[:RECALL_AT]]
        return float(np.isin(best, candidates).mean())

    def _known(self) -> dict[str, Known]:
        if self._table is None:
            return {}
        self._table.refresh()
        return self._table.videos()

    def _rename(self, table: WindowTable, root: Path) -> None:
        """Name the videos of roots below ``root`` relative to it."""
        for old in {video.root for video in self._known().values()}:
            if root in Path(old).parents:
                table.rename(old, str(root), Path(old).relative_to(root).as_posix())

    def _compare(
        self, files: Sequence[File], known: Mapping[str, Known], report: Report
    ) -> tuple[list[File], set[str]]:
        """Return the files to encode, and which of them replace others; note the rest in the report."""
        new, changed = [], set()
        names = {Path(video.root, name): name for name, video in known.items()}
        for file in files:
            path, before = Path(file.root, file.name), known.get(file.name)
            if names.get(path, file.name) != file.name:
                raise ValueError(
                    f"{path} must have one name in the index, which holds it as {names[path]!r} below "
                    f"{known[names[path]].root}; take that --root"
                )
            if before is None:
                new.append(file)
                continue
            old = Path(before.root, file.name)
            if before.root != file.root and old.exists():
                raise ValueError(
                    f"{path} must have a name of its own in the index, which holds {old} as {file.name!r}; index both "
                    "with a --root above them"
                )
            status = path.stat()
            same = (status.st_size, status.st_mtime_ns) == (before.state.size, before.state.modified)
            if same or (status.st_size == before.state.size and _digest(path) == before.state.digest):
                (report.unchanged if before.root == file.root else report.moved).append(file.name)
            else:
                new.append(file)
                changed.add(file.name)
        return new, changed

    @contextlib.contextmanager
    def _created(self) -> Iterator[WindowTable]:
        """Give the table; the first process makes it if there is none, and drops it if nothing gets into it."""
        new = self._table is None
        if self._table is None and self.processes.first:
            self._table = WindowTable.create(self.uri, self.about)
        self.processes.wait()
        table = self._opened()
        try:
            yield table
        finally:
            if new and self.processes.first and table.count() == 0:
                drop_table(self.uri)
                self._table = None

    def _opened(self) -> WindowTable:
        if self._table is None and self.uri == IN_MEMORY:
            raise ValueError("the index holds no videos; call index(videos) first")
        if self._table is None:
            self._table = open_index(self.uri)
        self._table.refresh()
        return self._table

    def _filled(self) -> WindowTable:
        """Return the newest version of the table.

        Raises:
            ValueError: it holds no videos.
        """
        table = self._opened()
        if table.count() == 0:
            raise ValueError(f"{self.uri} holds no videos; add some with drl-fast index PATHS --out {self.uri}")
        return table

    def _encode(
        self,
        table: WindowTable,
        files: Sequence[File],
        changed: set[str],
        values: Mapping[str, Mapping[str, Any]],
        report: Report,
        batch_size: int,
        workers: int,
        on_progress: OnProgress | None,
        on_unreadable: Callable[[Unreadable], None] | None,
    ) -> None:
        own = files[self.processes.rank :: self.processes.size]
        sampling = sampling_of(self.about, self.model)
        waiting: list[Encoded] = []

        def write() -> None:
            fresh = [video for video in waiting if video.file.name not in changed]
            table.write(fresh, [video for video in waiting if video.file.name in changed], values)
            for video in waiting:
                (report.updated if video.file.name in changed else report.added).append(video.file.name)
            waiting.clear()

        stream = encode_files(self.model, own, sampling, self.about.max_frames, batch=batch_size, workers=workers)
        if on_progress is not None:
            on_progress(0, len(own))
        with contextlib.closing(stream):
            for done, (_, video) in enumerate(stream, start=1):
                if isinstance(video, Unreadable):
                    report.unreadable.append(video)
                    if on_unreadable is not None:
                        on_unreadable(video)
                else:
                    waiting.append(video)
                windows = sum(len(video.spans) for video in waiting)
                if len(waiting) >= COMMIT_VIDEOS or windows >= COMMIT_WINDOWS:
                    write()
                if on_progress is not None:
                    on_progress(done, len(own))
        if waiting:
            write()

    def _best(self, table: WindowTable, query: Query, k: int, where: str | None, per_video: int | None) -> list[Best]:
        if table.count(where) <= tables.EXACT:
            return _merge(self._scores(query, self._windows(table, where)), k, per_video)
        self._kept = None  # The index has outgrown exact search: free the windows kept for it.
        wanted, count = k, max(CANDIDATES, 10 * k)
        if per_video is not None and where is None:
            wanted = min(k, per_video * table.count_videos())
        while True:
            ids = table.nearest(query.vector, where, count)
            found = _merge(self._scores(query, self._ready(_taken(table, ids))), k, per_video)
            # All candidates may be of a few long videos.
            if per_video is None or len(found) >= wanted or len(ids) < count or count >= tables.EXACT:
                return found
            count = min(4 * count, tables.EXACT)

    def _ready(self, blocks: Iterator[tables.Block]) -> Iterator[Windows]:
        return (ready(self.model, block) for block in blocks)

    def _windows(self, table: WindowTable, where: str | None) -> Iterator[Windows]:
        """Yield the windows that ``where`` selects. A search of all keeps them for the next one, if they fit."""
        now = self._kept  # one reading: another thread may search, too
        if now is not None and now.version == table.version:
            wanted = None if where is None else table.ids(where)
            for windows in now.windows:
                yield windows._replace(chosen=None if wanted is None else np.isin(windows.ids, wanted))
            return
        self._kept = now = None  # an older version's
        kept, held = [], 0
        version = table.version
        for windows in self._ready(table.blocks(where)):
            held += windows.nbytes
            if where is None and held <= self.kept_bytes:
                kept.append(windows)
            else:
                kept = []
            yield windows
        if where is None and held <= self.kept_bytes:
            self._kept = _Kept(version, kept)

    def _scores(self, query: Query, blocks: Iterator[Windows]) -> _Scored:
        scores, ids, paths, starts, ends = [], [], [], [], []
        for windows in blocks:
            rows = slice(None) if windows.chosen is None else windows.chosen
            scores.append(score(self.model, query, windows).numpy()[rows])
            ids.append(windows.ids[rows])
            paths.append(windows.paths[rows])
            starts.append(windows.starts[rows])
            ends.append(windows.ends[rows])
        empty = [np.zeros(0)]
        return _Scored(*(np.concatenate(parts or empty) for parts in (scores, ids, paths, starts, ends)))

    def _hits(
        self,
        table: WindowTable,
        query: Query,
        found: Sequence[Best],
        root: str | os.PathLike[str] | None,
        thumbnails: bool,
    ) -> list[Hit]:
        own = table.columns.names
        names = ["root", "interval", *own, *["thumbnails"] * thumbnails]
        rows = table.take([best.row for best in found], *names).combine_chunks().to_batches()[0]
        block, at = table.block(rows), {int(number): i for i, number in enumerate(rows.column("_rowid").to_pylist())}
        frames = chosen_frames(self.model, query, block) if explains(self.model) else None
        shares = [float(query.shares[list(word.positions)].sum()) for word in query.words]
        hits = []
        for best in found:
            i = at[best.row]
            row = {name: rows.column(name)[i].as_py() for name in ("path", "start", "end", "frames", *names)}
            times = [row["start"] + frame * row["interval"] for frame in range(row["frames"])]
            matches = [
                Match(word.text, frame, None if frame < 0 else times[frame], share)
                for word, frame, share in zip(query.words, [] if frames is None else frames[i], shares, strict=False)
            ]
            hits.append(
                Hit(
                    row["path"],
                    row["start"],
                    row["end"],
                    best.score,
                    matches,
                    Path(row["root"] if root is None else os.path.abspath(root), row["path"]),
                    times,
                    {name: row[name] for name in own},
                    row.get("thumbnails", []),
                )
            )
        return hits


@dataclass(frozen=True)
class _Kept:
    version: int
    """Of the table."""
    windows: list[Windows]


@dataclass(frozen=True)
class _Scored:
    scores: np.ndarray
    ids: np.ndarray
    paths: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


def has_index(index: str | os.PathLike[str]) -> bool:
    """Return whether there is an index."""
    return open_table(_uri(index)) is not None


def open_index(index: str | os.PathLike[str]) -> WindowTable:
    """Open an index without its model.

    Raises:
        ValueError: no index there, or one of another format.
    """
    uri = _uri(index)
    table = WindowTable.open(uri)
    if table is None:
        raise ValueError(f"index not found: {uri}; make it with drl-fast index PATHS --out {uri}")
    return table


def remove(table: WindowTable, paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Remove videos from an index: files, folders, or names in it. Return their names.

    Raises:
        ValueError: a path that names no video of the index.
    """
    with _one_writer(table.uri, Processes()):
        names = select({name: video.root for name, video in table.videos().items()}, paths)
        table.remove(names)
    return names


def prune(table: WindowTable, root: str | os.PathLike[str] | None = None) -> list[str]:
    """Remove the videos whose files no longer exist. Return their names.

    Raises:
        ValueError: a root that does not exist, such as a disk that is not mounted.
    """
    videos = table.videos()
    moved = [] if root is None else [Path(os.path.abspath(root))]
    gone = [place for place in sorted({Path(video.root) for video in videos.values()}) if not place.is_dir()]
    if moved:
        # One root may have moved there; the others must still exist.
        gone = gone[1:] if moved[0].is_dir() else moved
    if gone:
        raise ValueError(
            f"the videos' root must exist, not found: {gone[0]}; mount it, or name the folder that it moved to with "
            "--root"
        )
    with _one_writer(table.uri, Processes()):
        names = [
            name
            for name, video in videos.items()
            if not any((place / name).exists() for place in [Path(video.root), *moved])
        ]
        table.remove(names)
    return names


def _merge(found: _Scored, k: int, per_video: int | None) -> list[Best]:
    return merge_overlapping(found.scores, found.ids, found.paths, found.starts, found.ends, k, per_video)


def _taken(table: WindowTable, ids: np.ndarray) -> Iterator[tables.Block]:
    for start in range(0, len(ids), tables.BLOCK):
        for rows in table.take(ids[start : start + tables.BLOCK]).combine_chunks().to_batches():
            yield table.block(rows)


def _known_root(known: Mapping[str, Known], paths: Sequence[str | os.PathLike[str]]) -> Path | None:
    """Return the root of an index's videos that holds all the paths: the innermost of several."""
    if not paths:
        return None
    common = common_root(paths)
    above = {common, *common.parents}.intersection(Path(video.root) for video in known.values())
    return max(above, key=lambda root: len(root.parts), default=None)


def _digest(path: Path) -> str:
    return file_state(path).digest


@contextlib.contextmanager
def _one_writer(uri: str, processes: Processes) -> Iterator[None]:
    """Let one command at a time write to a folder; readers need no lock. An object store has none."""
    if not is_local(uri):
        yield
        return
    folder = Path(uri)
    new, lock = not folder.exists(), FileLock(folder / LOCK)
    if not processes.acquire(lock):
        raise ValueError(f"{uri} must be written by one command at a time, and another one runs; wait for it")
    try:
        yield
    finally:
        lock.release()
        if processes.first and open_table(uri) is None:  # nothing was written
            (folder / LOCK).unlink(missing_ok=True)
            if new:
                shutil.rmtree(folder)


def _uri(index: str | os.PathLike[str] | None) -> str:
    if index is None:
        return IN_MEMORY
    uri = os.fspath(index)
    return os.path.expanduser(uri) if is_local(uri) else uri


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be one such as cpu, cuda or cuda:1, got {device!r}") from error
