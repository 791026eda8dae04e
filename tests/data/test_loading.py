"""Items, batches and videos from worker processes: contents, order and failures."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from drl_fast.data.loading import (
    Tokenizer,
    Unreadable,
    VideoCaptions,
    collate,
    pair_loader,
    tokenize,
    video_loader,
)
from drl_fast.data.split import Split
from drl_fast.data.video import Sampling, read_video
from tests.clips import cut, grey, noise, solid, write_audio, write_video

SAMPLING = Sampling(rate=8, max_frames=4, size=32)
WORDS = 8


def words(texts: list[str], context_length: int) -> Tensor:
    """Tokenize like open_clip: start 1, a number per word, end 99, zeros."""
    ids = torch.zeros(len(texts), context_length, dtype=torch.int64)
    for row, text in zip(ids, texts, strict=True):
        numbers = [1, *[len(word) + 1 for word in text.split()][: context_length - 2], 99]
        row[: len(numbers)] = torch.tensor(numbers)
    return ids


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """Write four grey clips of 2, 3, 4 and 5 frames, and three unreadable files."""
    folder = tmp_path_factory.mktemp("clips")
    paths = [write_video(folder / f"{n}.mp4", [solid((grey(5 * n),) * 3)] * (n + 2)) for n in range(4)]
    paths += [folder / "empty.mp4", folder / "sound.mp4", folder / "cut.mp4"]
    paths[4].write_bytes(b"")
    write_audio(paths[5])
    cut(write_video(paths[6], noise(24), index_first=True), 0.5)
    names = tuple(f"id{n}" for n in range(7))
    captions = tuple(f"caption {'x' * n}" for n in range(9))
    return Split("folder", "train", captions, (3, 2, 1, 0, 4, 5, 6, 0, 3), tuple(paths), names)


@pytest.fixture
def pairs(split: Split) -> VideoCaptions:
    return VideoCaptions(split, words, max_words=WORDS, sampling=SAMPLING)


def levels(frames: Tensor) -> int:
    """Return the number of the clip in ``split`` that these frames show."""
    return round((float(frames.double().mean()) - grey(0)) / (grey(5) - grey(0)))


def test_item(pairs: VideoCaptions, split: Split) -> None:
    assert len(pairs) == 9
    item = pairs[1]
    assert isinstance(item, dict)
    assert item["text_ids"].tolist() == [1, 8, 2, 99, 0, 0, 0, 0]
    assert item["video"].shape == (4, 3, 32, 32)
    assert item["video"].dtype == torch.uint8
    assert item["video_mask"].tolist() == [True] * 4
    assert pairs[2]["video_mask"].tolist() == [True] * 3 + [False]  # type: ignore[call-overload]
    assert item["owner"].shape == ()
    assert item["owner"].dtype == torch.int64
    assert item["owner"] == 2
    assert torch.equal(item["video"], read_video(split.videos[2], SAMPLING)[0])


def test_unreadable_items_are_named(pairs: VideoCaptions, split: Split) -> None:
    for index, reason in ((4, "empty file"), (5, "must hold a video stream"), (6, "must be a whole video")):
        item = pairs[index]
        assert isinstance(item, Unreadable)
        assert item.name == f"id{index}"
        assert reason in item.reason
        assert str(split.videos[index]) in item.reason


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_in_order(pairs: VideoCaptions, workers: int) -> None:
    """Batches leave out unreadable videos and report them; a batch with only unreadable videos is None."""
    batches = [[0, 1, 4], [3], [5, 6], [8, 7, 2, 0], [1, 1]]
    loader = pair_loader(pairs, batches, workers=workers)
    assert len(loader) == len(batches)
    got = list(loader)
    assert [[u.name for u in unreadable] for _, unreadable in got] == [["id4"], [], ["id5", "id6"], [], []]
    owners = [None if batch is None else batch["owner"].tolist() for batch, _ in got]
    assert owners == [[3, 2], [0], None, [3, 0, 1, 3], [2, 2]]
    for batch, _ in got:
        if batch is not None:
            assert list(batch) == ["text_ids", "video", "video_mask", "owner"]
            assert batch["video"].shape[1:] == (4, 3, 32, 32)
            assert [levels(v[m]) for v, m in zip(batch["video"], batch["video_mask"], strict=True)] == batch[
                "owner"
            ].tolist()
    again = list(loader)
    assert [unreadable for _, unreadable in again] == [unreadable for _, unreadable in got]
    for (first, _), (second, _) in zip(got, again, strict=True):
        assert (first is None) == (second is None)
        if first is not None and second is not None:
            assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("workers", [0, 2])
def test_videos_in_order(split: Split, workers: int) -> None:
    """Only real frames are returned."""
    order = [2, 4, 0, 3, 1]
    loader = video_loader([split.videos[i] for i in order], SAMPLING, workers=workers)
    got = list(loader)
    assert len(loader) == len(got) == 5
    assert isinstance(got[1], Unreadable)
    assert got[1].name == str(split.videos[4])
    frames = [item for item in got if isinstance(item, Tensor)]
    assert [len(x) for x in frames] == [4, 2, 4, 3]
    assert [levels(x) for x in frames] == [2, 0, 3, 1]
    assert all(x.shape[1:] == (3, 32, 32) and x.dtype == torch.uint8 for x in frames)


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_to_load(pairs: VideoCaptions, workers: int) -> None:
    assert list(pair_loader(pairs, [], workers=workers)) == []
    assert list(video_loader([], SAMPLING, workers=workers)) == []


def test_the_callers_random_state_is_unchanged(pairs: VideoCaptions) -> None:
    before = torch.get_rng_state()
    list(pair_loader(pairs, [[0], [1]], workers=0))
    list(pair_loader(pairs, [[0], [1]], workers=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_collate_of_nothing() -> None:
    assert collate([]) == (None, [])
    gone = Unreadable("a", "b")
    assert collate([gone]) == (None, [gone])


def test_workers_end_with_the_loop(split: Split) -> None:
    """After an early exit, and after an error in a worker, whose message is kept."""
    items: Iterator = iter(video_loader([split.videos[0]] * 20, SAMPLING, workers=2))
    next(items)
    assert len(multiprocessing.active_children()) == 2
    items.close()  # type: ignore[attr-defined]
    assert multiprocessing.active_children() == []
    with pytest.raises(RuntimeError, match="of another kind"):
        list(pair_loader(Broken(), [[0]], workers=1))
    assert multiprocessing.active_children() == []


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_killed_worker(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next item raises one error; nothing is raised at the moment of the death."""
    monkeypatch.setattr("torch.utils.data._utils.signal_handling._SIGCHLD_handler_set", False)
    handler = signal.getsignal(signal.SIGCHLD)
    items = iter(video_loader([split.videos[0]] * 200, SAMPLING, workers=2))
    next(items)
    victim = multiprocessing.active_children()[0]
    os.kill(victim.pid or 0, signal.SIGKILL)
    victim.join()
    with pytest.raises(RuntimeError, match=r"was killed, most likely because memory .* fewer than workers=2"):
        list(items)
    assert multiprocessing.active_children() == []
    assert signal.getsignal(signal.SIGCHLD) == handler


