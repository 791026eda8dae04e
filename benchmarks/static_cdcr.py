"""CDCR's kernels for the static report: each in every form that it is launched in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from drl_fast.kernels import cdcr as forward
from drl_fast.kernels import cdcr_backward as backward
from drl_fast.kernels import cdcr_tokens as tokens
from drl_fast.kernels.packing import NORM_EPS

TYPES = {
    **dict.fromkeys(("own_index", "other_index", "index"), "*i16"),
    **dict.fromkeys(("mask", "own_mask", "other_mask"), "*u8"),
    **dict.fromkeys(("channels", "partial", "count"), "*fp64"),
    **dict.fromkeys(("inverse", "own_inverse", "other_inverse", "weight", "own_weight", "other_weight"), "*fp32"),
    **dict.fromkeys(("weighted", "partners", "pull", "to_weighted", "to_partners", "grad_weight"), "*fp32"),
}


class Launch(NamedTuple):
    """A kernel and what is fixed when it is compiled."""

    fn: Any
    what: str
    constants: dict[str, Any]
    options: dict[str, Any] = tokens.OPTIONS

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Half precisions differ in the one product that they reach."""
        return ("bf16", "fp16", "fp32") if self.fn is forward.cdcr_partners else ("bf16", "fp32")

    def signature(self, dtype: str) -> dict[str, str]:
        """Argument types as the launchers pass them."""
        return {
            name: "constexpr"
            if name in self.constants or name.endswith("_channel")
            else f"*{dtype}"
            if name in ("own", "other", "features", "grad")
            else TYPES[name]
            if name in TYPES
            else "i64"
            if name.endswith(("_pair", "_token"))
            else "i32"
            for name in self.fn.arg_names
        }

    def fixed(self) -> dict[str, Any]:
        """Constants, and strides of 1, which Triton compiles in."""
        return {**self.constants, **{name: 1 for name in self.fn.arg_names if name.endswith("_channel")}}

    def divisible(self) -> list[str]:
        """Numbers that are multiples of 16, which Triton compiles in as well: features are dense, masks need not be."""
        return ["dim", *(f"{of}_{step}" for of in ("own", "other", "stride") for step in ("pair", "token"))]


def launches(dim: int) -> Iterator[Launch]:
    """At 32 words and 12 frames, and at one token a row."""
    flat = {"ROWS": tokens.ROWS, "BD": tokens.channel_block(dim)}
    masked = {"OWN_MASKED": True, "OTHER_MASKED": True}
    deep = {"BD": tokens.channel_block(dim, tokens.DEPTH)}
    yield Launch(tokens.cdcr_norms, "norms", {**flat, "MASKED": True, "TINY": NORM_EPS})
    yield Launch(forward.cdcr_moments, "unit tokens", {**flat, "NORMALIZE": True})
    for keep in (False, True):
        what = "product rows of anchors" if keep else "diagonal"
        yield Launch(forward.cdcr_correlate, what, {**flat, "NORMALIZE": True, "KEEP": keep})
    for own, other in ((32, 12), (12, 32), (1, 1)):
        size, unit = f"{own} x {other}", {"NORMALIZE": own > 1}
        wide = tokens.pair_tile(own, other, tokens.MOST)
        yield Launch(forward.cdcr_partners, size, {**wide, **deep, **unit, **masked})
        tile = {**tokens.pair_tile(own, other, tokens.LEAST), **deep, **unit}
        if own <= other:
            yield Launch(forward.cdcr_product_rows, size, tile, forward.PRODUCT_ROWS)
        for full in (False, True):
            form = {"ANCHORS": True, "PARTNERS": True, "FULL": full, "SHORT": own < other}
            what = f"{'full' if full else 'diagonal'}, {size}"
            yield Launch(backward.cdcr_gradient, what, {**tile, **form}, backward.GRADIENT)
