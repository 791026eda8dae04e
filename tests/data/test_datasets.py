"""Captions and videos from each data set's annotation files, and errors about broken files."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from drl_fast.data.datasets import DATASETS, load_split
from tests import releases
from tests.releases import RELEASES, pairs, videos, write_csv, write_json, write_lines

MSRVTT = Path(__file__).resolve().parents[3] / "shared" / "data" / "msrvtt"


FILES = {
    "msrvtt": ["video0.mp4", "video2.webm", "video7.mp4", "video9.mp4"],
    "msvd": ["-4wsuPCjDBc_5_15.avi", "b_1_2.avi", "c_1_2.avi", "d_1_2.avi"],
    "lsmdc": ["1_Film/1_Film_0-2.avi", "2_Film/2_Film_3-4.avi", "3_Film/3_Film_0-1.avi", "4_Film/4_Film_0-1.avi"],
    "vatex": ["Ptf_2VRj-V0_000122_000132.mp4", "b_000001_000011.mp4", "c_000001_000011.mp4"],
    "activitynet": ["QOlSCBRmfWY.mkv", "v_b.mp4", "c.webm"],
    "didemo": ["12@N00_34_ab.mov.mp4", "56@N00_78_cd.3gp", "9_c.mp4", "9_d.mp4"],
    "folder": ["a.mp4", "b/c.mp4"],
}
EVERYTHING = [("a.mp4", "one"), ("b/c.mp4", "two"), ("a.mp4", "three")]
EXPECTED = {
    ("msrvtt", "train"): [("video2", "a dog"), ("video0", "a cat"), ("video2", "the dog, again")],
    ("msrvtt", "val"): [("video7", 'a man, "talking"\n\u2028twice'), ("video9", "a girl")],
    ("msrvtt", "test"): [("video7", 'a man, "talking"\n\u2028twice'), ("video9", "a girl")],
    ("msvd", "train"): [
        ("b_1_2", "a dog"),
        ("-4wsuPCjDBc_5_15", "a squirrel eats"),
        ("-4wsuPCjDBc_5_15", "a zoë"),
    ],
    ("msvd", "val"): [("c_1_2", "rain")],
    ("msvd", "test"): [("d_1_2", "one"), ("d_1_2", "two"), ("d_1_2", "three")],
    ("lsmdc", "train"): [
        ("1_Film_0-2", 'He says "no", and "go.'),
        ("2_Film_3-4", "SOMEONE runs."),
        ("1_Film_0-2", "B."),
    ],
    ("lsmdc", "val"): [("3_Film_0-1", "She sits.")],
    ("lsmdc", "test"): [("4_Film_0-1", "They leave.")],
    ("vatex", "train"): [("Ptf_2VRj-V0_000122_000132", "a drum"), ("Ptf_2VRj-V0_000122_000132", "two drums")],
    ("vatex", "val"): [("b_000001_000011", "a fish")],
    ("vatex", "test"): [("c_000001_000011", "a lake"), ("c_000001_000011", "water")],
    ("activitynet", "train"): [("v_b", "Rain."), ("v_QOlSCBRmfWY", "A woman dances. Others join.")],
    ("activitynet", "val"): [("v_c", "A car. It stops.")],
    ("activitynet", "test"): [("v_c", "A car. It stops.")],
    ("didemo", "train"): [("12@N00_34_ab.mov", "a dog runs the dog sits"), ("56@N00_78_cd", "a baby")],
    ("didemo", "val"): [("9_c.avi", "snow")],
    ("didemo", "test"): [("9_d.mp4", "sun")],
    ("folder", "train"): EVERYTHING,
    ("folder", "val"): EVERYTHING,
    ("folder", "test"): EVERYTHING,
}


@pytest.mark.parametrize(("dataset", "part"), EXPECTED)
def test_parts(tmp_path: Path, dataset: str, part: str) -> None:
    """Captions are in the file's order, videos in the list's; each file has the video's name or stem."""
    RELEASES[dataset](tmp_path)
    split = load_split(dataset, part, videos=videos(tmp_path, *FILES[dataset]), annotations=tmp_path, strict=True)
    assert (split.dataset, split.part) == (dataset, part)
    assert pairs(split) == EXPECTED[dataset, part]
    assert split.left_out() == []
    for name, path in zip(split.names, split.videos, strict=True):
        assert path.is_file()
        assert path.name.startswith(name.removeprefix("v_").rpartition("/")[2].partition(".")[0]) or path.stem == name


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_vatex_as_released(tmp_path: Path, part: str) -> None:
    """The release's files with HGR's arrays give the same pairs."""
    releases.vatex_release(tmp_path)
    split = load_split("vatex", part, videos=videos(tmp_path, *FILES["vatex"]), annotations=tmp_path)
    assert pairs(split) == EXPECTED["vatex", part]


