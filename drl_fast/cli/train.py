"""``drl-fast train``: train a row of the ablation on one process or, under torchrun, many."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import torch.distributed as dist
import typer
from rich.console import Console

from ..console import (
    STAGES,
    metrics_table,
    print_all_unreadable,
    print_cut,
    print_features,
    print_line,
    print_machine,
    print_split,
    print_unreadable,
    progress,
)
from ..data.datasets import load_split
from ..data.split import Split
from ..engine.processes import Processes, processes
from ..metrics import DIRECTIONS
from ._errors import INTERRUPTED, report_errors
from ._options import Annotations, Dataset, Features, Overrides, Strict, Videos, check_alone, with_folders

if TYPE_CHECKING:
    from ..data.loading import Unreadable
    from ..engine.config import RunConfig
    from ..engine.data import Source
    from ..engine.evaluate import Evaluation
    from ..engine.train import Run
    from ..model.head import Head

# The size of a dry run, which shows that a configuration works, not how fast it is.
DRY_STEPS, DRY_BATCH = 2, 8
DRY_HINT = ", or try it on generated clips with --dry-run"
# Seconds within which a second signal counts as the first one repeated.
REPEATED = 1.0


def train(
    config: Annotated[
        Path, typer.Option(help="A row of the ablation, such as wti_cdcr, or a YAML file: model and recipe.")
    ],
    dataset: Dataset = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The run's folder: new, or its own with --resume. Default: runs/ and the names of data set and row."
        ),
    ] = None,
    videos: Videos = None,
    annotations: Annotations = None,
    features: Features = None,
    overrides: Overrides = None,
    init_from: Annotated[
        Path | None,
        typer.Option(
            help="Start from the weights of a run, a save_pretrained folder or a checkpoint file of the public DRL or "
            "CLIP4Clip code, with a new optimizer and schedule; the architecture must be the configuration's."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the folder's last checkpoint, or start if there is none.")
    ] = False,
    strict: Strict = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Take two steps on generated clips with random weights; keep nothing.")
    ] = False,
) -> None:
    """Train a model and keep the one with the highest text-to-video R@1.

    Ctrl-C ends it after the current step with a checkpoint. --resume continues with the losses that it would have had,
    after a kill too. Under torchrun, N processes share each batch; see docs/training.md.
    """
    with report_errors("train"):
        from ..engine.config import read_config
        from ..engine.train import LAST, Run

        if resume and init_from is not None:
            raise ValueError(
                f"init-from must be left out with --resume, which continues from the run's checkpoint, got {init_from}"
            )
        if resume and dry_run:
            raise ValueError("dry-run keeps nothing to go on with, got --resume too; drop one of them")
        settings = read_config(config, overrides or (), dataset, features)
        on_features = settings.features is not None
        if settings.features is not None:
            check_alone(settings.features, videos=videos, annotations=annotations, dry_run=dry_run or None)
        with processes() as here, contextlib.ExitStack() as stack:
            console = Console(quiet=not here.first)
            name = settings.dataset if on_features else dataset
            folder = out or Path("runs") / (f"{name}_{config.stem}" if name else config.stem)
            source = init_from or settings.init_from or (_recorded_source(folder) if resume else None)
            settings = dataclasses.replace(settings, init_from=source and str(Path(source).resolve()))
            if dry_run:
                scratch = stack.enter_context(_shared_folder(here))
                settings, folder = _dry_settings(settings, scratch, here), scratch / "run"
                videos = annotations = scratch
            # A checkpoint replaces all weights: nothing is fetched, and init_from may be gone.
            load_weights = not (resume and (folder / LAST).exists())
            if on_features:
                model, data = _with_features(settings, strict, load_weights, here, console)
            else:
                model, data, settings = _with_videos(
                    settings, videos, annotations, strict, load_weights, here, dry_run, console
                )
            stop = stack.enter_context(_stop_on_signal(console))
            watcher = _Watcher(console, dry_run, "InfoNCE" if settings.loss == "softmax" else "sigmoid loss")
            run = Run(settings, model, data, folder, here, watcher, stop)
            _print_towers(run, console)
            run.open_folder(resume)
            with watcher.bars:
                finished = run.train()
            _conclude(run, finished, dry_run, console)
        if not finished:
            raise typer.Exit(INTERRUPTED)


def _with_videos(
    config: RunConfig,
    videos: Path | None,
    annotations: Path | None,
    strict: bool,
    load_weights: bool,
    here: Processes,
    dry: bool,
    console: Console,
) -> tuple[Head, Source, RunConfig]:
    """Build the model with its CLIP, and find captions and videos; return them with the configuration's folders."""
    from ..engine.config import build_model
    from ..engine.data import Data

    config, videos, annotations = with_folders(config, videos, annotations, DRY_HINT)
    splits = {
        part: load_split(config.dataset, part, videos=videos, annotations=annotations, strict=strict)
        for part in ("train", "val")
    }
    _introduce(config, splits, here, dry, console)
    if _fetches(config) and "HF_HUB_OFFLINE" not in os.environ:
        weights = "" if config.pretrained is None else f" and weights {config.pretrained!r}"
        print_line(console, f"loading {config.clip}{weights}; without a network this fails in a minute")
    model, tokenizer = build_model(config, load_weights=load_weights)
    for split in splits.values():
        print_cut(console, split.captions, model, tokenizer, config.words)
    return model, Data(splits["train"], splits["val"], tokenizer, strict), config


