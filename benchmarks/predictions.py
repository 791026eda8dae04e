"""Predict the times of the kernels on an H100, from their machine code and a cost model. Nothing is measured.

    python -m benchmarks.predictions                 a table
    python -m benchmarks.predictions --json FILE     also the figures

bfloat16, both directions, both masks, all tokens real, weights that need gradients. The launches are those of the
public function (fake_gpu.py); the instructions are those of the kernels that it launches (machine_code.py).

The model. A kernel takes the longest of five times, divided by the share of multiprocessors that its tiles keep busy,
plus ``launch_us``: its products on the tensor cores; its instructions through the issue ports; through each pipe; its
bytes from L2; its bytes from memory (HBM). Bytes of a tensor that fits in ``resident_bytes`` count as L2's. The rates
are in ``ASSUMPTIONS``, which the JSON file repeats. Products of the library and of plain PyTorch run at the full rate
of the tensor cores at this clock. ``low`` lets products and other instructions overlap in full, and reads L2 at the
higher of two rates; ``high`` lets nothing of them overlap, and reads at the lower rate. Latency, waits inside a
program, bank conflicts and the host are left out.

Plain PyTorch goes through the same model: each operation reads its inputs and writes its outputs once. Two forms: the
public code's, and the one that zeroes masked tokens instead of their similarities (both in eager.py).
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from drl_fast.kernels import layout
from drl_fast.kernels import token_interaction_backward as backward
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import drl_fast

from . import eager, fake_gpu
from .launches import is_view
from .machine_code import PIPES, Code
from .static_report import Problem, constants_of, in_words, steps_of, tensors

ASSUMPTIONS = {
    "gpu": "H100 SXM",
    "multiprocessors": 132,
    # 790 TFLOP/s of dense bfloat16 products, what libraries reach; the boost clock of 1.98 GHz is not sustained.
    "clock_ghz": 1.46,
    "flop_per_clock": 4096,
    # Warp instructions per clock and multiprocessor.
    "issue": 4.0,
    "pipes": {"alu": 2.0, "fma": 4.0, "mufu": 0.5, "shfl": 1.0, "lds": 1.0, "sts": 1.0, "ldg": 1.0, "stg": 1.0},
    # Published products with tiles of 128 x 128 imply the upper figure.
    "l2_tb_per_s": {"low": 9.5, "high": 7.0},
    "hbm_tb_per_s": 3.0,
    "resident_bytes": 32 << 20,
    "launch_us": 2.0,
}
SHAPES = ((128, 32, 12, 512), (1024, 32, 12, 512), (4096, 32, 12, 512), (1024, 64, 64, 512))
ITEM = 2


class Sizes(NamedTuple):
    """Sizes of a problem: rows, tokens, word slots, frame slots, channels."""

    texts: int
    words: int
    videos: int
    frames: int
    slots: int
    columns: int
    dim: int

    @property
    def pairs(self) -> int:
        return self.texts * self.videos

    @property
    def coefficients(self) -> int:
        return self.slots * self.columns

    @property
    def tokens(self) -> int:
        """Bytes of both sides' tokens in slots."""
        return (self.slots + self.columns) * self.dim * ITEM

    @property
    def matches(self) -> int:
        return self.pairs * (self.words + self.frames)


class Work(NamedTuple):
    """What all launches of a kernel in a forward or backward pass do."""

    flop: float = 0.0  # on the tensor cores
    moved: tuple[tuple[float, float], ...] = ()  # bytes, and the size of the tensor that they belong to


def sizes(batch: int, words: int, frames: int, dim: int) -> Sizes:
    slots = batch * layout.most_slots(words)
    return Sizes(batch, words, batch, frames, slots, layout.padded_videos(batch) * frames, layout.padded_channels(dim))


