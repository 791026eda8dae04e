"""A folder's captions file: both formats, traces of spreadsheets, and errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from drl_fast.data.folder import FIX, Caption, read_captions

ROWS = [Caption("a.mp4", 'a "red" cross, moving'), Caption("b c.mp4", "Zoë läuft 跑"), Caption("a.mp4", "again")]


def as_csv(rows: list[Caption]) -> str:
    quoted = [",".join('"' + cell.replace('"', '""') + '"' for cell in row) for row in rows]
    return "\n".join(["video,caption", *quoted, ""])


def as_jsonl(rows: list[Caption]) -> str:
    return "".join(json.dumps({"video": row.video, "caption": row.text, "extra": 1}) + "\n" for row in rows)


@pytest.mark.parametrize(("name", "content"), [("captions.csv", as_csv(ROWS)), ("captions.jsonl", as_jsonl(ROWS))])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_both_forms(tmp_path: Path, name: str, content: str, mark: str, newline: str) -> None:
    """Captions are in the file's order. A byte order mark, Windows line ends and blank lines are accepted."""
    (tmp_path / name).write_bytes((mark + content + "\n").replace("\n", newline).encode())
    assert read_captions(tmp_path) == ROWS
    assert read_captions(str(tmp_path)) == ROWS


def test_columns_in_any_order_and_spaces_around_values(tmp_path: Path) -> None:
    (tmp_path / "captions.csv").write_text("id,caption,video\n7, two dogs , d.mp4 \n")
    assert read_captions(tmp_path) == [Caption("d.mp4", "two dogs", id="7")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("captions.csv", "", "captions.csv must have the columns video, caption, got an empty file"),
        ("captions.csv", "video,caption\n", "captions.csv must hold at least one caption, got none"),
        ("captions.jsonl", "\n\n", "captions.jsonl must hold at least one caption, got none"),
        ("captions.csv", "video,text\na.mp4,x\n", "must have the columns video, caption, got video, text; correct"),
        (
            "captions.csv",
            "video;caption\na.mp4;x\n",
            "must have the columns video, caption, got video;caption; c",
        ),
        (
            "captions.csv",
            "video,caption\na.mp4,x\nb.mp4\n",
            r"line 3 must have 2 fields \(video, caption\), got 1",
        ),
        (
            "captions.csv",
            "video,caption\na.mp4,a dog, a boat\n",
            r"line 2 must have 2 fields .*, got 3; put a",
        ),
        ("captions.csv", 'video,caption\na.mp4,x\nb.mp4,"two\nc.mp4,three\n', "line 3 must be comma.*unexpected end"),
        ("captions.csv", 'video,caption\na.mp4,"stop" sign\n', "line 2 must be comma.*expected after"),
        ("captions.csv", "video,caption,caption\na.mp4,x,y\n", "must hold each column once, got 'caption' twice"),
        ("captions.csv", f"video,caption\na.mp4,{'x' * 140_000}\n", "line 2 must be.*field larger than field limit"),
        ("captions.csv", "video,caption\na.mp4,  \n", "caption 1 must have.*video='a.mp4', caption='  '"),
        ("captions.csv", "video,caption\n,x\n", "caption 1 must have.*video='', caption='x'"),
        ("captions.jsonl", '{"video": "a.mp4"}\n', "caption 1 must have.*caption=None among columns video;"),
        ("captions.jsonl", '{"video": "a.mp4", "caption": ["x"]}\n', r"caption 1 must have.*caption=\['x'\]"),
        (
            "captions.jsonl",
            '{"video": "a.mp4", "caption": "x"}\n{"video": \n',
            "line 2 must be JSON, got Expect",
        ),
        (
            "captions.jsonl",
            '{"video": "a.mp4", "caption": "x", "caption": "y"}\n',
            "line 1 must hold each key once, got 'caption' twice",
        ),
        ("captions.jsonl", '\n["a.mp4", "x"]\n', "line 2 must be a JSON object, got list"),
    ],
)
def test_broken_file(tmp_path: Path, name: str, content: str, message: str) -> None:
    """The error names the file, the caption or line, its value, and the expected format."""
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_captions(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert str(caught.value).endswith(FIX)


@pytest.mark.parametrize(("name", "content"), [("captions.csv", as_csv(ROWS)), ("captions.jsonl", '{"video": "é"}')])
@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_not_utf8(tmp_path: Path, name: str, content: str, encoding: str) -> None:
    (tmp_path / name).write_bytes(content.replace("跑", "").encode(encoding))
    with pytest.raises(ValueError, match=rf"{name} must be UTF-8 text, got .*; save it as UTF-8"):
        read_captions(tmp_path)


def test_no_captions_file_and_two(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must hold one of captions\.csv and captions\.jsonl, got neither; put"):
        read_captions(tmp_path)
    (tmp_path / "captions.csv").write_text(as_csv(ROWS))
    (tmp_path / "captions.jsonl").write_text(as_jsonl(ROWS))
    with pytest.raises(ValueError, match=r"got captions\.csv and captions\.jsonl; put"):
        read_captions(tmp_path)


def test_the_captions_file_itself(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text(as_csv(ROWS))
    assert read_captions(tmp_path / "mine.csv") == ROWS


@pytest.mark.parametrize("name", ["missing", "captions.txt"])
def test_no_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "captions.txt").write_text(as_csv(ROWS))
    with pytest.raises(
        ValueError,
        match=f"captions folder not found: .*{name}; it is --annotations, or else --videos",
    ):
        read_captions(tmp_path / name)
