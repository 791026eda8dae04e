"""The state of a run in one file: weights, optimizer and progress. DDP and FSDP read each other's files."""

from __future__ import annotations

import reprlib
import textwrap
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from ..atomic_write import write_atomically
from ..metrics import DIRECTIONS
from ..model.config import Pictures
from ..model.head import Head
from ..model.weight_files import check_zip
from .config import RunConfig

FORMAT = "drl-fast run 2"
PARTS = {
    "format": str,
    "built": dict,
    "model": dict,
    "optimizer": dict,
    "progress": dict,
    "config": dict,
    "data": str,
}
# What weights do not tell of a model; another value would train another model without a word.
BUILT = ("quick_gelu", "mean", "std", "resize", "interpolation", "sizes")
METRICS = {"R1", "R5", "R10", "MdR", "MnR", "R1_low", "R1_high", "candidates"}
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
# A resumed run may change these: they change rounding at most.
FREE = (
    *("videos", "annotations", "features", "workers", "checkpoint_every", "chunk", "parallel"),
    *("checkpoint_towers", "compile"),
)


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
    model: Head,
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
        "built": _built(model),
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
        check_zip(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError(
            f"{path} must be a whole checkpoint, and could not be read ({type(error).__name__}: "
            f"{textwrap.shorten(str(error), 100) or 'no reason given'}); start a new run in another folder"
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
        f"{name} {reprlib.repr(before.get(name))} then and {value!r} now"
        for name, value in asdict(config).items()
        # A tensor, for example, has no truth value.
        if name not in FREE and (type(before.get(name)) is not type(value) or before[name] != value)
    ]
    if changed:
        raise ValueError(
            f"config must be the one that {path} was trained with, got {'; '.join(changed)}; restore it, or start a "
            "new run in another folder"
        )


def restore(state: dict[str, Any], model: Head, optimizer: torch.optim.Optimizer) -> Progress:
    """Load a state that :func:`read` returned into model and optimizer.

    Raises:
        ValueError: entries that do not fit them.
    """
    try:
        # torch ignores missing entries.
        different = model.state_dict().keys() ^ state["model"].keys()
        if different:
            raise KeyError(min(different))
        if state["progress"]["step"] and not state["optimizer"]["state"]:
            raise KeyError("the optimizer's state")
        set_state_dict(
            model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=FULL
        )
        progress = Progress(**state["progress"])
        _check_progress(progress)
        _check_optimizer(optimizer, progress.step)
        built = _built(model)
        # Older checkpoints lack these; their pictures were prepared in the default way.
        defaults = {name: x for name, x in Pictures._field_defaults.items() if name in built}
        before = {**defaults, **state["built"]}
        for name in sorted(built.keys() | before.keys()):
            if before.get(name) != built.get(name):
                raise ValueError(f"{name} was {before.get(name)} and is {built.get(name)}")
    except Exception as error:  # torch raises whatever the first wrong entry leads to
        reason = f"{type(error).__name__}: {textwrap.shorten(str(error), 200)}"
        raise ValueError(
            f"the checkpoint must hold the state of this model and optimizer, got another ({reason}); start a new run"
        ) from error
    return progress


def _built(model: Head) -> dict[str, Any]:
    described = model.describe_config()
    return {name: described[name] for name in BUILT if name in described}


def _check_progress(progress: Progress) -> None:
    step, evaluations = progress.step, progress.evaluations
    whole = type(step) is int and step >= 0 and isinstance(evaluations, dict)
    for epoch, found in evaluations.items() if whole else ():
        whole = whole and type(epoch) is int and found.keys() == set(DIRECTIONS)
        for values in found.values() if whole else ():
            whole = whole and values.keys() == METRICS and all(isinstance(x, int | float) for x in values.values())
    if not whole:
        raise ValueError("its progress is damaged")


def _check_optimizer(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Check that each parameter's moments have its shape; set_state_dict takes any."""
    for p, state in optimizer.state.items():
        steps = float(state["step"])
        if not 0 <= steps <= step or steps != int(steps):
            raise ValueError(f"an optimizer's step is {steps}, in a run of {step} steps")
        for name in ("exp_avg", "exp_avg_sq"):
            if state[name].shape != p.shape or not state[name].is_floating_point():
                raise ValueError(f"{name} has the shape {tuple(state[name].shape)} instead of {tuple(p.shape)}")
