"""The demo on generated clips: write, decode, train every interaction, compare, show one pair's matches, and search."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from ..atomic_write import write_atomically
from ..console import print_line, print_machine, progress
from ..data import moving_shapes
from ..data.datasets import load_split
from ..data.moving_shapes import ARRANGEMENTS, MOST, Clip
from ..data.split import Split
from ..data.video import read_video
from ..engine.in_memory import Pairs
from ..filmstrip import plot_matches
from ..metrics import ranks
from ..model.drl import DRL
from ..model.small import LAYERS
from . import frozen
from .choices import choose, tables
from .comparison import CDCR, RECIPE, ROWS, SAMPLING, Row, as_json, compare, draw, findings, table, tokenizer
from .search import search_clips

INTERVALS = (
    "Brackets: 95 % bootstrap interval of R@1 over the held-out clips, four clips of the same words drawn as one. It "
    "shows how another draw of clips would differ, not another training: each row is one training from one seed."
)
NUMBERS, MATCHES = "comparison.json", "matches.png"


def run_shapes(
    console: Console, *, clips: int, held_out: int, steps: int, seed: int, out: Path, keep: Path | None = None
) -> list[Row]:
    """Run the demo, print its findings, write its plots, and return each interaction's scores.

    Raises:
        ValueError: numbers of clips that are no multiple of 4 or too large, folders that cannot be used.
        OSError: a full disk, among others.
    """
    start = time.perf_counter()
    _check_counts(clips, held_out)
    print_machine(console)
    _check_writable(out)
    made = moving_shapes.make_clips(clips + held_out, seed)
    with _clip_folder(keep) as folder, progress(console) as bars:
        task = bars.add_task("write clips", total=len(made), note="")
        parts = ["train"] * clips + ["test"] * held_out
        paths = moving_shapes.write_folder(made, folder, parts, lambda: bars.advance(task))
        size = sum(path.stat().st_size for path in paths)
        train, test = (load_split("folder", part, videos=folder, annotations=folder) for part in ("train", "test"))
        train_frames, train_mask = _decode(train, bars)
        test_frames, test_mask = _decode(test, bars)
        held_out_files = {path.name: path.read_bytes() for path in test.videos}
    print_line(
        console,
        f"{len(made)} H.264 clips of {moving_shapes.SIZE} x {moving_shapes.SIZE} pixels ({size / 2**20:.1f} MiB), "
        f"{int(train_mask.sum() + test_mask.sum())} frames decoded ({SAMPLING.rate:g} per second of video)"
        + (f"; kept in {keep}" if keep else ""),
    )
    batch = min(RECIPE["batch"], clips)
    console.print(
        f"{held_out} clips are held out, with their captions. Captions come in fours of the same words, which differ "
        f"in who moves where and who moves first: {made[0].caption!r} or {made[1].caption!r}.\n"
        f"CLIP towers of {LAYERS} + {LAYERS} layers, random weights: they learn all they know here. First the towers "
        f"train as CLIP does, by DP, for {steps} steps; then {len(ROWS)} models start from them, each with its own "
        f"interaction, and train for {steps} steps of {batch} pairs: one recipe, tuned for no row. No temporal module: "
        "a frame shows which shape has left and which has not, so order is visible without one.",
        highlight=False,
    )
    pairs = Pairs(train_frames, train_mask, tokenizer()(list(train.captions)))
    decoded = [frames[real] for frames, real in zip(test_frames, test_mask, strict=True)]
    with progress(console) as bars:
        rows, models = compare(pairs, test, decoded, steps, seed, bars)
    console.print(table(rows))
    console.print(INTERVALS)
    console.print("\n".join(findings(rows)), "\n", highlight=False)
    held = Pairs(test_frames, test_mask, tokenizer()(list(test.captions)))
    with progress(console) as bars:
        on_tokens = frozen.train_frozen(models["DP"], pairs, held, steps, seed, bars)
    console.print(frozen.table(on_tokens, rows))
    console.print(
        f"The trained DP row's towers encoded all clips once, in {on_tokens.encoding:.1f} s. On their tokens a "
        f"temporal module ({frozen.TEMPORAL}) and the interaction train by the same recipe, for {steps} steps.",
        highlight=False,
    )
    console.print("\n".join(frozen.findings(on_tokens)), "\n", highlight=False)
    for path in draw(rows, batch, out):
        print_line(console, f"plot: {path}")
    _show_choices(models[CDCR], made[clips], decoded[0], rows[-1], console, out / MATCHES)
    search_clips(models[CDCR], test, held_out_files, out, console)
    seconds = time.perf_counter() - start
    machine = {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    options = {"clips": clips, "steps": steps, "seed": seed}
    numbers = {
        **options,
        **machine,
        "torch": torch.__version__,
        "seconds": round(seconds, 1),
        **as_json(rows),
        "frozen": on_tokens.as_json(),
    }
    write_atomically(out / NUMBERS, lambda name: Path(name).write_text(json.dumps(numbers, indent=1) + "\n"))
    print_line(console, f"numbers: {out / NUMBERS}")
    print_line(console, f"The demo took {seconds:.0f} s.")
    return rows


def _check_counts(clips: int, held_out: int) -> None:
    for name, value, least in (("clips", clips, 1), ("held-out", held_out, 2)):
        if value % ARRANGEMENTS or value < least * ARRANGEMENTS:
            nearest = max(value // ARRANGEMENTS, least) * ARRANGEMENTS
            raise ValueError(
                f"{name} must be a multiple of {ARRANGEMENTS}, the arrangements of one caption's words, and at "
                f"least {least * ARRANGEMENTS}, got {value}; take {nearest}"
            )
    if clips + held_out > MOST:
        raise ValueError(
            f"clips and held-out together must be at most {MOST}, the different captions there are, got "
            f"{clips} + {held_out}; make fewer"
        )


def _check_writable(folder: Path) -> None:
    """Make the folder of the plots now, so that a mistake does not show minutes later."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out must be a folder, got the file {folder}; name another")
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"out must be a folder that can be written to, got {folder}; name another")


