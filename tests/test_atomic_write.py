"""Files are written completely or not at all, with the mode of any new file."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch

from drl_fast.atomic_write import write_atomically


@pytest.fixture
def small_files_only() -> Iterator[None]:
    """Limit files to 4 KB, to simulate a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


WRITERS = {
    "text": lambda name: Path(name).write_text("x" * 100_000),
    "torch": lambda name: torch.save(torch.zeros(100_000), name),
    "safetensors": lambda name: safetensors.torch.save_file({"x": torch.zeros(100_000)}, name),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.usefixtures("small_files_only")
def test_a_full_disk_is_an_os_error_and_leaves_nothing(tmp_path: Path, writer: str) -> None:
    path = tmp_path / "model"
    path.write_bytes(b"before")
    with pytest.raises(OSError):
        write_atomically(path, WRITERS[writer])
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_the_mode_follows_the_umask(tmp_path: Path, writer: str, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "model", WRITERS[writer])
    finally:
        os.umask(before)
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_writers_own_error_passes(tmp_path: Path) -> None:
    def fail(name: str) -> None:
        raise ValueError("not a model")

    with pytest.raises(ValueError, match="not a model"):
        write_atomically(tmp_path / "model", fail)
    assert list(tmp_path.iterdir()) == []
