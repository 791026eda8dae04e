"""Training as the paper does it, one process or many, and going on after whatever ended it.

A run is a folder: ``config.yaml``, ``last.pt`` (all that a continuation needs), ``best/`` (the model with the highest
text-to-video R@1), ``evaluations.json``, ``log.csv``, ``tensorboard/`` and, where videos could not be read,
``unreadable.txt``. A step is a function of the state before it and of its number: order of captions, learning rate and
random numbers follow from that and from the seed, so that a run which was killed goes on with the losses that it would
have had.
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
import yaml
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from ..atomic_write import remove_parts, write_atomically
from ..data.loading import Tokenizer, Unreadable, VideoCaptions, pair_loader
from ..data.split import Split
from ..distributed.group import Group, Terms
from ..model.drl import DRL
from ..model.pretrained import BEST
from . import checkpoint, schedule
from .checkpoint import Progress
from .config import RunConfig, read_config
from .evaluate import Evaluation, evaluate
from .fsdp import average_gradients, clip_gradients, distribute, reduce_after
from .logs import Logs, write_evaluations
from .processes import Processes
from .step import add_gradients

LAST, CONFIG, UNREADABLE = "last.pt", "config.yaml", "unreadable.txt"


class Watcher(Protocol):
    """What a command shows of a run; called on the first process alone, but for ``unreadable``."""

    def started(self, step: int, steps: int, epochs: int) -> None: ...
    def stepped(self, values: dict[str, float]) -> None: ...
    def evaluating(self, stage: str, done: int, total: int) -> None: ...
    def evaluated(self, epoch: int, found: Evaluation, best: bool) -> None: ...
    def unreadable(self, video: Unreadable) -> None: ...


@dataclass
class Data:
    """What a run trains on and is evaluated on."""

    train: Split
    val: Split
    tokenizer: Tokenizer
    strict: bool = False

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all pairs: names of videos and captions, in order."""
        pairs = [(split.names, split.captions, split.owner) for split in (self.train, self.val)]
        return hashlib.blake2b(repr(pairs).encode(), digest_size=16).hexdigest()


