"""Options that several commands share."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..engine.config import RunConfig

Dataset = Annotated[
    str | None,
    typer.Option(help="msrvtt, msvd, lsmdc, vatex, activitynet, didemo or folder; default: the configuration's."),
]
Videos = Annotated[Path | None, typer.Option(help="Folder of the video files; default: the configuration's.")]
Annotations = Annotated[Path | None, typer.Option(help="Folder of the annotation files; default: the configuration's.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the configuration; repeatable.")
]
Features = Annotated[
    Path | None, typer.Option(help="Use the tokens in this folder, which drl-fast features wrote, instead of videos.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1; default: the GPU if there is one.")]
Strict = Annotated[bool, typer.Option("--strict", help="Fail if a video is missing or cannot be read.")]


def with_folders(
    config: RunConfig, videos: Path | None, annotations: Path | None, hint: str = ""
) -> tuple[RunConfig, Path, Path]:
    """Return the configuration with absolute folders, and the folders; ``folder`` data keeps captions with the videos.

    Raises:
        ValueError: neither an option nor the configuration names one of them; ``hint`` is added to the remedy.
    """
    found = {"videos": videos or config.videos, "annotations": annotations or config.annotations}
    if config.dataset == "folder" and found["annotations"] is None:
        found["annotations"] = found["videos"]
    folders = []
    for name, folder in found.items():
        if folder is None:
            raise ValueError(f"{name} must name a folder, got none; pass --{name} or set it in the configuration{hint}")
        folders.append(Path(folder).resolve())
    return dataclasses.replace(config, videos=str(folders[0]), annotations=str(folders[1])), folders[0], folders[1]


def check_alone(features: str, **others: object) -> None:
    """Reject options of videos beside features, instead of silently ignoring them."""
    for name, value in others.items():
        if value is not None:
            raise ValueError(
                f"{name.replace('_', '-')} goes without features, got {value} beside {features}; drop one of them"
            )