def _with_features(
    config: RunConfig, strict: bool, load_weights: bool, here: Processes, console: Console
) -> tuple[Head, Source]:
    """Open the features, and build a head for them."""
    from ..data.feature_store import FeatureStore
    from ..engine.config import build_head
    from ..engine.data import StoredData

    assert config.features is not None
    store = FeatureStore(config.features)
    parts = {part: store.part(part, strict=strict) for part in ("train", "val")}
    _introduce(config, {part: found.split for part, found in parts.items()}, here, False, console)
    print_features(console, store)
    for found in parts.values():
        print_all_unreadable(console, found.unreadable)
    return build_head(config, store, load_weights=load_weights), StoredData(store, parts["train"], parts["val"], strict)


def _random_towers_stay(config: RunConfig) -> bool:
    """Return whether towers with random weights are frozen, so that nothing can be learned from them."""
    random = config.pretrained is None and config.init_from is None and config.features is None
    return random and (config.freeze == "clip" or config.lora > 0 or config.freeze_layers is not None)


def _fetches(config: RunConfig) -> bool:
    """Return whether the configured weights, or the tokenizer, may have to be fetched."""
    from ..model.clip import fetches_tokenizer

    weights = config.init_from is None and config.pretrained is not None and not Path(config.pretrained).is_file()
    return weights or (config.clip is not None and fetches_tokenizer(config.clip))


def _recorded_source(folder: Path) -> str | None:
    """Return what a run that is resumed was initialized from."""
    from ..engine.config import read_recorded
    from ..engine.train import CONFIG

    return read_recorded(folder / CONFIG).get("init_from") if (folder / CONFIG).is_file() else None


def _introduce(config: RunConfig, splits: dict[str, Split], here: Processes, dry: bool, console: Console) -> None:
    """Print what is trained, on what and where."""
    print_machine(console)
    for split in splits.values():
        print_split(console, split)
    if not dry and splits["train"].captions == splits["val"].captions:
        print_line(
            console,
            "val holds the training captions: its scores say nothing about other videos; a column split (train, val, "
            "test) separates them",
            "bold yellow",
        )
    elif not dry and splits["val"].stands_in:
        print_line(
            console,
            "the data set has no val part: test serves as val, and the best epoch is chosen on the test videos",
            "bold yellow",
        )
    if not dry and _random_towers_stay(config):
        from ..model.clip import example_tag

        print_line(
            console,
            "the towers' weights are random, and the frozen ones stay so; take trained ones with --set "
            f"pretrained={example_tag(config.clip)}",
            "bold yellow",
        )
    weights = "random weights" if config.pretrained is None else f"weights {config.pretrained}"
    if config.init_from is not None:
        weights = f"weights from {config.init_from}"
    tower = f"{config.clip}, {weights}, " if config.features is None else ""
    print_line(
        console,
        f"{tower}interaction {config.interaction}, temporal module {config.temporal}, cdcr "
        f"{config.cdcr}; {config.precision} on {here.device}"
        + (f", {here.size} processes ({config.parallel})" if here.size > 1 else ""),
    )


def _print_towers(run: Run, console: Console) -> None:
    """Print which options of the towers are on, and how much of the towers trains."""
    from ..engine.config import OF_TOWERS
    from ..model.fine_tuning import count_parameters

    chosen = {name: getattr(run.config, name) for name in OF_TOWERS}
    names = [name if value is True else f"{name} {value}" for name, value in chosen.items() if value != OF_TOWERS[name]]
    if names:
        trained, whole = (f"{count / 1e6:.3g} M" for count in count_parameters(run.model.get_submodule("clip")))
        print_line(console, f"{', '.join(names)}: {trained} of {whole} tower parameters train")


