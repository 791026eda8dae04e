"""Search: scores are the model's own, hits are merged, words have frames, bad input is refused."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import drl_fast
from drl_fast import Retriever
from drl_fast.data.loading import tokenize
from drl_fast.data.video import Sampling, read_video
from drl_fast.model.weight_files import weights_hash
from drl_fast.search import retriever as retriever_module
from drl_fast.search import scoring
from drl_fast.search import table as tables
from drl_fast.search.model import load_run
from drl_fast.search.retriever import Hit
from drl_fast.search.scoring import Best, merge_overlapping

from .videos import CLIP, INPUTS, WINDOWS, make_video, save_model

QUERY = "a snowboarder turns red, then blue"


def all_scores(retriever: Retriever, folder: Path, query: str) -> dict[tuple[str, float], float]:
    """Score every window with the model's own similarity, from the files."""
    model, found = retriever.model, {}
    ids = tokenize(retriever.tokenizer, [query], retriever.about.max_words)
    with torch.no_grad():
        text, text_mask = model.encode_text(ids)
        for name in WINDOWS:
            frames, mask = read_video(folder / name, Sampling(rate=2, max_frames=12, size=32))
            real = int(mask.sum())
            for first in range(0, max(real - 4, 0) + 1, 2):
                part, real_part = frames[None, first : first + 4], mask[None, first : first + 4]
                video = model.encode_video(part, real_part)
                found[name, first / 2] = float(model.similarity(text, video, text_mask, real_part))
    return found


def merged(scores: dict[tuple[str, float], float]) -> list[tuple[str, float]]:
    """Keep the best of windows of 2 s that overlap, the plain way."""
    kept: list[tuple[str, float]] = []
    for name, start in sorted(scores, key=lambda key: -scores[key]):
        if all(other != name or abs(start - begin) >= 2 for other, begin in kept):
            kept.append((name, start))
    return kept


@pytest.mark.parametrize("interaction", ["wti", "ti", "dp", "hi", "mlp", "xti"])
@pytest.mark.parametrize("temporal", [None, "seqTransf"])
def test_scores_are_the_models_own(made_videos: Path, tmp_path: Path, interaction: str, temporal: str | None) -> None:
    model = save_model(tmp_path / "m", interaction=interaction, temporal=temporal)
    retriever = Retriever.from_run(model, tmp_path / "index", "cpu")
    retriever.index([made_videos])
    expected = all_scores(retriever, made_videos, QUERY)
    assert len(expected) == sum(WINDOWS.values())
    hits = retriever.search(QUERY, k=100)
    assert [(hit.video, hit.start) for hit in hits] == merged(expected)
    for hit in hits:
        # The index holds tokens in float16.
        assert hit.score == pytest.approx(expected[hit.video, hit.start], abs=2e-3)
    assert any(hit.matches for hit in hits) == (interaction in ("wti", "ti"))


def test_a_score_does_not_depend_on_the_others(indexed: Retriever, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexed, "kept_bytes", 0)
    monkeypatch.setattr(indexed, "_kept", None)
    hits = indexed.search(QUERY, k=100)
    monkeypatch.setattr(tables, "BLOCK", 1)
    assert indexed.search(QUERY, k=100) == hits
    for hit in hits:
        where = f"path = '{hit.video}' AND start = {hit.start}"
        assert [x.score for x in indexed.search(QUERY, where=where)] == [hit.score]


