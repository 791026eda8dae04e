"""The state of a run in one file: weights, optimizer and progress. DDP and FSDP read each other's files."""

from __future__ import annotations

import textwrap
import zipfile
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from ..atomic_write import write_atomically
from ..model.drl import DRL
from .config import RunConfig

FORMAT = "drl-fast run 2"
PARTS = {"format": str, "model": dict, "optimizer": dict, "progress": dict, "config": dict, "data": str}
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
# A resumed run may change these: they change rounding at most.
FREE = ("videos", "annotations", "workers", "checkpoint_every", "chunk", "parallel")


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    evaluations: dict[int, dict[str, dict[str, float]]] = field(default_factory=dict)
    """Metrics and intervals after each epoch, by its number from 1; see :meth:`Evaluation.with_intervals`."""

    def best(self) -> tuple[int, dict[str, dict[str, float]]] | None:
        """Return the epoch with the highest text-to-video R@1, and its metrics; of two equals, the earlier."""
        return max(self.evaluations.items(), key=lambda item: item[1]["t2v"]["R1"], default=None)


def save(
    path: Path,
    model: DRL,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    config: RunConfig,
    data: str,
    *,
    write: bool,
) -> None:
    """Write a run's state to a temporary file and rename it. All processes call this, one of them with ``write``.

    Raises:
        OSError: the file cannot be written, for example because the disk is full; an older checkpoint stays.
    """
    weights, optimizer_state = get_state_dict(model, optimizer, options=FULL)
    if not write:
        return
    state = {
        "format": FORMAT,
        "model": weights,
        "optimizer": optimizer_state,
        "progress": asdict(progress),
        "config": asdict(config),
        "data": data,
    }
    try:
        write_atomically(path, lambda name: torch.save(state, name))
    except (OSError, RuntimeError) as error:
        # torch's writer raises a RuntimeError that does not mention the disk.
        reason = getattr(error, "strerror", None) or "its writer failed, as it does on a full disk"
        before = "; the previous checkpoint is intact" if path.exists() else ""
        raise OSError(f"{path} could not be written: {reason}{before}; make room and continue with --resume") from error


def read(path: Path, config: RunConfig, data: str) -> dict[str, Any]:
    """Read a run's state and check that it belongs to this run.

    Raises:
        ValueError: a damaged file or one of another kind, another configuration (every difference is named), or other
            data.
    """
    try:
        # torch writes a CRC of every tensor and does not check it.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"{damaged} is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError(
            f"{path} must be a whole checkpoint, and could not be read ({type(error).__name__}); start a new run in "
            "another folder"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path} must be a checkpoint of drl-fast train ({FORMAT}), got another file")
    wrong = [name for name, kind in PARTS.items() if not isinstance(state.get(name), kind)]
    if wrong:
        raise ValueError(f"{path} must be a whole checkpoint, got one without a valid {wrong[0]}; start a new run")
    require_same(config, state["config"], path)
    if state["data"] != data:
        raise ValueError(
            f"dataset must be the one that {path} was trained on, got other captions or videos (some missing?); "
            "restore them, or start a new run in another folder"
        )
    return state


def require_same(config: RunConfig, then: dict[str, Any], path: Path) -> None:
    """Check that a run continues with its own configuration, as recorded in ``path``.

    Raises:
        ValueError: naming every field that differs.
    """
    # A field that is newer than the run had its default then.
    defaults = {f.name: f.default for f in fields(config) if f.default is not MISSING}
    before = {**defaults, **then}
    changed = [
        f"{name} {before[name]!r} then and {value!r} now"
        for name, value in asdict(config).items()
        if name not in FREE and before[name] != value
    ]
    if changed:
        raise ValueError(
            f"config must be the one that {path} was trained with, got {'; '.join(changed)}; restore it, or start a "
            "new run in another folder"
        )


def restore(state: dict[str, Any], model: DRL, optimizer: torch.optim.Optimizer) -> Progress:
    """Load a state that :func:`read` returned into model and optimizer.

    Raises:
        ValueError: entries that do not fit them.
    """
    try:
        # torch ignores missing entries.
        different = model.state_dict().keys() ^ state["model"].keys()
        if different:
            raise KeyError(min(different))
        set_state_dict(
            model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=FULL
        )
        progress = Progress(**state["progress"])
        progress.best()
    except Exception as error:  # torch raises whatever the first wrong entry leads to
        reason = f"{type(error).__name__}: {textwrap.shorten(str(error), 200)}"
        raise ValueError(
            f"the checkpoint must hold the state of this model and optimizer, got another ({reason}); start a new run"
        ) from error
    return progress
