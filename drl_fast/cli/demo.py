"""``drl-fast demo``: from video files to ranked answers, in three to five minutes on two cores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ._errors import report_errors

CLIP = "ViT-B-32"
# Options that one form has and the other has not.
OF_VIDEOS = ("pretrained", "clip", "max_words")
OF_SHAPES = ("keep", "out", "clips", "held_out", "steps", "seed")


def demo(
    context: typer.Context,
    videos: Annotated[
        Path | None,
        typer.Option(
            help="Score your own videos: a folder of them with captions.csv (video,caption) or captions.jsonl."
        ),
    ] = None,
    pretrained: Annotated[
        str | None, typer.Option(help="With --videos: an open_clip tag, such as openai, or a weight file.")
    ] = None,
    clip: Annotated[
        str,
        typer.Option(
            help="With --videos: an open_clip model; ViT-B-32-quickgelu with a local file of OpenAI's weights."
        ),
    ] = CLIP,
    max_words: Annotated[
        int, typer.Option(min=3, help="With --videos: tokens that a caption is cut to, start and end included.")
    ] = 32,
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for the plots loss.png, recall.png and matches.png, and for search/, the held-out clips with "
            "an index of them."
        ),
    ] = Path("demo_out"),
    keep: Annotated[
        Path | None,
        typer.Option(help="Keep the generated clips and their captions in this new or empty folder."),
    ] = None,
    clips: Annotated[int, typer.Option(help="Clips to generate for training, a multiple of 4.")] = 3200,
    held_out: Annotated[
        int, typer.Option(help="Clips to generate for the test, with captions of their own; a multiple of 4.")
    ] = 400,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of the towers and of each model.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of clips, weights and batches.")] = 0,
) -> None:
    """Train every interaction on generated clips and compare them; with --videos score your own videos instead."""
    console = Console()
    with report_errors("train"):
        _check_options(context, videos)
        if videos is None:
            from ..demo import shapes

            shapes.run_shapes(console, clips=clips, held_out=held_out, steps=steps, seed=seed, out=out, keep=keep)
        else:
            from ..demo import folder

            folder.run_folder(videos, clip, pretrained, console, max_words=max_words)


def _check_options(context: typer.Context, videos: Path | None) -> None:
    """Reject options of the other form instead of silently ignoring them."""
    for name in OF_VIDEOS if videos is None else OF_SHAPES:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option, value = name.replace("_", "-"), context.params[name]
            if videos is None:
                raise ValueError(f"{option} goes with videos, got {option}={str(value)!r} alone; add --videos DIR")
            raise ValueError(f"{option} goes without videos, got {option}={str(value)!r} beside them; drop one of them")