@contextlib.contextmanager
def _clip_folder(keep: Path | None) -> Iterator[Path]:
    """Make a folder for clips: ``keep``, which is emptied again when something fails, or a temporary one."""
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="drl_fast_demo_") as name:
            yield Path(name)
        return
    # Never overwrite a user's own captions.csv.
    if keep.is_file() or (keep.is_dir() and any(keep.iterdir())):
        raise ValueError(f"keep must be a new or an empty folder, got {keep}; name another or empty it")
    new = not keep.exists()
    keep.mkdir(parents=True, exist_ok=True)
    try:
        yield keep
    except BaseException:
        # Clips without captions are of no use, and a second run would refuse the folder.
        for path in keep.iterdir():
            path.unlink()
        if new:
            keep.rmdir()
        raise


def _decode(split: Split, bars: Progress) -> tuple[Tensor, Tensor]:
    """Frames (N, Nv, 3, H, W) uint8 and mask (N, Nv) bool."""
    task = bars.add_task(f"decode {split.part} clips", total=len(split.videos), note="")
    decoded = []
    for path in split.videos:
        decoded.append(read_video(path, SAMPLING))
        bars.advance(task)
    return torch.stack([frames for frames, _ in decoded]), torch.stack([mask for _, mask in decoded])


def _show_choices(model: DRL, clip: Clip, frames: Tensor, row: Row, console: Console, path: Path) -> None:
    """Print and draw which frame each word of one caption chose."""
    rank = int(ranks(row.sim[:1], torch.zeros(1, dtype=torch.int64)))
    console.print(
        f'\nThe first held-out clip, "{clip.caption}" (by {CDCR} its caption finds it at rank {rank}). Weight: a '
        "token's share of its side's score.",
        highlight=False,
    )
    seen = []
    for frame in range(len(frames)):
        first, second = clip.travelled(frame * round(moving_shapes.FPS / SAMPLING.rate))
        seen.append(f"{first:.0f} {clip.first.direction}, {second:.0f} {clip.second.direction}")
    found = choose(model, clip.caption, frames, tokenizer())
    for made in tables(found, seen):
        console.print(made)
    plot_matches(frames, found.words, found.frame_of_word, found.word_weights, path)
    print_line(console, f"plot: {path}")
