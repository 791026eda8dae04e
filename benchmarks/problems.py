"""Problems: shapes, and inputs drawn for them from a fixed seed."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# The 1,000 captions of MSR-VTT's 1k-A test split under CLIP's BPE, start and end tokens included, cut at 32:
# tokens -> captions. "Real lengths" means this.
_COUNTS = (3, 54, 72, 127, 99, 114, 104, 81, 76, 67, 51, 34, 22, 21, 16, 14, 11, 9, 6, 6, 6, 2, 2, 1, 1, 1)
CAPTION_LENGTHS = dict(zip((*range(5, 30), 32), _COUNTS, strict=True))
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

    def label(self) -> str:
        plain = Shape(0)
        extra = [self.dtype] if self.dtype != plain.dtype else []
        extra += ["real lengths"] if self.lengths == "real" else []
        dim = "" if self.dim == plain.dim else f", {self.dim}"
        return " ".join([f"({self.batch}, {self.nt}, {self.nv}{dim})", *extra])

    def family(self) -> Shape:
        """Return what the shapes of a curve over the batch share."""
        return replace(self, batch=0)


def batches(family: Shape, *sizes: int) -> tuple[Shape, ...]:
    """Return the shapes of a family that have these batches."""
    return tuple(replace(family, batch=size) for size in sizes)


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

    def inputs(self) -> tuple[Tensor, ...]:
        return self.text, self.video, self.text_weight, self.video_weight, self.text_mask, self.video_mask

    def leaves(self) -> tuple[Tensor, ...]:
        """Return the tensors whose gradients a training step computes."""
        return self.inputs()[:4]

    @functools.cached_property
    def grad(self) -> Tensor:
        """A gradient of the (A, B) logits, drawn when first needed: a loss without logits has no use for it.

        It is float32 whatever the features are, as the interaction's result is; eager logits have the input's dtype.
        """
        b = self.shape.batch
        return torch.randn(b, b, generator=torch.Generator().manual_seed(SEED + 1)).to(self.text.device)

    @functools.cached_property
    def unit(self) -> tuple[Tensor, Tensor]:
        """Normalised features, made once: max-sim libraries expect them."""
        words, frames = (torch.nn.functional.normalize(x.detach(), dim=-1) for x in (self.text, self.video))
        return words, frames

    def rows(self) -> tuple[Tensor, Tensor]:
        """Return all words and all frames, padding included, as rows of matrices without gradients."""
        return self.text.detach().flatten(0, 1), self.video.detach().flatten(0, 1)


def caption_lengths(batch: int, longest: int, generator: torch.Generator) -> Tensor:
    """Draw ``batch`` caption lengths from the histogram, cut at ``longest``."""
    lengths = torch.tensor(list(CAPTION_LENGTHS))
    counts = torch.tensor(list(CAPTION_LENGTHS.values()), dtype=torch.float32)
    return lengths[torch.multinomial(counts, batch, replacement=True, generator=generator)].clamp(max=longest)


def make_problem(shape: Shape, device: str = "cpu") -> Problem:
    """Draw a problem from a fixed seed. Features and weights require gradients."""
    generator = torch.Generator().manual_seed(SEED)
    b, nt, nv = shape.batch, shape.nt, shape.nv
    lengths = caption_lengths(b, nt, generator) if shape.lengths == "real" else torch.full((b,), nt)
    text_mask = (torch.arange(nt) < lengths[:, None]).to(torch.float32)
    video_mask = torch.ones(b, nv)

    def weight(mask: Tensor) -> Tensor:
        return torch.randn(mask.shape, generator=generator).masked_fill(mask == 0, -torch.inf).softmax(-1)

    text = torch.randn(b, nt, shape.dim, generator=generator)
    video = torch.randn(b, nv, shape.dim, generator=generator)
    drawn = (text, video, weight(text_mask), weight(video_mask), text_mask, video_mask)
    ready = [x.to(device=device, dtype=getattr(torch, shape.dtype)) for x in drawn]
    return Problem(shape, *(x.requires_grad_() for x in ready[:4]), *ready[4:])
