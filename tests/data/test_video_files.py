"""Which file is an id's video."""

from __future__ import annotations

from pathlib import Path

import pytest

from drl_fast.data.datasets import load_split
from tests import releases
from tests.releases import videos, write_csv, write_json, write_lines


@pytest.mark.parametrize(
    ("name", "files", "expected"),
    [
        ("a", ["a.mp4", "a.jpg", "a.json"], "a.mp4"),
        ("a", ["deep/er/a.MKV"], "deep/er/a.MKV"),
        ("a.mov", ["a.mov", "a.mov.mp4", "a.mp4"], "a.mov"),
        ("a.mov", ["x/a.mov", "a.mov.mp4"], "x/a.mov"),
        ("a.mov", ["a.mov.mp4", "a.mp4"], "a.mov.mp4"),
        ("a.mov", ["a.mp4"], "a.mp4"),
        ("a.b", ["a.b.mp4", "a.mp4"], "a.b.mp4"),
        ("a.b", ["a.mp4"], None),
        ("a.mp4", ["a.mp4", "x/a.mp4"], "a.mp4"),
        ("x/a.mp4", ["a.mp4", "x/a.mp4"], "x/a.mp4"),
        ("./a.mp4", ["a.mp4"], "a.mp4"),
        ("../a.mp4", ["a.mp4"], None),
        ("a", ["a.jpg"], None),
        ("a", [".a.mp4", "._a.mp4", ".hidden/a.mp4"], None),
        ("a", ["a", "a.mp4"], "a"),
    ],
)
def test_matching(tmp_path: Path, name: str, files: list[str], expected: str | None) -> None:
    write_csv(tmp_path / "captions.csv", ["video", "caption"], [[name, "x"], ["always.mp4", "y"]])
    folder = videos(tmp_path, "always.mp4", *files)
    split = load_split("folder", "test", videos=folder, annotations=tmp_path)
    found = dict(zip(split.names, split.videos, strict=True)).get(name)
    assert found == (None if expected is None else folder / expected)


@pytest.mark.parametrize("files", [["a.mp4", "a.avi"], ["x/a.mp4", "y/a.mp4"]])
def test_two_files_for_one_id(tmp_path: Path, files: list[str]) -> None:
    """Only where the id is asked for."""
    releases.vatex(tmp_path)
    write_json(tmp_path / "ref_captions.json", {"a": ["one"], "b": ["two"]})
    write_lines(tmp_path / "test_list.txt", ["a"])
    write_lines(tmp_path / "val_list.txt", ["b"])
    folder = videos(tmp_path, "b.mp4", *files)
    with pytest.raises(ValueError, match=r"videos must hold one file for a, got .*a\..* and .*a\..*; remove or rename"):
        load_split("vatex", "test", videos=folder, annotations=tmp_path)
    assert load_split("vatex", "val", videos=folder, annotations=tmp_path).names == ("b",)


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    write_csv(tmp_path / "captions.csv", ["video", "caption"], [["a", "one"], ["c", "two"]])
    elsewhere = videos(tmp_path / "elsewhere", "c.mp4")
    folder = videos(tmp_path, "a.mp4")
    (folder / "b").symlink_to(elsewhere)
    (folder / "loop").symlink_to(folder)
    split = load_split("folder", "test", videos=folder, annotations=tmp_path, strict=True)
    assert split.videos == (folder / "a.mp4", folder / "b" / "c.mp4")
