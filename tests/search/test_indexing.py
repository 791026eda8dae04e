"""Add, update, remove; columns; moved folders; what is refused, and that nothing is left half written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import lancedb
import pyarrow as pa
import pytest

from drl_fast import Retriever
from drl_fast.search import lance
from drl_fast.search import retriever as retriever_module
from drl_fast.search import table as tables
from drl_fast.search.retriever import open_index
from drl_fast.search.table import KEY

from .videos import CLIP, WINDOWS, keep_times, make_video, save_model


def contents(retriever: Retriever) -> dict[str, int]:
    """Windows by video, as a new reader sees them."""
    paths = open_index(retriever.uri).table.search().select(["path"]).to_arrow().column("path").to_pylist()
    return {path: paths.count(path) for path in paths}


def tokens(retriever: Retriever, path: str) -> list[list[float]]:
    rows = open_index(retriever.uri).table.search().where(f"path = '{path}'").select(["start", "tokens"]).to_arrow()
    return rows.sort_by("start").column("tokens").to_pylist()


def test_add_skip_update_remove(retriever: Retriever, videos: Path) -> None:
    assert sorted(retriever.index([videos]).added) == sorted(WINDOWS)
    assert contents(retriever) == WINDOWS
    assert retriever.size() == (3, 8)
    again = retriever.index([videos])
    assert (again.added, again.updated, len(again.unchanged)) == ([], [], 3)
    before = tokens(retriever, "long.mp4")
    make_video(videos / "long.mp4", 4, seed=9)
    make_video(videos / "new.mp4", 2)
    changed = retriever.index([videos])
    assert (changed.added, changed.updated, len(changed.unchanged)) == (["new.mp4"], ["long.mp4"], 2)
    assert contents(retriever) == {**WINDOWS, "long.mp4": 3, "new.mp4": 1}
    assert tokens(retriever, "long.mp4")[:3] != before[:3]
    assert retriever.remove([videos / "a b", "new.mp4"]) == ["a b/日本.mp4", "new.mp4"]
    assert contents(retriever) == {"short.mp4": 1, "long.mp4": 3}
    (videos / "long.mp4").unlink()
    assert retriever.prune() == ["long.mp4"]
    assert contents(retriever) == {"short.mp4": 1}


def test_an_update_equals_a_new_index(retriever: Retriever, model: Path, videos: Path, tmp_path: Path) -> None:
    """Longer than before, so that rows are updated and inserted; shorter, so that some are deleted."""
    retriever.index([videos])
    make_video(videos / "short.mp4", 7, seed=4)
    make_video(videos / "long.mp4", 1, seed=5)
    retriever.index([videos])
    fresh = Retriever.from_run(model, tmp_path / "fresh", "cpu")
    fresh.index([videos])
    assert contents(retriever) == contents(fresh)
    for path in WINDOWS:
        assert tokens(retriever, path) == tokens(fresh, path)


def test_unchanged_files_are_not_decoded(retriever: Retriever, videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    retriever.index([videos])
    copy = videos / "copy"
    shutil.copy(videos / "long.mp4", copy)
    copy.replace(videos / "long.mp4")  # other times, the same bytes
    monkeypatch.setattr("drl_fast.search.windows.sample_video", None)
    assert len(retriever.index([videos]).unchanged) == 3


def test_another_content_of_the_same_size(retriever: Retriever, videos: Path) -> None:
    retriever.index([videos])
    content = bytearray((videos / "long.mp4").read_bytes())
    content[-1] ^= 1
    (videos / "long.mp4").write_bytes(content)
    assert retriever.index([videos]).updated == ["long.mp4"]


def test_a_file_by_itself_and_odd_names(retriever: Retriever, tmp_path: Path) -> None:
    names = ["it's; DROP TABLE.mp4", "100% 'a' \"b\".webm.mp4", "жизнь 🎬.mp4", "[x].mp4", "a:b.mp4"]
    for seed, name in enumerate(names):
        make_video(tmp_path / "odd" / name, 1, seed)
    assert retriever.index([tmp_path / "odd" / name for name in names]).added == names
    assert len(retriever.search("a", k=100)) == len(names)
    make_video(tmp_path / "odd" / names[0], 2, 7)
    assert retriever.index(tmp_path / "odd").updated == [names[0]]
    assert retriever.remove(names[:3]) == names[:3]
    assert set(contents(retriever)) == set(names[3:])


def test_columns(retriever: Retriever, videos: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text('video,year,place\nshort,1999,Rome\n日本.mp4,2010,"Kyoto, Japan"\nnowhere.mp4,1,x\n', "utf-8")
    assert retriever.index([videos], table).unnamed == ["nowhere.mp4"]
    found = {hit.video: hit.columns for hit in retriever.search("x", k=100)}
    assert found["short.mp4"] == {"year": 1999, "place": "Rome"}
    assert found["a b/日本.mp4"] == {"year": 2010, "place": "Kyoto, Japan"}
    assert found["long.mp4"] == {"year": None, "place": None}
    # New values of known videos need no decoding, and an update of the video keeps them.
    assert retriever.index([videos], {"long.mp4": {"year": 2020}, "short": {"year": 1998}}).updated == []
    make_video(videos / "long.mp4", 3, seed=8)
    assert retriever.index([videos]).updated == ["long.mp4"]
    found = {hit.video: hit.columns for hit in retriever.search("x", k=100)}
    assert found["long.mp4"] == {"year": 2020, "place": None}
    assert found["short.mp4"] == {"year": 1998, "place": "Rome"}
    # Another column, later.
    retriever.index([videos], {"long.mp4": {"loud": True}})
    assert [hit.video for hit in retriever.search("x", where="loud")] == ["long.mp4"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"long.mp4": {"tokens": 1}}, "must have names of their own, got tokens"),
        ({"long.mp4": {"year": "soon"}}, "column year must be of type int64"),
        ({"long.mp4": {"x": 1}, "short.mp4": {"x": "a"}}, "must hold values of one type"),
        ("gone.csv", "must be a CSV file, not found"),
    ],
)
def test_columns_that_do_not_fit(retriever: Retriever, videos: Path, columns: object, message: str) -> None:
    retriever.index([videos], {"long.mp4": {"year": 2020}})
    before = open_index(retriever.uri).table.version
    with pytest.raises(ValueError, match=message):
        retriever.index([videos], columns)  # type: ignore[arg-type]
    assert open_index(retriever.uri).table.version == before


@pytest.mark.parametrize("content", ["name,year\na,1\n", "", "video,year\na,1,2\n"])
def test_tables_that_are_none(retriever: Retriever, videos: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(ValueError, match=r"t\.csv must (be a CSV file|have a column video)"):
        retriever.index([videos], tmp_path / "t.csv")
    assert not (tmp_path / "index").exists()


def test_a_moved_folder(retriever: Retriever, videos: Path, tmp_path: Path) -> None:
    """It is found by ``root``, and indexing it again encodes nothing."""
    retriever.index([videos])
    moved = tmp_path / "elsewhere" / "clips"
    moved.parent.mkdir()
    videos.rename(moved)
    hits = retriever.search("x", k=100, root=moved)
    assert all(hit.path.is_file() for hit in hits)
    assert {hit.video for hit in hits} == set(WINDOWS)
    with pytest.raises(ValueError, match="the videos' root must exist, not found"):
        retriever.prune()
    assert retriever.prune(moved) == []
    assert sorted(retriever.index([moved]).moved) == sorted(WINDOWS)
    assert all(hit.path.is_file() for hit in retriever.search("x", k=100))


def test_a_folder_beside_another(retriever: Retriever, videos: Path, tmp_path: Path) -> None:
    """A name that is taken is refused; a root above both renames what is there."""
    other = tmp_path / "other"
    make_video(other / "long.mp4", 2)
    retriever.index([videos])
    with pytest.raises(ValueError, match="must have a name of its own in the index"):
        retriever.index([other])
    assert contents(retriever) == WINDOWS
    assert retriever.index([other], root=tmp_path).added == ["other/long.mp4"]
    assert set(contents(retriever)) == {"other/long.mp4", *(f"videos/{name}" for name in WINDOWS)}
    # The root is the index's own now.
    assert len(retriever.index([videos]).unchanged) == 3
    assert all(hit.path.is_file() for hit in retriever.search("x", k=100))


def test_a_file_is_in_the_index_once(retriever: Retriever, videos: Path, tmp_path: Path) -> None:
    """Also with several roots, when a folder below one of them is indexed again."""
    other = make_video(tmp_path / "other" / "more.mp4", 2).parent
    retriever.index([videos])
    assert retriever.index([other]).added == ["more.mp4"]
    assert retriever.index([videos / "a b"]).unchanged == ["a b/日本.mp4"]
    before = contents(retriever)
    with pytest.raises(
        ValueError, match=r"日本\.mp4 must have one name in the index, which holds it as 'a b/日本\.mp4'"
    ):
        retriever.index([videos / "a b"], root=videos / "a b")
    assert contents(retriever) == before


def test_prune_with_several_roots(retriever: Retriever, videos: Path, tmp_path: Path) -> None:
    """A root that did not move keeps its videos; two that are gone are refused."""
    other = make_video(tmp_path / "other" / "more.mp4", 2).parent
    retriever.index([videos])
    retriever.index([other])
    moved = videos.rename(tmp_path / "moved")
    (moved / "short.mp4").unlink()
    assert retriever.prune(moved) == ["short.mp4"]
    other.rename(tmp_path / "away")
    with pytest.raises(ValueError, match=f"the videos' root must exist, not found: {videos}"):
        retriever.prune(moved)
    assert set(contents(retriever)) == {"more.mp4", *WINDOWS} - {"short.mp4"}


def test_a_column_without_values(retriever: Retriever, videos: Path) -> None:
    """It has no type yet, clears what is there, and later values bring a type."""
    retriever.index([videos], {"long.mp4": {"year": 2020, "note": None}})
    retriever.index([videos], {"long.mp4": {"year": None, "note": "x"}})
    assert [hit.columns for hit in retriever.search("x", where="note = 'x'", k=1)] == [{"year": None, "note": "x"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("video,a,a\nshort,1,2\n", "must name each column once, got 'a' twice"),
        ("video,a\nshort,1\nshort.mp4,2\n", r"must have one row for each video, got two for short\.mp4"),
    ],
)
def test_tables_that_say_two_things(
    retriever: Retriever, videos: Path, tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        retriever.index([videos], tmp_path / "t.csv")


def test_an_index_below_the_home_folder(
    model: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    Retriever.from_run(model, "~/home.index", "cpu").index([videos])
    assert (tmp_path / "home.index").is_dir()
    assert Retriever.open("~/home.index", "cpu").size() == (3, sum(WINDOWS.values()))


def test_unreadable_videos_are_listed(retriever: Retriever, videos: Path) -> None:
    (videos / "bad.mp4").write_bytes(b"no video")
    seen = []
    report = retriever.index([videos], on_unreadable=seen.append)
    assert [video.name for video in report.unreadable] == ["bad.mp4"]
    assert seen == report.unreadable
    assert contents(retriever) == WINDOWS


def test_nothing_readable_leaves_nothing(retriever: Retriever, tmp_path: Path) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    assert len(retriever.index([tmp_path / "bad.mp4"]).unreadable) == 1
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: [folder / "gone"], "must be files or folders, not found"),
        (lambda folder: [folder], "must hold videos"),
        (lambda folder: [], "must hold videos"),
    ],
)
def test_paths_without_videos(
    retriever: Retriever, tmp_path: Path, make: Callable[[Path], list[Path]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        retriever.index(make(tmp_path))
    assert not (tmp_path / "index").exists()


def test_a_path_outside_the_root_and_the_index(retriever: Retriever, videos: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must lie below the root"):
        retriever.index([videos], root=videos / "a b")
    assert not (tmp_path / "index").exists()
    retriever.index([videos])
    for path in ("nowhere.mp4", tmp_path / "gone", videos / "long"):
        with pytest.raises(ValueError, match="a path outside it"):
            retriever.remove([path])
    assert contents(retriever) == WINDOWS


def test_one_writer_at_a_time(retriever: Retriever, model: Path, videos: Path) -> None:
    retriever.index([videos])
    with retriever_module._one_writer(retriever.uri, retriever.processes):
        other = Retriever.open(retriever.uri, "cpu")
        with pytest.raises(ValueError, match="written by one command at a time"):
            other.index([videos])
        assert other.search("x")


def test_another_model_is_refused(retriever: Retriever, videos: Path, tmp_path: Path) -> None:
    retriever.index([videos])
    for name, options in {"weights": {"seed": 1}, "options": {"masking": "exclude"}, "layer": {"wti_arch": 3}}.items():
        other = save_model(tmp_path / name, **options)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="was made with another model"):
            Retriever.from_run(other, retriever.uri, "cpu")
    with pytest.raises(ValueError, match="was made with another model"):
        Retriever.from_clip(CLIP, None, retriever.uri, "cpu")
    assert Retriever.open(retriever.uri, "cpu").size() == (3, 8)


def test_a_model_that_changed_or_is_gone(tmp_path: Path, videos: Path) -> None:
    run = save_model(tmp_path / "run")
    index = tmp_path / "index"
    Retriever.from_run(run, index, "cpu").index([videos])
    save_model(run, seed=5)
    with pytest.raises(ValueError, match="was made with another model"):
        Retriever.open(index, "cpu")
    shutil.rmtree(run)
    with pytest.raises(ValueError, match=r"which cannot be loaded .*not found.*name the model with --model"):
        Retriever.open(index, "cpu")


def altered(
    folder: Path, change: Callable[[dict], object], schema: Callable[[pa.Schema], pa.Schema] = lambda x: x
) -> Path:
    """Write an index whose description and schema are not ours."""
    retriever = Retriever.from_clip(CLIP, None, device="cpu")
    about = json.loads(retriever.about.schema.metadata[KEY])
    change(about)
    made = schema(retriever.about.schema).with_metadata({KEY: json.dumps(about)})
    lancedb.connect(folder).create_table(lance.TABLE, schema=made)
    return folder


def halved(schema: pa.Schema) -> pa.Schema:
    return schema.set(schema.get_field_index("tokens"), pa.field("tokens", pa.list_(pa.float16(), 10)))


def in_float32(schema: pa.Schema) -> pa.Schema:
    field = schema.field("tokens")
    return schema.set(
        schema.get_field_index("tokens"), pa.field("tokens", pa.list_(pa.float32(), field.type.list_size))
    )


def test_another_version_or_shape_is_refused(tmp_path: Path) -> None:
    refused = [
        (altered(tmp_path / "v", lambda about: about.update(format="drl-fast index 9")), "must be of the format"),
        (altered(tmp_path / "k", lambda about: about.pop("rate")), "must describe its model"),
        (altered(tmp_path / "n", lambda about: about.update(extra=1)), "must describe its model"),
        (altered(tmp_path / "w", lambda about: None, halved), "got other columns or types"),
        (altered(tmp_path / "d", lambda about: None, in_float32), "got other columns or types"),
    ]
    for folder, message in refused:
        with pytest.raises(ValueError, match=message):
            Retriever.open(folder, "cpu")
        with pytest.raises(ValueError, match=message):
            Retriever.from_clip(CLIP, None, folder, "cpu")
    lancedb.connect(tmp_path / "other").create_table(lance.TABLE, [{"path": "a"}])
    with pytest.raises(ValueError, match="must be an index of drl-fast"):
        Retriever.open(tmp_path / "other", "cpu")
    with pytest.raises(ValueError, match="index not found"):
        Retriever.open(tmp_path / "nothing", "cpu")
    assert not (tmp_path / "nothing").exists()


def test_a_full_disk(retriever: Retriever, videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was committed stays, and the same call continues."""
    retriever.index([videos / "short.mp4"], root=videos)
    table = retriever._table
    assert table is not None
    add = type(table.table).add

    def full(*_: object) -> None:
        raise RuntimeError("lance error: LanceError(IO): No space left on device (os error 28), /rust/src/io.rs:1:2")

    monkeypatch.setattr(type(table.table), "add", full)
    with pytest.raises(OSError, match=r"^the index .* could not be written: the disk is full; make room"):
        retriever.index([videos])
    monkeypatch.setattr(type(table.table), "add", add)
    assert contents(retriever) == {"short.mp4": 1}
    retriever.index([videos])
    assert contents(retriever) == WINDOWS


