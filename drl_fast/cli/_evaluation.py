"""The evaluation that ``drl-fast eval`` runs, prints and writes."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from .. import __version__
from ..atomic_write import write_atomically
from ..console import DIRECTIONS, chance, metrics_row, metrics_table, print_machine, progress
from ..data.datasets import load_split
from ..data.feature_cache import FeatureCache
from ..data.formats import PARTS
from ..data.loading import Unreadable
from ..data.split import Split
from ..data.video import Sampling
from ..engine.config import RunConfig
from ..engine.evaluate import Evaluation, evaluate
from ..engine.processes import Processes, processes
from ..metrics import dual_softmax_metrics, recall_interval
from ..model.drl import DRL
from ..validation import option
from ._data import print_left_out, print_unreadable, with_folders
from ._trained import load_model, settings, untrained

SHOWN = 10
STAGES = {"videos": "decode and encode videos", "texts": "encode captions", "scores": "score"}
POST = "Post-processing by dual softmax, not comparable with the table above"
POST_NOTE = "Dual softmax weighs every score by those of all test queries, which a search does not have."


@dataclass(frozen=True)
class EvalRun:
    """What ``drl-fast eval`` was asked for; see its options."""

    checkpoint: Path | None = None
    config: Path | None = None
    part: str = "test"
    videos: Path | None = None
    annotations: Path | None = None
    overrides: tuple[str, ...] = ()
    out: Path | None = None
    cache: Path | None = None
    workers: int | None = None
    block: int = 64
    strict: bool = False
    post: bool = False


def run_eval(run: EvalRun, console: Console) -> None:
    """Evaluate on all processes; the first prints and writes.

    Raises:
        ValueError: options, files or a split that cannot be used.
        OSError: a result that cannot be written.
    """
    option("split", run.part, PARTS)
    with processes() as here:
        console.quiet = not here.first
        if run.out is not None and here.first:
            _check_out(run.out)
        config = settings(run.checkpoint, run.config, run.overrides)
        config, videos, annotations = with_folders(config, run.videos, run.annotations)
        model, tokenizer = load_model(run.checkpoint, config)
        model.to(here.device)
        sampling = config.sampling(model.picture_size[0])
        split = load_split(config.dataset, run.part, videos=videos, annotations=annotations, strict=run.strict)
        _introduce(run, config, model, split, sampling, here, console)
        watch = _Watch(console)
        with watch.bars:
            found = evaluate(
                model,
                split,
                tokenizer,
                sampling,
                max_words=config.words,
                workers=config.workers if run.workers is None else run.workers,
                cache=None if run.cache is None else FeatureCache(run.cache),
                block=run.block,
                precision=config.precision,
                strict=run.strict,
                process_group=here.group,
                on_progress=watch,
            )
        if here.first:
            report = _report(run, config, model, split, found, here, watch.seconds)
            _print(report, console)
            if run.out is not None:
                _write(run.out, report)
                console.print(f"written to {escape(str(run.out))}", highlight=False, soft_wrap=True)


def _introduce(
    run: EvalRun, config: RunConfig, model: DRL, split: Split, sampling: Sampling, here: Processes, console: Console
) -> None:
    """What is evaluated, on what and where, before it takes long."""
    print_machine(console)
    source = "as built" if run.checkpoint is None else f"from {run.checkpoint}"
    name = model.clip_name or "a CLIP without a name"
    console.print(
        f"Model {escape(source)}: {escape(name)}, interaction {model.config.interaction}, temporal module "
        f"{model.config.temporal}; {config.precision} on {here.device}" + f", {here.size} processes" * (here.size > 1),
        highlight=False,
        soft_wrap=True,
    )
    console.print(
        f"{config.dataset}, {split.part}: {len(split.captions)} captions of {len(split.videos)} videos, "
        f"of which {sampling.rate:g} frame{'s' * (sampling.rate != 1)} a second are looked at, at most "
        f"{sampling.max_frames}",
        highlight=False,
        soft_wrap=True,
    )
    print_left_out(console, split)
    warning = untrained(config) if run.checkpoint is None else None
    if warning is not None:
        console.print(f"[bold yellow]{warning}[/bold yellow]", highlight=False, soft_wrap=True)


class _Watch:
    """Bars of what evaluation reports, and how long each stage took."""

    def __init__(self, console: Console) -> None:
        self.bars = progress(console)
        self.seconds: dict[str, float] = {}
        self._tasks: dict[str, Any] = {}
        self._since = time.perf_counter()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self.bars.add_task(STAGES[stage], total=total, note="")
        self.bars.update(self._tasks[stage], completed=done)
        if done == total:
            now = time.perf_counter()
            self.seconds[stage], self._since = now - self._since, now


def _report(
    run: EvalRun,
    config: RunConfig,
    model: DRL,
    split: Split,
    found: Evaluation,
    here: Processes,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """All that is printed and more, as JSON holds it."""
    texts, videos = found.sim.shape
    intervals = {key: recall_interval(found.sim, found.owner, direction=key) for key in DIRECTIONS}
    return {
        "dataset": config.dataset,
        "part": split.part,
        "checkpoint": None if run.checkpoint is None else str(run.checkpoint),
        "untrained": untrained(config) if run.checkpoint is None else None,
        "metrics": found.metrics,
        "R1_interval_95": {key: list(interval) for key, interval in intervals.items()},
        "chance": chance(videos),
        "dual_softmax": dual_softmax_metrics(found.sim, found.owner) if run.post else None,
        "texts": texts,
        "videos": videos,
        "missing": list(split.missing),
        "unreadable": [video._asdict() for video in found.unreadable],
        "model": model.describe_config(),
        "config": dataclasses.asdict(config),
        "block": run.block,
        "device": str(here.device),
        "processes": here.size,
        "versions": {
            "drl_fast": __version__,
            "torch": torch.__version__,
            "open_clip": version("open_clip_torch"),
            "av": version("av"),
        },
        "seconds": {stage: round(taken, 3) for stage, taken in seconds.items()},
    }


def _print(report: dict[str, Any], console: Console) -> None:
    unreadable = report["unreadable"]
    for video in unreadable[:SHOWN]:
        print_unreadable(console, Unreadable(**video))
    if len(unreadable) > SHOWN:
        console.print(f"... and {len(unreadable) - SHOWN} more unreadable videos", highlight=False)
    count = f"{report['texts']} captions against {report['videos']} videos"
    table = metrics_table(f"\n{report['dataset']}, {report['part']}: {count}, recalls in percent")
    for key, direction in DIRECTIONS.items():
        metrics_row(table, direction, report["metrics"][key], report["R1_interval_95"][key])
    metrics_row(table, "chance", report["chance"])
    console.print(table)
    console.print("Brackets: 95 % bootstrap interval over the videos; how another draw of them would differ.")
    if report["dual_softmax"] is not None:
        table = metrics_table(f"\n{POST}")
        for key, direction in DIRECTIONS.items():
            metrics_row(table, direction, report["dual_softmax"][key])
        console.print(table)
        console.print(POST_NOTE)
    stages = ", ".join(f"{STAGES[stage]} {taken:.1f} s" for stage, taken in report["seconds"].items())
    console.print(f"Time: {stages}", highlight=False)


def _check_out(path: Path) -> None:
    """Find out now, not after an hour, whether the result can be written."""
    if path.is_dir():
        raise ValueError(f"out must be a file, got {path}, a folder; name a file in it, such as {path / 'eval.json'}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def _write(path: Path, report: dict[str, Any]) -> None:
    text = json.dumps(report, indent=2) + "\n"
    try:
        write_atomically(path, lambda name: Path(name).write_text(text, encoding="utf-8"))
    except OSError as error:
        raise OSError(f"the result could not be written to {path}, got: {error.strerror or error}") from error
