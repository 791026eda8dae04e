"""``drl-fast eval``: score a model on a data set, on one process or, under torchrun, many."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from torch import Tensor

from .. import __version__
from ..atomic_write import write_atomically
from ..console import (
    STAGES,
    chance,
    metrics_table,
    print_all_unreadable,
    print_cut,
    print_features,
    print_line,
    print_machine,
    print_split,
    progress,
)
from ..data.datasets import load_split
from ..data.formats import PARTS
from ..engine.precision import PRECISIONS
from ..engine.processes import Processes, processes
from ..engine.sanity_checks import equal_scores
from ..metrics import DIRECTIONS, dual_softmax_metrics, recall_interval
from ..validation import option
from ._errors import report_errors
from ._options import Annotations, Dataset, Features, Overrides, Strict, Videos, check_alone, with_folders

if TYPE_CHECKING:
    from ..data.split import Split
    from ..data.video import Sampling
    from ..engine.evaluate import Evaluation
    from ..model.head import Head

POST = "Post-processing by dual softmax, not comparable with the table above"
POST_NOTE = "Dual softmax weights every score by those of all test queries, which a search does not have."


def evaluate(
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="A run of drl-fast train (its best model), a save_pretrained folder, or a checkpoint file of the "
            "public DRL or CLIP4Clip code. Default: the configured model, untrained."
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="A row of the ablation, such as wti_cdcr, or a YAML file. A run and its best/ need none. What it "
            "names must agree with the checkpoint."
        ),
    ] = None,
    dataset: Dataset = None,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    videos: Videos = None,
    annotations: Annotations = None,
    features: Features = None,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Write metrics, intervals, counts and settings to this JSON.")
    ] = None,
    save_scores: Annotated[
        Path | None,
        typer.Option(
            help="Write the similarities, captions x videos, to this .npy file; --out then lists both by name."
        ),
    ] = None,
    precision: Annotated[
        str, typer.Option(help="fp32, or bf16: faster on a GPU; it moves similarities by about 0.01.")
    ] = "fp32",
    cache: Annotated[Path | None, typer.Option(help="Keep frame features here, and decode no video twice.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Decoding processes per process; default: the configuration's.")
    ] = None,
    block: Annotated[int, typer.Option(min=1, help="Captions scored at a time: fewer use less memory.")] = 64,
    strict: Strict = False,
    post: Annotated[
        bool,
        typer.Option("--post", help="Also print metrics after dual softmax, which are not comparable with plain ones."),
    ] = False,
) -> None:
    """Score every caption of a split against every video of it: recalls and ranks in both directions.

    Videos that are missing or cannot be read are named and left out with their captions. Under torchrun, N processes
    share the work and give the same numbers; see docs/training.md.
    """
    with report_errors("train"), processes() as here:
        from ..data.feature_cache import FeatureCache
        from ..data.feature_store import FeatureStore
        from ..engine import evaluate as engine
        from ..engine.load_model import load_head, load_model, settings_of, untrained

        option("split", split, PARTS)
        option("precision", precision, PRECISIONS)
        console = Console(quiet=not here.first)
        if here.first:
            for name, path in (("out", out), ("save-scores", save_scores)):
                _check_out(name, path)
        found_settings = settings_of(
            checkpoint, config, overrides or (), dataset, features=features, on_videos=videos is not None
        )
        settings = found_settings.config
        watch = _Watch(console)
        options: dict[str, Any] = {
            "block": block,
            "precision": precision,
            "process_group": here.group,
            "on_progress": watch,
        }
        if settings.features is not None:
            check_alone(settings.features, videos=videos, annotations=annotations, cache=cache, workers=workers)
            store = FeatureStore(settings.features)
            stored = store.part(split, strict=strict)
            part, model = stored.split, load_head(checkpoint, found_settings, store).to(here.device)
            _introduce(console, checkpoint, model, part, precision, here)
            print_features(console, store)
            if store.about.inputs is not None:
                _print_other_inputs(console, checkpoint, model, store.about.inputs)
            score: Callable[[], Evaluation] = partial(engine.evaluate_features, model, store, stored, **options)
        else:
            settings, videos, annotations = with_folders(settings, videos, annotations)
            drl, tokenizer = load_model(checkpoint, found_settings)
            model = drl.to(here.device)
            sampling = settings.sampling(*drl.pictures)
            if sampling.seconds is None and model.inputs is not None:
                sampling = dataclasses.replace(sampling, seconds=model.inputs.seconds)
            part = load_split(settings.dataset, split, videos=videos, annotations=annotations, strict=strict)
            _introduce(console, checkpoint, model, part, precision, here)
            _print_inputs(console, checkpoint, model, sampling, settings.words)
            print_cut(console, part.captions, drl, tokenizer, settings.words)
            score = partial(
                engine.evaluate,
                drl,
                part,
                tokenizer,
                sampling,
                max_words=settings.words,
                workers=settings.workers if workers is None else workers,
                cache=None if cache is None else FeatureCache(cache),
                strict=strict,
                **options,
            )
        warning = untrained(settings) if checkpoint is None else None
        if warning is not None:
            print_line(console, warning, "bold yellow")
        with watch.bars:
            found = score()
        if not here.first:
            return
        stuck = equal_scores(found.sim)
        if stuck is not None:
            print_line(console, f"warning: {stuck}", "bold yellow")
        report = {
            "dataset": settings.dataset,
            "part": split,
            "checkpoint": None if checkpoint is None else str(checkpoint),
            "untrained": warning,
            "metrics": found.metrics,
            "R1_interval_95": {key: list(recall_interval(found.sim, found.owner, direction=key)) for key in DIRECTIONS},
            "chance": chance(found.sim.shape[1]),
            "dual_softmax": dual_softmax_metrics(found.sim, found.owner) if post else None,
            "texts": found.sim.shape[0],
            "videos": found.sim.shape[1],
            "missing": list(part.missing),
            "unreadable": [video._asdict() for video in found.unreadable],
            "model": model.describe_config(),
            "features": settings.features,
            "config": _of_model(dataclasses.asdict(settings), model, checkpoint),
            "precision": precision,
            "scores": None
            if save_scores is None
            else {"file": str(save_scores), "captions": found.captions, "videos": found.names},
            "block": block,
            "device": str(here.device),
            "processes": here.size,
            "versions": {
                "drl_fast": __version__,
                "torch": torch.__version__,
                "open_clip": version("open_clip_torch"),
                "av": version("av"),
            },
            "seconds": {stage: round(taken, 3) for stage, taken in watch.seconds.items()},
        }
        # Written before they are printed, since a closed pipe ends the printing; and printed if they cannot be written.
        written: list[str] = []
        try:
            if save_scores is not None:
                _write(save_scores, lambda name: _save_array(name, found.sim))
                written.append(f"similarities written to {save_scores}; --out lists their captions and videos")
            if out is not None:
                text = json.dumps(report, indent=2) + "\n"
                _write(out, lambda name: Path(name).write_text(text, encoding="utf-8"))
                written.append(f"written to {out}")
        finally:
            _print(report, found, console)
            for line in written:
                print_line(console, line)


def _introduce(
    console: Console, checkpoint: Path | None, model: Head, part: Split, precision: str, here: Processes
) -> None:
    """Print the machine, the model and the data."""
    print_machine(console)
    described = model.describe_config()
    clip = f"{described['clip'] or 'unnamed CLIP'}, " if "clip" in described else ""
    print_line(
        console,
        f"Model {'as built' if checkpoint is None else f'from {checkpoint}'}: {clip}"
        f"interaction {model.config.interaction}, temporal module {model.config.temporal}; {precision} on "
        f"{here.device}" + f", {here.size} processes" * (here.size > 1),
    )
    print_split(console, part)


def _print_inputs(console: Console, checkpoint: Path | None, model: Head, sampling: Sampling, words: int) -> None:
    """Print how frames are sampled, and how the model was trained if that differs."""
    print_line(console, f"frames: {sampling.rate:g} per second, at most {sampling.max_frames} per video")
    used = {"max_words": words, "rate": sampling.rate, "max_frames": sampling.max_frames}
    _print_other_inputs(console, checkpoint, model, used)


def _print_other_inputs(console: Console, checkpoint: Path | None, model: Head, used: dict[str, Any]) -> None:
    """Print how the model's inputs were prepared in training, if that differs."""
    trained = None if model.inputs is None else dataclasses.asdict(model.inputs)
    names = ("max_words", "rate", "max_frames")
    if trained is not None and checkpoint is not None and any(trained[key] != used[key] for key in names):
        print_line(
            console,
            f"the model was trained with {trained['rate']:g} frames per second, at most {trained['max_frames']} "
            f"per video, and {trained['max_words']} words",
            "yellow",
        )


