"""``drl-fast doctor``: what serves this machine's tensors, and whether its numbers are right."""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor


def doctor() -> None:
    """Say which implementation serves each device and why, print versions, and compare values with float64.

    Exits with 1 when a value is wrong.
    """
    from ..ops import _registry

    console = Console()
    table = Table(title="drl-fast doctor", title_justify="left")
    for heading in ("device", "served by", "why", "largest error against float64"):
        table.add_column(heading, overflow="fold")
    wrong = False
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        errors = {dtype: worst_error(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
        bad = any(not error <= limit(dtype) for dtype, error in errors.items())
        wrong |= bad
        shown = ", ".join(f"{str(dtype)[6:]} {error:.1e}" for dtype, error in errors.items())
        table.add_row(
            device, _registry.implementation(device), escape(reason(device)), f"[red]{shown}[/]" if bad else shown
        )
    if not torch.cuda.is_available():
        table.add_row("cuda", "-", "torch sees no CUDA device", "-")
    console.print(table)
    names = ("drl-fast", "torch", "triton", "open_clip_torch", "av")
    console.print(f"Python {platform.python_version()}, " + ", ".join(f"{name} {version(name)}" for name in names))
    if wrong:
        console.print("[red]A value is wrong on this device: do not train on it; please report this table.[/]")
        raise typer.Exit(1)


def reason(device: str) -> str:
    from ..ops import _registry

    if device == "cuda":
        return "no Triton kernel in this version"
    if _registry.EXTENSION_ERROR is not None:
        return f"no C++ extension: {_registry.EXTENSION_ERROR}"
    return f"C++ extension, {_registry.cpu_capability()} kernels, {torch.get_num_threads()} threads"


def limit(dtype: torch.dtype) -> float:
    """Relative error that rounding of features and sums explains."""
    return 1e-4 if dtype == torch.float32 else 3e-2


def worst_error(device: str, dtype: torch.dtype) -> float:
    """Largest relative error of logits and gradients, with and without competing zeros, holes in the masks.

    The truth is chunked PyTorch in float64 on the CPU: another implementation, from the same rounded features.
    """
    from ..ops.chunked import token_interaction as chunked

    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(rows, tokens, 80, generator=generator).to(dtype) for rows, tokens in ((9, 13), (37, 5))]
    masks = [torch.rand(x.shape[:2], generator=generator) < 0.7 for x in features]
    weights = [torch.rand(x.shape[:2], generator=generator) for x in features]
    probe = torch.randn(9, 37, generator=generator)
    op = torch.ops.drl_fast
    errors = []
    for zero_competes in (True, False):
        here = [x.to(device) for x in (*features, *weights, *masks, probe)]
        ours = run(op.token_interaction, op.token_interaction_backward, here, zero_competes)
        wide = [x.double() for x in (*features, *weights)]
        truth = run(chunked.forward, chunked.backward, [*wide, *masks, probe.double()], zero_competes)
        errors += [(x.cpu().double() - y).abs().max() / y.abs().max() for x, y in zip(ours, truth, strict=True)]
    # torch's maximum and not Python's, which loses a NaN.
    return float(torch.stack(errors).max())


def run(forward: Callable[..., Any], backward: Callable[..., Any], inputs: list[Tensor], zero: bool) -> list[Tensor]:
    """Logits and all four gradients of one implementation."""
    *arguments, probe = inputs
    logits, video_index, text_index = forward(*arguments, True, zero, True)
    return [logits, *backward(probe, *arguments, video_index, text_index, True, True, True)]


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
