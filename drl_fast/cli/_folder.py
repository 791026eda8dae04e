"""The demo on someone's own videos and captions: decode, encode, search."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from .. import DP
from ..data.folder import read_captions
from ..data.video import Sampling, read_video
from ..data.video_files import VIDEO_SUFFIXES
from ..engine.evaluate import encode_texts, encode_videos
from ..metrics import ranks, retrieval_metrics
from ..model.clip import load_clip
from ..model.drl import DRL
from ._tables import DIRECTIONS, chance, metrics_row, metrics_table, print_machine, progress, served_by

MAX_WORDS = 32
SHOWN = 30
NO_WEIGHTS = (
    "Random weights: the scores below mean nothing. They show that decoding, towers and interaction run on your "
    "videos; name weights with --pretrained, e.g. --pretrained openai."
)


def run_folder(folder: Path, clip_name: str, pretrained: str | None, console: Console) -> dict[str, Tensor]:
    """Score the folder's captions against its videos, print metrics and top matches, return similarities by layer.

    Raises:
        ValueError: no captions file, no usable video, an unknown model or weights that cannot be had.
    """
    captions = read_captions(folder)
    from_where = "random weights" if pretrained is None else f"weights {escape(pretrained)} (a tag is fetched once)"
    console.print(f"loading {escape(clip_name)}, {from_where}", highlight=False)
    clip, tokenizer = load_clip(clip_name, pretrained)
    model = DRL(clip, interaction="ti", temporal=None).eval()
    sampling = Sampling(size=model.picture_size[0])
    print_machine(console)
    console.print(f"{sampling.rate:g} frame a second of video, at most {sampling.max_frames}", highlight=False)

    named = list(dict.fromkeys(c.video for c in captions))
    names, video, mask, skipped = _encode_folder(model, folder, named, sampling, console)
    for reason in skipped:
        # Escaped here and below: file names and captions hold brackets, which rich takes for its markup.
        console.print(f"[yellow]skipped:[/yellow] {escape(reason)}", highlight=False, soft_wrap=True)
    unnamed = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in VIDEO_SUFFIXES and p.name not in named)
    if unnamed:
        console.print(f"no caption names: {escape(', '.join(unnamed))}", highlight=False, soft_wrap=True)
    if not names:
        raise ValueError(
            f"{folder} must hold at least one readable video that its captions name, got none of {len(skipped)}; "
            "the reasons are above"
        )
    column = {name: number for number, name in enumerate(names)}
    usable = [caption for caption in captions if caption.video in column]
    owner = torch.tensor([column[caption.video] for caption in usable])
    length = min(MAX_WORDS, clip.context_length)
    text, text_mask = encode_texts(model, tokenizer([c.text for c in usable], context_length=length))
    with torch.no_grad():
        sims = {"TI": model.similarity(text, video, text_mask, mask), "DP": DP()(text, video, text_mask, mask)}
    if pretrained is None:
        console.print(f"[bold yellow]{NO_WEIGHTS}[/bold yellow]")
    console.print(_metrics(sims, owner, len(usable), len(names)))
    console.print(
        f"TI: every word's best frame and every frame's best word, unweighted (by {served_by()}). DP: end token "
        "against mean frame, CLIP's own way. Neither has parameters: CLIP brings none for WTI's two networks, which "
        "training would have to fill."
    )
    console.print(_top_matches(sims["DP"], [c.text for c in usable], names, owner))
    return sims


def _encode_folder(
    model: DRL, folder: Path, files: list[str], sampling: Sampling, console: Console
) -> tuple[list[str], Tensor, Tensor, list[str]]:
    """Names, tokens (B, Nv, D) and mask (B, Nv) of the readable videos, and why the others are left out.

    A video's frames go as soon as it is encoded: decoded, a large folder would not fit in memory.
    """
    names, tokens, masks, skipped = [], [], [], []
    with progress(console) as bars:
        task = bars.add_task("decode and encode", total=len(files), note="")
        for file in files:
            try:
                frames, mask = read_video(folder / file, sampling)
            except ValueError as error:
                skipped.append(str(error))
            else:
                names.append(file)
                tokens.append(encode_videos(model, frames[None], mask[None]))
                masks.append(mask[None])
            bars.advance(task)
    if not names:
        return [], torch.empty(0), torch.empty(0), skipped
    return names, torch.cat(tokens), torch.cat(masks), skipped


def _metrics(sims: dict[str, Tensor], owner: Tensor, texts: int, videos: int) -> Table:
    table = metrics_table(f"\n{texts} captions against {videos} videos, recalls in percent")
    for key, direction in DIRECTIONS.items():
        for name, sim in sims.items():
            metrics_row(table, f"{direction}, {name}", retrieval_metrics(sim, owner)[key])
    metrics_row(table, "chance", chance(videos))
    return table


def _top_matches(sim: Tensor, texts: list[str], names: list[str], owner: Tensor) -> Table:
    """Each caption's best video by DP, and the rank of its own."""
    title = "Top match per caption (DP)" + (f", the first {SHOWN} of {len(texts)}" if len(texts) > SHOWN else "")
    table = Table(title=title, title_justify="left")
    for name in ("caption", "top match", "cosine", "its own video's rank"):
        table.add_column(name, justify="left" if name in ("caption", "top match") else "right")
    rank = ranks(sim, owner).tolist()
    for row, text in enumerate(texts[:SHOWN]):
        best = int(sim[row].argmax())
        place = f"{rank[row]} of {len(names)}"
        table.add_row(escape(text), escape(names[best]), f"{float(sim[row, best]):.3f}", place)
    return table
