"""The demo on someone's own videos and captions: decode, encode, search."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TaskID
from rich.table import Table
from torch import Tensor

from ..console import metrics_table, print_cut, print_line, print_machine, progress, served_by
from ..data.datasets import split_of
from ..data.feature_cache import FeatureCache
from ..data.folder import Caption, read_captions
from ..data.formats import listing_of
from ..data.split import Split, some
from ..data.video import Sampling
from ..data.video_files import VideoFiles
from ..engine.evaluate import Evaluation, evaluate
from ..metrics import DIRECTIONS, ranks
from ..model.clip import load_clip
from ..model.drl import DRL
from ..validation import printable

SHOWN = 30
NO_WEIGHTS = (
    "Random weights: the scores below mean nothing. They show that decoding, towers and interaction run on your "
    "videos; name weights with --pretrained, e.g. --pretrained openai."
)


def run_folder(
    folder: Path, clip_name: str, pretrained: str | None, console: Console, *, max_words: int = 32
) -> dict[str, Tensor]:
    """Score the folder's captions against its videos, print metrics and top matches, return similarities by layer.

    Captions are cut to ``max_words`` tokens, start and end included.

    Raises:
        ValueError: no captions file, no usable video, an unknown model or weights that cannot be loaded.
    """
    captions = read_captions(folder)
    source = "random weights" if pretrained is None else f"weights {pretrained} (a tag is downloaded once)"
    print_line(console, f"loading {clip_name}, {source}")
    clip, tokenizer = load_clip(clip_name, pretrained)
    models = {name: DRL(clip, interaction=name.lower(), temporal=None) for name in ("TI", "DP")}
    sampling = Sampling(**models["TI"].pictures._asdict())
    print_machine(console)
    print_line(console, f"{sampling.rate:g} frame a second of video, at most {sampling.max_frames}")

    split = _split(folder, captions, console)
    print_cut(console, split.captions, models["TI"], tokenizer, max_words)
    found = {}
    # The second model finds the first one's frame features and decodes nothing.
    with tempfile.TemporaryDirectory(prefix="drl_fast_demo_") as cache, progress(console) as bars:
        for name, model in models.items():
            task = bars.add_task(f"decode, encode, score by {name}", total=len(split.videos), note="")
            found[name] = evaluate(
                model,
                split,
                tokenizer,
                sampling,
                max_words=max_words,
                cache=FeatureCache(cache),
                on_progress=partial(_show, bars, task),
            )
    for video in found["DP"].unreadable:
        print_line(console, f"skipped: {video.reason}", "yellow")
    if pretrained is None:
        print_line(console, NO_WEIGHTS, "bold yellow")
    metrics = {
        f"{direction}, {name}": evaluation.metrics[key]
        for key, direction in DIRECTIONS.items()
        for name, evaluation in found.items()
    }
    shown, searched = found["DP"].sim.shape
    title = f"\n{shown} captions against {searched} videos, recalls in percent"
    console.print(metrics_table(title, metrics, candidates=searched))
    print_line(
        console,
        f"TI: every word's best frame and every frame's best word, unweighted (by {served_by()}). DP: end token "
        "against mean frame, as in CLIP. Neither has parameters; WTI's two weight networks would need training.",
    )
    console.print(_top_matches(found["DP"]))
    return {name: evaluation.sim for name, evaluation in found.items()}


def _split(folder: Path, captions: list[Caption], console: Console) -> Split:
    """Find each caption's video in the folder, by the rules of training; print what has no caption or no file."""
    files = VideoFiles(folder)
    split = split_of("folder", "test", listing_of(captions), files)
    for name in split.missing:
        print_line(
            console, f"skipped: {folder / name} must be a video file in the folder, not found; check the path", "yellow"
        )
    if not split.videos:
        raise ValueError(
            f"{folder} must hold the videos that its captions name ({some(split.missing)}), got none of them"
        )
    unnamed = sorted(str(path.relative_to(folder)) for path in set(files.videos) - set(split.videos))
    if unnamed:
        print_line(console, f"no caption names: {some(unnamed)}")
    return split


def _show(bars: Progress, task: TaskID, stage: str, done: int, total: int) -> None:
    if stage == "videos":
        bars.update(task, completed=done)


def _top_matches(found: Evaluation) -> Table:
    """Make a table of each caption's best video by DP, and the rank of its own."""
    texts, names = found.captions, found.names
    title = "Top match per caption (DP)" + (f", the first {SHOWN} of {len(texts)}" if len(texts) > SHOWN else "")
    table = Table(title=title, title_justify="left")
    for name in ("caption", "top match", "cosine", "its own video's rank"):
        table.add_column(name, justify="left" if name in ("caption", "top match") else "right")
    rank = ranks(found.sim, found.owner).tolist()
    for row, text in enumerate(texts[:SHOWN]):
        best = int(found.sim[row].argmax())
        place = f"{rank[row]} of {len(names)}"
        table.add_row(_cell(text), _cell(names[best]), f"{float(found.sim[row, best]):.3f}", place)
    return table


def _cell(text: str) -> str:
    # rich takes brackets for markup, and a terminal obeys escape sequences.
    return escape(printable(text))