def test_windows_stay_in_memory_until_the_index_changes(
    made_videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    retriever = Retriever.from_run(save_model(tmp_path / "m"), tmp_path / "index", "cpu")
    retriever.index([made_videos])
    hits, where = retriever.search(QUERY, k=100), "path = 'long.mp4' AND start >= 2"
    some = retriever.search(QUERY, k=100, where=where)
    fresh = Retriever.from_run(tmp_path / "m", tmp_path / "index", "cpu")
    assert fresh.search(QUERY, k=100, where=where) == some
    blocks, reads = tables.WindowTable.blocks, []
    monkeypatch.setattr(tables.WindowTable, "blocks", lambda self, where: reads.append(where) or blocks(self, where))
    assert retriever.search(QUERY, k=100) == hits
    assert retriever.search(QUERY, k=100, where=where) == some
    assert not reads
    fresh.remove(["long.mp4"])
    assert {hit.video for hit in retriever.search(QUERY, k=100)} == {hit.video for hit in hits} - {"long.mp4"}
    assert reads == [None]
    retriever.kept_bytes = 0
    retriever._kept = None
    assert retriever.search(QUERY, k=100) == retriever.search(QUERY, k=100)
    assert reads == [None] * 3


def test_hits(indexed: Retriever, made_videos: Path) -> None:
    hits = indexed.search(QUERY, k=100, thumbnails=True)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    for hit in hits:
        assert hit.path == made_videos / hit.video
        assert hit.path.is_file()
        assert len(hit.times) == len(hit.thumbnails)
        assert all(picture.startswith(b"\xff\xd8") for picture in hit.thumbnails)
        assert hit.start == hit.times[0]
        assert hit.times[-1] < hit.end
    assert indexed.search(QUERY, k=2)[0].score == hits[0].score
    assert len(indexed.search(QUERY, k=2)) == 2
    assert indexed.search(QUERY, k=2)[0].thumbnails == []
    short = next(hit for hit in hits if hit.video == "short.mp4")
    assert (short.start, short.end, short.columns) == (0, 1.5, {"year": 1999})


def test_matches_are_those_of_the_interaction(indexed: Retriever) -> None:
    """Words of several tokens are joined; each word's frame is that of its heaviest token."""
    model, query = indexed.model, "unbelievably red snowboarders"
    (hit,) = indexed.search(query, k=1, where="path = 'long.mp4' AND start = 2")
    assert [match.word for match in hit.matches] == query.split()
    ids = tokenize(indexed.tokenizer, [query], indexed.about.max_words)
    table = indexed._filled()
    (block,) = table.blocks("path = 'long.mp4' AND start = 2")
    with torch.no_grad():
        text, mask = model.encode_text(ids)
        _, matches = model.similarity(text, block.tokens.float(), mask, block.mask, return_matches=True)
        weights = model.interaction.weights(text, text, mask, mask)[0][0]  # type: ignore[union-attr]
    positions = indexed.encode(query).words
    assert sum(len(word.positions) for word in positions) == int(mask.sum()) - 2
    assert max(len(word.positions) for word in positions) > 1
    for match, word in zip(hit.matches, positions, strict=True):
        heaviest = max(word.positions, key=lambda position: float(weights[position]))
        assert match.frame == matches.video_index[0, 0, heaviest]
        assert match.weight == pytest.approx(float(weights[list(word.positions)].sum()))
        assert match.time == (None if match.frame < 0 else hit.times[match.frame])


def test_where(indexed: Retriever) -> None:
    assert {hit.video for hit in indexed.search("x", k=100, where="year > 2000")} == {"a b/日本.mp4"}
    assert {hit.video for hit in indexed.search("x", k=100, where="path LIKE 'a b/%' OR year = 1999")} == {
        "a b/日本.mp4",
        "short.mp4",
    }
    assert indexed.search("x", where="year > 3000") == []
    assert all(hit.start >= 3 for hit in indexed.search("x", k=100, where="start >= 3"))


@pytest.mark.parametrize("where", ["nosuch = 1", "year = = 1", "'", "year; DROP TABLE windows", "start"])
def test_where_that_is_not_sql(indexed: Retriever, where: str) -> None:
    with pytest.raises(ValueError, match=r"where must be an SQL expression of the columns path, start, end, year") as e:
        indexed.search("x", where=where)
    assert "\n" not in str(e.value)
    assert ".rs" not in str(e.value)
    assert indexed.size() == (3, 8)


@pytest.mark.parametrize("text", ["", "  \n"])
def test_an_empty_query(indexed: Retriever, text: str) -> None:
    with pytest.raises(ValueError, match="must be a sentence, got an empty one"):
        indexed.search(text)


def test_long_queries(indexed: Retriever) -> None:
    with pytest.raises(ValueError, match="at most 1000 characters, got 10000"):
        indexed.search("a" * 10_000)
    assert indexed.is_cut("red " * 100)
    assert not indexed.is_cut("red and blue")
    assert indexed.search("red " * 100, k=1)[0].matches[-1].frame >= -1
    with pytest.raises(TypeError, match="text must be a string"):
        indexed.search(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["日本の海", "кошка", "🎬", "a\x00b", "' OR 1=1", "\ud800"])
def test_any_script(indexed: Retriever, text: str) -> None:
    assert indexed.search(text, k=1)


@pytest.mark.parametrize("k", [0, -1])
def test_k_below_one(indexed: Retriever, k: int) -> None:
    with pytest.raises(ValueError, match=f"k must be a positive integer, got {k}"):
        indexed.search("x", k=k)
    with pytest.raises(ValueError, match=f"per_video must be a positive integer, got {k}"):
        indexed.search("x", per_video=k)


def test_an_empty_index(retriever: Retriever, videos: Path) -> None:
    with pytest.raises(ValueError, match="index not found"):
        retriever.search("x")
    retriever.index([videos])
    retriever.remove(list(WINDOWS))
    with pytest.raises(ValueError, match="holds no videos"):
        retriever.search("x")
    retriever.index([videos])
    assert {hit.video for hit in retriever.search("x", k=100)} == set(WINDOWS)


def test_in_memory(model: Path, videos: Path) -> None:
    retriever = Retriever.from_run(model, device="cpu")
    with pytest.raises(ValueError, match="holds no videos"):
        retriever.search("x")
    retriever.index([videos])
    assert {hit.video for hit in retriever.search("x", k=100)} == set(WINDOWS)


def test_clip_alone_ranks_by_ti(made_videos: Path, tmp_path: Path) -> None:
    """The same random weights in every process; the defaults of a folder: a frame a second, 12 frames."""
    retriever = Retriever.from_clip(CLIP, None, tmp_path / "index", "cpu")
    retriever.index([made_videos])
    assert retriever.model.config.interaction == "ti"
    assert retriever.model.config.temporal is None
    assert (retriever.about.rate, retriever.about.max_frames, retriever.about.stride) == (1, 12, 6)
    hits = retriever.search(QUERY, k=100)
    assert len(hits) == 3
    assert all(hit.matches for hit in hits)
    torch.manual_seed(1)
    assert Retriever.open(tmp_path / "index", "cpu").search(QUERY, k=100) == hits


def test_inputs_are_the_runs_own(indexed: Retriever) -> None:
    about = indexed.about
    assert (about.rate, about.max_frames, about.max_words) == (INPUTS.rate, INPUTS.max_frames, INPUTS.max_words)
    assert about.stride == 2


@pytest.mark.parametrize("run", ["nothing", "empty"])
def test_no_run(tmp_path: Path, run: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"not found|must hold model\.safetensors"):
        Retriever.from_run(tmp_path / run)


def test_a_device_that_is_none(model: Path) -> None:
    with pytest.raises(ValueError, match="device must be one such as cpu"):
        Retriever.from_run(model, device="abacus")


def test_beyond_the_exact_limit(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With as many candidates as windows the hits are the exact ones; recall says how many fewer keep."""
    for number in range(8):
        make_video(tmp_path / "v" / f"{number}.mp4", 6, seed=20 + number)
    retriever = Retriever.from_run(model, tmp_path / "index", "cpu")
    retriever.index([tmp_path / "v"])
    exact = retriever.search(QUERY, k=100)
    assert retriever.recall(QUERY) is None
    monkeypatch.setattr(tables, "EXACT", 5)
    assert retriever.search(QUERY, k=100) == exact
    assert retriever.recall(QUERY) == 1
    assert {hit.video for hit in retriever.search(QUERY, k=100, where="path < '3'")} == {"0.mp4", "1.mp4", "2.mp4"}
    monkeypatch.setattr(retriever_module, "CANDIDATES", 5)
    found = retriever.search(QUERY, k=1)
    vector = retriever.encode(QUERY).vector
    nearest = retriever._filled().nearest(vector, None, 10)
    rows = retriever._filled().take(nearest, "vector").to_pylist()
    by_hand = retriever._filled().table.search().select(["vector", "start", "path"]).to_arrow().to_pylist()
    dots = sorted((float(np.dot(row["vector"], vector.numpy())) for row in by_hand), reverse=True)
    assert sorted((float(np.dot(row["vector"], vector.numpy())) for row in rows), reverse=True) == pytest.approx(
        dots[:10], abs=1e-5
    )
    assert found[0].video in {row["path"] for row in rows}
    recall = retriever.recall(QUERY)
    assert recall is not None
    assert 0 <= recall <= 0.5


def test_a_vector_index_is_made_beyond_the_limit(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LanceDB's IVF-PQ needs 256 rows: one per code."""
    make_video(tmp_path / "v" / "a.mp4", 260, seed=1)
    retriever = Retriever.from_run(model, tmp_path / "index", "cpu")
    monkeypatch.setattr(tables, "EXACT", 100)
    retriever.index([tmp_path / "v"])
    table = retriever._filled()
    assert table.count() > 256
    assert [index.columns for index in table.table.list_indices()] == [["vector"]]
    found = retriever.search(QUERY, k=3)
    monkeypatch.setattr(tables, "EXACT", 10_000)
    assert retriever.search(QUERY, k=3) == found
    monkeypatch.setattr(tables, "EXACT", 100)
    make_video(tmp_path / "v" / "b.mp4", 10, seed=2)
    retriever.index([tmp_path / "v"])
    assert table.count() > 256
    assert retriever._kept is not None
    assert {hit.video for hit in retriever.search(QUERY, k=200)} == {"a.mp4", "b.mp4"}
    assert retriever._kept is None  # memory is released once the index is searched by vectors


def test_hits_of_several_videos_among_candidates(indexed: Retriever, monkeypatch: pytest.MonkeyPatch) -> None:
    """One video may hold all the first candidates; then more are chosen, up to a limit."""
    rows = indexed._filled().table.search().select(["path"]).with_row_id(True).to_arrow().to_pylist()
    ids = np.array([row["_rowid"] for row in sorted(rows, key=lambda row: row["path"] != "long.mp4")])
    asked: list[int] = []

    def nearest(table: tables.WindowTable, vector: torch.Tensor, where: str | None, count: int) -> np.ndarray:
        asked.append(count)
        held = {20: WINDOWS["long.mp4"], 50: WINDOWS["long.mp4"]}.get(count, len(ids))
        return np.resize(ids[:held], count)

    videos = [hit.video for hit in indexed.search(QUERY, k=5, per_video=1)]
    assert set(videos) == set(WINDOWS)
    monkeypatch.setattr(tables.WindowTable, "nearest", nearest)
    monkeypatch.setattr(tables.WindowTable, "count", lambda table, where=None: 3 if where == "start = 0" else 1000)
    monkeypatch.setattr(retriever_module, "CANDIDATES", 20)
    monkeypatch.setattr(tables, "EXACT", 100)
    assert [hit.video for hit in indexed.search(QUERY, k=2, per_video=1)] == videos[:2]
    assert asked == [20, 80]
    # There are three videos, so three hits are all.
    assert [hit.video for hit in indexed.search(QUERY, k=5, per_video=1)] == videos
    assert asked == [20, 80, 50, 100]
    # How many videos an expression selects is not known.
    assert [hit.video for hit in indexed.search(QUERY, k=5, per_video=1, where="start < 99")] == videos
    assert asked == [20, 80, 50, 100, 50, 100]
    assert len(indexed.search(QUERY, k=2)) == 2
    assert asked[6:] == [20]


@pytest.mark.parametrize("sorted_first", [1, 1000])
def test_merging(sorted_first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best window stands for those that overlap it; windows that touch do not; ties go by path and start."""
    monkeypatch.setattr(scoring, "SORTED_FIRST", sorted_first)
    nan = float("nan")
    scores = np.array([0.1, 0.9, 0.5, 0.9, 0.9, nan], dtype=np.float32)
    starts, ends = np.array([0.0, 6, 12, 18, 0, 50]), np.array([12.0, 18, 24, 30, 12, 60])
    paths = np.array(["v", "v", "v", "v", "u", "w"], dtype=object)
    found = merge_overlapping(scores, np.arange(6), paths, starts, ends, 100)
    assert [best.row for best in found] == [4, 1, 3, 5]
    assert (
        merge_overlapping(scores, np.arange(6), paths, starts, ends, 2)
        == found[:2]
        == [
            Best(4, float(scores[4])),
            Best(1, float(scores[1])),
        ]
    )
    assert [best.row for best in merge_overlapping(scores, np.arange(6), paths, starts, ends, 3, 1)] == [4, 1, 5]
    assert merge_overlapping(scores[:0], np.arange(0), paths[:0], starts[:0], ends[:0], 3) == []


def test_the_public_name() -> None:
    assert drl_fast.Retriever is Retriever
    assert "Retriever" in dir(drl_fast)
    hit = Hit("a", 0, 1, 0.5, [], Path("/a"), [0.0])
    assert re.fullmatch(r"Hit\(video='a'.*\)", repr(hit))


def test_indices_of_before_preparation_was_recorded_stay_valid(model: Path, tmp_path: Path) -> None:
    loaded = load_run(model, torch.device("cpu"))
    drl, then = loaded.model, ("resize", "interpolation", "inputs")
    options = {name: value for name, value in drl.describe_config().items() if name not in then}
    assert loaded.about.model == weights_hash(dict(sorted(drl.state_dict().items())), repr(sorted(options.items())))
    drl.pictures = drl.pictures._replace(resize="squash")
    drl.save_pretrained(tmp_path)
    assert load_run(tmp_path, torch.device("cpu")).about.model != loaded.about.model
