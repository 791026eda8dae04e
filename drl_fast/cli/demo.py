"""``drl-fast demo``: the whole way from video files to ranked answers, in about two minutes on two cores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape


def demo(
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
        typer.Option(help="With --videos: an open_clip model; for OpenAI's weights from a file its -quickgelu name."),
    ] = "ViT-B-32",
    keep: Annotated[
        Path | None,
        typer.Option(help="Write the generated clips and their captions to this new or empty folder and leave them."),
    ] = None,
    clips: Annotated[int, typer.Option(min=2, help="Clips to generate for training.")] = 1000,
    held_out: Annotated[
        int, typer.Option(min=2, help="Clips to generate for the test, with captions of their own.")
    ] = 100,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 300,
    seed: Annotated[int, typer.Option(min=0, help="Of clips, weights and batches.")] = 0,
) -> None:
    """Train a small model on generated clips and search them; with --videos score your own videos instead."""
    console = Console()
    try:
        if videos is None:
            if pretrained is not None:
                raise ValueError(f"pretrained goes with videos, got pretrained={pretrained!r} alone; add --videos DIR")
            from ._shapes import ShapesRun, run_shapes

            run_shapes(ShapesRun(clips, held_out, steps, seed, keep), console)
        else:
            from ._folder import run_folder

            run_folder(videos, clip, pretrained, console)
    except ValueError as error:
        raise _failure(str(error)) from error
    except OSError as error:
        raise _failure(f"{error}; check that the path can be read and written and that the disk has room") from error
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("drl_fast"):
            raise
        message = f"{error.name} is missing; the demo needs the video extra: pip install 'drl-fast[video]'"
        raise _failure(message) from error


def _failure(message: str) -> typer.Exit:
    """Say what went wrong; raising the result ends the command with status 1."""
    # Escaped: file names hold brackets, which rich takes for its markup.
    Console(stderr=True).print(f"[bold red]error[/bold red] {escape(message)}", highlight=False, soft_wrap=True)
    return typer.Exit(1)
