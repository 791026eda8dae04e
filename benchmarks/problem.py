"""Problems: shapes, and inputs drawn for them from a fixed seed."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

# The 1,000 captions of MSR-VTT's 1k-A test split under CLIP's BPE, start and end tokens included, cut at 32:
# tokens -> captions. "Real lengths" means this.
CAPTION_LENGTHS = {
    5: 3,
    6: 54,
    7: 72,
    8: 127,
    9: 99,
    10: 114,
    11: 104,
    12: 81,
    13: 76,
    14: 67,
    15: 51,
    16: 34,
    17: 22,
    18: 21,
    19: 16,
    20: 14,
    21: 11,
    22: 9,
    23: 6,
    24: 6,
    25: 6,
    26: 2,
    27: 2,
    28: 1,
    29: 1,
    32: 1,
}
SEED = 0


@dataclass(frozen=True)
class Shape:
    """B texts of Nt tokens against B videos of Nv tokens of D channels."""

    batch: int
    nt: int = 32
    nv: int = 12
    dim: int = 512
    lengths: str = "full"  # or "real": captions as long as CAPTION_LENGTHS says, padded to nt
    dtype: str = "float32"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def label(self) -> str:
        plain = Shape(0)
        extra = [self.dtype] if self.dtype != plain.dtype else []
        extra += ["real lengths"] if self.lengths == "real" else []
        dim = "" if self.dim == plain.dim else f", {self.dim}"
        return " ".join([f"({self.batch}, {self.nt}, {self.nv}{dim})", *extra])

    def similarity_bytes(self) -> int:
        """Size of the A x B x Nt x Nv tensor."""
        return self.batch**2 * self.nt * self.nv * torch.empty(0, dtype=getattr(torch, self.dtype)).element_size()


@dataclass
class Problem:
    """One shape's inputs. Masks have the features' dtype, as public code keeps them."""

    shape: Shape
    text: Tensor
    video: Tensor
    text_weight: Tensor
    video_weight: Tensor
    text_mask: Tensor
    video_mask: Tensor
    _unit: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    def inputs(self) -> tuple[Tensor, ...]:
        return self.text, self.video, self.text_weight, self.video_weight, self.text_mask, self.video_mask

    def leaves(self) -> tuple[Tensor, ...]:
        """What a training step wants gradients of."""
        return self.inputs()[:4]

    @functools.cached_property
    def grad(self) -> Tensor:
        """A gradient of the (A, B) logits, drawn for whoever asks: a loss without logits has no use for it.

        float32 whatever the features are, as the interaction's own result is; eager code's is in the input's dtype.
        """
        b = self.shape.batch
        return torch.randn(b, b, generator=torch.Generator().manual_seed(SEED + 1)).to(self.text.device)

    def unit(self) -> tuple[Tensor, Tensor]:
        """Normalised features, made once: max-sim libraries expect them."""
        if self._unit is None:
            with torch.no_grad():
                self._unit = tuple(torch.nn.functional.normalize(x, dim=-1) for x in (self.text, self.video))
        return self._unit


def caption_lengths(batch: int, longest: int, generator: torch.Generator) -> Tensor:
    """``batch`` caption lengths from the histogram, at most ``longest``."""
    lengths = torch.tensor(list(CAPTION_LENGTHS))
    counts = torch.tensor(list(CAPTION_LENGTHS.values()), dtype=torch.float32)
    return lengths[torch.multinomial(counts, batch, replacement=True, generator=generator)].clamp(max=longest)


def make_problem(shape: Shape, device: str = "cpu", train: bool = False) -> Problem:
    """Draw a problem. With ``train`` features and weights require gradients; the seed makes runs comparable."""
    generator = torch.Generator().manual_seed(SEED)
    dtype = getattr(torch, shape.dtype)
    b, nt, nv = shape.batch, shape.nt, shape.nv
    if shape.lengths == "real":
        lengths = caption_lengths(b, nt, generator)
    else:
        lengths = torch.full((b,), nt)
    text_mask = (torch.arange(nt) < lengths[:, None]).to(torch.float32)
    video_mask = torch.ones(b, nv)

    def weight(mask: Tensor) -> Tensor:
        logits = torch.randn(mask.shape, generator=generator).masked_fill(mask == 0, -torch.inf)
        return logits.softmax(-1)

    def ready(x: Tensor, leaf: bool = False) -> Tensor:
        return x.to(device=device, dtype=dtype).requires_grad_(leaf and train)

    return Problem(
        shape,
        ready(torch.randn(b, nt, shape.dim, generator=generator), leaf=True),
        ready(torch.randn(b, nv, shape.dim, generator=generator), leaf=True),
        ready(weight(text_mask), leaf=True),
        ready(weight(video_mask), leaf=True),
        ready(text_mask),
        ready(video_mask),
    )
