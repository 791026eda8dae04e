"""Time candidate tiles on this GPU and save the best of each kind of kernel as JSON.

    python benchmarks/tune.py [--quick]

Writes ``<out>/<gpu>/tuning.json``: a row of "tiles" has the fields of ``kernels/tuning.py``'s ``Tile`` with their place
in its tables (architecture; "forward" or the backward's side; kind), so that ``Tile(**row["tile"])`` is the entry.

One tile serves a kind of kernel whatever the batch, because a score's bits depend on it: the tile with the smallest sum
over shapes of time relative to the best one there wins. A candidate that spills, does not launch, or is wrong against
float64 (the doctor's rule) is out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from drl_fast.kernels import packing, tuning
from drl_fast.kernels import token_interaction as forward
from drl_fast.kernels import token_interaction_backward as backward
from drl_fast.kernels.tuning import Tile

import harness
from drl_fast.cli import device_check as check
from harness import Call, Run, interleave
from problems import Shape, make_problem

SECONDS = 1.0
SHAPES = (Shape(1024, 32, 12), Shape(512, 64, 64), Shape(512, 77, 20), Shape(1024, 32, 12, lengths="real"))
DTYPES = {"keyed": "bfloat16", "exact": "bfloat16", "half": "bfloat16", "tf32": "float32", "fp32": "float32"}


def grid(sizes: Sequence[tuple[int, int, int]], steps: Sequence[int], stages: Sequence[int]) -> list[Tile]:
    """Return the candidates of these (m, n, warps), channels a step and stages, with and without TMA."""
    return [Tile(m, n, k, w, s, tma) for m, n, w in sizes for k in steps for s in stages for tma in (False, True)]


FORWARD = grid(((128, 128, 8), (64, 128, 8), (64, 128, 4), (64, 64, 8), (64, 64, 4)), (16, 32, 64), (2, 3, 4))
BACKWARD = grid(((256, 64, 8), (256, 64, 4), (128, 64, 8), (128, 64, 4), (64, 64, 8)), (32, 64), (2, 3))


def calls(kind: str, side: str | None, shape: Shape) -> Call:
    """Return one sweep of the forward with matches, or one side's gradient."""
    p = make_problem(shape, "cuda")
    p.text, p.video = p.text.detach(), p.video.detach()
    mask = p.text_mask.bool() if shape.lengths == "real" else None
    text, video = packing.Side(p.text, p.text_weight.float(), mask), packing.Side(p.video, p.video_weight.float(), None)
    normalize = kind != "exact"
    if side is None:
        return lambda: forward.forward(text, video, normalize, True, True)
    _, by_word, by_frame = forward.forward(text, video, normalize, True, True)
    words = packing.pack_words(text, tuning.STEP, True, grain=packing.GRAIN, classes=False, copies=False)
    # Blocks of 128 rows: a multiple of what any candidate needs.
    frames = packing.pack_frames(video, tuning.STEP, 128, True, copies=False)
    sums = torch.empty(frames.features.shape, dtype=torch.float32, device="cuda")
    block = backward.Block(slice(0, len(p.text)), text, p.grad.float(), by_word, by_frame)
    shared = backward.Shared(video, frames, sums, torch.ones((), device="cuda"), True)
    run = backward.text_gradient if side == "text" else backward.add_video_gradient
    return lambda: run(words, block, shared)


def measure(table: dict[str, Tile], kind: str, side: str | None, candidates: list[Tile]) -> dict[Tile, list[float]]:
    """Return the seconds of each candidate that works, shape by shape."""
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
                call = calls(kind, side, replace(shape, dtype=DTYPES[kind]))
                for _ in range(3):
                    call()
                times[tile].append(min(interleave({"it": call}, "cuda", SECONDS, 5)["it"]))
        except Exception as error:  # out of shared memory or registers, or no such instruction
            times.pop(tile, None)
            print(f"  {tile}: {type(error).__name__}")
    table[kind] = before
    return times


def best(times: dict[Tile, list[float]]) -> Tile:
    """Return the tile with the smallest sum of times relative to the fastest at each shape."""
    fastest = [min(column) for column in zip(*times.values(), strict=True)]
    return min(times, key=lambda tile: sum(t / f for t, f in zip(times[tile], fastest, strict=True)))


def main() -> None:
    options = harness.parser(__doc__).parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("tune needs a CUDA device; benchmarks/static_report.py needs none")
    options.device = "cuda"
    # No GPU has run this yet: the durations are guesses.
    run = Run("tuning", options, 3 if options.size == "quick" else 60, seconds=SECONDS)
    gpu, arch = torch.cuda.get_device_name(), tuning.architecture(torch.device("cuda"))
    before = torch.backends.cuda.matmul.fp32_precision
    work: list[tuple[str | None, dict[str, Tile], list[Tile]]] = [(None, tuning.FORWARD[arch], FORWARD)]
    work += [(side, tuning.BACKWARD[arch][side], BACKWARD) for side in tuning.SIDES]
    for side, table, tiles in work:
        for kind in table:
            torch.backends.cuda.matmul.fp32_precision = "tf32" if kind == "tf32" else "ieee"
            # The present entry takes part: a known result is better than none.
            candidates = list(dict.fromkeys([table[kind], *(tiles[:3] if options.size == "quick" else tiles)]))
            times = measure(table, kind, side, candidates)
            winner = best(times)
            ms = [1e3 * t for t in times[winner]]
            tile = winner._replace(source=f"measured on {gpu}")._asdict()
            row = {"arch": arch, "kernel": side or "forward", "kind": kind, "tile": tile, "ms": ms}
            run.row("tiles", row, f"{side or 'forward'} {kind}: {winner[:6]}, ms {[round(t, 3) for t in ms]}")
    torch.backends.cuda.matmul.fp32_precision = before
    run.finish()


if __name__ == "__main__":
    main()
