"""One reader per data set, for the annotation files that the public codes distribute.

A reader takes the annotations folder and the part ("train", "val" or "test"); it returns ids and captions.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from .annotations import (
    AS_RELEASED,
    Listing,
    checked,
    field,
    find_file,
    pairs,
    paragraph,
    read_ids,
    read_json,
    read_pickle,
    read_table,
    read_text,
    strings,
    unique,
)
from .folder import Caption, read_captions

PARTS = ("train", "val", "test")


def msrvtt(annotations: Path, part: str) -> Listing:
    """Read 1k-A: 9,000 training clips, each caption a sample; 1,000 pairs that serve as val and test."""
    if part != "train":
        path = find_file(annotations, "MSRVTT_JSFUSION_test.csv")
        captions = [(row["video_id"].strip(), row["sentence"]) for row in read_table(path, ("video_id", "sentence"))]
        return Listing(unique((name for name, _ in captions), path), captions)
    path = find_file(annotations, "MSRVTT_train.9k.csv")
    ids = unique((row["video_id"].strip() for row in read_table(path, ("video_id",))), path)
    path = find_file(annotations, "MSRVTT_data.json")
    sentences = field(read_json(path, dict), "sentences", list, str(path))
    return Listing(ids, pairs(sentences, "video_id", "caption", f"{path}, sentence"))


def msvd(annotations: Path, part: str) -> Listing:
    """Read about 40 captions per clip, each a list of words."""
    ids = read_ids(find_file(annotations, f"{part}_list.txt"))
    path = find_file(annotations, "raw-captions.pkl")
    captions = []
    for name, sentences in read_pickle(path).items():
        place = f"{path}, entry {name!r}"
        checked(name, str, place)
        captions += [(name, " ".join(strings(words, place))) for words in checked(sentences, list, place)]
    return Listing(ids, captions)


def lsmdc(annotations: Path, part: str) -> Listing:
    """Read one clip per line, tab-separated, without a header; a few clips have two lines."""
    names = {
        "train": "LSMDC16_annos_training.csv",
        "val": "LSMDC16_annos_val.csv",
        "test": "LSMDC16_challenge_1000_publictect.csv",
    }
    path = find_file(annotations, names[part])
    captions = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        fields = line.rstrip("\r").split("\t")
        if len(fields) != 6:
            raise ValueError(
                f"{path}, line {number} must have 6 tab-separated fields, the clip's name first and the sentence "
                f"last, got {len(fields)}; {AS_RELEASED}"
            )
        captions.append((fields[0].strip(), fields[5]))
    return Listing(unique(dict.fromkeys(name for name, _ in captions), path), captions)


def vatex(annotations: Path, part: str) -> Listing:
    """Read ten captions per clip of HGR's split, from HGR's own files or the release's."""
    short = {"train": "trn", "val": "val", "test": "tst"}[part]
    ids = read_ids(find_file(annotations, f"{part}_list.txt", f"{short}_names.npy", f"public_split/{short}_names.npy"))
    # HGR's validation and test clips both come from the release's validation part.
    release = "vatex_training_v1.0.json" if part == "train" else "vatex_validation_v1.0.json"
    path = find_file(annotations, "ref_captions.json", "annotation/RET/ref_captions.json", release)
    captions = []
    if path.name == release:
        for number, entry in enumerate(read_json(path, list), start=1):
            place = f"{path}, entry {number}"
            name = field(entry, "videoID", str, place)
            captions += [(name, text) for text in strings(field(entry, "enCap", list, place), f"{place}, enCap")]
    else:
        for name, sentences in read_json(path, dict).items():
            captions += [(name, text) for text in strings(sentences, f"{path}, entry {name!r}")]
    return Listing(ids, captions)


def activitynet(annotations: Path, part: str) -> Listing:
    """Read one paragraph per video, its sentences joined; the first validation part serves as val and test."""
    ids_name, captions_name = ("train_ids.json", "train.json") if part == "train" else ("val_ids.json", "val_1.json")
    ids = read_ids(find_file(annotations, ids_name))
    path = find_file(annotations, captions_name)
    captions = []
    for name, entry in read_json(path, dict).items():
        place = f"{path}, entry {name!r}"
        sentences = strings(field(entry, "sentences", list, place), f"{place}, sentences")
        captions.append((name, paragraph(sentences)))
    return Listing(ids, captions)


def didemo(annotations: Path, part: str) -> Listing:
    """Read one paragraph per video, its descriptions joined in the file's order."""
    ids = read_ids(find_file(annotations, f"{part}_list.txt"))
    path = find_file(annotations, f"{part}_data.json")
    described = defaultdict(list)
    for name, text in pairs(read_json(path, list), "video", "description", f"{path}, entry"):
        described[name].append(text)
    return Listing(ids, [(name, paragraph(sentences)) for name, sentences in described.items()])


def folder(annotations: Path, part: str) -> Listing:
    """Read a user's captions: all of them without a ``split`` column; val and test stand in for each other."""
    captions, stands_in = captions_of_part(read_captions(annotations), annotations, part)
    return listing_of(captions, stands_in)


def listing_of(captions: list[Caption], stands_in: bool = False) -> Listing:
    """List captions and the videos that they name."""
    pairs = [(caption.video, caption.text) for caption in captions]
    return Listing(list(dict.fromkeys(video for video, _ in pairs)), pairs, stands_in=stands_in)


def captions_of_part(captions: list[Caption], annotations: Path, part: str) -> tuple[list[Caption], bool]:
    """Return a part's captions, and whether they are those of another part that stands in for it."""
    wanted = part
    present = dict.fromkeys(caption.split for caption in captions)
    if any(present):
        for number, caption in enumerate(captions, start=1):
            if caption.split not in PARTS:
                raise ValueError(
                    f"the captions file in {annotations}, caption {number}, must have one of the splits "
                    f"{', '.join(PARTS)}, since others do, got {caption.split!r}; correct it"
                )
        wanted = part if part in present else {"val": "test", "test": "val"}.get(part, part)
        captions = [caption for caption in captions if caption.split == wanted]
        if not captions:
            found = ", ".join(present)
            raise ValueError(f"{annotations} must have captions whose split is {part}, got only {found}; mark some")
    return captions, wanted != part
