"""Videos and captions as a model takes them, decoded in worker processes in a fixed order."""

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

from ..validation import describe, positive_int
from .split import Split
from .video import Sampling, read_video

T = TypeVar("T")
# Tokenizers of open_clip: (texts, context_length=n) -> ids (texts, n).
Tokenizer: TypeAlias = Callable[..., Tensor]
Batch: TypeAlias = dict[str, Tensor]


class Unreadable(NamedTuple):
    """A video that gives no frame."""

    name: str
    """Its id in the annotations, or its path where there is none."""
    reason: str
    """One line: the path, what is wrong with it, a remedy."""


def tokenize(tokenizer: Tokenizer, captions: Sequence[str], max_words: int) -> Tensor:
    """Token ids (A, max_words) int64, zeros behind the end token; a longer caption is cut, its end token kept.

    Raises:
        ValueError: a ``max_words`` that has no room for start, end and a word between them, or a tokenizer that does
            not keep to it.
    """
    if positive_int("max_words", max_words) < 3:
        raise ValueError(f"max_words must be at least 3: start, a word, end; got {max_words}; DRL uses 32")
    ids = tokenizer(list(captions), context_length=max_words)
    if ids.shape != (len(captions), max_words):
        raise ValueError(
            f"tokenizer must give ids of shape {(len(captions), max_words)}, got {describe(ids)}; use open_clip's"
        )
    return ids.to(torch.int64)


class VideoCaptions(Dataset):
    """A split's captions, each with its video: one item a caption.

    Args:
        split: see :func:`drl_fast.data.datasets.load_split`.
        tokenizer: open_clip's, ``tokenizer(texts, context_length=n) -> ids``.
        max_words: tokens a caption, start and end included.
        sampling: which frames.

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
        # A worker has a core to itself: threads of its own would take the others'.
        return read_video(path, sampling, threads=0 if get_worker_info() is None else 1)
    except ValueError as error:
        return Unreadable(name, str(error))


def collate(items: Sequence[Batch | Unreadable]) -> tuple[Batch | None, list[Unreadable]]:
    """Stack what could be read: the batch (None where nothing could), and what could not."""
    read = [item for item in items if not isinstance(item, Unreadable)]
    batch = {key: torch.stack([item[key] for item in read]) for key in read[0]} if read else None
    return batch, [item for item in items if isinstance(item, Unreadable)]


def pair_loader(
    pairs: Dataset, batches: Sequence[Sequence[int]], *, workers: int, pin: bool = False
) -> Loader[tuple[Batch | None, list[Unreadable]]]:
    """What :func:`collate` makes of each batch of ``pairs``, in the order of ``batches``.

    Args:
        pairs: a :class:`VideoCaptions`, or a data set with items of that form.
        batches: each batch's indices into ``pairs``.
        workers: processes that decode, each a batch at a time; 0 decodes in this one.
        pin: put batches in page-locked memory, from where they reach a GPU faster.

    Raises:
        RuntimeError: while iterating, a worker was killed.
    """
    sampler = [list(batch) for batch in batches]
    return Loader(DataLoader(pairs, batch_sampler=sampler, collate_fn=collate, pin_memory=pin, **_processes(workers)))


def video_loader(paths: Sequence[Path], sampling: Sampling, *, workers: int) -> Loader[Tensor | Unreadable]:
    """Each video's real frames (n, 3, size, size) uint8, or an :class:`Unreadable`, in the order of ``paths``.

    Args:
        workers: processes that decode, each a video at a time; 0 decodes in this one.

    Raises:
        RuntimeError: while iterating, a worker was killed.
    """
    return Loader(DataLoader(_Videos(paths, sampling), batch_size=None, collate_fn=_as_it_is, **_processes(workers)))


def _as_it_is(item: T) -> T:
    return item


def _processes(workers: int) -> dict[str, Any]:
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 0:
        raise ValueError(
            f"workers must be a number of processes, 0 for none, got {describe(workers)}; one a core serves"
        )
    options: dict[str, Any] = {
        "num_workers": workers,
        # DataLoader draws a seed even where nothing is random; not from the caller's generator.
        "generator": torch.Generator().manual_seed(0),
    }
    if workers > 0:
        options["worker_init_fn"] = _leave_signals_to_the_parent
        # Workers start anew with every loader. Forked, they deliver after 0.2 s; spawned, or from a server, after 6 s:
        # each imports torch then and is sent MSR-VTT's 180,000 captions. The parent's CUDA and threads do no harm to a
        # fork that uses neither: its torch has one thread, and so has its decoder.
        if sys.platform == "linux":
            options["multiprocessing_context"] = "fork"
    return options


def _leave_signals_to_the_parent(worker: int) -> None:
    # Ctrl-C reaches every process of the terminal, and a scheduler's SIGTERM those of a job. The parent takes its step
    # to the end, for which it may want another batch, and then ends its workers.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # And so is one of the thread that hands tensors over, when the parent stops halfway through taking one.
    sys.excepthook = _unless_the_parent_left


def _unless_the_parent_left(
    kind: type[BaseException], error: BaseException, traceback: types.TracebackType | None
) -> None:
    if not issubclass(kind, EOFError | ConnectionError):
        sys.__excepthook__(kind, error, traceback)


class Loader(Generic[T]):
    """A DataLoader that says in one sentence why a worker is gone. Iterating starts its workers anew each time."""

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
                "a process that decodes videos was killed, most likely for want of memory or of shared memory "
                f"(/dev/shm); use fewer than workers={self.loader.num_workers}, smaller batches, or in a container "
                "more shared memory (docker run --shm-size=8g)"
            ) from error
        finally:
            # Not left to its destructor: a traceback may keep it alive, and the next workers would inherit it.
            if self.loader.num_workers > 0:
                items._shutdown_workers()  # type: ignore[attr-defined]


@contextlib.contextmanager
def _no_signal_handler() -> Iterator[None]:
    """Undo DataLoader's handler of a child's death.

    It raises wherever the main thread happens to be: in the midst of an optimizer's step as well. The death is seen
    without it, when the next item is asked for.
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
