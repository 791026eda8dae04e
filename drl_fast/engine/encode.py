"""Encode the captions and the videos of a data set once, into a store; resumable, on one process or many."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from ..data.feature_store import ABOUT, LOCK, SIDES, About, Contents, Writer, begin, done_chunks, write_about
from ..data.loading import Tokenizer, Unreadable, tokenize, video_loader
from ..data.video import Sampling
from ..model import towers
from ..model.drl import DRL
from .features import device_of, encode_frames
from .precision import Autocast
from .processes import Processes

# Videos per write; a kill loses at most this many per process.
VIDEOS = 16
# CLIP's text blocks that a head starts from; the temporal module has four.
BLOCKS = 4

Tokens = Tensor | Unreadable
# Yields the tokens (count, width) of the items of each chunk, in order.
Encode = Callable[[Sequence[range]], Iterator[list[Tokens]]]


def write_store(
    folder: Path,
    about: About,
    contents: Contents,
    start: bytes,
    encoders: dict[str, Encode],
    processes: Processes,
    *,
    on_progress: Callable[[str, int, int], None],
    on_unreadable: Callable[[Unreadable], None],
) -> None:
    """Write a store, or finish one that was stopped; every process writes a shard of its own.

    Args:
        start: see :func:`drl_fast.data.feature_store.begin`.
        encoders: by side.
        on_progress: called with ``"text"`` or ``"video"``, items done and all items; of this process alone.
        on_unreadable: called for a video that cannot be decoded.

    Raises:
        ValueError: a folder with something else, another encoding in it, or tokens that cannot be stored; the item is
            named.
        OSError: files that cannot be written.
    """
    lock = FileLock(folder / LOCK)
    if not processes.acquire(lock):
        raise ValueError(
            f"out must be a folder of one encoding at a time, got {folder}, where another one runs; wait for it"
        )
    try:
        if processes.first:
            begin(folder, about, contents, start)
        processes.wait()
        names = {"text": contents.texts, "video": contents.videos}
        for name in SIDES:
            _write_side(folder, about, name, names[name], encoders[name], processes, on_progress, on_unreadable)
        if processes.first:
            for name in SIDES:
                lacking = len(about.side(name).chunks()) - len(done_chunks(folder, name, about.side(name)))
                if lacking:
                    raise ValueError(
                        f"out must be a folder that all processes share, got {folder} without {lacking} chunks of "
                        f"{name}; repeat the command"
                    )
            write_about(folder, replace(about, finished=True))
    finally:
        lock.release()
        if processes.first and not (folder / ABOUT).exists():  # begin refused the folder
            (folder / LOCK).unlink(missing_ok=True)


def _write_side(
    folder: Path,
    about: About,
    name: str,
    names: Sequence[str],
    encode: Encode,
    processes: Processes,
    on_progress: Callable[[str, int, int], None],
    on_unreadable: Callable[[Unreadable], None],
) -> None:
    side = about.side(name)
    chunks, known = side.chunks(), done_chunks(folder, name, side)
    missing = [number for number in range(len(chunks)) if number not in known]
    processes.wait()  # all processes have looked before the first one writes
    own = [chunks[number] for number in missing[processes.rank :: processes.size]]
    total = side.items // processes.size if processes.size > 1 else side.items
    done = max(0, total - sum(map(len, own)))
    on_progress(name, done, total)
    writer = Writer(folder, name, side, about.dtype, processes.rank)
    try:
        empty = torch.zeros(0, side.width)
        for items, found in zip(own, encode(own), strict=True):
            for video in found:
                if isinstance(video, Unreadable):
                    on_unreadable(video)
            tokens = [empty if isinstance(x, Unreadable) else x for x in found]
            writer.append(items, tokens, [names[item] for item in items])
            done += len(items)
            on_progress(name, min(done, total), total)
    finally:
        writer.close()
    processes.wait()


def encode_captions(model: DRL, tokenizer: Tokenizer, texts: Sequence[str], words: int, context: Autocast) -> Encode:
    """Return an encoder of captions, each cut to ``words`` tokens."""

    def encode(chunks: Sequence[range]) -> Iterator[list[Tokens]]:
        model.eval()
        for items in chunks:
            ids = tokenize(tokenizer, [texts[item] for item in items], words)
            with torch.no_grad(), context():
                tokens, mask = model.encode_text(ids.to(device_of(model)))
            yield [row[real] for row, real in zip(tokens.float().cpu(), mask.cpu(), strict=True)]

    return encode


def encode_videos(
    model: DRL, paths: Sequence[Path], names: Sequence[str], sampling: Sampling, workers: int, context: Autocast
) -> Encode:
    """Return an encoder of video files: one token for each frame."""

    def encode(chunks: Sequence[range]) -> Iterator[list[Tokens]]:
        model.eval()
        items = [item for chunk in chunks for item in chunk]
        if not items:
            return
        loader = video_loader([paths[item] for item in items], sampling, workers=workers)
        stream = encode_frames(model, loader, context)
        try:
            for chunk in chunks:
                with torch.no_grad():
                    found = [next(stream) for _ in chunk]
                yield [
                    x._replace(name=names[item]) if isinstance(x, Unreadable) else x.float()
                    for item, x in zip(chunk, found, strict=True)
                ]
        finally:
            stream.close()  # ends the processes that decode

    return encode


def head_start(model: DRL) -> dict[str, Tensor]:
    """Return what a head starts from, as :meth:`drl_fast.data.feature_store.FeatureStore.start` describes it."""
    start, clip = towers.start(model.clip), model.clip
    found, positions = {"logit_scale": clip.logit_scale}, model.sizes.max_positions
    if clip.logit_bias is not None:
        found["logit_bias"] = clip.logit_bias
    if start is not None:
        found["positional_embedding"] = start.positional_embedding
        found |= {f"blocks.{name}": x for name, x in start.blocks.items() if int(name.partition(".")[0]) < BLOCKS}
    if start is None or len(start.positional_embedding) != positions:
        found["max_positions"] = torch.tensor(positions)
    return found
