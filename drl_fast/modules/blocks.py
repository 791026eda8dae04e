"""CLIP's text block outside CLIP: what the temporal transformer and XTI are stacks of, and how they start."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import validation

# The public modules outside CLIP have it; CLIP's own layers have 1e-5.
LAYER_NORM_EPS = 1e-12
INIT_STD = 0.02


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last axis in float32 (float64 for float64), returned in the input's dtype."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=LAYER_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        # In half precision eps is 0 and a constant row NaN, unless a device's kernel widens by itself.
        wide = torch.promote_types(x.dtype, torch.float32)
        y = F.layer_norm(x.to(wide), self.normalized_shape, self.weight.to(wide), self.bias.to(wide), self.eps)
        return y.to(x.dtype)


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the activation of OpenAI's weights."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Multi-head attention with the parameters of ``nn.MultiheadAttention``, batch first.

    Not that class itself: of a row without a real position it makes NaN.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.normal_(self.in_proj_weight, std=INIT_STD)

    def forward(self, x: Tensor, attends: Tensor | None, queries: int | None = None) -> Tensor:
        """(R, N, D), attends (R, N) bool with at least one True a row or None -> (R, queries or N, D)."""
        dim = x.shape[-1]
        weights, biases = self.in_proj_weight.split(dim), self.in_proj_bias.split(dim)
        inputs = (x if queries is None else x[:, :queries], x, x)
        q, k, v = (
            F.linear(y, w, b).unflatten(-1, (self.heads, dim // self.heads)).transpose(1, 2)
            for y, w, b in zip(inputs, weights, biases, strict=True)
        )
        mask = None if attends is None else attends[:, None, None, :]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm attention and QuickGELU MLP (4 x wider), each with a residual; CLIP's state-dict keys."""

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
    """A stack of blocks, masked, not causal.

    ``transformer(x (R, N, D), attends=None, queries=None) -> (R, N, D)``: ``attends`` (R, N) bool says which positions
    are attended to, at least one a row; with ``queries`` only the first so many positions come out, (R, queries, D),
    and the last block computes no others.

    Raises:
        ValueError: ``dim`` that is no multiple of ``heads``, a size below 1.
    """

    def __init__(self, dim: int, layers: int, heads: int) -> None:
        super().__init__()
        validation.positive_int("dim", dim)
        validation.positive_int("layers", layers)
        if dim % validation.positive_int("heads", heads):
            raise ValueError(f"dim must be a multiple of heads = {heads}, got {dim}; choose another width")
        self.resblocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))

    def forward(self, x: Tensor, attends: Tensor | None = None, queries: int | None = None) -> Tensor:
        last = len(self.resblocks) - 1
        for i, block in enumerate(self.resblocks):
            x = block(x, attends, queries if i == last else None)
        return x


def start_new(module: nn.Module) -> None:
    """Draw Linear and Embedding weights from N(0, 0.02) and set biases to 0, as the public code starts new layers.

    For ``module.apply``.
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
    """Start positions and blocks as CLIP's text tower: as many of each as both have; the rest is left as it is.

    Args:
        positional_embedding: (P, D), CLIP's text positions.
        blocks: the state dict of CLIP's text ``transformer.resblocks``: ``0.attn.in_proj_weight`` and so on.

    Returns:
        False, with nothing copied, where CLIP's text tower is of another width than the module.

    Raises:
        ValueError: a block whose keys are not those of CLIP's form.
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
