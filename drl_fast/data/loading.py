"""Batches of videos and captions, decoded in worker processes, in a fixed order."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ..validation import describe, non_negative_int, positive_int
from .split import Split
from .video import Sampling, read_video

T = TypeVar("T")
# Tokenizers of open_clip: (texts, context_length=n) -> ids (texts, n).
Tokenizer: TypeAlias = Callable[..., Tensor]
Batch: TypeAlias = dict[str, Tensor]


# Captions tokenized at once when those that are cut are counted.
COUNTED = 4096


class Unreadable(NamedTuple):
    """A video that cannot be decoded."""

    name: str
    """Its id in the annotations, or its path."""
    reason: str
    """One line: the path, what is wrong, a remedy."""


def tokenize(tokenizer: Tokenizer, captions: Sequence[str], max_words: int) -> Tensor:
    """Tokenize captions to ids (A, max_words) int64, padding after the end token; a cut caption keeps its end token.

    Raises:
        ValueError: ``max_words`` below 3 (start, a word, end), or a tokenizer that ignores it.
    """
    max_words = positive_int("max_words", max_words)
    if max_words < 3:
        raise ValueError(f"max_words must be at least 3: start, a word, end; got {max_words}; DRL uses 32")
    ids = tokenizer(list(captions), context_length=max_words)
    if ids.shape != (len(captions), max_words):
        raise ValueError(
            f"tokenizer must give ids of shape {(len(captions), max_words)}, got {describe(ids)}; use open_clip's"
        )
    return ids.to(torch.int64)


def count_cut(tokenizer: Tokenizer, captions: Sequence[str], max_words: int) -> int:
    """Count the captions that have more than ``max_words`` tokens, start and end included."""
    own = getattr(tokenizer, "tokenizer", None)  # Hugging Face's, inside open_clip's
    cut, padding = 0, getattr(own, "pad_token_id", None) or 0
    # Where the end token is padding too (SigLIP) or becomes it (CLIPA), only the token before it tells of a cut.
    hidden = padding == getattr(own, "eos_token_id", None) or getattr(tokenizer, "strip_sep_token", False)
    first = max_words - 1 if hidden else max_words
    for start in range(0, len(captions), COUNTED):
        ids = tokenizer(list(captions[start : start + COUNTED]), context_length=max_words + 1)
        cut += int((ids[:, first] != padding).sum())
    return cut


class VideoCaptions(Dataset):
    """A split's captions, each with its video; one item per caption.

    Args:
        split: see :func:`drl_fast.data.datasets.load_split`.
        tokenizer: open_clip's, ``tokenizer(texts, context_length=n) -> ids``.
        max_words: tokens per caption, start and end included.
        sampling: which frames are used.

    An item is a dict of ``text_ids`` (max_words,) int64, ``video`` (max_frames, 3, size, size) uint8, ``video_mask``
    (max_frames,) bool and ``owner`` () int64, the video's index in the split; or an :class:`Unreadable`.
    """

    def __init__(self, split: Split, tokenizer: Tokenizer, *, max_words: int, sampling: Sampling) -> None:
        self.split, self.tokenizer, self.max_words, self.sampling = split, tokenizer, max_words, sampling

    def __len__(self) -> int:
        return len(self.split.captions)

    def __getitem__(self, index: int) -> Batch | Unreadable:
        owner = self.split.owner[index]
        decoded = _decode(self.split.names[owner], self.split.videos[owner], self.sampling)
        if isinstance(decoded, Unreadable):
            return decoded
        ids = tokenize(self.tokenizer, [self.split.captions[index]], self.max_words)[0]
        return {"text_ids": ids, "video": decoded[0], "video_mask": decoded[1], "owner": torch.tensor(owner)}


class CaptionsOfVideos(VideoCaptions):
    """The same captions, asked for by tuples of captions of one video, which is decoded once.

    An item is a dict of ``text_ids`` (captions, max_words), ``video``, ``video_mask`` and ``owner`` as above; or an
    :class:`Unreadable`.
    """

    def __getitem__(self, index: Sequence[int]) -> Batch | Unreadable:  # type: ignore[override]
        owner = self.split.owner[index[0]]
        decoded = _decode(self.split.names[owner], self.split.videos[owner], self.sampling)
        if isinstance(decoded, Unreadable):
            return decoded
        ids = tokenize(self.tokenizer, [self.split.captions[i] for i in index], self.max_words)
        return {"text_ids": ids, "video": decoded[0], "video_mask": decoded[1], "owner": torch.tensor(owner)}

    def groups(self, batch: Sequence[int]) -> list[tuple[int, ...]]:
        """Cut a batch's captions into tuples, one for each video, in the order in which the videos first appear."""
        found: dict[int, list[int]] = {}
        for i in batch:
            found.setdefault(self.split.owner[i], []).append(i)
        return [tuple(captions) for captions in found.values()]


class _Videos(Dataset):
    def __init__(self, paths: Sequence[Path], sampling: Sampling) -> None:
        self.paths, self.sampling = paths, sampling

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor | Unreadable:
        path = self.paths[index]
        decoded = _decode(str(path), path, self.sampling)
        return decoded if isinstance(decoded, Unreadable) else decoded[0][decoded[1]]


