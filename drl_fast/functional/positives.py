"""Which text-video pairs are positives: the argument of all contrastive losses."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import validation

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_positives(
    value: object, rows: int, columns: int, device: torch.device, square: str, *, needs_one: bool = True
) -> Tensor:
    """Check ``positives`` and return it as int64 (A,) columns, -1 for none, or as bool (A, B).

    Args:
        value: None (the diagonal, if A = B), integers (A,) or bool (A, B).
        rows: A, the number of texts.
        columns: B, the number of videos.
        device: of the logits.
        square: what to say of a rectangle without positives: the argument and what it must be.
        needs_one: whether a batch without a positive is an error.

    Raises:
        ValueError: another shape or device; on the CPU, a column that does not exist, or no positive at all.
        TypeError: neither integers nor bool.
    """
    if value is None:
        if rows != columns:
            raise ValueError(square)
        return torch.arange(rows, device=device)
    x = validation.tensor("positives", value)
    if x.dtype not in (*INTEGERS, torch.bool):
        raise TypeError(
            f"positives must be integers, a video's row for each text, or a bool matrix, got {x.dtype}; "
            f"convert it with positives.{'bool' if x.dim() == 2 else 'long'}()"
        )
    want = (rows, columns) if x.dtype == torch.bool else (rows,)
    if tuple(x.shape) != want:
        raise ValueError(
            f"positives must be (A,) = ({rows},) integers or (A, B) = ({rows}, {columns}) bool, got "
            f"{validation.describe(x)}" + _hint(x, rows, columns)
        )
    if x.device != device:
        raise ValueError(
            f"positives must be on the logits' device {device}, got {x.device}; move it with "
            f"positives.to({str(device)!r})"
        )
    x = validation.private_copy(x)
    if x.dtype != torch.bool:
        x = x.to(torch.int64)
    if validation.values_are_visible(x):
        if x.dtype != torch.bool and rows and not -1 <= int(x.min()) <= int(x.max()) < columns:
            raise ValueError(
                f"positives must lie in 0..{columns - 1}, video's rows, or be -1 for a text without a positive, got "
                f"{int(x.min())}..{int(x.max())}" + ("; replace -100 by -1" if int(x.min()) == -100 else "")
            )
        if needs_one and not bool((x if x.dtype == torch.bool else x >= 0).any()):
            raise ValueError("positives must hold at least one positive pair, got none; skip such batches")
    return x


def _hint(x: Tensor, rows: int, columns: int) -> str:
    """Name the remedy for the likeliest wrong shapes."""
    if x.dtype != torch.bool:
        return "; convert a matrix with positives.bool()" if tuple(x.shape) == (rows, columns) else ""
    if tuple(x.shape) == (columns, rows):
        return "; transpose it: rows are texts"
    return "; pass the video's row of each text, and -1 for none" if x.dim() == 1 else ""
