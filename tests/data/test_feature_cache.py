"""Features cached on disk: found by content, with the same bits; damaged entries are ignored."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from drl_fast.data import feature_cache
from drl_fast.data.feature_cache import FeatureCache
from drl_fast.data.video import Sampling

KEY = "ab" + "0" * 38


@pytest.fixture
def cache(tmp_path: Path) -> FeatureCache:
    return FeatureCache(tmp_path / "cache" / "features")


def everything(cache: FeatureCache) -> list[Path]:
    return [path for path in cache.folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(12, 512), (1, 1), (0, 8), ()])
def test_round_trip(cache: FeatureCache, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    features = torch.randn(shape).to(dtype)
    assert cache.get(KEY) is None
    cache.put(KEY, features)
    found = cache.get(KEY)
    assert found is not None
    assert found.dtype == dtype
    assert torch.equal(found, features)
    assert everything(cache) == [cache.folder / "ab" / f"{KEY}.safetensors"]


def test_an_entry_of_another_shape_is_damaged(cache: FeatureCache) -> None:
    """Its bytes are right, its header is not."""
    cache.put(KEY, torch.arange(6.0).reshape(2, 3))
    path = everything(cache)[0]
    content = path.read_bytes()
    assert content.count(b"[2,3]") == 1
    path.write_bytes(content.replace(b"[2,3]", b"[3,2]"))
    assert cache.get(KEY) is None


@pytest.mark.skipif(os.name == "nt", reason="no named pipes")
def test_a_pipe_is_refused_at_once(cache: FeatureCache, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(ValueError, match=r"pipe\.mp4 must be a readable video, got: not a regular file"):
        cache.key(tmp_path / "pipe.mp4", Sampling(), "encoder")


def test_special_values_and_strides(cache: FeatureCache) -> None:
    features = torch.tensor([[torch.nan, torch.inf], [-0.0, 1.0]], requires_grad=True).T
    cache.put(KEY, features)
    found = cache.get(KEY)
    assert found is not None
    assert torch.equal(found.view(torch.int32), features.detach().contiguous().view(torch.int32))


def test_another_cache_object_finds_the_last_value(cache: FeatureCache) -> None:
    cache.put(KEY, torch.zeros(3))
    cache.put(KEY, torch.ones(3))
    found = FeatureCache(str(cache.folder)).get(KEY)
    assert found is not None
    assert found.tolist() == [1, 1, 1]


def test_many_at_once(cache: FeatureCache) -> None:
    """Concurrent writers leave one complete entry and no other file."""

    def work(number: int) -> bool:
        cache.put(KEY, torch.full((64, 64), float(number)))
        found = cache.get(KEY)
        return found is not None and bool((found == found[0, 0]).all())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(64)))
    assert len(everything(cache)) == 1


def test_key_depends_on_the_content(cache: FeatureCache, tmp_path: Path) -> None:
    first, second, other = (tmp_path / name for name in ("a.mp4", "b.avi", "c.mp4"))
    # More than one chunk, different at the very end.
    data = bytes(feature_cache.CHUNK) + b"end"
    first.write_bytes(data)
    second.write_bytes(data)
    other.write_bytes(data[:-1] + b"D")
    key = cache.key(first, Sampling(), "clip")
    assert key == cache.key(str(second), Sampling(), "clip") == FeatureCache(tmp_path).key(first, Sampling(), "clip")
    assert len(key) == len(KEY)
    assert set(key) <= set("0123456789abcdef")
    assert cache.key(other, Sampling(), "clip") != key
    assert cache.key(first, Sampling(), "clip2") != key


@pytest.mark.parametrize("name", [field.name for field in fields(Sampling)])
def test_key_depends_on_the_sampling(cache: FeatureCache, tmp_path: Path, name: str) -> None:
    (tmp_path / "a.mp4").write_bytes(b"video")
    other = replace(Sampling(), **{name: {"resize": "squash", "interpolation": "bilinear"}.get(name, 3)})
    assert cache.key(tmp_path / "a.mp4", Sampling(), "x") != cache.key(tmp_path / "a.mp4", other, "x")


def test_content_is_read_once(cache: FeatureCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read again only if the file was changed or replaced."""
    path = tmp_path / "a.mp4"
    path.write_bytes(b"video")
    hashed = []
    blake2b = feature_cache.hashlib.blake2b
    monkeypatch.setattr(
        feature_cache.hashlib, "blake2b", lambda data=b"", **kw: hashed.append(data) or blake2b(data, **kw)
    )
    first = cache.key(path, Sampling(), "x")
    assert hashed.count(b"") == 1
    assert cache.key(path, Sampling(max_frames=3), "x") != first
    assert hashed.count(b"") == 1
    path.write_bytes(b"other")
    os.utime(path, ns=(0, 0))
    assert cache.key(path, Sampling(), "x") != first
    assert hashed.count(b"") == 2


def test_unreadable_video(cache: FeatureCache, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.mp4 must be a readable video, got: No such file or directory; ch"):
        cache.key(tmp_path / "nowhere.mp4", Sampling(), "x")


@pytest.mark.parametrize("damage", ["cut", "emptied", "flipped", "text", "moved", "folder"])
def test_damaged_entries_are_ignored(cache: FeatureCache, damage: str) -> None:
    """They can be written again, unless a folder has their name."""
    cache.put(KEY, torch.ones(64))
    path = cache.path(KEY)
    data = bytearray(path.read_bytes())
    if damage == "folder":
        path.unlink()
        path.mkdir()
        assert cache.get(KEY) is None
        return
    if damage == "moved":  # another program's safetensors
        feature_cache.safetensors.torch.save_file({"weights": torch.ones(3)}, path)
    else:
        data[-1] ^= 1
        path.write_bytes({"cut": data[:-40], "emptied": b"", "flipped": data, "text": b"no tensors here"}[damage])
    assert cache.get(KEY) is None
    cache.put(KEY, torch.ones(64))
    assert cache.get(KEY) is not None


@pytest.mark.parametrize("step", ["write_bytes", "replace", "mkdir"])
@pytest.mark.parametrize("held", [False, True])
def test_full_disk(cache: FeatureCache, monkeypatch: pytest.MonkeyPatch, step: str, held: bool) -> None:
    """It raises an error, leaves no part of the entry, and keeps the previous one."""
    if held:
        cache.put(KEY, torch.zeros(4))
    before = everything(cache)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def partly(self: Path, data: bytes) -> None:
        with self.open("wb") as file:
            file.write(data[: len(data) // 2])
        full()

    with monkeypatch.context() as patch:
        patch.setattr(Path, step, partly if step == "write_bytes" else full)
        with pytest.raises(OSError, match=r"features could not be kept in .*, got: No space left on device; make room"):
            cache.put(KEY, torch.ones(4))
    assert everything(cache) == before
    found = cache.get(KEY)
    assert (found is not None) == held
    assert found is None or found.tolist() == [0] * 4


def test_folder_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    cache = FeatureCache(tmp_path / "cache")
    assert cache.get(KEY) is None
    with pytest.raises(OSError, match=r"features could not be kept in .*cache, got: Not a directory|File exists"):
        cache.put(KEY, torch.ones(1))


def test_features_must_be_a_tensor(cache: FeatureCache) -> None:
    with pytest.raises(TypeError, match=r"features must be a torch\.Tensor, got list of 1"):
        cache.put(KEY, [1.0])  # type: ignore[arg-type]
