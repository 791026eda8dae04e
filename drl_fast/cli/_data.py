"""What train and eval do about a data set: where it lies, and what of it is not used."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from ..data.loading import Unreadable
from ..data.split import Split
from ..engine.config import RunConfig


def with_folders(
    config: RunConfig, videos: Path | None, annotations: Path | None, hint: str = ""
) -> tuple[RunConfig, Path, Path]:
    """The configuration with the folders that options name, and they; one's own captions lie beside one's videos.

    Raises:
        ValueError: neither says where one of them is; ``hint`` is added to the remedy.
    """
    found = {"videos": videos or config.videos, "annotations": annotations or config.annotations}
    if config.dataset == "folder" and found["annotations"] is None:
        found["annotations"] = found["videos"]
    for name, folder in found.items():
        if folder is None:
            raise ValueError(f"{name} must name a folder, got none; pass --{name} or set it in the configuration{hint}")
    names = {name: str(folder) for name, folder in found.items()}
    config = dataclasses.replace(config, videos=names["videos"], annotations=names["annotations"])
    return config, Path(names["videos"]), Path(names["annotations"])


def print_left_out(console: Console, split: Split) -> None:
    """What annotations list and the folders do not hold."""
    for sentence in split.left_out():
        console.print(f"[yellow]left out:[/yellow] {escape(sentence)}", highlight=False, soft_wrap=True)


def print_unreadable(console: Console, video: Unreadable) -> None:
    """A video that gives no frame, and why."""
    console.print(
        f"[yellow]unreadable, left out:[/yellow] {escape(video.name)}: {escape(video.reason)}",
        highlight=False,
        soft_wrap=True,
    )