def forward_work(s: Sizes, launches: int) -> Work:
    # Matches of one byte, maxima of two.
    outputs = 4.0 * s.pairs + 3.0 * s.matches
    return Work(2.0 * s.coefficients * s.dim, ((s.tokens, s.tokens), (outputs, outputs)))


def pack_work(s: Sizes, launches: int) -> Work:
    # Each packing of a block of texts packs all videos.
    moved = 2.0 * (s.slots + launches * s.columns) * s.dim * ITEM
    return Work(0.0, ((moved, moved / launches),))


def expand_work(s: Sizes, launches: int) -> Work:
    block = min(backward.COEFFICIENT_BYTES, s.coefficients * ITEM)
    read = 4.0 * s.pairs + s.matches
    return Work(0.0, ((s.coefficients * ITEM, block), (read, read)))


def product_work(s: Sizes, launches: int) -> Work:
    columns = min(s.columns, backward.COLUMNS)
    blocks_of_words = -(-s.slots * columns * ITEM // backward.COEFFICIENT_BYTES)
    blocks_of_frames = -(-s.columns // columns)
    of_words, of_frames = 4.0 * s.slots * s.dim, 4.0 * s.columns * s.dim
    sums = (
        (of_words * (2 * blocks_of_frames - 1), of_words / blocks_of_words),
        (of_frames * (2 * blocks_of_words - 1), of_frames),
    )
    return Work(4.0 * s.coefficients * s.dim, sums)


def unpack_work(s: Sizes, launches: int) -> Work:
    moved = (s.slots + s.columns) * s.dim * (4.0 + 2 * ITEM)
    return Work(0.0, ((moved, moved),))


def weights_work(s: Sizes, launches: int) -> Work:
    read = 2.0 * s.matches + 4.0 * s.pairs
    return Work(0.0, ((read, read),))


def count_work(s: Sizes, launches: int) -> Work:
    read = float(s.texts * s.words + s.videos * s.frames)
    return Work(0.0, ((read, read),))


WORK: dict[str, Callable[[Sizes, int], Work]] = {
    "count_tokens": count_work,
    "pack_rows": pack_work,
    "interaction_forward": forward_work,
    "expand_coefficients": expand_work,
    "multiply_tiles": product_work,
    "library_product": product_work,
    "unpack_gradients": unpack_work,
    "sum_weight_gradients": weights_work,
}


def seconds(cycles: float) -> float:
    """Turn cycles of all multiprocessors together into seconds."""
    return cycles / (ASSUMPTIONS["multiprocessors"] * ASSUMPTIONS["clock_ghz"] * 1e9)


def traffic(moved: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """Return bytes of L2 and of HBM."""
    moved = list(moved)
    l2 = sum(size for size, tensor in moved if tensor <= ASSUMPTIONS["resident_bytes"])
    return l2, sum(size for size, _ in moved) - l2


def range_of(tensor: float, issue: float, l2: float, hbm: float, busy: float, launches: int) -> dict[str, Any]:
    """Return the times of each resource, in seconds except for bytes of L2 and HBM, and the predicted range; in ms."""
    memory = hbm / (ASSUMPTIONS["hbm_tb_per_s"] * 1e12)
    cache = {name: l2 / (rate * 1e12) for name, rate in ASSUMPTIONS["l2_tb_per_s"].items()}
    gaps = launches * ASSUMPTIONS["launch_us"] * 1e-6
    low = max(tensor, issue, cache["low"], memory) / busy + gaps
    high = max(tensor + issue, cache["high"], memory) / busy + gaps
    parts = {"tensor": tensor, "issue": issue, "l2": cache["low"], "hbm": memory, "low": low, "high": high}
    return {"launches": launches, "busy": round(busy, 2), **{name: round(x * 1e3, 4) for name, x in parts.items()}}


def issued(instructions: Counter[str]) -> float:
    """Return the cycles in which one multiprocessor issues some warp instructions."""
    pipes = ASSUMPTIONS["pipes"]
    return max(
        instructions.total() / ASSUMPTIONS["issue"], *(instructions[name] / rate for name, rate in pipes.items())
    )


def predict(kernel: str, launches: list[fake_gpu.Launch], s: Sizes) -> dict[str, Any]:
    """Predict all launches of one kernel in a forward or a backward pass."""
    work = WORK[kernel](s, len(launches))
    l2, hbm = traffic(work.moved)
    compiled = Counter(launch.compiled.hash for launch in launches)
    main = next(x.compiled for x in launches if x.compiled.hash == compiled.most_common(1)[0][0])
    code, constants = Code(fake_gpu.machine_code(main.asm["cubin"])), constants_of(main)
    warps, parts, steps = main.metadata.num_warps, code.product_loop(), steps_of(constants)
    units = sum(launch.grid[0] for launch in launches) / len(launches)
    if work.flop and parts and steps:
        tile = constants["TILE"]
        step, sweep, rest = parts
        count = work.flop / (2.0 * tile.m * tile.n * tile.k)
        per_step = Counter({name: warps * (step[name] + sweep[name] / steps) for name in PIPES})
        if kernel == "interaction_forward":
            # Programs take tiles in turn; the launches share the texts.
            units = -(-s.slots // tile.n) * -(-s.videos // tile.m) / len(launches)
        per_tile = Counter({name: warps * rest[name] for name in PIPES})
        issue = seconds(count * issued(per_step) + units * len(launches) * issued(per_tile))
        l2 += work.flop * (tile.m + tile.n) * ITEM / (2.0 * tile.m * tile.n)
    else:
        counts, size = code.hot_loop()
        passes = sum(moved for moved, _ in work.moved) / (32.0 * size)  # of one warp
        issue = seconds(issued(Counter({name: n * passes for name, n in counts.items()})))
    tensor = seconds(work.flop / ASSUMPTIONS["flop_per_clock"])
    per_processor = units / ASSUMPTIONS["multiprocessors"]
    busy = per_processor / -(-units // ASSUMPTIONS["multiprocessors"])
    return {"kernel": kernel, "form": in_words(constants), **range_of(tensor, issue, l2, hbm, busy, len(launches))}


def predict_library(products: list[fake_gpu.Product], s: Sizes) -> dict[str, Any]:
    """Predict the library's products of a backward pass."""
    tensor = seconds(sum(2.0 * p.m * p.k * p.n for p in products) / ASSUMPTIONS["flop_per_clock"])
    moved = traffic(product_work(s, len(products)).moved)
    return {"kernel": "library_product", "form": "", **range_of(tensor, 0.0, *moved, 1.0, len(products))}


def ours(shape: tuple[int, int, int, int]) -> dict[str, Any]:
    """Predict the kernels of a forward and a backward pass."""
    fake_gpu.install(90)
    batch, words, frames, dim = shape
    problem = Problem("", batch, words, batch, frames, dim)
    passes = {}
    with fake_gpu.serving_cpu_tensors():
        *learned, text_mask, video_mask = tensors(*problem[1:8])
        learned = [x.requires_grad_() for x in learned]
        logits = None
        for name in ("forward", "backward"):
            with fake_gpu.library_products() as products, fake_gpu.compiled_kernels() as launches:
                if logits is None:
                    logits = drl_fast.token_interaction(*learned, text_mask, video_mask)
                else:
                    logits.backward(torch.empty_like(logits))
            groups = defaultdict(list)
            for launch in launches:
                groups[launch.kernel].append(launch)
            passes[name] = [predict(kernel, group, sizes(*shape)) for kernel, group in groups.items()]
            if products:
                passes[name].append(predict_library(products, sizes(*shape)))
    return passes


class Cost(TorchDispatchMode):
    """Add up the model's time of each operation."""

    def __init__(self) -> None:
        super().__init__()
        self.ms = self.bytes = self.flop = 0.0
        self.operations = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        if is_view(function) or "empty" in function.name():
            return result
        moved = [bytes_of(x) for x in (*_tensors(arguments), *_tensors((result,)))]
        flop = 0.0
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm):
            flop = 2.0 * result.numel() * arguments[0].shape[-1]
        self.operations += 1
        self.bytes += sum(moved)
        self.flop += flop
        tensor = seconds(flop / ASSUMPTIONS["flop_per_clock"])
        self.ms += range_of(tensor, 0.0, *traffic([(sum(moved), sum(moved))]), 1.0, 1)["low"]
        return result

    def result(self) -> dict[str, Any]:
        start = {"operations": self.operations, "gigabytes": round(self.bytes / 1e9, 3)}
        return {**start, "teraflop": round(self.flop / 1e12, 3), "ms": round(self.ms, 4)}


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def bytes_of(x: Tensor) -> int:
    """Return the bytes of a tensor; of a broadcast one those that exist."""
    return min(x.numel() * x.itemsize, x.untyped_storage().nbytes())


def plain(interaction: Callable[..., Tensor], shape: tuple[int, int, int, int]) -> dict[str, Any]:
    """Predict plain PyTorch's forward and backward pass, on tensors without data."""
    batch, words, frames, dim = shape
    with torch.device("meta"):
        features = [torch.empty(batch, n, dim, dtype=torch.bfloat16, requires_grad=True) for n in (words, frames)]
        weights = [torch.empty(batch, n, dtype=torch.bfloat16, requires_grad=True) for n in (words, frames)]
        masks = [torch.empty(batch, n, dtype=torch.bool) for n in (words, frames)]
    with Cost() as forward:
        logits = interaction(*features, *weights, *masks)
    with Cost() as backward:
        torch.autograd.grad(logits, [*features, *weights], torch.empty_like(logits))
    found = {"forward": forward.result(), "backward": backward.result()}
    return {**found, "forward_ms": found["forward"]["ms"], "step_ms": round(forward.ms + backward.ms, 4)}


def prediction() -> dict[str, Any]:
    """Predict every shape."""
    shapes = []
    for shape in SHAPES:
        passes = ours(shape)
        rivals = {"plain": plain(eager.token_interaction, shape), "premasked": plain(eager.premasked, shape)}
        found: dict[str, Any] = {"shape": list(shape), "kernels": passes, **rivals}
        for name, parts in (("forward", ("forward",)), ("step", ("forward", "backward"))):
            rows = [row for part in parts for row in passes[part]]
            found[name] = {end: round(sum(row[end] for row in rows), 4) for end in ("low", "high")}
        print(lines(found), flush=True)
        shapes.append(found)
    about = "predicted by a cost model, not measured; milliseconds"
    return {"benchmark": "predictions", "about": about, "assumptions": ASSUMPTIONS, "shapes": shapes}


def lines(found: dict[str, Any]) -> str:
    """Show one shape."""
    shown = [f"{tuple(found['shape'])}, predicted in ms"]
    for name, kernels in found["kernels"].items():
        for row in kernels:
            parts = "".join(f"  {part} {row[part]:8.3f}" for part in ("tensor", "issue", "l2", "hbm"))
            start = f"  {name:9}{row['kernel']:22}{row['launches']:5} launches{parts}  busy {row['busy']:.2f}"
            shown.append(f"{start}  {row['low']:8.3f} to {row['high']:8.3f}")
    for name in ("forward", "step"):
        rivals = " and ".join(f"{found[rival][f'{name}_ms']:.3f}" for rival in ("plain", "premasked"))
        shown.append(f"  {name}: {found[name]['low']:.3f} to {found[name]['high']:.3f}; plain PyTorch {rivals}")
    return "\n".join(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description="Predict the kernels' times on an H100 from their machine code.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures")
    arguments = parser.parse_args()
    print("predicted by a cost model, nothing is measured; takes about a minute", flush=True)
    result = prediction()
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
