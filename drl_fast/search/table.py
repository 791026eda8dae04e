"""The table of windows: its schema, and what is read from it and written to it. Every commit holds whole videos."""

from __future__ import annotations

import dataclasses
import json
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import lance
from .lance import IvfPq, first_sentence, pa, plain_errors
from .windows import Encoded, State

FORMAT = "drl-fast index 1"
# The key of the index's description in the schema's metadata.
KEY = b"drl_fast"
# Rows that are read at a time.
BLOCK = 4096
# Above so many windows, vectors are indexed and a search rescores the nearest ones only.
EXACT = 100_000
# Selects one window of each video.
FIRST = "start = 0"
# Small files, of one commit each, that are left as they are.
FILES = 64
# Commits that meet another process's are repeated this often; LanceDB itself repeats them, too.
ATTEMPTS = 8
# Names per SQL expression.
NAMES = 500


@dataclass(frozen=True)
class About:
    """What an index was made with; a search needs the same."""

    model: str
    """Hash of weights and options."""
    source: dict[str, Any]
    """Where the model is: ``run``, or ``clip`` and ``pretrained``."""
    rate: float
    """Frames per second."""
    max_frames: int
    """Nv, frames of a window."""
    stride: int
    """Frames from one window to the next."""
    max_words: int
    """Nt, tokens of a query."""
    dim: int
    """D"""
    weighted: bool
    """Whether the model weighs frames, as WTI does."""
    format: str = FORMAT

    @property
    def schema(self) -> pa.Schema:
        """The table's columns; those of users come behind them."""
        numbers = self.max_frames * self.dim
        columns = {
            "path": pa.string(),
            "root": pa.string(),
            "start": pa.float64(),
            "end": pa.float64(),
            "vector": pa.list_(pa.float32(), self.dim),
            "tokens": pa.list_(pa.float16(), numbers),
            **({"weights": pa.list_(pa.float32(), self.max_frames)} if self.weighted else {}),
            "frames": pa.int16(),
            "interval": pa.float64(),
            "thumbnails": pa.list_(pa.binary()),
            "hash": pa.string(),
            "size": pa.int64(),
            "modified": pa.int64(),
        }
        return pa.schema(list(columns.items()), metadata={KEY: json.dumps(dataclasses.asdict(self)).encode()})

    @property
    def scored(self) -> list[str]:
        """The columns that a search reads of every window."""
        return ["path", "start", "end", "tokens", "frames", *["weights"] * self.weighted]


class Known(NamedTuple):
    """A video in the index."""

    root: str
    state: State


class Block(NamedTuple):
    """Some windows as they are scored."""

    ids: np.ndarray
    """(B,) LanceDB's row ids"""
    rows: pa.RecordBatch
    tokens: Tensor
    """(B, Nv, D) float16"""
    mask: Tensor
    """(B, Nv) bool"""
    weights: Tensor | None
    """(B, Nv) float32"""


