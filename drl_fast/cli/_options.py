"""Options that more than one command has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Videos = Annotated[Path | None, typer.Option(help="Folder of the video files; else the configuration's.")]
Annotations = Annotated[Path | None, typer.Option(help="Folder of the annotation files; else the configuration's.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="key=value in YAML, over the configuration's; repeatable.")
]
Strict = Annotated[bool, typer.Option(help="Fail where a video is missing or cannot be read.")]
