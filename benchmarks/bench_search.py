"""Search in an index: time of a query, recall, memory, size and time of indexing, beside search without an index.

    python benchmarks/bench_search.py [--quick | --full]

Windows are synthetic: each video shows three of 2,000 topics, and a query names the topics of one window, all with
noise. So recall says something, but less than real videos would. Encoding is not part of any time: towers do not change
with the size of an index. A window has 12 tokens of 512 channels and no thumbnails; a query has 12 words. Sections:

    windows   an index as `drl-fast index` writes it, and `Retriever.search`: the first query reads all windows from the
              disk, later ones find them in memory; the same scores from memory by NumPy, PyTorch, maxsim-cpu (one
              direction) and `drl_fast.topk`; the recall of the candidates that pooled vectors would give
    vectors   LanceDB's index of pooled vectors, which chooses the candidates of larger indexes, with the settings of
              the search, against all vectors
    tokens    LanceDB's own search with several vectors a row

Each index is measured in a process of its own. Writes ``<out>/<machine>/search.json``.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import drl_fast
import harness
import plots
import result_tables
from drl_fast.numerics import unit
from drl_fast.search.lance import connect, pa
from drl_fast.search.retriever import CANDIDATES, KEPT_BYTES, Retriever
from drl_fast.search.scoring import Query
from drl_fast.search.table import About, WindowTable
from drl_fast.search.windows import Encoded, File, State

FRAMES, WORDS, DIM, WINDOWS_OF_VIDEO = 12, 12, 512, 10
TOPICS, NOISE = 2000, 1.0
K, QUERIES = 10, 20
Row = dict[str, Any]


# --- synthetic windows ------------------------------------------------------------------------------------------------
class Videos:
    """Windows and queries, the same ones for a seed. A window's number gives its content."""

    def __init__(self, windows: int) -> None:
        self.windows = windows
        self.topics = unit(torch.randn(TOPICS, DIM, generator=torch.Generator().manual_seed(0)))

    def _shown(self, video: int) -> Tensor:
        """Return the topics of a video's windows, (windows, 3): those of neighbours mostly agree."""
        generator = torch.Generator().manual_seed(video + 1)
        shown = torch.randint(TOPICS, (3,), generator=generator).repeat(WINDOWS_OF_VIDEO, 1)
        shown[:, 2] = torch.randint(TOPICS, (WINDOWS_OF_VIDEO,), generator=generator)
        return shown

    def tokens(self, first: int, count: int) -> Tensor:
        """Return unit tokens of some videos' windows, (count * WINDOWS_OF_VIDEO, FRAMES, DIM) float16."""
        shown = torch.cat([self._shown(video) for video in range(first, first + count)])
        which = torch.arange(FRAMES) * 3 // FRAMES
        noise = torch.randn(len(shown), FRAMES, DIM, generator=torch.Generator().manual_seed(first)) / DIM**0.5
        return unit(self.topics[shown[:, which]] + NOISE * noise).half()

    def query(self, nth: int) -> Query:
        """Return a query for one window."""
        generator = torch.Generator().manual_seed(10_000 + nth)
        window = int(torch.randint(self.windows, (), generator=generator))
        shown = self._shown(window // WINDOWS_OF_VIDEO)[window % WINDOWS_OF_VIDEO]
        noise = torch.randn(WORDS, DIM, generator=generator) / DIM**0.5
        tokens = unit(self.topics[shown[torch.arange(WORDS) * 3 // WORDS]] + NOISE * noise)
        return Query(tokens[None], torch.ones(1, WORDS, dtype=torch.bool), None, [])

    def parts(self, videos: int = 100) -> Iterator[tuple[int, Tensor]]:
        """Yield the first video of each part, and the part's tokens."""
        for first in range(0, self.windows // WINDOWS_OF_VIDEO, videos):
            count = min(videos, self.windows // WINDOWS_OF_VIDEO - first)
            yield first, self.tokens(first, count)


def pooled(tokens: Tensor) -> Tensor:
    return unit(unit(tokens.float()).sum(dim=1))


class Synthetic(Retriever):
    """The retriever, with queries and windows that no tower encodes."""

    def __init__(self, uri: str, table: WindowTable, videos: Videos) -> None:
        self.model = drl_fast.Head(DIM, interaction="ti").eval()
        self.uri, self._table, self.about, self.videos = uri, table, table.about, videos
        self._kept, self.kept_bytes = None, KEPT_BYTES

    def encode(self, text: str) -> Query:
        return self.videos.query(int(text))


def encoded(videos: Videos, first: int, tokens: Tensor) -> list[Encoded]:
    """Return videos as indexing hands them to the table."""
    found = []
    for i, own in enumerate(tokens.split(WINDOWS_OF_VIDEO)):
        name = f"{first + i:07}.mp4"
        spans = [(6.0 * window, 6.0 * window + FRAMES) for window in range(WINDOWS_OF_VIDEO)]
        counts = torch.full((WINDOWS_OF_VIDEO,), FRAMES, dtype=torch.int16)
        pictures: list[list[bytes]] = [[] for _ in spans]
        state = State(0, 0, name)
        found.append(Encoded(File(name, "/videos"), state, spans, 1.0, own, counts, None, pooled(own), pictures))
    return found


# --- what is measured -------------------------------------------------------------------------------------------------
def percentiles(call: Callable[[int], Any], count: int = QUERIES) -> Row:
    """Time a call for each query once, after a warm-up, in milliseconds."""
    call(0)
    times = []
    for nth in range(count):
        begin = time.perf_counter()
        call(nth)
        times.append(1e3 * (time.perf_counter() - begin))
    return {"p50": statistics.median(times), "p99": float(np.percentile(times, 99)), "queries": count}


def size(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / harness.MB


def share(found: Any, exact: Any) -> float:
    return float(np.mean([len(set(f) & set(e)) / len(e) for f, e in zip(found, exact, strict=True)]))


def search_windows(windows: int, threads: int) -> tuple[Callable[[], None], Callable[[], Row]]:
    """Index windows and search them."""

    def run() -> Row:
        videos = Videos(windows)
        with tempfile.TemporaryDirectory(prefix="drl-fast-") as folder:
            about = About("synthetic", {}, 1.0, FRAMES, FRAMES // 2, WORDS, DIM, False)
            table = WindowTable.create(folder, about)
            seconds = 0.0
            for first, tokens in videos.parts(25):  # a commit of drl-fast index holds about so many windows
                new = encoded(videos, first, tokens)
                begin = time.perf_counter()
                table.write(new, [], {})
                seconds += time.perf_counter() - begin
            begin = time.perf_counter()
            table.finish()
            seconds += time.perf_counter() - begin
            retriever = Synthetic(folder, table, videos)
            harness.reset_peak("cpu")
            before = harness.resident("VmRSS")
            begin = time.perf_counter()
            retriever.search("0", k=K)
            first_ms = 1e3 * (time.perf_counter() - begin)
            search = percentiles(lambda nth: retriever.search(str(nth), k=K))
            peak = harness.resident("VmHWM") - before
            exact = [_best_rows(retriever, nth) for nth in range(QUERIES)]
            near = [table.nearest(videos.query(nth).vector, None, CANDIDATES) for nth in range(QUERIES)]
            return {
                "windows": windows,
                "first_ms": first_ms,
                "ms": search,
                "peak_mb": peak / harness.MB,
                "index_mb": size(Path(folder)),
                "windows_per_second": windows / seconds,
                "candidates": CANDIDATES,
                "candidates_recall": share(near, exact) if windows > CANDIDATES else None,
            }

    return functools.partial(torch.set_num_threads, threads), run


def _best_rows(retriever: Synthetic, nth: int) -> np.ndarray:
    """Return the row ids of a query's best windows, scored exactly."""
    found = retriever._scores(retriever.encode(str(nth)), retriever._windows(retriever._table, None))
    return found.ids[np.argsort(-found.scores, kind="stable")[:K]]


def brute_force(windows: int, form: str, threads: int) -> tuple[Callable[[], None], Callable[[], Row]]:
    """Score windows that lie in memory: in float32, ours in float16."""

    def run() -> Row:
        videos = Videos(windows)
        tokens = torch.empty(windows, FRAMES, DIM)
        for first, part in videos.parts():
            start = first * WINDOWS_OF_VIDEO
            tokens[start : start + len(part)] = part
        queries = [videos.query(nth).tokens[0] for nth in range(QUERIES)]
        score = FORMS[form](tokens)
        ms = percentiles(lambda nth: score(queries[nth]))
        return {"windows": windows, "form": form, "ms": ms}

    return functools.partial(torch.set_num_threads, threads), run


def in_numpy(tokens: Tensor) -> Callable[[Tensor], Any]:
    flat = tokens.view(-1, DIM).numpy()

    def score(query: Tensor) -> Any:
        s = (flat @ query.numpy().T).reshape(len(tokens), FRAMES, WORDS)
        scores = (s.max(1).mean(1) + s.max(2).mean(1)) / 2
        return np.argpartition(-scores, K)[:K]

    return score


def in_torch(tokens: Tensor) -> Callable[[Tensor], Any]:
    flat = tokens.view(-1, DIM)

    def score(query: Tensor) -> Any:
        s = torch.mm(flat, query.T).view(len(tokens), FRAMES, WORDS)
        return ((s.amax(1).mean(1) + s.amax(2).mean(1)) / 2).topk(K)

    return score


def in_maxsim_cpu(tokens: Tensor) -> Callable[[Tensor], Any]:
    import maxsim_cpu

    documents = tokens.numpy()
    return lambda query: np.argpartition(-maxsim_cpu.maxsim_scores(query.numpy(), documents), K)[:K]


def in_drl_fast(tokens: Tensor) -> Callable[[Tensor], Any]:
    prepared = drl_fast.prepare(tokens, dtype=torch.float16)
    return lambda query: drl_fast.topk(query[None], prepared, K)


FORMS: dict[str, Callable[[Tensor], Callable[[Tensor], Any]]] = {
    "NumPy": in_numpy,
    "PyTorch": in_torch,
    "maxsim-cpu": in_maxsim_cpu,
    "drl-fast": in_drl_fast,
}


def search_vectors(windows: int, threads: int) -> tuple[Callable[[], None], Callable[[], Row]]:
    """Index pooled vectors alone, and search them."""

    def run() -> Row:
        videos = Videos(windows)
        vectors = torch.cat([pooled(tokens) for _, tokens in videos.parts()])
        queries = torch.stack([videos.query(nth).vector for nth in range(QUERIES)])
        exact = (queries @ vectors.T).topk(K).indices.numpy()
        brute = percentiles(lambda nth: torch.mv(vectors, queries[nth]).topk(K))
        with tempfile.TemporaryDirectory(prefix="drl-fast-") as folder:
            schema = pa.schema([("vector", pa.list_(pa.float32(), DIM)), ("frames", pa.int32())])
            database = connect(folder).create_table("windows", schema=schema)
            begin = time.perf_counter()
            for first in range(0, windows, 50_000):
                part = vectors[first : first + 50_000]
                column = pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1).numpy()), DIM)
                # The column that the search for candidates reads holds the window's number here.
                database.add(pa.table([column, np.arange(first, first + len(part), dtype=np.int32)], schema))
            wrote = time.perf_counter() - begin
            begin = time.perf_counter()
            database.create_index(metric="cosine", vector_column_name="vector", index_type="IVF_PQ")
            indexed = time.perf_counter() - begin
            table = WindowTable.__new__(WindowTable)  # only its search for candidates, on a table of vectors alone
            table.uri, table.table = folder, database
            harness.reset_peak("cpu")
            before = harness.resident("VmRSS")
            ms = percentiles(lambda nth: table.nearest(queries[nth], None, CANDIDATES))
            rows = database.search().select(["frames"]).with_row_id(True).to_arrow()
            row_ids = rows.column("_rowid").to_numpy()[np.argsort(rows.column("frames").to_numpy())]
            found = [table.nearest(query, None, CANDIDATES) for query in queries]
            return {
                "windows": windows,
                "ms": ms,
                "brute_force_ms": brute,
                "recall": share(found, row_ids[exact]),
                "peak_mb": (harness.resident("VmHWM") - before) / harness.MB,
                "index_mb": size(Path(folder)),
                "write_seconds": wrote,
                "index_seconds": indexed,
            }

    return functools.partial(torch.set_num_threads, threads), run


def search_tokens(windows: int, threads: int) -> tuple[Callable[[], None], Callable[[], Row]]:
    """Index all tokens as LanceDB's multivectors, and search them."""

    def run() -> Row:
        videos = Videos(windows)
        with tempfile.TemporaryDirectory(prefix="drl-fast-") as folder:
            kind = pa.list_(pa.list_(pa.float32(), DIM))
            schema = pa.schema([("tokens", kind), ("number", pa.int32())])
            database = connect(folder).create_table("windows", schema=schema)
            begin = time.perf_counter()
            for first, tokens in videos.parts():
                numbers = np.arange(first * WINDOWS_OF_VIDEO, first * WINDOWS_OF_VIDEO + len(tokens), dtype=np.int32)
                database.add(pa.table([pa.array(tokens.float().numpy().tolist(), kind), numbers], schema))
            wrote = time.perf_counter() - begin
            begin = time.perf_counter()
            database.create_index(metric="cosine", vector_column_name="tokens", index_type="IVF_PQ")
            indexed = time.perf_counter() - begin

            def search(nth: int) -> np.ndarray:
                query = database.search(videos.query(nth).tokens[0].numpy(), vector_column_name="tokens")
                rows = query.distance_type("cosine").nprobes(64).select(["number", "_distance"]).limit(K)
                return rows.to_arrow().column("number").to_numpy()

            ms = percentiles(search, 5)
            scores = [_one_direction(videos, nth) for nth in range(5)]
            return {
                "windows": windows,
                "ms": ms,
                "recall": share([search(nth) for nth in range(5)], scores),
                "index_mb": size(Path(folder)),
                "write_seconds": wrote,
                "index_seconds": indexed,
            }

    return functools.partial(torch.set_num_threads, threads), run


def _one_direction(videos: Videos, nth: int) -> np.ndarray:
    """Return the best windows by the sum over words of the largest cosine: what multivectors compute."""
    query = videos.query(nth).tokens[0]
    scores = torch.cat([(tokens.float() @ query.T).amax(1).sum(1) for _, tokens in videos.parts()])
    return scores.topk(K).indices.numpy()


# --- plans ------------------------------------------------------------------------------------------------------------
PLANS: dict[str, dict[str, tuple[int, ...]]] = {
    "quick": {"windows": (1000,), "vectors": (2000,), "tokens": (500,)},
    "default": {"windows": (1000, 10_000), "vectors": (10_000, 100_000), "tokens": (1000,)},
    "full": {
        "windows": (1000, 10_000, 100_000),
        "vectors": (100_000, 300_000, 1_000_000),
        "tokens": (1000, 4000, 20_000),
    },
}
MINUTES = {"quick": 1, "default": 4, "full": 10}


def main() -> None:
    options = harness.parser(__doc__).parse_args()
    plan = PLANS[options.size]
    run = harness.Run("search", options, MINUTES[options.size], k=K, queries=QUERIES, noise=NOISE)
    apart = functools.partial(harness.measure_apart, threads=options.threads)
    for windows in plan["windows"]:
        row = {"windows": windows, **apart("bench_search:search_windows", windows=windows)}
        run.row("windows", row, f"{windows:9,}  {_shown(row)}")
        for form in FORMS:
            row = {"windows": windows, "form": form, **apart("bench_search:brute_force", windows=windows, form=form)}
            run.row("memory", row, f"{windows:9,}  {form}: {_shown(row)}")
    for section in ("vectors", "tokens"):
        for windows in plan[section]:
            row = {"windows": windows, **apart(f"bench_search:search_{section}", windows=windows)}
            run.row(section, row, f"{windows:9,}  {_shown(row)}")
    result = run.finish()
    result_tables.show(result)
    plots.draw_search(result, run.path)


def _shown(row: Row) -> str:
    return f"p50 {row['ms']['p50']:.1f} ms, p99 {row['ms']['p99']:.1f} ms" if row["status"] == "ok" else row["status"]


if __name__ == "__main__":
    main()