def test_every_data_set_is_tested() -> None:
    assert set(DATASETS) == set(RELEASES) == set(FILES)
    sizes = {name: (spec.max_words, spec.max_frames) for name, spec in DATASETS.items()}
    assert {name for name, size in sizes.items() if size == (64, 64)} == {"activitynet", "didemo"}
    assert {size for name, size in sizes.items() if name not in ("activitynet", "didemo")} == {(32, 12)}


@pytest.mark.skipif(not MSRVTT.is_dir(), reason="no MSR-VTT here")
def test_real_msrvtt(tmp_path: Path) -> None:
    """The list has 1,000 pairs; one of the clips is here."""
    split = load_split("msrvtt", "test", videos=MSRVTT, annotations=MSRVTT)
    assert pairs(split) == [("video7500", "a soccer team walking out on the field")]
    assert split.videos == (MSRVTT / "video7500.mp4",)
    assert len(split.missing) == 999
    with pytest.raises(ValueError, match=r"MSRVTT_data\.json, got .*without it"):
        load_split("msrvtt", "train", videos=MSRVTT, annotations=MSRVTT)
    shutil.copy(MSRVTT / "MSRVTT_train.9k.csv", tmp_path)
    write_json(tmp_path / "MSRVTT_data.json", {"sentences": [{"video_id": "video9", "caption": "x"}]})
    split = load_split("msrvtt", "train", videos=videos(tmp_path, "video9.mp4"), annotations=tmp_path)
    assert pairs(split) == [("video9", "x")]
    assert len(split.missing) == 8999


def test_absent_videos_are_counted_and_named(tmp_path: Path) -> None:
    releases.msrvtt(tmp_path)
    folder = videos(tmp_path, "video2.mp4")
    split = load_split("msrvtt", "train", videos=folder, annotations=tmp_path)
    assert pairs(split) == [("video2", "a dog"), ("video2", "the dog, again")]
    assert split.missing == ("video0",)
    assert split.left_out() == ["1 of 2 videos listed have no file: video0"]
    with pytest.raises(ValueError, match=r"must hold all the videos .*1 of 2 videos listed have no file: video0"):
        load_split("msrvtt", "train", videos=folder, annotations=tmp_path, strict=True)


def test_many_absent_videos_are_named_in_part(tmp_path: Path) -> None:
    rows = [["k", "v", f"video{i}", "x"] for i in range(50)]
    write_csv(tmp_path / "MSRVTT_JSFUSION_test.csv", ["key", "vid_key", "video_id", "sentence"], rows)
    split = load_split("msrvtt", "test", videos=videos(tmp_path, "video3.mp4"), annotations=tmp_path)
    assert split.left_out() == [
        "49 of 50 videos listed have no file: video0, video1, video2, video4, video5 and 44 more"
    ]


def test_empty_captions_are_counted(tmp_path: Path) -> None:
    releases.vatex(tmp_path)
    write_json(tmp_path / "ref_captions.json", {"a": ["", "one", " \n"], "b": [" "], "c": [], "d": ["two"], "x": [""]})
    write_lines(tmp_path / "test_list.txt", "abcde")
    folder = videos(tmp_path, *(f"{name}.mp4" for name in "abcd"))
    split = load_split("vatex", "test", videos=folder, annotations=tmp_path)
    assert pairs(split) == [("a", "one"), ("d", "two")]
    assert (split.missing, split.uncaptioned, split.empty_captions) == (("e",), ("b", "c"), 3)
    assert len(split.left_out()) == 3
    (folder / "e.mp4").touch()
    with pytest.raises(ValueError, match=r"3 of 5 videos listed have no caption: b, c, e"):
        load_split("vatex", "test", videos=folder, annotations=tmp_path, strict=True)


