"""``drl-fast doctor``: which implementation serves this machine's tensors, and whether its results are right."""

from __future__ import annotations

import platform
from importlib import metadata

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .. import __version__
from .device_check import limit, worst_error

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPTIONAL = ("triton", "open_clip_torch", "torchvision", "av", "transformers", "peft")
# Narrower terminals get one dtype per line.
WIDE = 120
ONE_DTYPE = 20


def doctor() -> None:
    """Show which implementation serves each device and compare its results with float64.

    The last line is the verdict. Exits with status 1 if a result is wrong or no device is checked.
    """
    from ..ops import dispatch

    console = Console()
    table = Table(title="drl-fast doctor", title_justify="left")
    for heading in ("device", "served by", "why"):
        table.add_column(heading, overflow="fold")
    table.add_column("largest error against float64", width=None if console.width >= WIDE else ONE_DTYPE)
    wrong, slow = [], []
    checked = devices(dispatch.forced)
    for device in checked:
        errors = {dtype: worst_error(device, dtype) for dtype in DTYPES}
        # `not <=` is true for NaN as well.
        failed = any(not error <= limit(dtype) for dtype, error in errors.items())
        shown = ", ".join(f"{str(dtype).removeprefix('torch.')} {error:.1e}" for dtype, error in errors.items())
        served_by = dispatch.implementation(device)
        table.add_row(device, served_by, escape(reason(device)), f"[red]{shown}[/]" if failed else shown)
        wrong += [device] * failed
        slow += [device] * (served_by == "chunked")
    if not torch.cuda.is_available():
        table.add_row("cuda", "-", "torch sees no CUDA device", "-")
    console.print(table)
    if dispatch.forced != "auto":
        console.print(f"DRL_FAST_BACKEND={dispatch.forced} forces one implementation.", highlight=False)
    console.print(environment(), highlight=False)
    console.print(", ".join(version(name) for name in OPTIONAL), highlight=False)
    if not checked:
        console.print(
            f"[bold red]NOTHING CHECKED:[/] no device here runs with DRL_FAST_BACKEND={dispatch.forced}; unset it."
        )
        raise typer.Exit(1)
    if wrong:
        console.print(
            "[bold red]PROBLEM:[/] A value is wrong on this device: do not train on it "
            f"({', '.join(wrong)}). Open an issue with this output.",
            highlight=False,
        )
        raise typer.Exit(1)
    verdict = "and kernels serve every device."
    if slow:
        verdict = f"but {' and '.join(slow)} runs without kernels (see why); expect it to be slow."
    console.print(f"[bold green]OK:[/] results are right, {verdict}", highlight=False)


def devices(forced: str) -> tuple[str, ...]:
    """List the devices that the forced backend serves, of those that are there.

    Not the CPU for Triton's interpreter, which would take minutes.
    """
    served = {"cpp": ("cpu",), "triton": ("cuda",)}.get(forced, ("cpu", "cuda"))
    return tuple(device for device in served if device == "cpu" or torch.cuda.is_available())


def environment() -> str:
    """Name the versions that matter to a bug report, in one line."""
    return (
        f"drl-fast {__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}"
    )


def reason(device: str) -> str:
    """Say why this implementation serves ``device``."""
    from ..ops import dispatch

    if dispatch.forced == "torch":
        return "forced by DRL_FAST_BACKEND=torch"
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
    """Name an optional package and its version, or say that it is missing."""
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return f"no {package}"
