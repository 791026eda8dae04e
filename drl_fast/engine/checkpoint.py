"""The state of a run in one file: weights, the optimizer, how far it came. Replicas and shards read each other's."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from ..atomic_write import write_atomically
from ..model.drl import DRL
from .config import RunConfig

FORMAT = "drl-fast run 1"
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
# What may change between a run and its continuation: none of these changes what is computed, but for rounding.
FREE = ("videos", "annotations", "workers", "checkpoint_every", "chunk", "parallel")


@dataclass
class Progress:
    """How far a run came."""

    step: int = 0
    evaluations: dict[int, dict[str, dict[str, float]]] = field(default_factory=dict)
    """Metrics after each epoch, by its number from 1."""

    def best(self) -> tuple[int, float] | None:
        """Epoch and text-to-video R@1 of the best evaluation, the earlier one of two equals."""
        scores = [(epoch, found["t2v"]["R1"]) for epoch, found in self.evaluations.items()]
        return max(scores, key=lambda score: score[1], default=None)


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
    """Write a run's state aside and rename it. All processes call it, one of them with ``write``.

    Raises:
        OSError: a full disk among others; a checkpoint of before stands.
    """
    weights, optimizer_state = get_state_dict(model, optimizer, options=WHOLE)
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
        # torch's writer has an error of its own for a full disk, which does not say so.
        reason = error.strerror if isinstance(error, OSError) else "its writer failed, as it does on a full disk"
        before = "; the checkpoint before stands" if path.exists() else ""
        raise OSError(f"{path} could not be written: {reason}{before}; make room and go on with --resume") from error


def read(path: Path, config: RunConfig, data: str) -> dict[str, Any]:
    """Read a run's state and see that it is this run's.

    Raises:
        ValueError: a file that is damaged or of another kind, another configuration or other data: each difference is
            named.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError(
            f"{path} must be a whole checkpoint, and could not be read ({type(error).__name__}); start anew in another "
            "folder"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path} must be a checkpoint of drl-fast train ({FORMAT}), got another file")
    refuse_another(config, state["config"], path)
    if state["data"] != data:
        raise ValueError(
            f"dataset must be the one that {path} was trained on, got other captions or videos (some missing?); put "
            "them back, or start anew in another folder"
        )
    return state


def refuse_another(config: RunConfig, then: dict[str, Any], path: Path) -> None:
    """See that a run goes on with the configuration that it began with, as ``path`` has it.

    Raises:
        ValueError: naming every field that differs.
    """
    changed = [
        f"{name} {then.get(name)!r} then and {value!r} now"
        for name, value in asdict(config).items()
        if name not in FREE and then.get(name) != value
    ]
    if changed:
        raise ValueError(
            f"config must be the one that {path} was trained with, got {'; '.join(changed)}; put it back, or start "
            "anew in another folder"
        )


def restore(state: dict[str, Any], model: DRL, optimizer: torch.optim.Optimizer) -> Progress:
    """Put a state that was read into model and optimizer."""
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=WHOLE
    )
    return Progress(**state["progress"])
