"""Finding the file of a video id."""

from __future__ import annotations

from pathlib import Path

import pytest

from drl_fast.data.datasets import load_split
from drl_fast.data.video import Sampling, read_video
from tests import releases
from tests.clips import greys, write_video
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
        ("x/a", ["x/a.mp4", "y/a.mp4"], "x/a.mp4"),
        ("x/a.mov", ["x/a.mp4", "y/a.mp4"], "x/a.mp4"),
        ("x/a.mov", ["y/a.mov"], None),
        ("x\\a.mp4", ["x/a.mp4"], "x/a.mp4"),
        ("x\\a.mp4", ["x\\a.mp4", "x/a.mp4"], "x\\a.mp4"),
        ("A.MP4", ["a.mp4"], "a.mp4"),
        ("A.mp4", ["a.mp4", "A.mp4"], "A.mp4"),
        ("Zo\u00eb", ["Zoe\u0308.mp4"], "Zoe\u0308.mp4"),
        ("\u1112\u1161\u11ab.mp4", ["\ud55c.mp4"], "\ud55c.mp4"),
        ("a:b.mp4", ["a:b.mp4"], "a:b.mp4"),
        *((f"a{suffix}", ["a.mp4"], "a.mp4") for suffix in (".3g2", ".asf", ".mpe", ".divx", ".m2v", ".3G2")),
        *(("a.mp4", [f"a{suffix}"], f"a{suffix}") for suffix in (".3g2", ".asf", ".mpe", ".divx", ".m2v", ".3G2")),
    ],
)
def test_matching(tmp_path: Path, name: str, files: list[str], expected: str | None) -> None:
    write_csv(tmp_path / "captions.csv", ["video", "caption"], [[name, "x"], ["always.mp4", "y"]])
    folder = videos(tmp_path, "always.mp4", *files)
    split = load_split("folder", "test", videos=folder, annotations=tmp_path)
    found = dict(zip(split.names, split.videos, strict=True)).get(name)
    assert found == (None if expected is None else folder / expected)


@pytest.mark.parametrize("inside", [True, False])
def test_an_absolute_name_must_lie_in_the_folder(tmp_path: Path, inside: bool) -> None:
    folder, other = videos(tmp_path, "a.mp4", "always.mp4"), videos(tmp_path / "elsewhere", "a.mp4")
    name = (folder if inside else other) / "a.mp4"
    write_csv(tmp_path / "captions.csv", ["video", "caption"], [[name, "x"], ["always.mp4", "y"]])
    split = load_split("folder", "test", videos=folder, annotations=tmp_path)
    assert split.missing == (() if inside else (str(name),))


def test_one_file_under_several_spellings_is_one_video(tmp_path: Path) -> None:
    """As two videos they would tie for each caption, and one of them would count as wrong."""
    rows = [["a.mp4", "one"], ["b", "two"], ["a", "three"], ["./a.mp4", "four"]]
    write_csv(tmp_path / "captions.csv", ["video", "caption"], rows)
    folder = videos(tmp_path, "a.mp4", "b.mp4")
    split = load_split("folder", "test", videos=folder, annotations=tmp_path)
    assert split.videos == (folder / "a.mp4", folder / "b.mp4")
    assert split.names == ("a.mp4", "b")
    assert split.owner == (0, 1, 0, 0)
    assert split.captions == ("one", "two", "three", "four")


@pytest.mark.parametrize(("listed", "file"), [("v_x", "x.mp4"), ("x", "v_x.mp4"), ("v_x", "v_x.mp4")])
def test_a_data_sets_prefix_may_be_missing_on_either_side(tmp_path: Path, listed: str, file: str) -> None:
    write_json(tmp_path / "val_ids.json", [listed])
    write_json(tmp_path / "val_1.json", {listed: {"sentences": ["one"]}})
    folder = videos(tmp_path, file)
    assert load_split("activitynet", "val", videos=folder, annotations=tmp_path).videos == (folder / file,)


def test_a_colon_is_not_a_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FFmpeg would read "concat:a.mp4" as a command to join files."""
    write_video(tmp_path / "concat:a.mp4", greys(3))
    monkeypatch.chdir(tmp_path)
    assert read_video("concat:a.mp4", Sampling(rate=8, size=32))[1].sum() == 3


@pytest.mark.parametrize("files", [["a.mp4", "a.avi"], ["x/a.mp4", "y/a.mp4"]])
def test_two_files_for_one_id(tmp_path: Path, files: list[str]) -> None:
    """It is an error only if the id is used."""
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