class WindowTable:
    """An index's table, which other processes may read and write meanwhile.

    Args:
        uri: the folder or object store, for messages.
    """

    def __init__(self, uri: str, table: Any) -> None:
        self.uri, self.table = uri, table
        with plain_errors(f"the index {uri} cannot be read"):
            schema = table.schema
        self.about = _read_about(uri, schema)
        own = self.about.schema
        if [(f.name, f.type) for f in own] != [(f.name, f.type) for f in schema][: len(own)]:
            raise ValueError(
                f"{uri} must have the columns of {FORMAT} with Nv = {self.about.max_frames} and D = {self.about.dim}, "
                "got other columns or types; make the index again"
            )

    @classmethod
    def open(cls, uri: str) -> WindowTable | None:
        """Open an index; None if there is none."""
        table = lance.open_table(uri)
        return None if table is None else cls(uri, table)

    @classmethod
    def create(cls, uri: str, about: About) -> WindowTable:
        """Create an index without rows."""
        return cls(uri, lance.create_table(uri, about.schema))

    @property
    def columns(self) -> pa.Schema:
        """The user's columns."""
        return pa.schema(list(self.table.schema)[len(self.about.schema) :])

    @property
    def version(self) -> int:
        """Changes with every commit."""
        return self.table.version

    def refresh(self) -> None:
        """See what other processes committed."""
        with plain_errors(f"the index {self.uri} cannot be read"):
            self.table.checkout_latest()

    def count(self, where: str | None = None) -> int:
        """Count windows.

        Raises:
            ValueError: ``where`` is no SQL expression of the columns.
        """
        try:
            return self.table.count_rows(where)
        except (ValueError, RuntimeError, OSError) as error:
            if where is None:
                raise OSError(f"the index {self.uri} cannot be read: {first_sentence(error)}") from error
            own = [name for name in ("path", "start", "end") if name in self.table.schema.names]
            raise ValueError(
                f"where must be an SQL expression of the columns {', '.join([*own, *self.columns.names])}, got "
                f"{where!r}: {first_sentence(error).partition('. Valid fields')[0]}"
            ) from error

    def count_videos(self) -> int:
        """Count videos; each has one window that starts at 0."""
        return self.count(FIRST)

    def videos(self) -> dict[str, Known]:
        """Return the videos by path."""
        names = ["path", "root", "hash", "size", "modified"]
        rows = self._arrow(self.table.search().where(FIRST).select(names)).to_pylist()
        return {row["path"]: Known(row["root"], State(row["size"], row["modified"], row["hash"])) for row in rows}

    def values(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Return the values of the user's columns of some videos, by path."""
        found = {}
        for part in _parts(names if self.columns.names else ()):
            query = self.table.search().where(f"{FIRST} AND {_among('path', part)}")
            rows = self._arrow(query.select(["path", *self.columns.names])).to_pylist()
            found.update({row.pop("path"): row for row in rows})
        return found

    def blocks(self, where: str | None) -> Iterator[Block]:
        """Read windows as they are scored, some at a time."""
        query = self.table.search()
        if where is not None:
            query = query.where(where)
        query = query.select(self.about.scored).with_row_id(True)
        # A batch ends with its file, and files are as small as commits.
        waiting: list[pa.RecordBatch] = []
        with plain_errors(f"the index {self.uri} cannot be read"):
            for rows in query.to_batches(BLOCK):
                waiting.append(rows)
                if sum(map(len, waiting)) >= BLOCK:
                    yield self._joined(waiting)
                    waiting = []
            if waiting:
                yield self._joined(waiting)

    def _joined(self, batches: Sequence[pa.RecordBatch]) -> Block:
        return self.block(pa.Table.from_batches(batches).combine_chunks().to_batches()[0])

    def ids(self, where: str | None) -> np.ndarray:
        """Return the row ids of all windows."""
        query = self.table.search()
        if where is not None:
            query = query.where(where)
        return self._arrow(query.select(["frames"]).with_row_id(True)).column("_rowid").to_numpy()

    def nearest(self, vector: Tensor, where: str | None, count: int) -> np.ndarray:
        """Return the row ids of the windows whose pooled vectors are nearest by cosine, by LanceDB's vector search."""
        query = self.table.search(vector.numpy(), vector_column_name="vector").distance_type("cosine")
        if where is not None:
            query = query.where(where, prefilter=True)
        # At least 64 of an index's cells, more where these hold too few; and the stored vectors instead of their codes.
        query = query.minimum_nprobes(64).maximum_nprobes(0).refine_factor(2)
        return (
            self._arrow(query.select(["frames", "_distance"]).with_row_id(True).limit(count))
            .column("_rowid")
            .to_numpy()
        )

    def take(self, ids: Sequence[int] | np.ndarray, *more: str) -> pa.Table:
        """Read rows by id, in LanceDB's order: what a search reads, ``_rowid``, and more columns."""
        query = self.table.take_row_ids([int(number) for number in ids])
        return self._arrow(query.select([*self.about.scored, *more]).with_row_id())

    def block(self, rows: pa.RecordBatch) -> Block:
        """Return rows of what a search reads as tensors."""
        shape = (rows.num_rows, self.about.max_frames)
        tokens = torch.from_numpy(_flat(rows.column("tokens"))).view(*shape, self.about.dim)
        counts = torch.from_numpy(np.array(rows.column("frames")))
        return Block(
            np.array(rows.column("_rowid")),
            rows,
            tokens,
            torch.arange(shape[1]) < counts[:, None],
            torch.from_numpy(_flat(rows.column("weights"))).view(shape) if self.about.weighted else None,
        )

    def write(
        self, new: Sequence[Encoded], changed: Sequence[Encoded], columns: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Add new videos in one commit; replace changed ones in another.

        Args:
            columns: the user's values by path.
        """
        if new:
            rows = self._rows(new, columns)
            self._commit(lambda: self.table.add(rows))
        if changed:
            rows = self._rows(changed, columns)
            # One commit: a reader sees a video's old windows or its new ones.
            replace = (
                self.table.merge_insert(["path", "start"])
                .when_matched_update_all()
                .when_not_matched_insert_all()
                .when_not_matched_by_source_delete(_among("path", [video.file.name for video in changed]))
            )
            self._commit(lambda: replace.execute(rows))

    def move(self, names: Sequence[str], root: str) -> None:
        """Note that videos lie below another root now."""
        for part in _parts(names):
            self._commit(
                lambda part=part: self.table.update(where=_among("path", part), values={"root": root}),  # type: ignore[misc]
            )

    def rename(self, root: str, new: str, folder: str) -> None:
        """Name the videos of one root relative to another, in which it is ``folder``."""
        values = {"path": f"concat({_quoted(folder + '/')}, path)", "root": _quoted(new)}
        self._commit(
            lambda: self.table.update(where=f"root = {_quoted(root)}", values_sql=values),
        )

    def remove(self, names: Sequence[str]) -> None:
        """Remove videos."""
        for part in _parts(names):
            self._commit(
                lambda part=part: self.table.delete(_among("path", part)),  # type: ignore[misc]
            )

    def add_columns(self, fields: Iterable[pa.Field]) -> None:
        """Add columns of the user's that are not there yet, without values.

        Raises:
            ValueError: a column that is there with another type, or is one of the index's own.
        """
        new, there = [], self.columns
        for field in fields:
            if field.name in self.about.schema.names or field.name.startswith("_"):
                raise ValueError(
                    f"columns must have names of their own, got {field.name}, which the index itself uses; rename it"
                )
            if pa.types.is_null(field.type):
                continue  # without a value there is no type: later values may bring one
            if field.name not in there.names:
                new.append(field)
            elif there.field(field.name).type != field.type:
                raise ValueError(
                    f"the column {field.name} must be of type {there.field(field.name).type}, as in {self.uri}, got "
                    f"{field.type}; convert its values or name it otherwise"
                )
        if new:
            self._commit(lambda: self.table.add_columns(new))

    def set_columns(self, columns: Mapping[str, Mapping[str, Any]]) -> None:
        """Replace the user's values of videos that are in the index, in one commit; ``columns`` maps path to values."""
        given = {name for values in columns.values() for name in values}
        names = [name for name in self.columns.names if name in given]
        if not names:
            return
        fields = [pa.field("path", pa.string()), *(self.columns.field(name) for name in names)]
        rows = pa.Table.from_pylist([{**values, "path": path} for path, values in columns.items()], pa.schema(fields))
        update = self.table.merge_insert("path").when_matched_update_all()
        self._commit(lambda: update.execute(rows))

    def finish(self) -> None:
        """Index the vectors once there are more than ``EXACT`` windows; merge small files once there are many.

        Merging copies rows. The copied files stay for an hour, since another process may still read them.
        """
        self.refresh()
        if self.count() > EXACT and not self.table.list_indices():
            self._commit(lambda: self.table.create_index("vector", config=IvfPq(distance_type="cosine")))
        with plain_errors(f"the index {self.uri} cannot be read"):
            small = self.table.stats()["fragment_stats"]["num_small_fragments"]
        if small > FILES:
            self._commit(lambda: self.table.optimize(cleanup_older_than=timedelta(hours=1)))

    def _commit(self, write: Callable[[], object]) -> None:
        """Call ``write``, which commits; repeat it on the newest version if another process's commit came between.

        Raises:
            OSError: it failed for another reason, a full disk for example; the table is as it was.
        """
        for attempt in range(ATTEMPTS):
            try:
                write()
                return
            except (RuntimeError, ValueError, OSError) as error:
                if "conflict" not in str(error).lower() or attempt + 1 == ATTEMPTS:
                    raise OSError(f"the index {self.uri} could not be written: {first_sentence(error)}") from error
            time.sleep(random.uniform(0.05, 0.2) * 2**attempt)
            self.refresh()

    def _arrow(self, query: Any) -> pa.Table:
        with plain_errors(f"the index {self.uri} cannot be read"):
            return query.to_arrow()

    def _rows(self, videos: Sequence[Encoded], columns: Mapping[str, Mapping[str, Any]]) -> pa.Table:
        per_window = [video for video in videos for _ in video.spans]
        arrays = {
            "path": [video.file.name for video in per_window],
            "root": [video.file.root for video in per_window],
            "start": [span[0] for video in videos for span in video.spans],
            "end": [span[1] for video in videos for span in video.spans],
            "vector": _list(torch.cat([video.vectors for video in videos])),
            "tokens": _list(torch.cat([video.tokens for video in videos]).flatten(1)),
            "frames": torch.cat([video.counts for video in videos]).numpy(),
            "interval": [video.interval for video in per_window],
            "thumbnails": [pictures for video in videos for pictures in video.thumbnails],
            "hash": [video.state.digest for video in per_window],
            "size": [video.state.size for video in per_window],
            "modified": [video.state.modified for video in per_window],
            **{
                name: [columns.get(video.file.name, {}).get(name) for video in per_window]
                for name in self.columns.names
            },
        }
        if self.about.weighted:
            arrays["weights"] = _list(torch.cat([video.weights for video in videos if video.weights is not None]))
        schema = pa.schema(list(self.table.schema))
        return pa.table([pa.array(arrays[f.name], f.type) for f in schema], schema)


def _read_about(uri: str, schema: pa.Schema) -> About:
    try:
        found = json.loads((schema.metadata or {})[KEY])
        written = found["format"]
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(
            f"{uri} must be an index of drl-fast, got another LanceDB table; name another folder"
        ) from error
    if written != FORMAT:
        raise ValueError(f"{uri} must be of the format {FORMAT!r}, got {written!r}; index the videos into a new folder")
    try:
        return About(**found)
    except TypeError as error:
        raise ValueError(f"{uri} must describe its model, got: {error}; index the videos into a new folder") from error


def _among(column: str, names: Sequence[str]) -> str:
    return f"{column} IN ({', '.join(map(_quoted, names))})"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _parts(names: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(names), NAMES):
        yield names[start : start + NAMES]


def _list(x: Tensor) -> pa.Array:
    """Return rows of numbers as a list of fixed size."""
    return pa.FixedSizeListArray.from_arrays(pa.array(x.contiguous().view(-1).numpy()), x.shape[1])


def _flat(column: pa.Array) -> np.ndarray:
    return np.array(column.flatten().to_numpy(zero_copy_only=True))
