"""Lines that train and eval both print."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from ..data.split import Split

if TYPE_CHECKING:
    from ..data.loading import Unreadable


def print_line(console: Console, text: str, style: str = "") -> None:
    """Print text as it stands: no markup, no colours for numbers, no line breaks."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def print_split(console: Console, split: Split) -> None:
    """Print a split's size, and what its annotations list but the folders do not hold."""
    captions, videos = len(split.captions), len(split.videos)
    print_line(console, f"{split.dataset}, {split.part}: {captions} captions of {videos} videos")
    for sentence in split.left_out():
        print_line(console, f"left out: {sentence}", "yellow")


def print_unreadable(console: Console, video: Unreadable) -> None:
    """Print that a video cannot be read, and why."""
    print_line(console, f"unreadable, left out: {video.name}: {video.reason}", "yellow")
