"""Tile shapes by architecture, kernel and shape class, chosen ahead of time; nothing is tried out while training.

``source`` says where an entry comes from: "static" was chosen from the static report (benchmarks/static_report.py:
no spills, tensor cores not serialised, shared memory within the chip's) and has not been measured; "measured" was
timed by benchmarks/tune.py on the GPU it names. A score's bits depend on the entry, so that training and inference
share it, and batch size takes no part in the choice.

Architectures: "sm_80" also serves 8.6, 8.9 and 12.x, whose shared memory is 99 KB.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

# Channels are padded with zeros to a multiple of this, which every tile's k divides.
STEP = 64


class Tile(NamedTuple):
    """One launch: ``m`` videos (or channels) x ``n`` words x ``k`` a step."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    tma: bool
    source: str = "static"


# Forward, by how the maxima are kept: "keyed" (16-bit unit tokens), "exact" (16-bit raw tokens, or beyond 255 tokens),
# "tf32" and "fp32" (float32 tokens). n grows to the length class where that is larger.
FORWARD = {
    "sm_80": {
        "keyed": Tile(64, 128, 64, 8, 3, False),
        "exact": Tile(64, 64, 64, 8, 3, False),
        "tf32": Tile(64, 64, 32, 8, 3, False),
        "fp32": Tile(64, 64, 16, 8, 2, False),
    },
    "sm_90": {
        "keyed": Tile(128, 128, 64, 8, 3, True),
        "exact": Tile(64, 128, 64, 8, 3, True),
        "tf32": Tile(64, 128, 32, 8, 3, True),
        "fp32": Tile(64, 64, 16, 8, 2, False),
    },
    "sm_100": {
        "keyed": Tile(128, 128, 64, 8, 3, True),
        "exact": Tile(64, 128, 64, 8, 3, True),
        "tf32": Tile(64, 128, 32, 8, 3, True),
        "fp32": Tile(64, 64, 16, 8, 2, False),
    },
    # Triton's interpreter: small, so that little problems have several tiles and ragged edges.
    "interpreter": dict.fromkeys(("keyed", "exact", "tf32", "fp32"), Tile(32, 64, 64, 1, 1, False)),
}


SIDES = ("text", "video")
# Backward: m channels x n words (gradient of the text) or videos (of the video), k of the other side a step.
BACKWARD = {
    "sm_80": {
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
    },
    "sm_90": {
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
    },
    "sm_100": {
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
    },
    "interpreter": {side: dict.fromkeys(("half", "tf32", "fp32"), Tile(64, 64, 64, 1, 1, False)) for side in SIDES},
}


def architecture(device: torch.device) -> str:
    """The table's key for a device; CPU tensors can only be Triton's interpreter's."""
    if device.type == "cpu":
        return "interpreter"
    major, _ = torch.cuda.get_device_capability(device)
    return {8: "sm_80", 9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_80")


def product(dtype: torch.dtype) -> str:
    """How a product of this dtype is computed: "half", or for float32 what torch's own setting allows."""
    if dtype != torch.float32:
        return "half"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "fp32"


def forward_tile(arch: str, kind: str, slots: int) -> Tile:
    tile = FORWARD[arch][kind]
    return tile._replace(n=max(tile.n, slots))


def backward_tile(arch: str, side: str, precision: str, dim: int, *, add: bool = False) -> Tile:
    tile = BACKWARD[arch][side][precision]
    if add:
        # Starting from the sum so far costs registers that four warps do not have.
        tile = tile._replace(warps=8)
    return tile._replace(m=min(tile.m, max(STEP, triton.next_power_of_2(dim))))


def launch_options(tile: Tile) -> dict[str, int | bool]:
    # Fusing a * b + c is triton 3.9's default and no longer 3.10's.
    return {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
