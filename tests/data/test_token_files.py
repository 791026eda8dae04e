"""Tokens of other encoders: every kind of file, names, and what is refused."""

from __future__ import annotations

import io
import json
import os
import pickle
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import hypothesis.strategies as st
import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from drl_fast.data.token_files import TokenFiles

FLOATS = [torch.float32, torch.float16, torch.float64]


def tokens(seed: int = 0, n: int = 3, d: int = 4, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).to(dtype)


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, np.asarray(array))
    return file.getvalue()


def npz(save: Callable[..., None] = np.savez, **arrays: Any) -> bytes:
    file = io.BytesIO()
    save(file, **{name: np.asarray(array) for name, array in arrays.items()})
    return file.getvalue()


def hdf5(**values: Any) -> bytes:
    """A value is an array, or a dict of a group's arrays."""
    file = io.BytesIO()
    with h5py.File(file, "w") as out:
        for name, value in values.items():
            for key, array in value.items() if isinstance(value, dict) else [("", value)]:
                out[f"{name}/{key}".rstrip("/")] = np.asarray(array)
    return file.getvalue()


def tar(*members: tuple[str, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as out:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            out.addfile(member, io.BytesIO(data))
    return file.getvalue()


def shards(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    return safetensors.torch.save({name: tensor.clone() for name, tensor in tensors.items()}, metadata)


def put(path: Path, data: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data or npy(tokens()))
    return path


def found(files: TokenFiles, name: str) -> Tensor:
    entry = files.find(name)
    assert entry is not None
    return files.read(entry)


def same(got: Tensor, expected: Tensor) -> bool:
    return got.dtype == expected.dtype and torch.equal(got, expected) and got.is_contiguous()


X = tokens()
# File name, content and entry of id "a", whose tokens are X.
KINDS = {
    "npy": ("a.npy", npy(X), "a.npy"),
    "npz, features": ("a.npz", npz(other=X[0], features=X), "a.npz"),
    "npz, last_hidden_state": ("a.npz", npz(last_hidden_state=X, mask=X[0]), "a.npz"),
    "npz, only one": ("a.npz", npz(whatever=X), "a.npz"),
    "npz, compressed": ("a.npz", npz(np.savez_compressed, features=X), "a.npz"),
    "safetensors, only one": ("a.safetensors", shards({"x": X}), "a.safetensors"),
    "safetensors, features": ("a.safetensors", shards({"features": X, "m": X[0]}), "a.safetensors"),
    "safetensors, collection": ("s.safetensors", shards({"b": X + 1, "a": X}), "s.safetensors/a"),
    "safetensors, metadata": ("s.safetensors", shards({"b": X + 1, "a": X}, {"k": "v"}), None),
    "hdf5": ("s.h5", hdf5(b=X + 1, a=X), "s.h5/a"),
    "hdf5, one key": ("s.h5", hdf5(a=X), "s.h5/a"),
    "hdf5, groups": ("s.hdf5", hdf5(b={"features": X + 1}, a={"mask": X[0], "last_hidden_state": X}), "s.hdf5/a"),
    "hdf5, one a video": ("a.h5", hdf5(features=X, mask=X[0]), "a.h5"),
    "tar, npy": ("s.tar", tar(("b.npy", npy(X + 1)), ("a.txt", b"x"), ("a.npy", npy(X))), "s.tar/a"),
    "tar, npz": ("s.tar", tar(("a.npz", npz(features=X)), ("b.npz", npz(features=X + 1))), "s.tar/a"),
    "tar, features.npy": ("s.tar", tar(("./a.features.npy", npy(X)), ("a.json", b"{}")), "s.tar/a"),
    "tar, gnu": ("s.tar", tar(("b" * 200 + ".npy", npy(X + 1)), ("a.npy", npy(X)), format=tarfile.GNU_FORMAT), None),
    "tar, pax": ("s.tar", tar(("é" * 200 + ".npy", npy(X + 1)), ("a.npy", npy(X))), None),
    "upper case": ("a.NPY", npy(X), "a.NPY"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("one_file", [False, True])
def test_every_kind(tmp_path: Path, kind: str, one_file: bool) -> None:
    name, data, entry = KINDS[kind]
    path = put(tmp_path / name, data)
    files = TokenFiles(path if one_file else str(tmp_path))
    for spelling in ("a", "a.mp4", "a.webm", "A.mp4"):
        assert same(found(files, spelling), X)
        assert entry is None or files.find(spelling) == tmp_path / entry
    assert files.find("c") is None
    assert files.folder == (path if one_file else tmp_path)
    assert len(files) == len(files.names) >= 1
    assert "a" in files.names


@pytest.mark.parametrize("dtype", [*FLOATS, torch.bfloat16])
def test_dtypes_are_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    x = tokens(dtype=dtype)
    put(tmp_path / "one.safetensors", shards({"x": x}))
    put(tmp_path / "many.safetensors", shards({"a": x, "b": x * 2}))
    if dtype in FLOATS:
        put(tmp_path / "n.npy", npy(x))
        put(tmp_path / "h.h5", hdf5(h=x))
    files = TokenFiles(tmp_path)
    assert same(found(files, "b"), x * 2)
    for name in files.names:
        assert name == "b" or same(found(files, name), x)


def test_big_endian_and_column_order(tmp_path: Path) -> None:
    x = tokens(dtype=torch.float32)
    put(tmp_path / "big.npy", npy(x.numpy().astype(">f4")))
    put(tmp_path / "columns.npy", npy(np.asfortranarray(x.numpy())))
    put(tmp_path / "h.h5", hdf5(h=x.numpy().astype(">f4"), i=x))
    files = TokenFiles(tmp_path)
    for name in ("big", "columns", "h", "i"):
        assert same(found(files, name), x)


@pytest.mark.parametrize("kind", ["npy", "safetensors, only one", "safetensors, collection", "hdf5", "tar, npy"])
def test_memory_is_the_callers(tmp_path: Path, kind: str) -> None:
    name, data, _ = KINDS[kind]
    path = put(tmp_path / name, data)
    files = TokenFiles(tmp_path)
    found(files, "a").zero_()
    assert same(found(files, "a"), X)
    assert path.read_bytes() == data


@pytest.mark.parametrize(
    ("name", "files", "expected"),
    [
        ("a.b", ["a.b.npy", "a.npy"], "a.b.npy"),
        ("a.b", ["a.npy"], None),
        ("a", ["a.b.npy"], None),
        ("a.mp4", ["a.mp4.npy", "a.npy"], "a.mp4.npy"),
        ("a", ["a.mp4.npy"], "a.mp4.npy"),
        ("a.avi", ["a.mp4.npy"], "a.mp4.npy"),
        ("a.npy", ["a.npy", "a.npz"], "a.npy"),
        ("a", ["deep/er/a.npy"], "deep/er/a.npy"),
        ("x/a", ["x/a.npy", "y/a.npy"], "x/a.npy"),
        ("x/a.mp4", ["x/a.npy", "y/a.npy"], "x/a.npy"),
        ("x\\a.mp4", ["x/a.npy"], "x/a.npy"),
        ("../a", ["a.npy"], None),
        ("a", [".a.npy", "._a.npy", ".hidden/a.npy"], None),
        ("Zo\u00eb", ["Zoe\u0308.npy"], "Zoe\u0308.npy"),
        ("a", ["a.mp4", "a.txt", "a.npy.gz"], None),
    ],
)
def test_names_of_files(tmp_path: Path, name: str, files: list[str], expected: str | None) -> None:
    for file in ["always.npy", *files]:
        put(tmp_path / file)
    assert TokenFiles(tmp_path).find(name) == (None if expected is None else tmp_path / expected)


KEYS = ["a.b", "c.mp4", "x/d", "Zoe\u0308", "/e", "f.features"]


@pytest.mark.parametrize("kind", ["tar", "safetensors"])
@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("a.b", "a.b"),
        ("a.b.mp4", "a.b"),
        ("a", None),
        ("c", "c.mp4"),
        ("c.mp4", "c.mp4"),
        ("x/d.mp4", "x/d"),
        ("d", "x/d"),
        ("Zo\u00eb.avi", "Zoe\u0308"),
        ("/e", "/e"),
        ("e.mp4", "/e"),
    ],
)
def test_names_in_collections(tmp_path: Path, kind: str, name: str, key: str | None) -> None:
    values = {key: tokens(seed) for seed, key in enumerate(KEYS)}
    if kind == "tar":
        put(tmp_path / "s.tar", tar(*((f"{key}.npy", npy(value)) for key, value in values.items())))
    else:
        put(tmp_path / "s.safetensors", shards(values))
    files = TokenFiles(tmp_path)
    assert len(files) == len(KEYS)
    if key is None:
        assert files.find(name) is None
    else:
        assert files.find(name) == Path(f"{tmp_path}/s.{kind}/{key}")
        assert same(found(files, name), values[key])


def test_a_shard_of_one_video(tmp_path: Path) -> None:
    """The last file of a collection may hold one tensor, named by the tensor and not by the file."""
    put(tmp_path / "part0.safetensors", shards({"a": X, "b": X + 1}))
    put(tmp_path / "part1.safetensors", shards({"c": X + 2}))
    assert same(found(TokenFiles(tmp_path), "c.mp4"), X + 2)


@pytest.mark.parametrize("kind", ["safetensors", "tar"])
def test_collections_larger_than_memory(tmp_path: Path, kind: str) -> None:
    """A file with a hole of 256 GiB: no more than the entry is read."""
    size = 2**38
    with (tmp_path / f"s.{kind}").open("wb") as file:
        if kind == "tar":
            member = tarfile.TarInfo("b.npy")
            member.size = size
            file.write(member.tobuf())
            file.seek(size, os.SEEK_CUR)
            file.write(tar(("a.npy", npy(X))))
        else:
            hole = {"dtype": "F16", "shape": [size // 2], "data_offsets": [24, 24 + size]}
            header = json.dumps({"a": {"dtype": "F16", "shape": [3, 4], "data_offsets": [0, 24]}, "b": hole}).encode()
            file.write(len(header).to_bytes(8, "little") + header + X.numpy().tobytes())
            file.truncate(file.tell() + size)
    files = TokenFiles(tmp_path)
    assert sorted(files.names) == ["a", "b"]
    assert same(found(files, "a"), X)


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    put(tmp_path / "in" / "a.npy")
    put(tmp_path / "elsewhere" / "c.npy")
    (tmp_path / "in" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    assert TokenFiles(tmp_path / "in").names == ["a", "b/c"]


@pytest.mark.parametrize("other", ["a.npz", "sub/a.npy", "s.tar", "s.h5", "a.safetensors"])
def test_two_entries_for_one_id(tmp_path: Path, other: str) -> None:
    """An error only if the id is used."""
    content = {
        ".npy": npy(X),
        ".npz": npz(x=X),
        ".tar": tar(("a.npy", npy(X))),
        ".h5": hdf5(a=X),
        ".safetensors": shards({"x": X}),
    }
    put(tmp_path / "a.npy")
    put(tmp_path / "b.npy")
    put(tmp_path / other, content[Path(other).suffix])
    files = TokenFiles(tmp_path)
    assert same(found(files, "b"), X)
    with pytest.raises(ValueError, match=r"must hold one entry for a\.mp4, got \S*a\S* and \S*a\S*; remove or rename"):
        files.find("a.mp4")


@pytest.mark.parametrize("second", ["a.npy", "a.npz", "a.features.npy"])
def test_two_members_of_one_key(tmp_path: Path, second: str) -> None:
    put(tmp_path / "s.tar", tar(("a.npy", npy(X)), (second, npy(X))))
    with pytest.raises(
        ValueError, match=rf"s\.tar must be .*, got: {second}, which is sparse or the second array of a"
    ):
        TokenFiles(tmp_path)


def test_members_that_are_left_out(tmp_path: Path) -> None:
    """Also those that a Mac adds, and links: nothing is written or followed."""
    file = io.BytesIO(tar(("a.npy", npy(X)), ("._a.npy", b"x"), (".h/b.npy", npy(X)), ("a.jpg", b"x"), ("c.pyd", b"x")))
    with tarfile.open(fileobj=file, mode="a") as out:
        link = tarfile.TarInfo("d.npy")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        out.addfile(link)
        folder = tarfile.TarInfo("e.npy")
        folder.type = tarfile.DIRTYPE
        out.addfile(folder)
    path = put(tmp_path / "s.tar", file.getvalue())
    assert TokenFiles(tmp_path).names == ["a"]
    assert list(tmp_path.iterdir()) == [path]


NAN = X.clone()
NAN[0, 1], NAN[2, 2:] = torch.nan, -torch.inf
CONTENT = {
    "a vector": (X[0], r"must hold tokens \(N, D\), got shape \(4,\); save one token per frame or word"),
    "a number": (X[0, 0], r"must hold tokens \(N, D\), got shape \(\); save one token per frame"),
    "a batch of one": (X[None], r"must hold tokens \(N, D\), got shape \(1, 3, 4\); save array\.squeeze\(0\)"),
    "a batch": (torch.stack([X, X]), r"must hold tokens \(N, D\), got shape \(2, 3, 4\); save one token per frame"),
    "no token": (X[:0], r"must hold at least one token and one channel, got shape \(0, 4\); encode it again"),
    "no channel": (X[:, :0], r"must hold at least one token and one channel, got shape \(3, 0\); encode it again"),
    "integers": (X.long(), r"must be float32, float16, bfloat16 or float64, got torch\.int64; save .* as float32"),
    "truth": (X > 0, r"must be float32, .*, got torch\.bool; save"),
    "complex": (X.to(torch.complex64), r"must be float32, .*, got torch\.complex64; save"),
    "not finite": (NAN, r"must be finite, got 1 NaN and 2 Inf; encode it again"),
}


@pytest.mark.parametrize("content", CONTENT)
@pytest.mark.parametrize("kind", ["npy", "npz", "h5", "tar", "safetensors"])
def test_arrays_that_are_no_tokens(tmp_path: Path, content: str, kind: str) -> None:
    value, message = CONTENT[content]
    value = value.contiguous()
    data = {
        "npy": lambda: npy(value),
        "npz": lambda: npz(features=value),
        "h5": lambda: hdf5(a={"features": value}),
        "tar": lambda: tar(("a.npy", npy(value))),
        "safetensors": lambda: shards({"a": value}),
    }
    put(tmp_path / f"a.{kind}", data[kind]())
    with pytest.raises(ValueError, match=rf"^\S*a\.{kind}\S* {message}") as error:
        found(TokenFiles(tmp_path), "a")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("dtype", ["longdouble", "U3", "S3", "V2", "datetime64[s]", "i4,f4"])
def test_dtypes_that_torch_lacks(tmp_path: Path, dtype: str) -> None:
    put(tmp_path / "a.npy", npy(np.zeros((2, 2), dtype)))
    with pytest.raises(ValueError, match=r"a\.npy must hold an array of tokens \(N, D\), .* got: .*; check or rewrite"):
        found(TokenFiles(tmp_path), "a")


@pytest.mark.parametrize(
    ("name", "data", "got"),
    [
        ("a.npz", npz(x=X, y=X), "2 arrays: x, y"),
        ("a.npz", npz(), "no array"),
        ("a.h5", hdf5(a={"x": X, "y": X}), "2 arrays: x, y"),
        ("a.tar", tar(("a.npz", npz(x=X, y=X))), "2 arrays: x, y"),
    ],
)
def test_several_arrays(tmp_path: Path, name: str, data: bytes, got: str) -> None:
    put(tmp_path / name, data)
    expected = rf"must hold .*, called features or last_hidden_state if it is not the only one, got: {got}; check or"
    with pytest.raises(ValueError, match=rf"^\S*/{name}(/a)? {expected}"):
        found(TokenFiles(tmp_path), "a")


def test_hdf5_without_arrays(tmp_path: Path) -> None:
    """Strings, a soft link that leads nowhere, and an empty dataset."""
    with h5py.File(tmp_path / "s.h5", "w") as file:
        file["text"] = "hello"
        file["strings"] = ["a", "b"]
        file["link"] = h5py.SoftLink("/nowhere")
        file["empty"] = h5py.Empty("f2")
    files = TokenFiles(tmp_path)
    assert len(files) == 4
    for name in files.names:
        with pytest.raises(ValueError, match=rf"s\.h5/{name} must hold an array of tokens .*, got: .+; check or"):
            found(files, name)


class Bomb:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return pytest.fail, ("a pickle was loaded",)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".pkl", ".pickle", ".PT"])
def test_pickles_are_refused(tmp_path: Path, suffix: str) -> None:
    path = put(tmp_path / f"a{suffix}", pickle.dumps(Bomb()))
    message = rf"a{suffix} must be an array file, got a pickle, .* numpy\.save.* or safetensors\.torch\.save_file"
    for place in (tmp_path, path):
        with pytest.raises(ValueError, match=message):
            TokenFiles(place)
    put(tmp_path / "b.npy")
    files = TokenFiles(tmp_path)
    assert same(found(files, "b"), X)
    assert files.find("c") is None
    assert files.names == ["b"]
    with pytest.raises(ValueError, match=message):
        files.find("a.mp4")
    put(tmp_path / "sub" / "a.npy")
    assert same(found(TokenFiles(tmp_path), "a.mp4"), X)


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    objects = np.array([[Bomb(), Bomb()]], dtype=object)
    put(tmp_path / "a.npy", npy(objects))
    put(tmp_path / "b.npz", npz(features=objects))
    put(tmp_path / "c.npy", pickle.dumps(Bomb()))
    files = TokenFiles(tmp_path)
    for name in ("a", "b", "c"):
        with pytest.raises(
            ValueError, match=rf"{name}\.np. must hold an array of tokens .*, got: .+; check or rewrite"
        ):
            found(files, name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.safetensors", "a.h5", "a.tar"])
def test_pipes_and_folders(tmp_path: Path, name: str) -> None:
    """Opening a pipe would wait for its writer."""
    put(tmp_path / "b.npy")
    (tmp_path / name).mkdir()
    assert TokenFiles(tmp_path).find("a") is None
    (tmp_path / name).rmdir()
    os.mkfifo(tmp_path / name)
    for place in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError, match=rf"{name} must .*, got: not a regular file"):
            found(TokenFiles(place), "a")


@pytest.mark.parametrize("name", ["a.npy", "a.safetensors", "a.h5", "a.tar"])
def test_links_that_lead_nowhere(tmp_path: Path, name: str) -> None:
    put(tmp_path / "b.npy")
    (tmp_path / name).symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=rf"{name} must .*, got: .*[Nn]o such file"):
        found(TokenFiles(tmp_path), "a")


def test_nothing_usable(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokens folder or file not found: \S*x; check the path"):
        TokenFiles(tmp_path / "x")
    put(tmp_path / "a.txt")
    put(tmp_path / "b.tar", tar(("a.txt", b"x")))
    put(tmp_path / "c.h5", hdf5())
    put(tmp_path / ".d.npy")
    for place in (tmp_path, tmp_path / "a.txt", tmp_path / "b.tar"):
        with pytest.raises(ValueError, match=r"must hold tokens \(\.npy, .* \.hdf5, uncompressed \.tar\), got none"):
            TokenFiles(place)


def test_hdf5_without_h5py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "s.h5", hdf5(a=X))
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ValueError, match=r"s\.h5 needs h5py \(.+\); install it with pip install 'drl-fast\[hdf5\]'"):
        TokenFiles(tmp_path)


def damaged() -> dict[str, tuple[str, bytes]]:
    array, archive = npy(X), tar(("a.npy", npy(X)), ("b.npy", npy(X)))
    first = archive.index(b"b.npy")
    return {
        "npy, longer": ("a.npy", array + b"x"),
        "npy, fewer rows": ("a.npy", array.replace(b"(3, 4)", b"(2, 4)")),
        "npy, vast": ("a.npy", array.replace(b"(3, 4), }         ", b"(3, 4000000000), }")),
        "npz, a flipped byte": ("a.npz", npz(features=X).replace(X.numpy().tobytes(), bytes(24))),
        "safetensors, longer": ("a.safetensors", shards({"x": X}) + b"x"),
        "safetensors, header": ("a.safetensors", b"\xff" * 16),
        "hdf5": ("a.h5", b"\x89HDF\r\n\x1a\n" + bytes(100)),
        "tar, a damaged header": ("a.tar", archive[: first + 2] + b"x" + archive[first + 3 :]),
        "tar, no end": ("a.tar", archive[: archive.rindex(X.numpy().tobytes()) // 512 * 512 + 512]),
        "tar, two": ("a.tar", archive + archive),
        "tar, compressed": ("a.tar", b"\x1f\x8b" + bytes(1000)),
        **{f"empty {suffix}": (f"a.{suffix}", b"") for suffix in ("npy", "npz", "safetensors", "h5", "tar")},
        **{f"{suffix}, text": (f"a.{suffix}", b"text") for suffix in ("npy", "npz", "safetensors", "h5", "tar")},
    }


@pytest.mark.parametrize("kind", damaged())
def test_damaged_files(tmp_path: Path, kind: str) -> None:
    name, data = damaged()[kind]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=rf"^\S*{name}(/\w)? must .*, got: .+; check or rewrite the file$") as error:
        found(TokenFiles(tmp_path), "a")
    assert len(str(error.value).splitlines()) == 1


def test_a_damaged_zip_entry_of_a_foreign_kind(tmp_path: Path) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as out:
        out.writestr("features", b"no array")
    put(tmp_path / "a.npz", file.getvalue())
    with pytest.raises(ValueError, match=r"a\.npz must hold an array of tokens .*, got: .*magic string"):
        found(TokenFiles(tmp_path), "a")


def outcome(path: Path, names: list[str] | None = None) -> tuple[list[Tensor], str]:
    """Return a file's tokens, and else the message of a ValueError: one line that names the file."""
    try:
        files = TokenFiles(path)
        return [found(files, name) for name in names or files.names], ""
    except ValueError as error:
        message = str(error)
    assert path.name in message
    assert len(message.splitlines()) == 1
    return [], message


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_files(tmp_path: Path, kind: str) -> None:
    """At 150 lengths. Only the zeros that fill a tar file up may be missing: its tokens are then still right."""
    name, data, _ = KINDS[kind]
    needed = len(data.rstrip(b"\0")) if name.endswith(".tar") else len(data)
    for length in range(0, len(data), 1 + len(data) // 150):
        (tmp_path / name).write_bytes(data[:length])
        x, error = outcome(tmp_path / name, ["a"])
        assert error or (same(x[0], X) and length > needed)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,  # a flaw in a C library must not break some runs and spare others
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(kind=st.sampled_from(sorted(KINDS)), flips=st.lists(st.tuples(st.integers(0), st.integers(0, 7)), min_size=1))
def test_flipped_bits(tmp_path: Path, kind: str, flips: list[tuple[int, int]]) -> None:
    """Formats without checksums cannot see a changed number; whatever is read is tokens, and all else a ValueError."""
    name, data, _ = KINDS[kind]
    changed = bytearray(data)
    for place, bit in flips:
        changed[place % len(data)] ^= 1 << bit
    (tmp_path / name).write_bytes(changed)
    for x in outcome(tmp_path / name)[0]:
        assert x.dim() == 2
        assert x.numel()
        assert x.isfinite().all()