@dataclass
class Run:
    """A model in training, with all that one step needs of the one before it."""

    config: RunConfig
    model: DRL
    data: Data
    folder: Path
    processes: Processes
    watcher: Watcher
    stop: Callable[[], bool] = lambda: False
    """Asked after every step: whether to write a checkpoint and end."""
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        config = self.config
        # Of a sharded model, which every process would have to call alike, evaluation sees a whole copy. It is on the
        # model's device only meanwhile.
        self.whole = copy.deepcopy(self.model) if self._sharded else self.model
        self.model.to(self.processes.device)
        distribute(self.model, config.parallel, self.processes)
        self.optimizer = schedule.optimizer(self.model, config)
        self.batches = schedule.batches(len(self.data.train.captions), config)
        self.per_epoch = len(self.batches) // config.epochs
        self.sampling = config.sampling(self.whole.picture_size[0])

    @property
    def _sharded(self) -> bool:
        return self.config.parallel == "fsdp" and self.processes.group is not None

    def open_folder(self, resume: bool) -> None:
        """Make the run's folder, or go on from the checkpoint in it.

        Raises:
            ValueError: a folder that holds a run, without ``resume``; a checkpoint of another run.
        """
        last = self.folder / LAST
        # Asked of all before the first one writes.
        started = self.processes.any((self.folder / CONFIG).exists() or last.exists())
        if started and not resume:
            raise ValueError(
                f"out must be a new folder, got {self.folder}, which holds a run; add --resume to go on with it, or "
                "name another"
            )
        if self.processes.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            for folder in (self.folder, self.folder / BEST):
                remove_parts(folder)
        self.processes.any(False)  # none looks before it is made
        if last.exists():
            state = checkpoint.read(last, self.config, self.data.fingerprint)
            self.progress = checkpoint.restore(state, self.model, self.optimizer)
        elif (self.folder / CONFIG).exists():
            then = asdict(read_config(self.folder / CONFIG))
            checkpoint.require_same(self.config, then, self.folder / CONFIG)
        self._agree()
        if self.processes.first:
            text = yaml.safe_dump(asdict(self.config), sort_keys=False)
            write_atomically(self.folder / CONFIG, lambda name: Path(name).write_text(text))

    def _agree(self) -> None:
        """See that all processes go on from one point, with the same data and the same folder.

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
        Group(self.processes.group).agree("training", lambda: Terms({}, same))

    def train(self) -> bool:
        """Train until the last epoch is evaluated; says whether it came to that or was told to stop before.

        Raises:
            ValueError: a step without a readable video; with ``strict`` any unreadable one.
            RuntimeError: a decoding process that was killed.
            OSError: a checkpoint or log that cannot be written.
        """
        steps, first = len(self.batches), self.processes.first
        logs = Logs(self.folder, self.progress.step) if first else None
        try:
            if first:
                self.watcher.started(self.progress.step, steps, self.config.epochs)
            loader = self._loader(self.progress.step)
            while True:
                step = self.progress.step
                if step and step % self.per_epoch == 0 and step // self.per_epoch not in self.progress.evaluations:
                    self._evaluate(step // self.per_epoch, logs)
                if step == steps:
                    return True
                values = self._step(loader)
                if first and logs is not None:
                    logs.step(values)
                    self.watcher.stepped(values)
                stopped = self.processes.any(self.stop())
                at_end = self.progress.step % self.per_epoch == 0
                if stopped or at_end or self.progress.step % self.config.checkpoint_every == 0:
                    self.save()
                if stopped:
                    return False
        finally:
            if logs is not None:
                logs.close()

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

    def _loader(self, step: int) -> Iterator[tuple[dict[str, Tensor] | None, list[Unreadable]]]:
        """This process's part of all batches from ``step`` on; workers live until the end."""
        pairs = VideoCaptions(self.data.train, self.data.tokenizer, max_words=self.config.words, sampling=self.sampling)
        own = [batch[self.processes.part(len(batch))] for batch in self.batches[step:]]
        pin = self.processes.device.type == "cuda"
        return iter(pair_loader(pairs, own, workers=self.config.workers, pin=pin))

    def _step(self, loader: Iterator[tuple[dict[str, Tensor] | None, list[Unreadable]]]) -> dict[str, float]:
        """One step of the optimizer; its numbers, as :data:`drl_fast.engine.logs.COLUMNS` names them."""
        start, config, step = time.perf_counter(), self.config, self.progress.step
        try:
            batch, unreadable = next(loader)
        except RuntimeError:  # a worker was killed, between two steps
            if self.processes.group is None:
                self.save()
            raise
        self._tell(unreadable)
        batch = self._on_device(batch)
        if self.processes.size == 1 and not len(batch["text_ids"]):
            raise ValueError(
                f"videos must be readable, got a batch without one, at step {step + 1} of {config.dataset}; see "
                f"{self.folder / UNREADABLE}"
            )
        self.model.train()
        self.optimizer.zero_grad()
        factor = schedule.rate(step, len(self.batches), config.warmup)
        schedule.set_rates(self.optimizer, factor)
        own_rows = -(-len(self.batches[step]) // self.processes.size)
        reduce_after(self.model, last=False)
        losses = add_gradients(
            self.model,
            batch,
            # By the rows that a process should have: with its videos unreadable it must still take all turns.
            chunks=-(-own_rows // config.chunk) if config.chunk else 1,
            precision=config.precision,
            group=self.processes.group,
            reseed=lambda part: torch.manual_seed(schedule.seed_of(config.seed, step, self.processes.rank, part)),
            before_last=lambda: reduce_after(self.model, last=True),
        )
        average_gradients(self.model, self.processes)
        norm = clip_gradients(self.model, config.clip_grad)
        self.optimizer.step()
        self.model.limit_logit_scale()
        self.progress.step = step + 1
        return {
            "step": step + 1,
            "epoch": step // self.per_epoch + 1,
            **{name: float(loss) for name, loss in losses.items()},
            "logit_scale": float(self.model.logit_scale.detach()),
            "grad_norm": float(norm),
            "lr": config.lr * factor,
            "clip_lr": config.clip_lr * factor,
            "pairs": len(self.batches[step]),
            "seconds": time.perf_counter() - start,
        }

    def _on_device(self, batch: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """A batch where the model is, of no row if nothing could be read; ``owner`` only if it is asked for."""
        sampling, words = self.sampling, self.config.words
        if batch is None:
            batch = {
                "text_ids": torch.zeros(0, words, dtype=torch.int64),
                "video": torch.zeros(0, sampling.max_frames, 3, sampling.size, sampling.size, dtype=torch.uint8),
                "video_mask": torch.zeros(0, sampling.max_frames, dtype=torch.bool),
                "owner": torch.zeros(0, dtype=torch.int64),
            }
        wanted = {name: x for name, x in batch.items() if name != "owner" or self.config.skip_same_video}
        return {name: x.to(self.processes.device, non_blocking=True) for name, x in wanted.items()}

    def unreadable(self) -> set[str]:
        """Names of the videos that could not be read so far, by any process."""
        path = self.folder / UNREADABLE
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return {line.partition("\t")[0] for line in lines}

    def _tell(self, unreadable: list[Unreadable]) -> None:
        """Name each video that cannot be read once, and keep a list of them beside the run."""
        named = self.unreadable() if unreadable else set()
        for video in unreadable:
            if self.data.strict:
                raise ValueError(f"{video.name} cannot be read, and --strict wants all of them: {video.reason}")
            if video.name not in named:
                named.add(video.name)
                with (self.folder / UNREADABLE).open("a", encoding="utf-8") as file:
                    file.write(f"{video.name}\t{video.reason}\n")
                self.watcher.unreadable(video)

    def _evaluate(self, epoch: int, logs: Logs | None) -> None:
        """Score the val part, keep the model if it is the best so far, and the numbers in any case."""
        if self._sharded:
            self.whole.load_state_dict(get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True)))
            self.whole.to(self.processes.device)
        first = self.processes.first
        found = evaluate(
            self.whole,
            self.data.val,
            self.data.tokenizer,
            self.sampling,
            max_words=self.config.words,
            workers=self.config.workers,
            precision=self.config.precision,
            strict=self.data.strict,
            process_group=self.processes.group,
            on_progress=self.watcher.evaluating if first else None,
        )
        if first:
            self._tell(found.unreadable)
        self.progress.evaluations[epoch] = found.metrics
        leader = self.progress.best()
        best = leader is not None and leader[0] == epoch
        if first:
            if best:
                self.whole.save_pretrained(self.folder / BEST)
            write_evaluations(self.folder, self.progress.evaluations)
            if logs is not None:
                logs.evaluation(self.progress.step, found.metrics)
            self.watcher.evaluated(epoch, found, best)
        if self._sharded:
            self.whole.cpu()
        self.save()
