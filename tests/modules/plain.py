"""CLIP's text block for one sequence, in plain code and from its state dict: the reference for the layers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden" / "model"


def load(case: str) -> dict[str, Tensor]:
    """Load the arrays of a recorded model."""
    with np.load(GOLDEN / f"{case}.npz") as file:
        return {k: torch.from_numpy(np.asarray(file[k])) for k in file.files if k != "meta"}


def under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the entries under a prefix, with the prefix removed."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def quick_gelu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-1.702 * x))


def layer_norm(x: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-12).sqrt() * p["weight"] + p["bias"]


def block(x: Tensor, p: Mapping[str, Tensor], heads: int) -> Tensor:
    """Apply a block, (N, D) -> (N, D); every position attends to all."""
    dim = x.shape[1]
    width = dim // heads
    qkv = layer_norm(x, under("ln_1.", p)) @ p["attn.in_proj_weight"].T + p["attn.in_proj_bias"]
    mixed = []
    for h in range(heads):
        q, k, v = (qkv[:, i * dim + h * width : i * dim + (h + 1) * width] for i in range(3))
        mixed.append(torch.softmax(q @ k.T / width**0.5, dim=-1) @ v)
    x = x + torch.cat(mixed, dim=1) @ p["attn.out_proj.weight"].T + p["attn.out_proj.bias"]
    hidden = quick_gelu(layer_norm(x, under("ln_2.", p)) @ p["mlp.c_fc.weight"].T + p["mlp.c_fc.bias"])
    return x + hidden @ p["mlp.c_proj.weight"].T + p["mlp.c_proj.bias"]


def blocks(x: Tensor, state: Mapping[str, Tensor], heads: int) -> Tensor:
    """Apply all blocks of ``state``, with keys ``0.attn...``, ``1.attn...``."""
    for i in range(1 + max(int(k.partition(".")[0]) for k in state)):
        x = block(x, under(f"{i}.", state), heads)
    return x


def scramble(module: torch.nn.Module) -> torch.nn.Module:
    """Draw weights that are large enough for every part to affect the output."""
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return module
