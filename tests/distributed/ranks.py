"""Run several ranks on one machine, with gloo over a file and a short timeout."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from tests.processes import forkserver

# Exchanges take far less; a hang fails after this time.
TIMEOUT = timedelta(seconds=60)


def on_ranks(size: int, function: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """Run ``function(rank, size, *arguments)`` in ``size`` processes of one group; return its results by rank."""
    forkserver()  # chooses what the server imports
    multiprocessing.start_processes(_run, (size, function, folder, arguments), nprocs=size, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(size)]


def _run(rank: int, size: int, function: Callable[..., Any], folder: Path, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=TIMEOUT)
    try:
        torch.save(function(rank, size, *arguments), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def error_of(call: Callable[[], object]) -> str:
    """Return type and message of the error of ``call``; the traceback for unexpected types."""
    try:
        call()
    except (ValueError, TypeError, RuntimeError, FloatingPointError) as error:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return traceback.format_exc()
    return "no error"