def _of_model(config: dict[str, Any], model: Head, checkpoint: Path | None) -> dict[str, Any]:
    """Return a configuration with the model's own options in place of defaults."""
    if checkpoint is None:
        return config
    own = {name: value for name, value in model.describe_config().items() if name in config}
    return {**config, **own, "pretrained": None}


class _Watch:
    """Show a progress bar per stage, and measure how long each stage takes."""

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


def _print(report: dict[str, Any], found: Evaluation, console: Console) -> None:
    print_all_unreadable(console, found.unreadable)
    count = f"{report['texts']} captions against {report['videos']} videos"
    title = f"\n{report['dataset']}, {report['part']}: {count}, recalls in percent"
    console.print(metrics_table(title, report["metrics"], report["R1_interval_95"], report["videos"]))
    print_line(console, "Brackets: 95 % bootstrap interval over the videos.")
    if report["dual_softmax"] is not None:
        console.print(metrics_table(f"\n{POST}", report["dual_softmax"]))
        print_line(console, POST_NOTE)
    stages = ", ".join(f"{STAGES[stage]} {taken:.1f} s" for stage, taken in report["seconds"].items())
    print_line(console, f"Time: {stages}")


def _check_out(name: str, path: Path | None) -> None:
    """Check now, not after an hour, that the result can be written."""
    if path is None:
        return
    if path.is_dir():
        file = path / ("eval.json" if name == "out" else "scores.npy")
        raise ValueError(f"{name} must be a file, got {path}, a folder; name a file in it, such as {file}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def _save_array(name: str, sim: Tensor) -> None:
    with Path(name).open("wb") as file:  # a name without .npy would get it added
        np.save(file, sim.numpy())


def _write(path: Path, write: Callable[[str], object]) -> None:
    try:
        write_atomically(path, write)
    except OSError as error:
        raise OSError(f"the result could not be written to {path}, got: {error.strerror or error}") from error
