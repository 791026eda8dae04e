"""The demo's last step: index the held-out clips with a trained model, and search them by a caption."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from ..console import print_line
from ..data.split import Split
from ..model.config import Inputs
from ..model.drl import DRL
from .comparison import CONTEXT, SAMPLING

# The name of the demo's towers in open_clip, by which a saved model finds their sizes.
CLIP = "drl-demo"
FOLDER, MODEL, CLIPS, INDEX = "search", "model", "clips", "index"
HITS = 8
MISSING = "searching the clips needs LanceDB: pip install 'drl-fast[search]'"


def search_clips(model: DRL, test: Split, clips: Mapping[str, bytes], out: Path, console: Console) -> Path | None:
    """Save the model, index the held-out clips, search them by the first caption, write a page and return its path.

    None: LanceDB is not installed, which is printed. An earlier demo's clips and index are replaced.

    Args:
        clips: the files of ``test``'s clips by name.
    """
    try:
        from ..search import page
        from ..search.retriever import Retriever
    except ModuleNotFoundError:
        print_line(console, MISSING, "yellow")
        return None
    start, folder, query = time.perf_counter(), out / FOLDER, test.captions[0]
    for old in (folder / CLIPS, folder / INDEX):
        shutil.rmtree(old, ignore_errors=True)
    (folder / CLIPS).mkdir(parents=True)
    for name, data in clips.items():
        (folder / CLIPS / name).write_bytes(data)
    model.clip_name, model.inputs = CLIP, Inputs(CONTEXT, SAMPLING.rate, SAMPLING.max_frames)
    model.save_pretrained(folder / MODEL)
    retriever = Retriever.from_run(folder / MODEL, folder / INDEX, "cpu")
    captions = {
        test.videos[owner].name: {"caption": caption} for caption, owner in zip(test.captions, test.owner, strict=True)
    }
    retriever.index(folder / CLIPS, captions)
    encoded = time.perf_counter()
    hits = retriever.search(query, HITS, thumbnails=True)
    written = page.write(folder, query, hits, retriever.description)
    videos, windows = retriever.size()
    seconds = (encoded - start, time.perf_counter() - encoded)
    console.print(
        f"\nSearch: {videos} held-out clips indexed in {seconds[0]:.1f} s ({windows} windows), searched by the first "
        f"one's caption in {seconds[1]:.2f} s; best hit: {escape(hits[0].video)}, whose caption is "
        f"{escape(str(hits[0].columns['caption']))!r}.",
        highlight=False,
    )
    print_line(console, f"page: {written}")
    print_line(console, f'search: drl-fast search {folder / INDEX} "{query}"')
    return written
