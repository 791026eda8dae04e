"""The store of tokens: what is read is what was written, after kills too, and damage is named."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from drl_fast.data import feature_store
from drl_fast.data.feature_store import (
    About,
    Contents,
    FeatureStore,
    Side,
    Writer,
    begin,
    done_chunks,
    start_bytes,
    write_about,
)
from drl_fast.data.split import Split

WIDTH, TEXTS, VIDEOS = 24, 23, 11
COUNTS = {"text": [1 + 5 * item % 9 for item in range(TEXTS)], "video": [item % 4 for item in range(VIDEOS)]}
# A video without tokens could not be decoded.
ABSENT = [item for item, count in enumerate(COUNTS["video"]) if count == 0]


def tokens_of(side: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(side))
    return [torch.randn(count, WIDTH, generator=generator) for count in COUNTS[side]]


def split_of(part: str, videos: Sequence[int]) -> Split:
    """Two captions a video, of the videos with these numbers."""
    captions = tuple(f"caption {number}" for video in videos for number in (2 * video, 2 * video + 1))
    paths = tuple(Path(f"/videos/v{video}.mp4") for video in videos)
    owner = tuple(place for place in range(len(videos)) for _ in range(2))
    return Split("folder", part, captions, owner, paths, tuple(f"v{video}" for video in videos), missing=("gone",))


SPLITS = {"train": split_of("train", range(8)), "test": split_of("test", range(7, 11))}
CONTENTS = Contents.of(SPLITS)
START, START_HASH = start_bytes({"logit_scale": torch.tensor(2.5)})


def about_of(dtype: str = "fp32") -> About:
    sides = {
        "text": Side(len(CONTENTS.texts), WIDTH, 4, 9, {"clip": "toy", "weights": "1"}),
        "video": Side(len(CONTENTS.videos), WIDTH, 3, 4, {"clip": "toy", "weights": "2"}),
    }
    inputs = {"max_words": 9, "rate": 1.0, "max_frames": 4, "seconds": None}
    return About("folder", dtype, "fp32", inputs, CONTENTS.digest(), START_HASH, **sides)


def fill(folder: Path, dtype: str = "fp32", on_chunk: Callable[[], object] = lambda: None) -> int:
    """Write what the store lacks; return how many chunks that was."""
    about, written = about_of(dtype), 0
    begin(folder, about, CONTENTS, START)
    for name in ("text", "video"):
        side, tokens = about.side(name), tokens_of(name)
        known = done_chunks(folder, name, side)
        writer = Writer(folder, name, side, dtype, 0)
        for number, items in enumerate(side.chunks()):
            if number not in known:
                on_chunk()
                writer.append(items, [tokens[item] for item in items], [f"{name} {item}" for item in items])
                written += 1
        writer.close()
    write_about(folder, replace(about, finished=True))
    return written


@pytest.fixture
def store(tmp_path: Path) -> Path:
    fill(tmp_path / "store")
    return tmp_path / "store"


@pytest.mark.parametrize(("dtype", "error"), [("fp32", 0.0), ("fp16", 2**-11), ("bf16", 2**-8)])
def test_what_is_read_is_what_was_written(tmp_path: Path, dtype: str, error: float) -> None:
    fill(tmp_path / "store", dtype)
    found = FeatureStore(tmp_path / "store")
    for side, length in (("text", 9), ("video", 4)):
        written = tokens_of(side)
        # In any order, and one item twice.
        items = [*reversed(range(len(written) - 1)), 1]
        tokens, mask = found.read(side, np.array(items))
        assert tokens.shape == (len(items), length, WIDTH)
        assert tokens.dtype == torch.float32
        assert mask.sum(dim=1).tolist() == [COUNTS[side][item] for item in items]
        for row, item in enumerate(items):
            torch.testing.assert_close(tokens[row, : COUNTS[side][item]], written[item], rtol=error, atol=0)
            assert not tokens[row, COUNTS[side][item] :].any()
    assert found.read("text", np.zeros(0, np.int64))[0].shape == (0, 9, WIDTH)
    assert found.longest("text") == (9, CONTENTS.texts[COUNTS["text"].index(9)])
    assert found.start().keys() == {"logit_scale"}


def test_parts_leave_out_what_could_not_be_decoded(store: Path) -> None:
    part = FeatureStore(store).part("train")
    readable = [video for video in range(8) if video not in ABSENT]
    assert part.split.names == tuple(f"v{video}" for video in readable)
    assert part.split.captions == tuple(f"caption {2 * video + which}" for video in readable for which in (0, 1))
    assert [part.split.names[owner] for owner in part.split.owner] == [f"v{v}" for v in readable for _ in (0, 1)]
    assert [CONTENTS.texts[item] for item in part.texts] == list(part.split.captions)
    assert [CONTENTS.videos[item] for item in part.videos] == list(part.split.names)
    assert [video.name for video in part.unreadable] == [f"v{video}" for video in ABSENT if video < 8]
    assert part.split.missing == ("gone",)
    # Video 7 is in both parts, and is stored once.
    assert FeatureStore(store).part("test").videos[0] == part.videos[-1]
    with pytest.raises(ValueError, match=r"must hold all videos of folder's train part, got it without gone, v0, v4"):
        FeatureStore(store).part("train", strict=True)
    with pytest.raises(ValueError, match=r"split must be one of train, test, which .* holds, got val"):
        FeatureStore(store).part("val")


class Killed:
    """Kill this process at its ``moment``-th write or sync; a write is cut in the middle."""

    def __init__(self, moment: int) -> None:
        self.left, self.fsync = moment, os.fsync

    def install(self) -> None:
        feature_store.os.fsync = self.sync  # type: ignore[attr-defined, assignment]
        opened = feature_store._open_end
        feature_store._open_end = lambda path: Cut(opened(path), self)  # type: ignore[assignment]

    def now(self) -> bool:
        self.left -= 1
        return self.left < 0

    def sync(self, number: int) -> None:
        if self.now():
            os.kill(os.getpid(), signal.SIGKILL)
        self.fsync(number)


class Cut:
    """A file whose write is cut in the middle if its process is killed there."""

    def __init__(self, file: Any, killed: Killed) -> None:
        self.file, self.killed = file, killed

    def write(self, data: bytes) -> None:
        if self.killed.now():
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        self.file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.mark.parametrize("moment", range(0, 40, 2))
def test_a_killed_writer_continues_with_the_same_bytes(store: Path, tmp_path: Path, moment: int) -> None:
    """The descriptions have 3 moments, and 10 chunks 4 each: tokens, their sync, records, their sync."""
    folder = tmp_path / "killed"
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            Killed(moment).install()
            fill(folder, on_chunk=lambda: os.write(write, b"."))
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        started = len(pipe.read())
    with pytest.raises(ValueError, match=r"features must be (finished, got|a folder that)"):
        FeatureStore(folder)
    chunks = sum(len(about_of().side(name).chunks()) for name in ("text", "video"))
    assert started + fill(folder) <= chunks + 1
    for path in store.iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes(), path.name
    assert {path.name for path in folder.iterdir()} == {path.name for path in store.iterdir()}


def test_shards_of_several_processes_are_one_store(store: Path, tmp_path: Path) -> None:
    folder, about = tmp_path / "shards", about_of()
    begin(folder, about, CONTENTS, START)
    for name in ("text", "video"):
        side, tokens = about.side(name), tokens_of(name)
        for shard in range(3):
            writer = Writer(folder, name, side, "fp32", shard)
            for items in side.chunks()[shard::3]:
                writer.append(items, [tokens[item] for item in items], ["" for _ in items])
            writer.close()
        assert done_chunks(folder, name, side) == set(range(len(side.chunks())))
    write_about(folder, replace(about, finished=True))
    for name in ("text", "video"):
        items = np.arange(about.side(name).items)
        for ours, theirs in zip(
            FeatureStore(folder).read(name, items), FeatureStore(store).read(name, items), strict=True
        ):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.full((2, WIDTH), torch.nan), r"my video must have finite tokens, got NaN or infinity"),
        (torch.full((2, WIDTH), 7e4), r"my video must have tokens that fp16 can hold, got 7e\+04; .* --dtype fp32"),
        (torch.zeros(2, WIDTH + 1), r"my video must have tokens of shape \(count, 24\) like the others, got \(2, 25\)"),
        (torch.zeros(WIDTH), r"my video must have tokens of shape .* got \(24,\); encode all items with one encoder"),
    ],
)
def test_tokens_that_cannot_be_stored(tmp_path: Path, tokens: Tensor, message: str) -> None:
    begin(tmp_path / "store", about_of("fp16"), CONTENTS, START)
    side = about_of().video
    writer = Writer(tmp_path / "store", "video", side, "fp16", 0)
    with pytest.raises(ValueError, match=message):
        writer.append(range(3), [torch.zeros(1, WIDTH), tokens, torch.zeros(1, WIDTH)], ["other", "my video", "third"])
    writer.close()
    assert done_chunks(tmp_path / "store", "video", side) == set()


def test_folders_of_something_else(store: Path, tmp_path: Path) -> None:
    assert fill(store) == 0  # the same features are there
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"out must be a new or an empty folder, got .* with other files"):
        fill(tmp_path / "mine")
    begin(tmp_path / "begun", about_of("fp16"), CONTENTS, START)
    with pytest.raises(ValueError, match=r"or the same features, got .* with dtype 'fp16' then and 'fp32' now"):
        fill(tmp_path / "begun")
    # Killed before features.json was written.
    (tmp_path / "begun" / "features.json").unlink()
    fill(tmp_path / "begun")
    with pytest.raises(
        ValueError, match=r"must be a folder that drl-fast features wrote, got .* without features.json"
    ):
        FeatureStore(tmp_path / "mine")


def change(path: Path, edit: Callable[[bytes], bytes]) -> None:
    path.write_bytes(edit(path.read_bytes()))


def edited(**values: Any) -> Callable[[bytes], bytes]:
    return lambda data: json.dumps({**json.loads(data), **values}).encode()


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        (
            "video-0.tokens",
            lambda data: data[:-1],
            r"video-0.tokens must have \d+ bytes as its index says",
        ),
        ("video-0.tokens", lambda data: data + b"0", r"video-0.tokens must have \d+ bytes as its index says"),
        ("video-0.index", lambda data: data[:-40], r"video-0.tokens must have 1152 bytes as its index says, got 1440"),
        (
            "video-0.index",
            lambda data: data[:12] + b"\xff\xff\xff\x7f" + data[16:],
            r"must name items below 11, got others",
        ),
        (
            "splits.json",
            lambda data: data.replace(b"caption 3", b"caption x"),
            r"splits.json must be the file",
        ),
        (
            "splits.json",
            lambda data: data[:100],
            r"must list captions and videos, got: .* must be JSON",
        ),
        (
            "features.json",
            lambda data: b"[]",
            r"must describe features of drl-fast, got: .* must be a dict",
        ),
        ("features.json", edited(format="other"), r"got: another format than 'drl-fast features 1'; encode"),
        ("features.json", edited(dtype="int8"), r"dtype must be one of 'fp16', 'bf16', 'fp32', got 'int8'"),
        ("features.json", edited(extra=1), r"unexpected keyword argument 'extra'; encode the features again"),
        (
            "features.json",
            edited(text={"items": 0}),
            r"must describe features of drl-fast, got: .*missing",
        ),
    ],
)
def test_a_damaged_store_names_the_file(store: Path, name: str, edit: Callable[[bytes], bytes], message: str) -> None:
    change(store / name, edit)
    with pytest.raises(ValueError, match=message):
        FeatureStore(store)


def test_a_flipped_bit_is_found_when_its_item_is_read(store: Path) -> None:
    at = (sum(COUNTS["text"][:5]) * WIDTH + 3) * 4
    change(store / "text-0.tokens", lambda data: data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    found = FeatureStore(store)
    found.read("text", np.array([4, 6]))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"text-0.tokens: text item 5 must have the checksum that was written"):
            found.read("text", np.array([4, 5]))


def test_a_lost_shard(store: Path) -> None:
    for name in ("video-0.index", "video-0.tokens"):
        (store / name).unlink()
    with pytest.raises(ValueError, match="must hold all 11 video items, got 0; copy the features again"):
        FeatureStore(store)


@pytest.mark.parametrize("edit", [lambda data: data[:20], lambda data: data[:-1] + bytes([data[-1] ^ 1])])
def test_a_damaged_start(store: Path, edit: Callable[[bytes], bytes]) -> None:
    change(store / "start.safetensors", edit)
    with pytest.raises(ValueError, match=r"start.safetensors must be the file that was written, got another; copy"):
        FeatureStore(store).start()


def test_the_digest_is_of_all_tokens(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "same")
    assert FeatureStore(tmp_path / "same").digest == FeatureStore(store).digest
    changed = tokens_of
    monkeypatch.setitem(globals(), "tokens_of", lambda side: [x + 1e-3 for x in changed(side)])
    fill(tmp_path / "other")
    assert FeatureStore(tmp_path / "other").digest != FeatureStore(store).digest


def test_several_writers_that_were_killed_are_continued_by_one(store: Path, tmp_path: Path) -> None:
    """Their shards keep whole chunks, and lose the rest."""
    folder, about = tmp_path / "killed", about_of()
    begin(folder, about, CONTENTS, START)
    side, tokens = about.video, tokens_of("video")
    for shard in range(2):
        writer = Writer(folder, "video", side, "fp32", shard)
        items = side.chunks()[shard]
        writer.append(items, [tokens[item] for item in items], ["" for _ in items])
        writer.close()
        with (folder / f"video-{shard}.tokens").open("ab") as file:
            file.write(b"half a chunk")
        with (folder / f"video-{shard}.index").open("ab") as file:
            file.write((folder / f"video-{shard}.index").read_bytes()[:20])
    fill(folder)
    for name in ("text", "video"):
        items = np.arange(about.side(name).items)
        assert torch.equal(FeatureStore(folder).read(name, items)[0], FeatureStore(store).read(name, items)[0])


def test_a_shard_that_lost_tokens_is_not_continued(store: Path, tmp_path: Path) -> None:
    shutil.copytree(store, tmp_path / "copy")
    write_about(tmp_path / "copy", about_of())
    change(tmp_path / "copy" / "text-0.tokens", lambda data: data[:100])
    with pytest.raises(ValueError, match=r"text-0.tokens must have at least \d+ bytes, got 100; encode"):
        fill(tmp_path / "copy")