def _decode(name: str, path: Path, sampling: Sampling) -> tuple[Tensor, Tensor] | Unreadable:
    try:
        # A worker has one core; its own decoding threads would compete with the other workers.
        return read_video(path, sampling, threads=0 if get_worker_info() is None else 1)
    except ValueError as error:
        return Unreadable(name, str(error))


def collate(items: Sequence[Batch | Unreadable]) -> tuple[Batch | None, list[Unreadable]]:
    """Stack the readable items to a batch (None if there are none), and return the unreadable ones beside it."""
    read = [item for item in items if not isinstance(item, Unreadable)]
    batch = {key: torch.stack([item[key] for item in read]) for key in read[0]} if read else None
    return batch, [item for item in items if isinstance(item, Unreadable)]


def collate_shared(items: Sequence[Batch | Unreadable]) -> tuple[Batch | None, list[Unreadable]]:
    """Join items of :class:`CaptionsOfVideos`.

    ``video_of`` (captions,) is the row of each caption's video, ``owner`` (captions,) the video's index in the split.
    """
    read = [item for item in items if not isinstance(item, Unreadable)]
    unreadable = [item for item in items if isinstance(item, Unreadable)]
    if not read:
        return None, unreadable
    captions = torch.tensor([len(item["text_ids"]) for item in read])
    return {
        "text_ids": torch.cat([item["text_ids"] for item in read]),
        "video": torch.stack([item["video"] for item in read]),
        "video_mask": torch.stack([item["video_mask"] for item in read]),
        "video_of": torch.arange(len(read)).repeat_interleave(captions),
        "owner": torch.stack([item["owner"] for item in read]).repeat_interleave(captions),
    }, unreadable


def pair_loader(
    pairs: Dataset, batches: Sequence[Sequence[Any]], *, workers: int, pin: bool = False
) -> Loader[tuple[Batch | None, list[Unreadable]]]:
    """Load each batch of ``pairs``, as :func:`collate` or :func:`collate_shared` returns it, in order.

    Args:
        pairs: a :class:`VideoCaptions` or a :class:`CaptionsOfVideos`, or a data set with such items.
        batches: each batch's indices into ``pairs``.
        workers: decoding processes, each with a batch at a time; 0 decodes in this process.
        pin: use page-locked memory, which copies to a GPU faster.

    Raises:
        RuntimeError: while iterating, a worker was killed.
    """
    sampler = [list(batch) for batch in batches]
    join = collate_shared if isinstance(pairs, CaptionsOfVideos) else collate
    return Loader(DataLoader(pairs, batch_sampler=sampler, collate_fn=join, pin_memory=pin, **_processes(workers)))


def video_loader(paths: Sequence[Path], sampling: Sampling, *, workers: int) -> Loader[Tensor | Unreadable]:
    """Load each video's real frames (n, 3, size, size) uint8, or an :class:`Unreadable`, in the order of ``paths``.

    Args:
        workers: decoding processes, each with a video at a time; 0 decodes in this process.

    Raises:
        RuntimeError: while iterating, a worker was killed.
    """
    return Loader(DataLoader(_Videos(paths, sampling), batch_size=None, **_processes(workers)))


def _processes(workers: int) -> dict[str, Any]:
    workers = non_negative_int("workers", workers, "0 decodes in this process; otherwise use one per core")
    options: dict[str, Any] = {
        "num_workers": workers,
        # DataLoader draws a seed although nothing is random; this keeps it off the caller's generator.
        "generator": torch.Generator().manual_seed(0),
    }
    if workers > 0:
        options["worker_init_fn"] = _leave_signals_to_the_parent
        # Every loader starts its own workers. Forked ones deliver after 0.2 s, spawned ones after 6 s, when each has
        # imported torch and received MSR-VTT's 180,000 captions. Forking is safe despite the parent's CUDA and threads:
        # workers use neither, and torch and decoder have one thread there.
        if sys.platform == "linux":
            options["multiprocessing_context"] = "fork"
    return options


def _leave_signals_to_the_parent(worker: int) -> None:
    # Ctrl-C reaches every process of the terminal, a scheduler's SIGTERM every process of the job. The parent finishes
    # its step, which may need another batch, and then ends its workers.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # If the parent stops while a tensor is handed over, the worker's connection breaks: no traceback for that.
    sys.excepthook = _hide_broken_connections


def _hide_broken_connections(
    kind: type[BaseException], error: BaseException, traceback: types.TracebackType | None
) -> None:
    if not issubclass(kind, EOFError | ConnectionError):
        sys.__excepthook__(kind, error, traceback)


class Loader(Generic[T]):
    """A DataLoader whose error says why a worker died. Every iteration starts its own workers."""

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[T]:
        with _no_signal_handler():
            items = iter(self.loader)
        try:
            yield from items
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            raise RuntimeError(
                "a process that decodes videos was killed, most likely because memory or shared memory (/dev/shm) ran "
                f"out; use fewer than workers={self.loader.num_workers}, smaller batches, or more shared memory "
                "(docker run --shm-size=8g)"
            ) from error
        finally:
            # Do not wait for its destructor: a traceback may keep it alive, and the next workers would inherit it.
            if self.loader.num_workers > 0:
                items._shutdown_workers()  # type: ignore[attr-defined]


@contextlib.contextmanager
def _no_signal_handler() -> Iterator[None]:
    """Undo DataLoader's SIGCHLD handler, which raises anywhere in the main thread, also within an optimizer's step.

    Without it a worker's death is noticed when the next item is requested.
    """
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGCHLD, before)
