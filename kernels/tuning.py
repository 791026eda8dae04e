"""Tile shapes by architecture, kernel and shape class. They are fixed; nothing is tuned at run time.

``source`` says where an entry comes from. "static": chosen from the static report (benchmarks/static_report.py: no
spills, tensor cores not serialised, shared memory within the GPU's) and not measured. "measured": timed by
benchmarks/tune.py on the GPU that it names. A score's bits depend on the entry, so training and inference use the same
one, and the choice does not depend on the batch size.

Architectures: "sm_80" also serves compute capability 8.6, 8.9 and 12.x, which have 99 KB of shared memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

# Channels are padded with zeros to a multiple of STEP; every tile's k divides it.
STEP = 64


class Tile(NamedTuple):
    """A tile of ``m`` videos (or channels) x ``n`` words, ``k`` per step; also a constexpr of the kernel."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    tma: bool
    source: str = "static"


# Forward, by the form of the maxima: "keyed" (16-bit unit tokens), "exact" (16-bit raw tokens, or over 255 tokens),
# "tf32" and "fp32" (float32 tokens). n grows to the length class if that is larger.
AMPERE_FORWARD = {
    "keyed": Tile(64, 128, 64, 8, 3, False),
    "exact": Tile(64, 64, 64, 8, 3, False),
    "tf32": Tile(64, 64, 32, 8, 3, False),
    "fp32": Tile(64, 64, 16, 8, 2, False),
}
HOPPER_FORWARD = {
    "keyed": Tile(128, 128, 64, 8, 3, True),
    "exact": Tile(64, 128, 64, 8, 3, True),
    "tf32": Tile(64, 128, 32, 8, 3, True),
    "fp32": Tile(64, 64, 16, 8, 2, False),
}
FORWARD = {
    "sm_80": AMPERE_FORWARD,
    "sm_90": HOPPER_FORWARD,
    "sm_100": dict(HOPPER_FORWARD),
    # Triton's interpreter, for tests: small tiles, so that small problems have several tiles and partly filled ones.
    "interpreter": dict.fromkeys(HOPPER_FORWARD, Tile(32, 64, 64, 1, 1, False)),
}

SIDES = ("text", "video")
# Backward: m channels x n words (text gradient) or videos (video gradient), k of the other side per step.
AMPERE_BACKWARD = {
    "text": {
        "half": Tile(128, 64, 64, 8, 2, False),
        "tf32": Tile(128, 64, 32, 8, 2, False),
        "fp32": Tile(64, 64, 16, 8, 2, False),
    },
    "video": {
        "half": Tile(128, 64, 64, 8, 2, False),
        "tf32": Tile(64, 64, 32, 8, 2, False),
        "fp32": Tile(64, 64, 16, 8, 2, False),
    },
}
HOPPER_BACKWARD = {
    "text": {
        "half": Tile(256, 64, 64, 8, 2, True),
        "tf32": Tile(128, 64, 32, 8, 2, True),
        "fp32": Tile(64, 64, 16, 8, 2, False),
    },
    "video": {
        "half": Tile(256, 64, 64, 4, 2, True),
        "tf32": Tile(128, 64, 32, 8, 2, True),
        "fp32": Tile(64, 64, 16, 8, 2, False),
    },
}
BACKWARD = {
    "sm_80": AMPERE_BACKWARD,
    "sm_90": HOPPER_BACKWARD,
    "sm_100": {side: dict(tiles) for side, tiles in HOPPER_BACKWARD.items()},
    "interpreter": {side: dict.fromkeys(("half", "tf32", "fp32"), Tile(64, 64, 64, 1, 1, False)) for side in SIDES},
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


def forward_tile(arch: str, kind: str, slots: int) -> Tile:
    tile = FORWARD[arch][kind]
    return tile._replace(n=max(tile.n, slots))


def backward_tile(arch: str, side: str, precision: str, dim: int, *, add: bool = False) -> Tile:
    tile = BACKWARD[arch][side][precision]
    if add:
        # Adding to the earlier blocks' sum needs more registers than four warps have.
        tile = tile._replace(warps=8)
    return tile._replace(m=min(tile.m, max(STEP, triton.next_power_of_2(dim))))


def launch_options(tile: Tile) -> dict[str, int | bool]:
    # Set explicitly: Triton's default differs between versions (on in 3.9, off in 3.10).
    return {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
