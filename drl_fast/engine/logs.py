"""A run's numbers on disk: one CSV line per step, the same in TensorBoard, evaluations as JSON."""

from __future__ import annotations

import contextlib
import csv
import json
import threading
from pathlib import Path

from ..atomic_write import write_atomically

LOG = "log.csv"
LOSSES = ("total", "info_nce", "cdcr")
COLUMNS = ("step", "epoch", *LOSSES, "logit_scale", "grad_norm", "lr", "clip_lr", "pairs", "seconds")


class Logs:
    """Write ``log.csv`` and ``tensorboard/`` in a run's folder, from the step after ``step`` on.

    Lines after the last checkpoint of a killed run are removed: those steps run again.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second to load

        path = folder / LOG
        rows = [row for row in read_log(path) if int(row["step"]) <= step] if path.exists() else []
        write_atomically(path, lambda name: _write(Path(name), rows))
        self._file = path.open("a", newline="", encoding="utf-8")
        self._rows = csv.DictWriter(self._file, COLUMNS)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        # TensorBoard writes in a thread of its own, whose errors would only show as a traceback.
        self._hook, self._failed = threading.excepthook, list[BaseException]()
        threading.excepthook = self._note

    def _note(self, found: threading.ExceptHookArgs) -> None:
        if isinstance(found.exc_value, OSError):
            self._failed.append(found.exc_value)
        else:
            self._hook(found)

    def step(self, values: dict[str, float]) -> None:
        """Log one step's numbers, named as :data:`COLUMNS`.

        Raises:
            OSError: log.csv cannot be written, or TensorBoard's file could not, some steps ago.
        """
        try:
            if self._failed:
                raise self._failed[0]
            # repr keeps every bit.
            self._rows.writerow({name: repr(values[name]) for name in COLUMNS})
            self._file.flush()
        except OSError as error:
            raise OSError(
                f"{self._file.name} and tensorboard/ beside it could not be written: {error.strerror or error}; make "
                "room and go on with --resume"
            ) from error
        for name in COLUMNS[2:]:
            self._board.add_scalar(f"train/{name}", values[name], int(values["step"]))

    def evaluation(self, step: int, metrics: dict[str, dict[str, float]]) -> None:
        """Log one evaluation's metrics in TensorBoard."""
        for direction, values in metrics.items():
            for name, value in values.items():
                self._board.add_scalar(f"val/{direction}_{name}", value, step)
        self._board.flush()

    def close(self) -> None:
        try:
            self._board.close()
        finally:
            threading.excepthook = self._hook
            with contextlib.suppress(OSError):  # reported by step()
                self._file.close()


def read_log(path: Path) -> list[dict[str, str]]:
    """Read the whole lines of a log, without one that a kill cut off.

    Raises:
        ValueError: a file that is not a run's log, or was changed by another program.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if None not in row.values() and None not in row]
        for row in rows:
            int(row["step"]), float(row["total"])
    except (ValueError, KeyError, csv.Error) as error:
        raise ValueError(
            f"{path} must be the log that training wrote, got another file ({type(error).__name__}: {error}); delete "
            "it to go on without the earlier lines"
        ) from error
    return rows


def write_evaluations(folder: Path, evaluations: dict[int, dict[str, dict[str, float]]]) -> None:
    """Write ``evaluations.json``: metrics by epoch."""
    text = json.dumps(evaluations, indent=2) + "\n"
    write_atomically(folder / "evaluations.json", lambda name: Path(name).write_text(text))


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        lines = csv.DictWriter(file, COLUMNS)
        lines.writeheader()
        lines.writerows(rows)
