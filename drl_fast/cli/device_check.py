"""Check a device's results: run every form of every kernel on small problems and compare with float64.

Compilers have miscompiled kernels like these before, and only a run on the device itself shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..numerics import statistics_dtype
from ..ops import dispatch


def limit(dtype: torch.dtype) -> float:
    """Return the largest relative error that rounding of gradients and their coefficients explains."""
    return {torch.float32: 1e-4, torch.float16: 2e-3}.get(dtype, 1.5e-2)


class Case(NamedTuple):
    """A small problem. Together the cases launch every kernel at every length class and in every form."""

    texts: int
    words: int
    videos: int
    frames: int
    normalize: bool = True
    both: bool = True
    large: bool = False  # treat it as a large batch: keep no matches, run the backward over small blocks
    masks: bool = True


CASES = (
    Case(9, 13, 37, 5),
    Case(9, 100, 5, 12),  # length classes up to 128 words
    Case(3, 140, 4, 9),  # more words than one tile: each direction runs by itself
    Case(3, 9, 2, 260),  # match indices that need more than a byte
    Case(9, 13, 11, 5, normalize=False),
    Case(9, 13, 11, 5, both=False),
    Case(33, 13, 3, 5, large=True),
    Case(18, 140, 2, 3, large=True),
    # Texts of equal length, for which the library multiplies; 16 words leave no slot free.
    Case(9, 16, 37, 5, masks=False),
    Case(20, 13, 11, 5, masks=False, large=True),
)


# With whether the pooling is logsumexp, or softmax.
SOFT_CASES = (
    (Case(9, 13, 11, 5), False),
    (Case(3, 140, 4, 5, normalize=False), True),  # more words than one tile
    (Case(9, 13, 5, 3, both=False), True),
)


# CDCR pairs text a with video a.
PAIR_CASES = (
    Case(9, 12, 9, 5),
    Case(5, 4, 5, 12),
    Case(3, 40, 3, 70),  # more tokens than one tile, on both sides
    Case(50, 1, 50, 1, normalize=False, both=False),  # the cross-correlation loss
)


def worst_error(device: str, dtype: torch.dtype) -> float:
    """Return the largest relative error of any operator's results; infinite if a match is wrong, NaN if one is NaN.

    The reference is another implementation, chunked PyTorch in float64 on the CPU, on the same rounded features.
    """
    # Python's max can drop a NaN; torch's cannot.
    checks = interaction_errors, soft_interaction_errors, decorrelation_errors
    return float(torch.stack([error for check in checks for error in check(device, dtype)]).max())


def interaction_errors(device: str, dtype: torch.dtype) -> list[Tensor]:
    """Compare matches, logits and gradients, with holes in the masks, with and without zeros that compete.

    A wrong match changes the largest gradients less than rounding does, so matches must be equal: no problem has ties.
    """
    from ..ops.chunked import token_interaction as chunked

    op = torch.ops.drl_fast
    errors = []
    for case in CASES:
        inputs, probe = problem(case, dtype)
        for zero_competes in (True, False):
            options = (case.normalize, zero_competes)
            here = [None if x is None else x.to(device) for x in inputs]
            # The CPU kernels always keep the matches.
            with small_blocks(device, case.large):
                ours, matches = run(
                    op.token_interaction,
                    op.token_interaction_backward,
                    here,
                    probe.to(device),
                    *options,
                    keep=not case.large or device == "cpu",
                )
            truth, true_matches = run(chunked.forward, chunked.backward, to_float64(inputs), probe.double(), *options)
            errors += relative(ours, truth)
            errors += [
                wrong_matches(found, true, mask)
                for found, true, mask in zip(matches, true_matches, choosers(inputs), strict=True)
                if len(found)
            ]
    return errors


def soft_interaction_errors(device: str, dtype: torch.dtype) -> list[Tensor]:
    """Compare logits and gradients of softmax and logsumexp pooling."""
    from ..ops.chunked import soft_token_interaction as chunked

    op: Any = torch.ops.drl_fast
    true: Any = chunked
    errors = []
    for case, logsumexp in SOFT_CASES:
        inputs, probe = problem(case, dtype)
        here, double = [None if x is None else x.to(device) for x in inputs], to_float64(inputs)
        options = (case.normalize, True, logsumexp, 0.1 if case.normalize else 2.0)
        gradients = op.soft_token_interaction_backward(probe.to(device), *here, *options, [True] * 4)
        ours = [op.soft_token_interaction(*here, *options), *gradients]
        truth = true.backward(probe.double(), *double, *options, [True] * 4)
        errors += relative(ours, [true.forward(*double, *options), *truth])
    return errors


def decorrelation_errors(device: str, dtype: torch.dtype) -> list[Tensor]:
    """Compare CDCR's matches, statistics, correlations and gradients, in the diagonal and the full form."""
    from ..ops.cdcr import CHUNKED

    op: Any = torch.ops.drl_fast
    true: dict[str, Any] = CHUNKED
    # A gradient of the correlation matrix.
    pull = torch.randn(80, 80, generator=torch.Generator().manual_seed(1))
    errors = []
    for case in PAIR_CASES:
        inputs, _ = problem(case, dtype)
        tokens, weights, masks = to_float64(inputs[:2]), to_float64(inputs[2:4]), inputs[4:]
        truth = true["cdcr_statistics"](*tokens, *masks, case.normalize, case.both)
        # Any values serve as offset and slope.
        channels = torch.stack([truth[2], 1 / truth[3].sqrt(), truth[2], truth[3]])
        here = [None if x is None else x.to(device) for x in inputs]
        indices = [index.to(device) for index in truth[:2]]
        constants = channels.to(device, statistics_dtype(torch.device(device)))
        ours = op.cdcr_statistics(*here[:2], *here[4:], case.normalize, case.both)
        errors += relative(ours, truth)
        for full in (False, True):
            ours = op.cdcr_correlation(*here[:4], *indices, constants[:2], case.normalize, full)
            known = (*tokens, *weights, *truth[:2])
            errors += relative(ours, true["cdcr_correlation"](*known, channels[:2], case.normalize, full))
            of_form = pull if full else pull.diagonal()
            ours = op.cdcr_gradient(*here[:4], *indices, constants, of_form.to(device), case.normalize)
            errors += relative(ours, true["cdcr_gradient"](*known, channels, of_form.double(), case.normalize))
    return errors


