"""Write tiny annotation files in the format of each data set's public release."""

from __future__ import annotations

import csv
import json
import pickle
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from drl_fast.data.split import Split


def write_json(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path


def write_lines(path: Path, lines: Iterable[str]) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def videos(folder: Path, *names: str) -> Path:
    """Write files with the videos' names; tests never decode them."""
    for name in names:
        (folder / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "videos" / name).write_bytes(b"video")
    return folder / "videos"


def pairs(split: Split) -> list[tuple[str, str]]:
    """Return (video name, caption) of every caption."""
    assert len(split.captions) == len(split.owner)
    assert len(split.videos) == len(split.names)
    return [(split.names[owner], text) for owner, text in zip(split.owner, split.captions, strict=True)]


def msrvtt(folder: Path) -> None:
    write_csv(folder / "MSRVTT_train.9k.csv", ["video_id"], [["video0"], ["video2"]])
    pairs = [("video2", "a dog"), ("video0", "a cat"), ("video2", "the dog, again"), ("video9", "of the test part")]
    sentences = [{"video_id": name, "caption": text, "sen_id": i} for i, (name, text) in enumerate(pairs)]
    write_json(folder / "MSRVTT_data.json", {"videos": [{"video_id": "video0"}], "sentences": sentences})
    rows = [["ret0", "msr7", "video7", 'a man, "talking"\n\u2028twice'], ["ret1", "msr9", "video9", "a girl"]]
    write_csv(folder / "MSRVTT_JSFUSION_test.csv", ["key", "vid_key", "video_id", "sentence"], rows)


def msvd(folder: Path) -> None:
    write_lines(folder / "train_list.txt", ["-4wsuPCjDBc_5_15", "b_1_2"])
    write_lines(folder / "val_list.txt", ["c_1_2"])
    write_lines(folder / "test_list.txt", ["d_1_2", ""])
    captions = {
        "b_1_2": [["a", "dog"]],
        "-4wsuPCjDBc_5_15": [["a", "squirrel", "eats"], ["a", "zoë"]],
        "c_1_2": [["rain"]],
        "d_1_2": [["one"], ["two"], ["three"]],
    }
    (folder / "raw-captions.pkl").write_bytes(pickle.dumps(captions, protocol=2))


def lsmdc(folder: Path) -> None:
    def line(clip: str, sentence: str) -> str:
        return "\t".join([clip, "00.00.51.926", "00.00.54.129", "00.00.51.926", "00.00.54.129", sentence])

    train = [
        line("1_Film_0-2", 'He says "no", and "go.'),
        line("2_Film_3-4", "SOMEONE runs."),
        line("1_Film_0-2", "B."),
    ]
    write_lines(folder / "LSMDC16_annos_training.csv", train)
    write_lines(folder / "LSMDC16_annos_val.csv", [line("3_Film_0-1", "She sits.")])
    write_lines(folder / "LSMDC16_challenge_1000_publictect.csv", [line("4_Film_0-1", "They leave.")])


VATEX = {
    "Ptf_2VRj-V0_000122_000132": ["a drum", "two drums"],
    "b_000001_000011": ["a fish"],
    "c_000001_000011": ["a lake", "water"],
}


def vatex(folder: Path) -> None:
    """Write captions in HGR's format, with lists of ids."""
    write_json(folder / "ref_captions.json", VATEX)
    for part, name in zip(("train", "val", "test"), VATEX, strict=True):
        write_lines(folder / f"{part}_list.txt", [name])


def vatex_release(folder: Path) -> None:
    """Write captions in the release's format, with HGR's arrays of ids."""
    entries = [{"videoID": name, "enCap": texts, "chCap": ["鼓"]} for name, texts in VATEX.items()]
    write_json(folder / "vatex_training_v1.0.json", entries[:1])
    write_json(folder / "vatex_validation_v1.0.json", entries[1:])
    (folder / "public_split").mkdir()
    for part, name in zip(("trn", "val", "tst"), VATEX, strict=True):
        np.save(folder / "public_split" / f"{part}_names.npy", np.array([name]))


def activitynet(folder: Path) -> None:
    def entry(*sentences: str) -> dict:
        return {"duration": 9.0, "timestamps": [[0, 1]] * len(sentences), "sentences": list(sentences)}

    write_json(folder / "train_ids.json", ["v_QOlSCBRmfWY", "v_b"])
    write_json(folder / "val_ids.json", ["v_c"])
    train = {
        "v_b": entry("Rain."),
        "v_QOlSCBRmfWY": entry("A woman dances.", " Others join. ", ""),
        "v_x": entry("No."),
    }
    write_json(folder / "train.json", train)
    write_json(folder / "val_1.json", {"v_c": entry("A car.", "It stops.")})


def didemo(folder: Path) -> None:
    def entry(video: str, text: str) -> dict:
        return {"video": video, "description": text, "times": [[0, 0]], "annotation_id": 1}

    names = {"train": ["12@N00_34_ab.mov", "56@N00_78_cd"], "val": ["9_c.avi"], "test": ["9_d.mp4"]}
    for part, listed in names.items():
        write_lines(folder / f"{part}_list.txt", listed)
    first, second = names["train"]
    entries = [entry(first, "a dog runs"), entry(second, "a baby"), entry(first, "the dog sits"), entry("other", "no")]
    write_json(folder / "train_data.json", entries)
    write_json(folder / "val_data.json", [entry("9_c.avi", "snow")])
    write_json(folder / "test_data.json", [entry("9_d.mp4", "sun")])


def folder(folder: Path) -> None:
    write_csv(folder / "captions.csv", ["video", "caption"], [["a.mp4", "one"], ["b/c.mp4", "two"], ["a.mp4", "three"]])


RELEASES: dict[str, Callable[[Path], None]] = {
    "msrvtt": msrvtt,
    "msvd": msvd,
    "lsmdc": lsmdc,
    "vatex": vatex,
    "activitynet": activitynet,
    "didemo": didemo,
    "folder": folder,
}
