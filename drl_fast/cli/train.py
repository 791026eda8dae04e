"""``drl-fast train``: a row of the ablation, on one process or, under torchrun, many."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ._errors import INTERRUPTED, told
from ._options import Annotations, Overrides, Strict, Videos


def train(
    config: Annotated[Path, typer.Option(help="A YAML file as under configs/: data set, model and recipe.")],
    out: Annotated[
        Path | None,
        typer.Option(help="The run's folder, new or, with --resume, its own; else runs/ and the config's name."),
    ] = None,
    videos: Videos = None,
    annotations: Annotations = None,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option(help="Go on from the folder's last checkpoint, or from the beginning if there is none.")
    ] = False,
    strict: Strict = False,
    dry_run: Annotated[
        bool, typer.Option(help="Two steps and an evaluation on generated clips, with random weights; keeps nothing.")
    ] = False,
) -> None:
    """Train a model and keep the one with the highest text-to-video R@1.

    Ctrl-C ends it after the step with a checkpoint; --resume goes on from there with the losses that it would have
    had, also after a kill. torchrun --nproc-per-node N -m drl_fast.cli train ... trains on N processes: the batch
    is divided among them and every pair stays a negative of all others.
    """
    with told("train"):
        from ._training import TrainRun, run_train

        run = TrainRun(config, out, videos, annotations, tuple(overrides or ()), resume, strict)
        if not run_train(run, Console(), dry=dry_run):
            raise typer.Exit(INTERRUPTED)