def relative(ours: Sequence[Tensor], truth: Sequence[Tensor]) -> list[Tensor]:
    """Return each result's largest error relative to the largest true entry; empty results are skipped."""
    pairs = [(x.cpu().double(), y.double()) for x, y in zip(ours, truth, strict=True) if y.numel()]
    # Match indices may all be 0.
    return [(x - y).abs().max() / y.abs().max().clamp(min=1e-30) for x, y in pairs]


def choosers(inputs: list[Tensor | None]) -> tuple[Tensor, Tensor]:
    """Return which tokens choose a match, for (A, Nt, B) and for (A, Nv, B) matches."""
    text, video, text_mask, video_mask = (inputs[i] for i in (0, 1, 4, 5))
    assert text is not None
    assert video is not None
    of_text = torch.ones(text.shape[:2], dtype=torch.bool) if text_mask is None else text_mask
    of_video = torch.ones(video.shape[:2], dtype=torch.bool) if video_mask is None else video_mask
    return of_text[:, :, None], of_video.T[None]


def wrong_matches(ours: Tensor, truth: Tensor, real: Tensor) -> Tensor:
    """Return an infinite error if a real token's match differs, else 0. Matches of masked tokens are undefined."""
    wrong = ((ours.cpu() != truth) & real).any()
    return torch.where(wrong, torch.inf, 0.0).double()


def to_float64(inputs: list[Tensor | None]) -> list[Tensor | None]:
    return [x.double() if x is not None and x.is_floating_point() else x for x in inputs]


@contextmanager
def small_blocks(device: str, small: bool) -> Iterator[None]:
    """Make the Triton backward work in blocks as small as they can be. Other devices have no such blocks."""
    if not small or dispatch.implementation(device) != "triton":
        yield
        return
    from drl_fast.kernels import token_interaction_backward as kernels

    before = kernels.BLOCK_BYTES, kernels.COEFFICIENT_BYTES, kernels.COLUMNS
    kernels.BLOCK_BYTES, kernels.COEFFICIENT_BYTES, kernels.COLUMNS = 1, 1, 1
    try:
        yield
    finally:
        kernels.BLOCK_BYTES, kernels.COEFFICIENT_BYTES, kernels.COLUMNS = before


def problem(case: Case, dtype: torch.dtype) -> tuple[list[Tensor | None], Tensor]:
    """Return features, weights and masks, and a gradient of the logits: the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    sides = ((case.texts, case.words), (case.videos, case.frames))
    features = [torch.randn(*side, 80, generator=generator).to(dtype) for side in sides]
    masks: list[Tensor | None] = [None, None]
    if case.masks:
        lengths = torch.linspace(case.words / 8, case.words, case.texts).ceil()[:, None]
        real, masks[1] = (torch.rand(side, generator=generator) < 0.7 for side in sides)
        masks[0] = real & (torch.arange(case.words) < lengths)
    weights = [torch.rand(side, generator=generator) for side in sides]
    probe = torch.randn(case.texts, case.videos, generator=generator)
    return [*features, weights[0], weights[1] if case.both else None, *masks], probe


def run(
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    inputs: list[Tensor | None],
    probe: Tensor,
    normalize: bool,
    zero: bool,
    keep: bool = True,
) -> tuple[list[Tensor], list[Tensor]]:
    """Return logits with all gradients, and matches, of one implementation."""
    logits, *kept = forward(*inputs, normalize, zero, keep, keep)
    return [logits, *backward(probe, *inputs, *kept, normalize, zero, [True] * 4)], kept[:2]
