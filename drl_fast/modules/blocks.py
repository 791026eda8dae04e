"""Transformer blocks of the form of CLIP's text tower, for XTI and the temporal modules, and their initialisation."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import autocast, validation

# As in the public code's modules outside CLIP; CLIP's own layers use 1e-5.
LAYER_NORM_EPS = 1e-12
INIT_STD = 0.02


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last axis in float32 (float64 for float64), returned in the input's dtype."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=LAYER_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        # In half precision eps rounds to 0 and a constant row becomes NaN, unless the kernel computes in float32.
        wide = torch.promote_types(x.dtype, torch.float32)
        y = F.layer_norm(x.to(wide), self.normalized_shape, self.weight.to(wide), self.bias.to(wide), self.eps)
        return y.to(x.dtype)


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the activation of OpenAI's weights."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Multi-head attention with the parameters of ``nn.MultiheadAttention``, batch first.

    ``nn.MultiheadAttention`` itself would return NaN for a row without a real position.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.normal_(self.in_proj_weight, std=INIT_STD)

    def forward(self, x: Tensor, attends: Tensor | None, queries: int | None = None) -> Tensor:
        """Attend: x (R, N, D), attends (R, N) bool with at least one True per row, or None -> (R, queries or N, D)."""
        dim = x.shape[-1]
        weights, biases = self.in_proj_weight.split(dim), self.in_proj_bias.split(dim)
        inputs = (x if queries is None else x[:, :queries], x, x)
        q, k, v = (
            F.linear(y, w, b).unflatten(-1, (self.heads, dim // self.heads)).transpose(1, 2)
            for y, w, b in zip(inputs, weights, biases, strict=True)
        )
        mask = None if attends is None else attends[:, None, None, :]
        mixed = _attention(q, k, v, mask)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attend in float32 on the CPU: PyTorch's bfloat16 kernel there takes longer than the casts and this one."""
    if q.device.type != "cpu" or q.dtype not in (torch.bfloat16, torch.float16):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    with autocast.off("cpu"):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask).to(q.dtype)


class Block(nn.Module):
    """Pre-norm attention and a QuickGELU MLP of width 4 D, each with a residual, under CLIP's state-dict keys."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attn = Attention(dim, heads)
        self.ln_1 = LayerNorm(dim)
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(dim, 4 * dim), gelu=QuickGELU(), c_proj=nn.Linear(4 * dim, dim))
        )
        self.ln_2 = LayerNorm(dim)

    def forward(self, x: Tensor, attends: Tensor | None, queries: int | None = None) -> Tensor:
        mixed = self.attn(self.ln_1(x), attends, queries)
        x = (x if queries is None else x[:, :queries]) + mixed
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks with masked, not causal attention.

    ``transformer(x (R, N, D), attends=None, queries=None) -> (R, N, D)``. ``attends`` (R, N) bool marks the positions
    that others attend to, at least one per row. With ``queries`` the result is the first ``queries`` positions only,
    (R, queries, D), and the last block computes no others.

    Raises:
        ValueError: ``dim`` is not a multiple of ``heads``, or a size is below 1.
    """

    def __init__(self, dim: int, layers: int, heads: int) -> None:
        super().__init__()
        dim, layers = validation.positive_int("dim", dim), validation.positive_int("layers", layers)
        heads = validation.positive_int("heads", heads)
        if dim % heads:
            raise ValueError(f"dim must be a multiple of heads = {heads}, got {dim}; choose another width")
        self.resblocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))

    def forward(self, x: Tensor, attends: Tensor | None = None, queries: int | None = None) -> Tensor:
        last = len(self.resblocks) - 1
        for i, block in enumerate(self.resblocks):
            x = block(x, attends, queries if i == last else None)
        return x


def start_new(module: nn.Module) -> None:
    """Draw Linear and Embedding weights from N(0, 0.02^2) and set biases to 0, as the public code does.

    Pass it to ``module.apply``.
    """
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=INIT_STD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


@torch.no_grad()
def copy_from_clip(
    positions: nn.Embedding,
    transformer: Transformer | None,
    positional_embedding: Tensor,
    blocks: Mapping[str, Tensor],
) -> bool:
    """Copy the first positions and blocks of CLIP's text tower, as many of each as both have.

    Args:
        positional_embedding: (P, D), CLIP's text positions.
        blocks: the state dict of CLIP's text ``transformer.resblocks``, with keys such as ``0.attn.in_proj_weight``.

    Returns:
        Whether anything was copied. Nothing is if CLIP's text tower has another width than the module.

    Raises:
        ValueError: a block does not have the keys of CLIP's text blocks.
    """
    validation.tensor("positional_embedding", positional_embedding)
    if positional_embedding.shape[-1] != positions.embedding_dim:
        return False
    count = min(len(positional_embedding), positions.num_embeddings)
    positions.weight[:count].copy_(positional_embedding[:count])
    for i, block in enumerate(transformer.resblocks if transformer is not None else ()):
        state = {k.removeprefix(f"{i}."): v for k, v in blocks.items() if k.startswith(f"{i}.")}
        if not state:
            break
        try:
            block.load_state_dict(state, strict=True)
        except RuntimeError as error:
            raise ValueError(f"blocks must hold CLIP's text resblocks, and block {i} does not fit: {error}") from error
    return True
