"""Training as in the paper, on one process or many, resumable after any interruption.

A run is a folder: ``config.yaml``, ``last.pt`` (the checkpoint that a continuation reads), ``best/`` (the model with
the highest text-to-video R@1), ``evaluations.json``, ``log.csv``, ``loss.png``, ``recall.png``, ``tensorboard/`` and,
where videos could not be read, ``unreadable.txt``. A step depends on the state before it and on its number alone: they
and the seed give the order of captions, the learning rate and the random numbers. So a run that was killed continues
with the losses that it would have had.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import torch
import yaml
from filelock import FileLock
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from ..atomic_write import remove_parts, write_atomically
from ..data.loading import Unreadable
from ..distributed.group import Group, agree
from ..model import fine_tuning
from ..model.head import Head
from ..model.pretrained import BEST
from ..validation import printable
from . import checkpoint, plots, sanity_checks, schedule
from .checkpoint import Progress
from .config import RunConfig, read_recorded
from .data import Loaded, Source
from .evaluate import Evaluation
from .fsdp import distribute
from .logs import LOG, Logs, read_log, write_evaluations
from .processes import Processes
from .step import take_step, text_name

LAST, CONFIG, UNREADABLE, LOCK = "last.pt", "config.yaml", "unreadable.txt", ".lock"


class Watcher(Protocol):
    """What a command shows of a run; called on the first process alone, except ``unreadable``."""

    def started(self, step: int, steps: int, epochs: int) -> None: ...
    def stepped(self, values: dict[str, float]) -> None: ...
    def evaluating(self, stage: str, done: int, total: int) -> None: ...
    def evaluated(self, epoch: int, found: Evaluation, best: bool) -> None: ...
    def unreadable(self, video: Unreadable) -> None: ...
    def warned(self, text: str) -> None: ...


@dataclass
class Run:
    """A model in training and everything that the next step needs."""

    config: RunConfig
    model: Head
    data: Source
    folder: Path
    processes: Processes
    watcher: Watcher
    stop: Callable[[], bool] = lambda: False
    """Asked after every step whether to write a checkpoint and end."""
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        self._lock = FileLock(self.folder / LOCK)
        config = self.config
        self._change_towers()
        # All processes would have to call a sharded model equally often. Evaluation uses a whole copy instead, which is
        # on the device only while it runs.
        self.whole = copy.deepcopy(self.model) if self._sharded else self.model
        self.model.to(self.processes.device)
        distribute(self.model, config.parallel, self.processes)
        if config.compile:  # last: copies are not compiled
            fine_tuning.compile_towers(self._clip, self.processes.device)
        self.optimizer = schedule.optimizer(self.model, config)
        self.batches = schedule.batches(self.data.train.owner, config)
        self.per_epoch = len(self.batches) // config.epochs
        self._info_nce: list[float] = []
        self._warned_of_loss = self._warned_of_scores = False
        self._saved: int | None = None

    def _change_towers(self) -> None:
        """Add adapters, freeze blocks and checkpoint them, as configured."""
        config = self.config
        if config.lora:
            torch.manual_seed(config.seed + 2)  # build_model takes the first two
            fine_tuning.add_adapters(self._clip, config.lora)
        if config.freeze_layers is not None:
            fine_tuning.freeze_layers(self._clip, config.freeze_layers)
        if config.checkpoint_towers:
            fine_tuning.checkpoint_towers(self._clip)

    @property
    def _clip(self) -> nn.Module:
        return self.model.get_submodule("clip")

    @property
    def _sharded(self) -> bool:
        return self.config.parallel == "fsdp" and self.processes.group is not None

    def open_folder(self, resume: bool) -> None:
        """Make the run's folder, or continue from the checkpoint in it.

        No other training can open the folder until this one ends, in whatever way.

        Raises:
            ValueError: a folder that holds a run, without ``resume``; a checkpoint of another run; a folder in which
                another training runs.
        """
        # All processes look before the first one writes.
        if self.processes.any(self._started()) and not resume:
            raise ValueError(
                f"out must be a new folder, got {self.folder}, which holds a run; add --resume to go on with it, or "
                "name another"
            )
        free = self.processes.acquire(self._lock)
        try:
            # Another training may have come and gone since the first look.
            if self.processes.any(not free or (self._started() and not resume)):
                raise ValueError(
                    f"out must be a folder of one training at a time, got {self.folder}, where another one runs"
                )
            self._continue()
        except BaseException:
            self._lock.release()
            raise

    def _started(self) -> bool:
        return (self.folder / CONFIG).exists() or (self.folder / LAST).exists()

    def _continue(self) -> None:
        """Read the folder's checkpoint, if there is one, and record the configuration."""
        last = self.folder / LAST
        if self.processes.first:
            for folder in (self.folder, self.folder / BEST):
                remove_parts(folder)
        if last.exists():
            state = checkpoint.read(last, self.config, self.data.fingerprint)
            self.progress = checkpoint.restore(state, self.model, self.optimizer)
            self._saved = self.progress.step
            if self.progress.step > len(self.batches):
                raise ValueError(f"{last} must be of a run of {len(self.batches)} steps, got step {self.progress.step}")
        elif (self.folder / CONFIG).exists():
            checkpoint.require_same(self.config, read_recorded(self.folder / CONFIG), self.folder / CONFIG)
        self._check_agreement()
        if self.processes.first:
            text = yaml.safe_dump(asdict(self.config), sort_keys=False)
            write_atomically(self.folder / CONFIG, lambda name: Path(name).write_text(text))

    def _check_agreement(self) -> None:
        """Check that all processes continue from the same step, with the same data and the same folder.

        Raises:
            ValueError: on all of them, naming what differs.
        """
        if self.processes.group is None:
            return
        same: dict[str, object] = {
            "the run's last step (out must be a folder that all processes share)": self.progress.step,
            "out (a folder that all processes share)": "there" if self.folder.is_dir() else "not there",
            "the data set": self.data.fingerprint,
            "config": repr(self.config),
        }
        with agree(Group(self.processes.group), "training") as agreement:
            agreement.same = same

    def train(self) -> bool:
        """Train until the last epoch is evaluated; return False where ``stop`` ended it before.

        Raises:
            ValueError: a step without a readable video; with ``strict`` any unreadable one.
            FloatingPointError: a loss or gradient that is NaN or infinite; the step is named, and the last checkpoint
                stays.
            RuntimeError: a decoding process that was killed.
            OSError: a checkpoint or log that cannot be written.
        """
        steps, first = len(self.batches), self.processes.first
        logs = Logs(self.folder, self.progress.step) if first else None
        try:
            if first:
                self.watcher.started(self.progress.step, steps, self.config.epochs)
                self._warn(sanity_checks.few_pairs(len(self.data.train.captions), self.config.batch))
                self._warn(sanity_checks.few_captions(len(self.data.val.captions)))
            loader = self._loader(self.progress.step)
            while True:
                step = self.progress.step
                if step and step % self.per_epoch == 0 and step // self.per_epoch not in self.progress.evaluations:
                    self._evaluate(step // self.per_epoch, logs)
                if step == steps:
                    best = self.progress.best()
                    if first and best is not None:
                        self._warn(sanity_checks.recall_at_chance(best[1]))
                    return True
                values = self._step(loader)
                if first and logs is not None:
                    logs.step(values)
                    self.watcher.stepped(values)
                    self._check_loss(values)
                stopped = self.processes.any(self.stop())
                at_end = self.progress.step % self.per_epoch == 0
                if stopped or at_end or self.progress.step % self.config.checkpoint_every == 0:
                    self.save()
                if stopped:
                    return False
        finally:
            if logs is not None:
                logs.close()
            self._lock.release()

    def _warn(self, text: str | None) -> None:
        if text is not None:
            self.watcher.warned(text)

    def _check_loss(self, values: dict[str, float]) -> None:
        """Warn once where InfoNCE stands at log(batch) after the warm-up."""
        if self.config.loss == "softmax" and values["step"] > schedule.warmup_steps(
            len(self.batches), self.config.warmup
        ):
            self._info_nce.append(values["info_nce"])
            if len(self._info_nce) % sanity_checks.WINDOW == 0 and not self._warned_of_loss:
                text = sanity_checks.loss_at_chance(self._info_nce, int(values["pairs"]))
                self._warned_of_loss = text is not None
                self._warn(text)

    def save(self) -> None:
        """Write the checkpoint that a continuation reads; all processes call it."""
        checkpoint.save(
            self.folder / LAST,
            self.model,
            self.optimizer,
            self.progress,
            self.config,
            self.data.fingerprint,
            write=self.processes.first,
        )
        self._saved = self.progress.step

    def _loader(self, step: int) -> Iterator[Loaded]:
        """Load this process's part of all batches from ``step`` on; workers live until the end."""
        own = [batch[self.processes.part(len(batch))] for batch in self.batches[step:]]
        return self.data.batches(self.whole, self.config, own, pin=self.processes.device.type == "cuda")

    def _step(self, loader: Iterator[Loaded]) -> dict[str, float]:
        """Take one step of the optimizer; return the numbers that :data:`drl_fast.engine.logs.COLUMNS` names."""
        start, config, step = time.perf_counter(), self.config, self.progress.step
        try:
            batch, unreadable = next(loader)
        except RuntimeError:  # a worker was killed, between two steps
            if self.processes.group is None:
                self.save()
            raise
        self._report_unreadable(unreadable)
        batch = self._on_device(batch)
        if self.processes.size == 1 and not len(batch[text_name(batch)]):
            raise ValueError(
                f"videos must be readable, got a batch without one, at step {step + 1} of {config.dataset}; see "
                f"{self.folder / UNREADABLE}"
            )
        factor = schedule.rate(step, len(self.batches), config.warmup)
        own_rows = -(-len(self.batches[step]) // self.processes.size)
        try:
            losses, norm = take_step(
                self.model,
                self.optimizer,
                batch,
                config,
                factor,
                processes=self.processes,
                # Counted with unreadable videos, so that all processes take equally many turns.
                chunks=-(-own_rows // config.chunk) if config.chunk else 1,
                reseed=lambda part: torch.manual_seed(schedule.seed_of(config.seed, step, self.processes.rank, part)),
            )
        except FloatingPointError as error:
            kept = "there is no checkpoint yet"
            if self._saved is not None:
                kept = f"{self.folder / LAST} holds step {self._saved}, from which --resume repeats"
            raise FloatingPointError(
                f"training stopped at step {step + 1}, before it changed the weights: {error}. {kept}; to train with "
                "other settings start a new run in another folder"
            ) from error
        self.progress.step = step + 1
        return {
            "step": step + 1,
            "epoch": step // self.per_epoch + 1,
            **{name: float(loss) for name, loss in losses.items()},
            "logit_scale": float(self.model.logit_scale.detach()),
            "grad_norm": float(norm),
            "lr": config.lr * factor,
            "clip_lr": config.clip_lr * factor,
            "pairs": self.processes.sum(len(batch[text_name(batch)])),
            "seconds": time.perf_counter() - start,
        }

    def _on_device(self, batch: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """Move a batch to the model; it has 0 rows if nothing could be read, and ``owner`` only where it is needed."""
        if batch is None:
            batch = self.data.empty(self.whole, self.config)
        # Captions that share a video's row are no negatives of each other. Across processes this takes an id.
        shared = self.config.captions_per_video > 0
        ids = self.processes.group is not None if shared else self.config.skip_same_video
        wanted = {name: x for name, x in batch.items() if name != "owner" or ids}
        return {name: x.to(self.processes.device, non_blocking=True) for name, x in wanted.items()}

    def unreadable(self) -> set[str]:
        """Names of the videos that no process could read so far."""
        path = self.folder / UNREADABLE
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return {line.partition("\t")[0] for line in lines}

    def _report_unreadable(self, unreadable: list[Unreadable]) -> None:
        """Name each unreadable video once and list it in the run's folder."""
        named = self.unreadable() if unreadable else set()
        for video in unreadable:
            if self.data.strict:
                raise ValueError(f"{video.name} cannot be read, and --strict wants all of them: {video.reason}")
            # One line a video, whatever its name holds.
            name = " ".join(printable(video.name).split())
            if name not in named:
                named.add(name)
                with (self.folder / UNREADABLE).open("a", encoding="utf-8") as file:
                    file.write(f"{name}\t{' '.join(printable(video.reason).split())}\n")
                self.watcher.unreadable(video)

    def _evaluate(self, epoch: int, logs: Logs | None) -> None:
        """Score the val part; write the numbers, the plots and, if it is the best so far, the model."""
        if self._sharded:
            self.whole.load_state_dict(get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True)))
            self.whole.to(self.processes.device)
        first = self.processes.first
        on_progress = self.watcher.evaluating if first else None
        found = self.data.evaluate(self.whole, self.config, self.processes.group, on_progress)
        if first:
            self._report_unreadable(found.unreadable)
        self.progress.evaluations[epoch] = found.with_intervals()
        leader = self.progress.best()
        best = leader is not None and leader[0] == epoch
        if first:
            if best:
                plain = fine_tuning.merge_adapters(self.whole) if self.config.lora else self.whole
                plain.save_pretrained(self.folder / BEST)
            try:
                write_evaluations(self.folder, self.progress.evaluations)
                self._plot()
            except OSError as error:
                raise OSError(
                    f"evaluations.json and the plots in {self.folder} could not be written: "
                    f"{error.strerror or error}; make room and go on with --resume"
                ) from error
            if logs is not None:
                logs.evaluation(self.progress.step, found.metrics)
            self.watcher.evaluated(epoch, found, best)
            stuck = sanity_checks.equal_scores(found.sim)
            if not self._warned_of_scores:
                self._warn(stuck)
            self._warned_of_scores |= stuck is not None
        if self._sharded:
            self.whole.cpu()
        self.save()

    def _plot(self) -> None:
        """Write loss.png and recall.png."""
        rows = read_log(self.folder / LOG)
        names = ("total", "info_nce") if self.config.cdcr else ("info_nce",)
        losses = {name: [float(row[name]) for row in rows] for name in names}
        batch, val = len(self.batches[0]), self.data.val
        if rows:  # someone may have deleted the log
            plots.save(
                plots.loss_plot(losses, batch, "Training", chance=self.config.loss == "softmax"),
                self.folder / "loss.png",
            )
        title = f"{val.dataset}, {val.part}: {len(val.captions):,} captions of {len(val.videos):,} videos"
        plots.save(plots.recall_plot(self.progress.evaluations, title), self.folder / "recall.png")
