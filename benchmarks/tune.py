"""Time candidate tiles on this GPU and write the best into kernels/tuning.py, marked "measured".

    python -m benchmarks.tune            measure and print
    python -m benchmarks.tune --write    also change the table

One tile serves a kind of kernel whatever the batch, because a score's bits depend on it: the tile with the smallest sum
over shape classes of time relative to the best one there wins. A candidate that spills, does not launch, or is wrong
against float64 (the doctor's rule) is out.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch
from drl_fast.kernels import packing, tuning
from drl_fast.kernels import token_interaction as forward
from drl_fast.kernels import token_interaction_backward as backward
from drl_fast.kernels.tuning import Tile

from benchmarks.harness import Call, interleave
from benchmarks.problem import Shape, make_problem
from drl_fast.cli import _device_check as check

TABLE = Path(tuning.__file__)
SHAPES = (Shape(1024, 32, 12), Shape(512, 64, 64), Shape(512, 77, 20), Shape(1024, 32, 12, lengths="real"))
DTYPES = {"keyed": "bfloat16", "exact": "bfloat16", "half": "bfloat16", "tf32": "float32", "fp32": "float32"}
FORWARD = [
    Tile(m, n, k, warps, stages, tma)
    for m, n, warps in ((128, 128, 8), (64, 128, 8), (64, 128, 4), (64, 64, 8), (64, 64, 4))
    for k in (16, 32, 64)
    for stages in (2, 3, 4)
    for tma in (False, True)
]
BACKWARD = [
    Tile(m, n, k, warps, stages, tma)
    for m, n, warps in ((256, 64, 8), (256, 64, 4), (128, 64, 8), (128, 64, 4), (64, 64, 8))
    for k in (32, 64)
    for stages in (2, 3)
    for tma in (False, True)
]


def calls(kind: str, side: str | None, shape: Shape) -> Call:
    """One sweep of the forward with matches, or one side's gradient."""
    p = make_problem(shape, "cuda")
    mask = p.text_mask.bool() if shape.lengths == "real" else None
    text, video = packing.Side(p.text, p.text_weight.float(), mask), packing.Side(p.video, p.video_weight.float(), None)
    normalize = kind != "exact"
    if side is None:
        return lambda: forward.forward(text, video, normalize, True, True)
    _, by_word, by_frame = forward.forward(text, video, normalize, True, True)
    words = packing.pack_words(text, tuning.STEP, True, grain=packing.GRAIN, classes=False, copies=False)
    # Blocks of 128 rows: a multiple of what any candidate needs.
    frames = packing.pack_frames(video, tuning.STEP, 128, True, copies=False)
    sums = torch.empty(frames.tokens.shape, dtype=torch.float32, device="cuda")
    block = backward.Block(slice(0, len(p.text)), text, p.grad.float(), by_word, by_frame)
    shared = backward.Shared(video, frames, sums, torch.ones((), device="cuda"), True)
    run = backward._text if side == "text" else backward._video
    return lambda: run(words, block, shared)


def measure(table: dict[str, Tile], kind: str, side: str | None, candidates: list[Tile]) -> dict[Tile, list[float]]:
    """Seconds of each candidate that works, shape by shape."""
    before, times = table[kind], {}
    dtype = getattr(torch, DTYPES[kind])
    for tile in candidates:
        table[kind] = tile
        try:
            if check.worst_error("cuda", dtype) > check.limit(dtype):
                print(f"  {tile}: wrong values")
                continue
            times[tile] = []
            for shape in SHAPES:
                call = calls(kind, side, Shape(**{**shape.as_dict(), "dtype": DTYPES[kind]}))
                for _ in range(3):
                    call()
                times[tile].append(min(interleave({"it": call}, "cuda", 1.0, 5)["it"]))
        except Exception as error:  # out of shared memory or registers, or no such instruction
            times.pop(tile, None)
            print(f"  {tile}: {type(error).__name__}")
    table[kind] = before
    return times


def best(times: dict[Tile, list[float]]) -> Tile:
    fastest = [min(column) for column in zip(*times.values(), strict=True)]
    return min(times, key=lambda tile: sum(t / f for t, f in zip(times[tile], fastest, strict=True)))


def write(arch: str, path: list[str], tile: Tile) -> None:
    """Replace one entry of the table's source: the first after each of ``path``'s names in turn."""
    text, at = TABLE.read_text(), 0
    for name in path:
        at = text.index(name, at)
    entry = re.compile(r"Tile\([^)]*\)")
    gpu = torch.cuda.get_device_name()
    new = f"Tile({', '.join(repr(x) for x in tile[:6])}, {f'measured on {gpu}'!r})".replace("'", '"')
    TABLE.write_text(text[:at] + entry.sub(new, text[at:], count=1))


def main() -> None:
    parser = argparse.ArgumentParser(description="Time candidate tiles on this GPU.")
    parser.add_argument("--write", action="store_true", help="change kernels/tuning.py")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("tune needs a CUDA device; the static report (benchmarks/static_report.py) needs none")
    arch = tuning.architecture(torch.device("cuda"))
    before = torch.backends.cuda.matmul.fp32_precision
    work: list[tuple[dict[str, Tile], str, str | None, list[Tile]]] = [
        (tuning.FORWARD[arch], kind, None, FORWARD) for kind in tuning.FORWARD[arch]
    ]
    work += [(tuning.BACKWARD[arch][s], k, s, BACKWARD) for s in tuning.SIDES for k in tuning.BACKWARD[arch][s]]
    for table, kind, side, candidates in work:
        torch.backends.cuda.matmul.fp32_precision = "tf32" if kind == "tf32" else "ieee"
        print(f"{arch} {side or 'forward'} {kind}")
        # The entry itself takes part, and a known result is better than none.
        times = measure(table, kind, side, list(dict.fromkeys([table[kind], *candidates])))
        winner = best(times)
        print(f"  best: {winner}, ms: {[round(1e3 * t, 3) for t in times[winner]]}")
        if arguments.write:
            path = ["FORWARD = {" if side is None else "BACKWARD = {", f'"{arch}"', *([f'"{side}"'] if side else [])]
            write(arch, [*path, f'"{kind}"'], winner)
    torch.backends.cuda.matmul.fp32_precision = before


if __name__ == "__main__":
    main()
