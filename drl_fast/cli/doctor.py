"""``drl-fast doctor``: what serves this machine's tensors, and whether its numbers are right."""

from __future__ import annotations

import platform
from importlib import metadata

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ._device_check import limit, worst_error


def doctor() -> None:
    """Say which implementation serves each device and why, print versions, and compare every kernel with float64.

    Exits with 1 when a value is wrong.
    """
    from ..ops import dispatch

    console = Console()
    table = Table(title="drl-fast doctor", title_justify="left")
    for heading in ("device", "served by", "why", "largest error against float64"):
        table.add_column(heading, overflow="fold")
    wrong = False
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        errors = {dtype: worst_error(device, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)}
        bad = any(not error <= limit(dtype) for dtype, error in errors.items())
        wrong |= bad
        shown = ", ".join(f"{str(dtype)[6:]} {error:.1e}" for dtype, error in errors.items())
        table.add_row(
            device, dispatch.implementation(device), escape(reason(device)), f"[red]{shown}[/]" if bad else shown
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
    from ..ops import dispatch

    if device == "cuda":
        problem = dispatch.triton_problem(device)
        if problem is not None:
            return problem
        from drl_fast.kernels import tuning

        name = torch.cuda.get_device_name(device)
        return f"Triton kernels, {name}, tiles for {tuning.architecture(torch.device(device))}"
    if dispatch.EXTENSION_ERROR is not None:
        return f"no C++ extension: {dispatch.EXTENSION_ERROR}"
    return f"C++ extension, {dispatch.cpu_capability()} kernels, {torch.get_num_threads()} threads"


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