class Broken(torch.utils.data.Dataset):
    def __getitem__(self, index: int) -> object:
        raise RuntimeError("of another kind")


class Worker(torch.utils.data.Dataset):
    """Return the state of a worker process."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        deaf = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        return {"deaf": torch.tensor(deaf), "threads": torch.tensor(torch.get_num_threads())}


def test_workers_ignore_interrupts_and_have_one_thread() -> None:
    torch.set_num_threads(2)
    for batch, _ in pair_loader(Worker(), [[0], [1]], workers=2):
        assert batch is not None
        assert batch["deaf"].tolist() == [True]
        assert batch["threads"].tolist() == [1]


INTERRUPTED = """
import signal, sys
# Started in the background by a shell script, processes ignore Ctrl-C: undo that.
signal.signal(signal.SIGINT, signal.default_int_handler)
from drl_fast.data.loading import video_loader
from drl_fast.data.video import Sampling
try:
    for _ in video_loader([sys.argv[1]] * 100000, Sampling(size=32), workers=2):
        print("going", flush=True)
except KeyboardInterrupt:
    print("stopped", flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="no process groups here")
def test_interrupt_is_quiet(split: Split) -> None:
    """Ctrl-C reaches workers too; they print nothing."""
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(split.videos[0])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "going\n"
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert out.splitlines()[-1] == "stopped"
    assert err == ""
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("workers", "error"), [(-1, ValueError), (1.5, TypeError), (True, TypeError), (None, TypeError)]
)
def test_bad_workers(pairs: VideoCaptions, workers: int, error: type[Exception]) -> None:
    message = r"workers must be an integer >= 0, got .*; 0 decodes in this process"
    with pytest.raises(error, match=message):
        pair_loader(pairs, [[0]], workers=workers)
    with pytest.raises(error, match=message):
        video_loader([], SAMPLING, workers=workers)


@pytest.mark.parametrize("tokenizer", ["words", "open_clip"])
def test_tokenize_keeps_the_end(tokenizer: str) -> None:
    """A long text keeps its start, the words that fit, and the end token; a short one is padded with zeros."""
    encode: Tokenizer = words
    if tokenizer == "open_clip":
        encode = pytest.importorskip("open_clip").SimpleTokenizer()
    ids = tokenize(encode, ["a dog and a cat and a bird and a fish", "a dog"], 6)
    assert ids.shape == (2, 6)
    assert ids.dtype == torch.int64
    start, end = ids[1, 0], ids[1, 3]
    assert ids[:, 0].tolist() == [start, start]
    assert ids[0, -1] == end == ids.max()
    assert ids[0, :3].tolist() == ids[1, :3].tolist()
    assert (ids[0, :-1] != end).all()
    assert ids[1, 4:].tolist() == [0, 0]
    assert tokenize(encode, [], 6).shape == (0, 6)


def test_tokenize_errors() -> None:
    with pytest.raises(ValueError, match="max_words must be at least 3: start, a word, end; got 2"):
        tokenize(words, ["a"], 2)
    with pytest.raises(TypeError, match="max_words must be a positive integer"):
        tokenize(words, ["a"], "32")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"tokenizer must give ids of shape \(1, 6\), got a .* of shape \(1, 7\)"):
        tokenize(lambda texts, context_length: words(texts, context_length + 1), ["a"], 6)
