"""Tile shapes by architecture, kernel and shape class. They are fixed; nothing is tuned at run time.

``source`` says where an entry comes from. "static": chosen from the static report (benchmarks/static_report.py: no
spills, tensor cores not serialised, shared memory within the GPU's) and not measured. "measured": timed by
benchmarks/gpu_session.py on the GPU that it names.

Architectures: "sm_80" also serves compute capability 8.6, 8.9 and 12.x, which have 99 KB of shared memory.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from . import layout


class Tile(NamedTuple):
    """A tile of ``m`` x ``n`` results, ``k`` per step; also a constexpr of the kernel."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    tma: bool
    programs: int = 1  # per multiprocessor
    source: str = "static"


# Forward: m videos x n word slots, by the form of the maxima: "keyed" (16-bit unit tokens), "exact" (16-bit raw tokens,
# or over 255 tokens), "tf32" and "fp32" (float32 tokens). "small" serves problems with too few large tiles to fill the
# GPU. n grows to the most slots of a text if that is larger. "soft" is soft pooling, by the product, and its backward's
# coefficients; these tiles are narrower because a program keeps three numbers for each slot and video.
AMPERE_FORWARD = {
    "keyed": {"large": Tile(64, 128, 64, 8, 3, False), "small": Tile(64, 64, 64, 4, 3, False, 2)},
    "exact": dict.fromkeys(("large", "small"), Tile(64, 64, 64, 8, 3, False)),
    "tf32": dict.fromkeys(("large", "small"), Tile(64, 64, 32, 8, 3, False)),
    "fp32": dict.fromkeys(("large", "small"), Tile(64, 64, 16, 8, 2, False)),
    "soft half": dict.fromkeys(("large", "small"), Tile(64, 64, 64, 8, 3, False)),
    "soft tf32": dict.fromkeys(("large", "small"), Tile(64, 64, 32, 8, 3, False)),
    "soft fp32": dict.fromkeys(("large", "small"), Tile(32, 64, 16, 8, 2, False)),
}
H100 = "measured on NVIDIA H100 80GB HBM3"
HOPPER_FORWARD = {
    "keyed": {
        "large": Tile(128, 128, 64, 8, 3, True, source=H100),
        "small": Tile(64, 64, 64, 4, 4, False, 2, source=H100),
    },
    "exact": {"large": Tile(64, 128, 64, 8, 3, True, source=H100), "small": Tile(64, 64, 64, 4, 4, True, 2)},
    "tf32": {"large": Tile(64, 128, 32, 8, 3, True, source=H100), "small": Tile(64, 64, 32, 4, 4, True, 2)},
    "fp32": dict.fromkeys(("large", "small"), Tile(64, 64, 16, 8, 2, False)),
    "soft half": dict.fromkeys(("large", "small"), Tile(64, 64, 64, 8, 3, True)),
    "soft tf32": dict.fromkeys(("large", "small"), Tile(64, 64, 32, 8, 3, True)),
    "soft fp32": dict.fromkeys(("large", "small"), Tile(32, 64, 16, 8, 2, False)),
}
SIZES = ("large", "small")
BLACKWELL_FORWARD = {
    "keyed": {"large": Tile(128, 128, 32, 8, 5, True), "small": Tile(64, 64, 64, 4, 4, True, 2)},
    "exact": {"large": Tile(64, 128, 32, 8, 4, True), "small": Tile(64, 64, 32, 8, 4, True, 2)},
    "tf32": {"large": Tile(64, 128, 16, 8, 4, True), "small": Tile(64, 64, 16, 8, 4, True, 2)},
    "fp32": dict(HOPPER_FORWARD["fp32"]),
    "soft half": dict.fromkeys(("large", "small"), Tile(64, 64, 32, 8, 4, True)),
    "soft tf32": dict.fromkeys(("large", "small"), Tile(64, 64, 16, 8, 4, True)),
    "soft fp32": dict.fromkeys(("large", "small"), Tile(32, 64, 16, 8, 2, False)),
}
FORWARD = {
    "sm_80": AMPERE_FORWARD,
    "sm_90": HOPPER_FORWARD,
    "sm_100": BLACKWELL_FORWARD,
    # Triton's interpreter, for tests: small tiles, so that small problems have several tiles and partly filled ones.
    "interpreter": {kind: dict.fromkeys(SIZES, Tile(32, 64, 64, 1, 1, False)) for kind in HOPPER_FORWARD},
}

