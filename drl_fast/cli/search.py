"""``drl-fast search``: find the moment in your videos that a sentence describes."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..console import print_line
from ..validation import printable
from ._errors import report_errors
from ._options import Device

if TYPE_CHECKING:
    from ..search.retriever import Hit, Retriever


def search(
    index: Annotated[str, typer.Argument(help="An index that drl-fast index made.")],
    query: Annotated[str, typer.Argument(help="A sentence.")],
    k: Annotated[int, typer.Option("-k", help="Hits to show.")] = 10,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a list of objects with video, start, end (seconds) and score.")
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option(help="Write index.html to this folder: each hit's frames, with the words above those they chose."),
    ] = None,
    clips: Annotated[Path | None, typer.Option(help="Export each hit's span as an MP4 to this folder.")] = None,
    padding: Annotated[
        float, typer.Option("--padding", help="With --clips: seconds to add before and after each span.")
    ] = 0.0,
    where: Annotated[
        str | None,
        typer.Option(help='Search only these windows: SQL of your columns, path, start and end, as "year >= 2020".'),
    ] = None,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="Show which second each word chose; beyond 100,000 windows also how many of the best windows of a "
            "sample the vector search keeps.",
        ),
    ] = False,
    per_video: Annotated[
        int | None, typer.Option(help="Hits of one video at most; 1 ranks videos by their best moments.")
    ] = None,
    root: Annotated[Path | None, typer.Option(help="Where the videos are now, if their folder was moved.")] = None,
    model: Annotated[Path | None, typer.Option(help="The index's model, if its folder was moved.")] = None,
    device: Device = None,
) -> None:
    """Find the moments that a sentence describes, best first.

    Of windows of one video that overlap, the best one stands for all. Up to 100,000 windows are scored exactly; beyond,
    pooled vectors choose 2,000 candidates, which are scored exactly.
    """
    with report_errors("search"):
        from ..search import clips as export
        from ..search import page
        from ..search.retriever import Retriever

        notes = Console(stderr=True)
        export.check_padding(padding)
        retriever = Retriever.open(index, device) if model is None else Retriever.from_run(model, index, device)
        retriever.kept_bytes = 0  # there is no next query
        hits = retriever.search(query, k, where, per_video=per_video, root=root, thumbnails=html is not None)
        if retriever.is_cut(query):
            print_line(
                notes, f"the query is cut to {retriever.about.max_words} tokens, all that the model reads", "yellow"
            )
        if as_json:
            typer.echo(json.dumps([_as_json(hit) for hit in hits], indent=2, ensure_ascii=False, default=str))
        else:
            _print(Console(), retriever, query, hits, explain, where)
        if html is not None:
            print_line(notes, f"page: {page.write(html, query, hits, retriever.description)}")
            gone = [str(hit.path) for hit in hits if not os.path.exists(hit.path)]
            if gone:
                text = f"the page cannot play {len(gone)} of {len(hits)} hits: {gone[0]} not found"
                print_line(notes, f"{text}; if the videos were moved, --root says where they are now", "yellow")
        if clips is not None:
            for written in export.export(hits, clips, padding):
                print_line(notes, f"clip: {written}")


def _as_json(hit: Hit) -> dict[str, Any]:
    return {
        "video": hit.video,
        "start": round(hit.start, 3),
        "end": round(hit.end, 3),
        "score": hit.score,
        "path": str(hit.path),
        "matches": [dataclasses.asdict(match) for match in hit.matches],
        "columns": hit.columns,
    }


def _print(
    console: Console, retriever: Retriever, query: str, hits: list[Hit], explain: bool, where: str | None
) -> None:
    from ..search.page import clock

    if not hits:
        print_line(console, "no windows fit --where")
        return
    table = Table("rank", "score", "span", "video")
    table.columns[0].justify = table.columns[1].justify = table.columns[2].justify = "right"
    if explain:
        table.add_column("which second each word chose")
    for rank, hit in enumerate(hits, start=1):
        row = [str(rank), f"{hit.score:.3f}", f"{clock(hit.start)} - {clock(hit.end)}", _cell(hit.video)]
        if explain:
            chosen = [f"{m.word} {'none' if m.time is None else clock(m.time)}" for m in hit.matches]
            row.append(_cell(" | ".join(chosen)))
        table.add_row(*row)
    console.print(table)
    if explain:
        if not any(hit.matches for hit in hits):
            print_line(console, f"the interaction {retriever.model.config.interaction} matches no words to frames")
        found = retriever.recall(query, where)
        if found is None:
            print_line(console, "every window was scored exactly")
        else:
            print_line(
                console, f"of a sample's 10 best windows by exact score, the vector search keeps {100 * found:.0f} %"
            )


def _cell(text: str) -> str:
    # rich takes brackets for markup, and a terminal obeys escape sequences.
    return escape(printable(text))