def test_commits_are_repeated_after_a_conflict(
    retriever: Retriever, videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the newest version, a few times."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    retriever.index([videos])
    table, calls = open_index(retriever.uri), []

    def write() -> None:
        calls.append(table.table.version)
        if len(calls) < 3:
            retriever.remove([list(WINDOWS)[len(calls)]])
            raise RuntimeError("lance error: Retryable commit conflict for version 7")

    table._commit(write)
    assert len(calls) == 3
    assert calls == sorted(set(calls))

    def never() -> None:
        raise RuntimeError("lance error: Retryable commit conflict for version 7")

    with pytest.raises(OSError, match="could not be written: lance error: Retryable commit conflict"):
        table._commit(never)


def test_small_files_are_merged(retriever: Retriever, videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once there are many; the contents stay."""
    monkeypatch.setattr(retriever_module, "COMMIT_VIDEOS", 1)

    def files() -> int:
        return open_index(retriever.uri).table.stats()["fragment_stats"]["num_fragments"]

    retriever.index([videos])
    assert files() == 3
    monkeypatch.setattr(tables, "FILES", 3)
    make_video(videos / "new.mp4", 2)
    retriever.index([videos])
    assert files() == 1
    assert contents(retriever) == {**WINDOWS, "new.mp4": 1}


def test_times_alone_prove_nothing_is_needed(retriever: Retriever, videos: Path) -> None:
    """Size and time of modification stand for the content, as in make and rsync."""
    retriever.index([videos])
    other = videos / "other"
    content = bytearray((videos / "long.mp4").read_bytes())
    content[-1] ^= 1
    other.write_bytes(content)
    keep_times(other, videos / "long.mp4")
    other.replace(videos / "long.mp4")
    assert len(retriever.index([videos]).unchanged) == 3