def test_split_column(tmp_path: Path) -> None:
    rows = [["a.mp4", "one", "train"], ["b.mp4", "two", " test "], ["a.mp4", "three", "train"], ["b.mp4", "4", "test"]]
    write_csv(tmp_path / "captions.csv", ["video", "caption", "split"], rows)
    folder = videos(tmp_path, "a.mp4", "b.mp4")
    train, test = (load_split("folder", part, videos=folder, annotations=tmp_path) for part in ("train", "test"))
    assert pairs(train) == [("a.mp4", "one"), ("a.mp4", "three")]
    assert pairs(test) == [("b.mp4", "two"), ("b.mp4", "4")]
    assert pairs(load_split("folder", "val", videos=folder, annotations=tmp_path)) == pairs(test)
    write_csv(tmp_path / "captions.csv", ["video", "caption", "split"], rows[::2])
    with pytest.raises(ValueError, match="must have captions whose split is val, got only train; mark some"):
        load_split("folder", "val", videos=folder, annotations=tmp_path)
    write_csv(tmp_path / "captions.csv", ["video", "caption", "split"], [*rows, ["a.mp4", "five", "dev"]])
    with pytest.raises(
        ValueError, match=r"caption 5, must have one of the splits train, val, test, since others do, got 'dev'"
    ):
        load_split("folder", "train", videos=folder, annotations=tmp_path)


def test_split_key_of_json_lines(tmp_path: Path) -> None:
    (tmp_path / "captions.jsonl").write_text(
        '{"video": "a.mp4", "caption": "one", "split": "val"}\n{"video": "a.mp4", "caption": "two", "split": "train"}\n'
    )
    split = load_split("folder", "val", videos=videos(tmp_path, "a.mp4"), annotations=tmp_path)
    assert pairs(split) == [("a.mp4", "one")]


class Evil:
    def __reduce__(self) -> tuple:
        return print, ("run",)


def lines(name: str, *content: str) -> Callable[[Path], object]:
    return lambda folder: write_lines(folder / name, content)


def entry(name: str, value: object) -> Callable[[Path], object]:
    return lambda folder: write_json(folder / name, value)


def pickled(value: object) -> Callable[[Path], object]:
    return lambda folder: (folder / "raw-captions.pkl").write_bytes(pickle.dumps(value))


def array(value: np.ndarray) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        (folder / "test_list.txt").unlink()
        np.save(folder / "tst_names.npy", value)

    return write


