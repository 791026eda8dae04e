"""Marks between the phases of a training step: seconds, or memory, from one mark to the next."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness


class Stopwatch:
    """``laps``: (phase, seconds) in order."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        self.laps: list[tuple[str, float]] = []
        self.last = self._now()

    def _now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def mark(self, phase: str) -> None:
        """The phase that ends here."""
        now = self._now()
        self.laps.append((phase, now - self.last))
        self.last = now

    def total(self, phase: str) -> float:
        return sum(seconds for name, seconds in self.laps if name == phase)


class MemoryMeter:
    """``laps``: phase, its peak and what is held at its end, both in MB beyond what was held at the start.

    A process's resident memory on a CPU, torch's allocations on a GPU.

    Raises:
        OSError: no /proc/self/clear_refs to reset the kernel's high-water mark.
    """

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        self.laps: list[dict[str, Any]] = []
        self.start = self._held()
        self._reset()

    def _held(self) -> float:
        harness.give_back()
        if self.cuda:
            torch.cuda.synchronize()
            return torch.cuda.memory_allocated()
        return harness.resident("VmRSS")

    def _reset(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def mark(self, phase: str) -> None:
        """The phase that ends here."""
        peak = torch.cuda.max_memory_allocated() if self.cuda else harness.resident("VmHWM")
        held = self._held()
        lap = {"phase": phase, "peak_mb": (peak - self.start) / harness.MB, "held_mb": (held - self.start) / harness.MB}
        self.laps.append(lap)
        self._reset()