# Backward's products of 16-bit tokens: m slots x n channels, k slots of the other side per step.
AMPERE_PRODUCT = {"large": Tile(128, 128, 64, 8, 3, False), "small": Tile(64, 64, 64, 4, 3, False)}
HOPPER_PRODUCT = {
    "large": Tile(128, 256, 64, 8, 3, True, source=H100),
    "small": Tile(64, 128, 64, 8, 3, True, source=H100),
}
PRODUCT = {
    "sm_80": AMPERE_PRODUCT,
    "sm_90": HOPPER_PRODUCT,
    "sm_100": {"large": Tile(128, 256, 64, 8, 3, True), "small": Tile(64, 128, 64, 8, 4, True)},
    "interpreter": dict.fromkeys(SIZES, Tile(64, 64, 64, 1, 1, False)),
}


def architecture(device: torch.device) -> str:
    """Return the tables' key for a device. CPU tensors reach the kernels only in Triton's interpreter."""
    if device.type == "cpu":
        return "interpreter"
    major, _ = torch.cuda.get_device_capability(device)
    return {8: "sm_80", 9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_80")


def product(dtype: torch.dtype) -> str:
    """Return the precision of products of this dtype: "half", or "tf32" or "fp32" as torch's setting says."""
    if dtype != torch.float32:
        return "half"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "fp32"


@functools.cache
def processors(device: torch.device) -> int:
    """Return the number of multiprocessors."""
    return 2 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def forward_tile(device: torch.device, kind: str, most: int, slots: int, videos: int) -> tuple[Tile, int]:
    """Choose a tile, and the number of programs that share the tiles of at most ``slots`` word slots.

    ``most``: the most slots of a text. The choice changes no bit of a score (kernels/token_interaction.py).
    """
    tiles = FORWARD[architecture(device)][kind]
    limit = processors(device)
    for size in SIZES:
        tile = tiles[size]
        if tile.n < most:
            # A wider tile needs more registers than four warps have, and on Ampere (no TMA) than eight.
            tile = tile._replace(n=most, warps=8, m=tile.m if tile.tma else max(32, tile.m // 2))
        count = -(-slots // tile.n) * -(-videos // tile.m)
        # A large tile is worth a partly filled GPU, down to three quarters.
        if size == "small" or 4 * count >= 3 * limit:
            break
    return tile, min(count, limit * tile.programs)


def product_tile(device: torch.device, rows: list[int], dim: int) -> tuple[Tile, int]:
    """Choose the tile of one launch of products with ``rows`` x ``dim`` results each, and the number of programs."""
    tiles = PRODUCT[architecture(device)]
    for size in SIZES:
        tile = tiles[size]
        tile = tile._replace(n=min(tile.n, max(layout.STEP, 1 << (dim - 1).bit_length())))
        programs = sum(-(-count // tile.m) for count in rows) * -(-dim // tile.n)
        # A large tile is worth a partly filled GPU, down to 70 %.
        if 10 * programs >= 7 * processors(device) and dim >= tiles[size].n:
            break
    return tile, programs


def library_products(dtype: torch.dtype, masked: bool) -> bool:
    """Say whether the backward multiplies by the library, which cannot know on the device how many words are real.

    It serves float32, and texts of equal length.
    """
    return dtype == torch.float32 or not masked


def launch_options(tile: Tile) -> dict[str, int | bool]:
    return {**options(tile.warps), "num_stages": tile.stages}


def options(warps: int) -> dict[str, int | bool]:
    # Set explicitly: Triton's default differs between versions (on in 3.9, off in 3.10).
    return {"num_warps": warps, "enable_fp_fusion": True}