def gone(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def raw(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(data)


RELEASED = "; take the file as it was released"
TEST_CSV = "MSRVTT_JSFUSION_test.csv"


@pytest.mark.parametrize(
    ("dataset", "part", "spoil", "message"),
    [
        ("msrvtt", "test", gone(TEST_CSV), f"annotations must hold {TEST_CSV}, got .* without it; copy it there"),
        ("msrvtt", "train", gone("MSRVTT_data.json"), r"annotations must hold MSRVTT_data\.json, got "),
        ("vatex", "test", gone("test_list.txt"), r"must hold test_list\.txt or tst_names\.npy or public_split/tst_nam"),
        ("vatex", "test", gone("ref_captions.json"), r"or vatex_validation_v1\.0\.json, got "),
        ("msrvtt", "test", lines(TEST_CSV, "video,sentence", "a,b"), "columns video_id, sentence, got video, sentence"),
        ("msrvtt", "test", lines(TEST_CSV), "must have the columns video_id, sentence, got an empty file"),
        ("msrvtt", "test", lines(TEST_CSV, "video_id,sentence"), "must list at least one video, got none"),
        (
            "msrvtt",
            "test",
            lines(TEST_CSV, "video_id,sentence", "a,b", "c"),
            "line 3 must have 2 fields .*, got 1",
        ),
        ("msrvtt", "test", lines(TEST_CSV, "video_id,sentence", "a,b,c"), r"line 2 must have 2 fields .*, got 3"),
        (
            "msrvtt",
            "test",
            lines(TEST_CSV, "video_id,sentence", 'a,"b'),
            "line 2 must be comma-separated text, got: ",
        ),
        ("msrvtt", "test", lines(TEST_CSV, "video_id,sentence", "a,b", "a,c"), "each video once, got 'a' twice"),
        ("msrvtt", "test", raw(TEST_CSV, b"video_id,sentence\na,\xff\n"), "must be UTF-8 text, got .*; save it as"),
        ("msrvtt", "train", lines("MSRVTT_train.9k.csv", "video_id", "a", "a"), r"9k\.csv must list each video once"),
        ("msrvtt", "train", lines("MSRVTT_data.json", "{"), r"MSRVTT_data\.json must be JSON, got Expecting"),
        ("msrvtt", "train", entry("MSRVTT_data.json", []), r"MSRVTT_data\.json must be a dict, got list of 0"),
        ("msrvtt", "train", entry("MSRVTT_data.json", {"a": 1}), "must have the key 'sentences', got 'a'" + RELEASED),
        ("msrvtt", "train", entry("MSRVTT_data.json", {"sentences": {}}), "json, sentences must be a list, got dict"),
        ("msrvtt", "train", entry("MSRVTT_data.json", {"sentences": [1]}), "json, sentence 1 must be a dict, got int"),
        (
            "msrvtt",
            "train",
            entry("MSRVTT_data.json", {"sentences": [{"video_id": "a", "caption": None}]}),
            "sentence 1, caption must be a str, got NoneType None",
        ),
        (
            "msrvtt",
            "train",
            entry("MSRVTT_data.json", {"sentences": [{"video_id": "other", "caption": "x"}]}),
            r"a caption for the 2 videos .*\(video0, video2\), but the captions in .* describe other; take both",
        ),
        ("msvd", "test", lines("test_list.txt", "a", "b", "a"), r"test_list\.txt must list each video once, got 'a'"),
        ("msvd", "test", lines("test_list.txt", ""), "must list at least one video, got none"),
        ("msvd", "test", pickled({"d_1_2": Evil()}), "pickle of plain lists.*got an object of builtins.print"),
        ("msvd", "test", raw("raw-captions.pkl", b"no pickle"), r"raw-captions\.pkl must be a pickle of plain lists"),
        ("msvd", "test", raw("raw-captions.pkl", b""), "must be a pickle of plain lists.*got Ran out of input"),
        ("msvd", "test", pickled([1]), "must be a dict, got list of 1"),
        ("msvd", "test", pickled({"d_1_2": "text"}), "entry 'd_1_2' must be a list, got str 'text'"),
        ("msvd", "test", pickled({"d_1_2": ["text"]}), "entry 'd_1_2' must be a list, got str 'text'"),
        ("msvd", "test", pickled({"d_1_2": [[1]]}), "entry 'd_1_2', 1 must be a str, got int 1"),
        ("msvd", "test", pickled({3: [["a"]]}), "entry 3 must be a str, got int 3"),
        (
            "lsmdc",
            "val",
            lines("LSMDC16_annos_val.csv", "a,b,c"),
            "line 1 must have 6 tab-separated fields, .* got 1; take the file",
        ),
        (
            "lsmdc",
            "val",
            lines("LSMDC16_annos_val.csv", "a\tb\tc\td\te\tf\tg"),
            "have 6 tab-separated fields, .* got 7; take the",
        ),
        ("lsmdc", "val", lines("LSMDC16_annos_val.csv", ""), "must list at least one video"),
        ("vatex", "test", entry("ref_captions.json", {"c": "text"}), "entry 'c' must be a list, got str 'text'"),
        ("vatex", "test", lines("ref_captions.json", '{"a": [], "a": []}'), "must hold each key once, got 'a' twice"),
        ("vatex", "test", array(np.array(["c"], dtype=object)), r"tst_names\.npy must be an array of strings, got: "),
        ("vatex", "test", array(np.zeros(3)), r"array of strings, got: float64 of shape \(3,\); write the ids to a"),
        (
            "vatex",
            "test",
            array(np.array([b"\xff"])),
            "must be an array of strings, got: 'utf-8' codec",
        ),
        ("vatex", "test", array(np.array([["a"]])), r"got: <U1 of shape \(1, 1\)"),
        ("activitynet", "val", entry("val_ids.json", {"v_c": 1}), r"val_ids\.json must be a list, got dict"),
        ("activitynet", "val", entry("val_ids.json", ["v_c", 1]), r"val_ids\.json, id 2 must be a str, got int 1"),
        ("activitynet", "val", entry("val_1.json", {"v_c": {"duration": 1}}), "'v_c' must have the key 'sentences'"),
        ("activitynet", "val", entry("val_1.json", {"v_c": []}), "entry 'v_c' must be a dict, got list of 0"),
        ("activitynet", "val", entry("val_1.json", {"v_c": {"sentences": [1]}}), "sentences, 1 must be a str"),
        ("activitynet", "val", entry("val_1.json", {"v_c": {"sentences": [" "]}}), "must have a caption for the 1 vid"),
        ("didemo", "test", entry("test_data.json", [{"video": "9_d.mp4"}]), "entry 1 must have the key 'description'"),
        ("didemo", "test", entry("test_data.json", {}), r"test_data\.json must be a list, got dict"),
    ],
)
def test_broken_annotations(
    tmp_path: Path, dataset: str, part: str, spoil: Callable[[Path], object], message: str
) -> None:
    """The error names the file, the entry and its value, and says what to do."""
    RELEASES[dataset](tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        load_split(dataset, part, videos=videos(tmp_path, *FILES[dataset]), annotations=tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "; " in str(caught.value)


def test_python_2_pickle(tmp_path: Path) -> None:
    """Strings of Python 2 are bytes in Python 3."""
    releases.msvd(tmp_path)
    (tmp_path / "raw-captions.pkl").write_bytes(b"(dp0\nS'd_1_2'\np1\n(lp2\n(lp3\nS'a'\naS'Zo\\xc3\\xab'\naas.")
    split = load_split("msvd", "test", videos=videos(tmp_path, "d_1_2.avi"), annotations=tmp_path)
    assert split.captions == ("a Zoë",)


@pytest.mark.filterwarnings("error")
def test_python_2_array(tmp_path: Path) -> None:
    """Strings are bytes, and the shape in the header ends in L."""
    releases.vatex_release(tmp_path)
    path = tmp_path / "public_split" / "tst_names.npy"
    np.save(path, np.array([b"c_000001_000011"]))
    data = path.read_bytes()
    path.write_bytes(data.replace(b"(1,), }", b"(1L,),}"))
    assert path.read_bytes() != data
    split = load_split("vatex", "test", videos=videos(tmp_path, *FILES["vatex"]), annotations=tmp_path)
    assert pairs(split) == EXPECTED["vatex", "test"]


@pytest.mark.parametrize(
    ("dataset", "part", "name"),
    [
        ("msrvtt", "train", "MSRVTT_train.9k.csv"),
        ("lsmdc", "train", "LSMDC16_annos_training.csv"),
        ("vatex", "test", "test_list.txt"),
        ("vatex", "test", "ref_captions.json"),
    ],
)
def test_traces_of_other_programs(tmp_path: Path, dataset: str, part: str, name: str) -> None:
    """A byte order mark, Windows line ends and blank lines are accepted."""
    RELEASES[dataset](tmp_path)
    data = (tmp_path / name).read_bytes().replace(b"\r\n", b"\n")
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n\r\n"))
    split = load_split(dataset, part, videos=videos(tmp_path, *FILES[dataset]), annotations=tmp_path)
    assert pairs(split) == EXPECTED[dataset, part]


@pytest.mark.parametrize(
    ("files", "there"),
    [
        (["other.mp4", "more.avi"], r"with other videos, such as .*\.(mp4|avi) \(of 2\)"),
        (["x.txt"], "no video file"),
    ],
)
def test_no_listed_video_exists(tmp_path: Path, files: list[str], there: str) -> None:
    releases.msrvtt(tmp_path)
    with pytest.raises(
        ValueError, match=rf"videos must hold the videos that msrvtt's test part lists \(video7, .*{there}; "
    ):
        load_split("msrvtt", "test", videos=videos(tmp_path, *files), annotations=tmp_path)


def test_bad_arguments(tmp_path: Path) -> None:
    releases.msrvtt(tmp_path)
    folder = videos(tmp_path, *FILES["msrvtt"])
    with pytest.raises(ValueError, match=r"dataset must be one of 'msrvtt', .*, got 'youcook'"):
        load_split("youcook", "test", videos=folder, annotations=tmp_path)
    with pytest.raises(ValueError, match="part must be one of 'train', 'val', 'test', got 'dev'"):
        load_split("msrvtt", "dev", videos=folder, annotations=tmp_path)
    with pytest.raises(ValueError, match=r"annotations folder not found: .*nowhere; it must hold"):
        load_split("msrvtt", "test", videos=folder, annotations=tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"videos folder not found: .*nowhere; check the path"):
        load_split("msrvtt", "test", videos=tmp_path / "nowhere", annotations=tmp_path)
