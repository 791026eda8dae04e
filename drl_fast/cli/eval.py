"""``drl-fast eval``: a model against a data set's videos and captions, on one process or, under torchrun, many."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ._errors import told
from ._options import Annotations, Overrides, Strict, Videos


def evaluate(
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="A run folder of drl-fast train (its best model), a folder of save_pretrained, or a checkpoint file "
            "of the public DRL code. Without it: the configured model as it is built."
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A YAML file as under configs/; a run folder brings its own.")
    ] = None,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    videos: Videos = None,
    annotations: Annotations = None,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Write metrics, intervals, counts and settings to this JSON.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Keep frame features in this folder, and decode no video twice.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that decode, for each process; else the configuration's.")
    ] = None,
    block: Annotated[int, typer.Option(min=1, help="Captions scored at a time: less memory, more passes.")] = 64,
    strict: Strict = False,
    post: Annotated[
        bool, typer.Option(help="Also print metrics after dual softmax, which are not comparable with plain ones.")
    ] = False,
) -> None:
    """Score every caption of a split against every video of it: recalls and ranks in both directions.

    Videos that are missing or cannot be read are named and left out with their captions. torchrun --nproc-per-node N
    -m drl_fast.cli eval ... shares the work and gives the same numbers.
    """
    with told("train"):
        from ._evaluation import EvalRun, run_eval

        run = EvalRun(
            checkpoint,
            config,
            split,
            videos,
            annotations,
            tuple(overrides or ()),
            out,
            cache,
            workers,
            block,
            strict,
            post,
        )
        run_eval(run, Console())
