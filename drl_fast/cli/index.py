"""``drl-fast index``: encode a folder of videos, so that ``drl-fast search`` finds moments in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..console import print_line, print_machine, print_unreadable, progress
from ..data.split import some
from ..engine.processes import Processes, processes
from ._errors import report_errors
from ._options import Device

if TYPE_CHECKING:
    from ..data.loading import Unreadable
    from ..search.retriever import Report, Retriever

NO_WEIGHTS = "CLIP's weights are random: hits will mean nothing; take trained ones with --pretrained"


def index(
    out: Annotated[
        str, typer.Option(help="The index: a folder, new or to be continued, or a place such as s3://bucket/path.")
    ],
    paths: Annotated[
        list[Path] | None, typer.Argument(help="Videos, and folders with all videos below them.", show_default=False)
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="A run of drl-fast train, or a folder of save_pretrained. Default: the index's own."),
    ] = None,
    clip: Annotated[
        str | None, typer.Option(help="An open_clip model instead of a run, such as ViT-B-32: TI ranks.")
    ] = None,
    pretrained: Annotated[
        str | None, typer.Option(help="With --clip: an open_clip tag, such as openai, a weight file, or none.")
    ] = None,
    root: Annotated[
        Path | None,
        typer.Option(
            help="Videos are named relative to this folder. Default: the index's own, or the folder that holds PATHS."
        ),
    ] = None,
    columns: Annotated[
        Path | None,
        typer.Option(
            help="A CSV file with columns of your own for search --where; its column video names each file, by path or "
            "name."
        ),
    ] = None,
    remove: Annotated[
        list[str] | None,
        typer.Option("--remove", help="Remove this video, or all below this folder, from the index; repeatable."),
    ] = None,
    prune: Annotated[bool, typer.Option("--prune", help="Remove the videos whose files no longer exist.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Frames that the image tower takes at a time.")] = 64,
    workers: Annotated[int, typer.Option(min=0, help="Threads that decode, each with a whole video in memory.")] = 2,
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was done as JSON.")] = False,
) -> None:
    """Encode videos into an index, which drl-fast search then searches.

    A video is cut into windows of as many frames as the model reads (12 seconds by default), which overlap by half.
    Run it again to add new videos and update changed ones; the rest is skipped. After Ctrl-C or a kill the same command
    continues. Under torchrun, N processes share the work. Videos that cannot be read are named and left out.
    """
    with report_errors("search"), processes() as here:
        console = Console(quiet=not here.first, stderr=as_json)
        removed = _remove(out, remove or [], prune, root, console) if remove or prune else []
        if not paths:
            if not (remove or prune):
                raise ValueError(
                    f"PATHS must name videos or folders of videos, got none; drl-fast index VIDEOS --out {out}"
                )
            _print_json(as_json, {"removed": removed})
            return
        retriever = _retriever(out, model, clip, pretrained, device, here, console)
        report = _index(retriever, paths, columns, root, batch_size, workers, here, console)
        # Each process encodes its own part; all of them find the same files unchanged.
        added, updated, unreadable = (here.gather(part) for part in (report.added, report.updated, report.unreadable))
        counts = {
            "added": len(added),
            "updated": len(updated),
            "found below another root": len(report.moved),
            "unchanged": len(report.unchanged),
        }
        if here.first:
            _conclude(report, counts, len(unreadable), out, retriever, console)
            _print_json(
                as_json,
                {
                    "added": added,
                    "updated": updated,
                    "moved": report.moved,
                    "unchanged": report.unchanged,
                    "removed": removed,
                    "unreadable": [video._asdict() for video in unreadable],
                },
            )
        if not sum(counts.values()):
            raise ValueError(f"none of the {len(unreadable)} videos could be read; see above")


def _remove(out: str, names: list[str], prune: bool, root: Path | None, console: Console) -> list[str]:
    from ..search import retriever

    table = retriever.open_index(out)
    removed = retriever.remove(table, names) if names else []
    if prune:
        removed += retriever.prune(table, root)
    print_line(console, f"removed {len(removed)} videos from {out}")
    return removed


def _retriever(
    out: str,
    model: Path | None,
    clip: str | None,
    pretrained: str | None,
    device: str | None,
    here: Processes,
    console: Console,
) -> Retriever:
    from ..model.clip import example_tag
    from ..search.retriever import Retriever, has_index

    if model is not None and clip is not None:
        raise ValueError(f"model and clip exclude each other, got {model} and {clip}; drop one of them")
    if clip is not None and pretrained is None:
        raise ValueError(
            f"pretrained must name the weights of {clip}: a tag such as {example_tag(clip)}, a file, or none for "
            "random ones"
        )
    if clip is None and pretrained is not None:
        raise ValueError(f"pretrained goes with --clip, got {pretrained} without it; add --clip NAME")
    print_machine(console)
    chosen = str(here.device) if device is None else device
    if clip is not None:
        weights = None if pretrained == "none" else pretrained
        retriever = Retriever.from_clip(clip, weights, out, chosen, processes=here)
        print_line(
            console, "CLIP without a run: TI ranks and explains; it has no weights of its own, and no temporal module"
        )
        if weights is None:
            print_line(console, f"warning: {NO_WEIGHTS} {example_tag(clip)}", "bold yellow")
    elif model is not None:
        retriever = Retriever.from_run(model, out, chosen, processes=here)
    elif has_index(out):
        retriever = Retriever.open(out, chosen, processes=here)
    else:
        raise ValueError(
            f"a new index needs a model: add --model RUN, or --clip ViT-B-32 --pretrained openai; {out} does not exist"
        )
    about = retriever.about
    print_line(
        console,
        f"model {retriever.description}; windows of {about.max_frames} frames, {about.max_frames / about.rate:g} s, "
        f"every {about.stride / about.rate:g} s; on {chosen}" + f", {here.size} processes" * (here.size > 1),
    )
    return retriever


def _index(
    retriever: Retriever,
    paths: list[Path],
    columns: Path | None,
    root: Path | None,
    batch_size: int,
    workers: int,
    here: Processes,
    console: Console,
) -> Report:
    bars = progress(console)
    tasks: list[Any] = []

    def show(done: int, total: int) -> None:
        if not tasks:
            tasks.append(bars.add_task("decode and encode videos", total=total, note=""))
        bars.update(tasks[0], completed=done)

    def unreadable(video: Unreadable) -> None:
        # Every process reports its own videos; the bars are the first process's.
        print_unreadable(Console(stderr=True), video)

    with bars:
        return retriever.index(
            list(paths),
            columns,
            root=root,
            batch_size=batch_size,
            workers=workers,
            on_progress=show,
            on_unreadable=unreadable,
        )


def _conclude(
    report: Report, counts: dict[str, int], unreadable: int, out: str, retriever: Retriever, console: Console
) -> None:
    """Print what was done, and how to search."""
    if report.unnamed:
        count = f"{len(report.unnamed)} rows of the columns"
        print_line(console, f"left out: {count} name no video of the index: {some(report.unnamed)}", "yellow")
    if unreadable:
        print_line(console, f"unreadable videos, left out: {unreadable}", "yellow")
    print_line(console, "videos: " + ", ".join(f"{count} {what}" for what, count in counts.items()))
    videos, windows = retriever.size()
    if windows:
        print_line(
            console, f'{out}: {videos} videos, {windows} windows; drl-fast search {out} "a sentence" searches them'
        )


def _print_json(asked: bool, value: Any) -> None:
    if asked:
        typer.echo(json.dumps(value, indent=2, ensure_ascii=False))