@contextlib.contextmanager
def _stop_on_signal(console: Console) -> Iterator[Callable[[], bool]]:
    """Give a function that tells whether Ctrl-C or SIGTERM arrived; a second Ctrl-C raises KeyboardInterrupt."""
    received: list[float] = []

    def note(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if received:
            # torchrun forwards what the terminal has already sent to its processes: one Ctrl-C arrives twice.
            if number == signal.SIGINT and now - received[0] > REPEATED:
                raise KeyboardInterrupt
            return
        received.append(now)
        print_line(console, "stopping after this step, with a checkpoint; press Ctrl-C again to stop at once")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Watcher:
    """Show progress bars, one line per evaluation, and the names of unreadable videos."""

    def __init__(self, console: Console, dry: bool, loss: str) -> None:
        self.console, self.bars, self.dry, self.loss = console, progress(console), dry, loss
        self._task: Any = None
        self._stages: dict[str, Any] = {}

    def started(self, step: int, steps: int, epochs: int) -> None:
        self._task = self.bars.add_task(f"train, {epochs} epochs", total=steps, completed=step, note="")
        if step:
            print_line(self.console, f"continuing after step {step} of {steps}")

    def stepped(self, values: dict[str, float]) -> None:
        speed = values["pairs"] / values["seconds"]
        note = f"epoch {values['epoch']:.0f}, {self.loss} {values['info_nce']:.3f}, {speed:.1f} pairs/s"
        self.bars.update(self._task, completed=values["step"], note=note)

    def evaluating(self, stage: str, done: int, total: int) -> None:
        if stage not in self._stages:
            self._stages[stage] = self.bars.add_task(STAGES[stage], total=total, note="")
        self.bars.update(self._stages[stage], completed=done)

    def evaluated(self, epoch: int, found: Evaluation, best: bool) -> None:
        for task in self._stages.values():
            self.bars.remove_task(task)
        self._stages.clear()
        recalls = ", ".join(f"{DIRECTIONS[key]} R@1 {found.metrics[key]['R1']:.1f}" for key in DIRECTIONS)
        print_line(self.console, f"epoch {epoch}: {recalls}" + ", the best so far" * best)

    def unreadable(self, video: Unreadable) -> None:
        # Every process reports its own videos, on stderr: the bars on stdout are the first process's.
        print_unreadable(Console(stderr=True), video)

    def warned(self, text: str) -> None:
        if not self.dry:  # generated clips and two steps: there is nothing to warn of
            print_line(self.console, f"warning: {text}", "bold yellow")


def _conclude(run: Run, finished: bool, dry: bool, console: Console) -> None:
    """Print the result, and how to continue."""
    from ..engine.train import BEST, LAST, UNREADABLE

    if not finished and dry:
        print_line(console, "stopped; a dry run keeps nothing")
        return
    if not finished:
        print_line(
            console,
            f"stopped after step {run.progress.step} of {len(run.batches)}; the same command with --resume continues "
            f"from {run.folder / LAST}",
        )
        return
    unreadable = run.unreadable()
    if unreadable:
        print_line(console, f"unreadable videos: {len(unreadable)}; {run.folder / UNREADABLE} has their names and why")
    best = run.progress.best()
    if best is None:
        return
    (epoch, metrics), val = best, run.data.val
    title = f"\n{val.dataset}, {val.part}: best epoch ({epoch}, by text-to-video R@1)"
    intervals = {key: (values["R1_low"], values["R1_high"]) for key, values in metrics.items()}
    console.print(metrics_table(title, metrics, intervals, int(metrics["t2v"]["candidates"])))
    if dry:
        print_line(console, "A dry run: generated clips, two steps. The scores mean nothing.")
        return
    print_line(
        console,
        f"drl-fast eval --checkpoint {run.folder} scores it on the test part; the model is in {run.folder / BEST}",
    )


def _dry_settings(config: RunConfig, folder: Path, here: Processes) -> RunConfig:
    """Return the configuration for a few generated clips, which are written to ``folder``."""
    from ..data import moving_shapes

    batch = min(config.batch, DRY_BATCH)
    if here.first:
        count = DRY_STEPS * batch
        clips = moving_shapes.make_clips(count + -count % moving_shapes.ARRANGEMENTS, seed=config.seed)[:count]
        moving_shapes.write_folder(clips, folder)
    here.wait()
    return dataclasses.replace(
        config,
        dataset="folder",
        # With init_from nothing is fetched, and the tag selects the activation.
        pretrained=None if config.init_from is None else config.pretrained,
        epochs=1,
        batch=batch,
        max_words=config.words,
        max_frames=config.sampling(1).max_frames,
        workers=min(config.workers, 2),
    )


@contextlib.contextmanager
def _shared_folder(here: Processes) -> Iterator[Path]:
    """Give a temporary folder that all processes of this machine see."""
    with contextlib.ExitStack() as stack:
        name = [stack.enter_context(tempfile.TemporaryDirectory(prefix="drl_fast_dry_"))] if here.first else [""]
        if here.group is not None:
            dist.broadcast_object_list(name, src=0, group=here.group)
        yield Path(name[0])
        here.wait()
