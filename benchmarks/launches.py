"""Count the launches and PyTorch operations of a training step, and time the host's share of it, without a GPU.

    python -m benchmarks.launches                 a table
    python -m benchmarks.launches --json FILE     also the figures

The problem: 128 texts of 32 words, 128 videos of 12 frames, 512 channels, bfloat16, both masks, weights that need
gradients. CPU tensors reach the Triton launchers of a pretended H100 (fake_gpu.py), whose launches do nothing: a real
launch adds the driver's share. Products by the library are replaced by products of 1 x 1 tensors, so that only their
dispatch is timed. Plain PyTorch (eager.py) runs on float32 CPU tensors of two texts of two words, two videos of two
frames and two channels, so nearly all of its time is dispatch. One thread; medians. Takes about 20 seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from drl_fast.kernels import token_interaction as forward_kernels
from drl_fast.kernels import token_interaction_backward as backward_kernels
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import drl_fast

from . import eager, fake_gpu, harness

CAPABILITY = 90
PROBLEM = {"texts": 128, "words": 32, "videos": 128, "frames": 12, "dim": 512}
LAST_BATCH = 77
REPEATS = 400
ONE = torch.ones(1, 1)


def is_view(function: Any) -> bool:
    """Say whether an operation only describes its input's memory in another way."""
    aliases = [x.alias_info for x in function._schema.returns]
    # The schema of _unsafe_view hides what it is.
    return function.name() == "aten::_unsafe_view" or any(x is not None and not x.is_write for x in aliases)


class Operations(TorchDispatchMode):
    """Count the operations that PyTorch dispatches, views apart."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()
        self.views: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        (self.views if is_view(function) else self.counted)[function.name()] += 1
        return function(*arguments, **(options or {}))

    def result(self) -> dict[str, Any]:
        return {"ops": self.counted.total(), "views": self.views.total(), "by_name": dict(sorted(self.counted.items()))}


def inputs(texts: int, words: int, videos: int, frames: int, dim: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return features and weights, which need gradients, and masks."""
    sides = (texts, words), (videos, frames)
    features = [torch.randn(*side, dim, dtype=torch.bfloat16) for side in sides]
    learned = [x.requires_grad_() for x in (*features, *(torch.rand(side) for side in sides))]
    return learned, [torch.ones(side, dtype=torch.bool) for side in sides]


@contextmanager
def dispatched_products() -> Iterator[None]:
    """Replace the library's products by products of 1 x 1 tensors."""

    def product(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
        if accumulate:
            torch.addmm(ONE, ONE, ONE, out=ONE)
        else:
            torch.mm(ONE, ONE, out=ONE)

    # Older kernels have no such function.
    with mock.patch.object(backward_kernels, "library_product", product, create=True):
        yield


def launcher_calls(learned: list[Tensor], masks: list[Tensor]) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return the calls of the forward and the backward launcher that a training step makes."""
    calls = []

    def recording(launcher: Callable[..., Any]) -> Callable[..., Any]:
        def record(*arguments: Any) -> Any:
            calls.append(lambda: launcher(*arguments))
            return launcher(*arguments)

        return record

    with (
        mock.patch.object(forward_kernels, "forward", recording(forward_kernels.forward)),
        mock.patch.object(backward_kernels, "backward", recording(backward_kernels.backward)),
    ):
        logits = drl_fast.token_interaction(*learned, *masks)
        logits.backward(torch.ones_like(logits))
    first, second = calls
    return first, second


def counted(call: Callable[[], Any]) -> dict[str, Any]:
    """Count launches and operations of one call."""
    with torch.no_grad(), fake_gpu.compiled_kernels() as launches, Operations() as operations:
        call()
    return {"launches": len(launches), "kernels": dict(Counter(x.kernel for x in launches)), **operations.result()}


def microseconds(call: Callable[[], Any], repeats: int) -> float:
    """Time the median call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return round(sorted(times)[repeats // 2] * 1e6, 1)


def recompiled(learned: list[Tensor], masks: list[Tensor]) -> int:
    """Count the kernels that a last batch of another size compiles again."""

    def step(rows: slice) -> set[str]:
        with fake_gpu.compiled_kernels() as launches:
            logits = drl_fast.token_interaction(
                *(x.detach()[rows].requires_grad_() for x in learned), *(x[rows] for x in masks)
            )
            logits.backward(torch.ones_like(logits))
        return {launch.compiled.hash for launch in launches}

    whole = step(slice(None))
    return len(step(slice(LAST_BATCH)) - whole)


def measure(repeats: int = REPEATS) -> dict[str, Any]:
    """Count and time ours and plain PyTorch."""
    torch.set_num_threads(1)
    fake_gpu.install(CAPABILITY)
    with fake_gpu.serving_cpu_tensors(), dispatched_products():
        learned, masks = inputs(**PROBLEM)
        new = recompiled(learned, masks)
        first, second = launcher_calls(learned, masks)
        ours = {"forward": counted(first), "backward": counted(second)}

        def public() -> Tensor:
            return drl_fast.token_interaction(*learned, *masks)

        logits = public()
        grad = torch.ones_like(logits)
        with torch.no_grad():
            ours["forward"]["launcher_us"] = microseconds(first, repeats)
            ours["backward"]["launcher_us"] = microseconds(second, repeats)
        ours["forward"]["host_us"] = microseconds(public, repeats)
        ours["backward"]["host_us"] = microseconds(
            lambda: torch.autograd.grad(logits, learned, grad, retain_graph=True), repeats
        )
    return {
        "benchmark": "launches",
        "problem": PROBLEM,
        "last_batch": {"rows": LAST_BATCH, "kernels_compiled": new},
        "ours": ours,
        "plain": plain(repeats),
        "machine": {"cpu": harness.machine("cpu", 1)["cpu"], "threads": 1},
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "commit": harness.git_commit()},
    }


def plain(repeats: int) -> dict[str, Any]:
    """Count and time plain PyTorch's operations, on small tensors."""
    learned, masks = inputs(2, 2, 2, 2, 2)
    learned = [x.detach().to(torch.float32).requires_grad_() for x in learned]

    def forward() -> Tensor:
        return eager.token_interaction(*learned, *masks)

    with Operations() as operations:
        logits = forward()
    found = {"forward": operations.result()}
    grad = torch.ones_like(logits)

    def backward() -> Any:
        return torch.autograd.grad(logits, learned, grad, retain_graph=True)

    with Operations() as operations:
        backward()
    found["backward"] = operations.result()
    found["forward"]["host_us"], found["backward"]["host_us"] = (microseconds(f, repeats) for f in (forward, backward))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Count a training step's launches and time the host; needs no GPU.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures")
    parser.add_argument("--quick", action="store_true", help="count, and time a few calls only")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("this benchmark compiles the kernels, and the interpreter does not; unset TRITON_INTERPRET")
    print("launches do nothing here, nothing is measured on a GPU; takes about 20 seconds", flush=True)
    result = measure(5 if arguments.quick else REPEATS)
    for name in ("ours", "plain"):
        for way in ("forward", "backward"):
            found = result[name][way]
            launches = f"{found['launches']:3} launches," if "launches" in found else " " * 13
            launcher = f" (launcher {found['launcher_us']:.0f} us)" if "launcher_us" in found else ""
            print(
                f"{name:6}{way:9}{launches} {found['ops']:3} ops, {found['views']:3} views,"
                f" {found['host_us']:5.0f} us on the host{launcher}"
            )
    print(f"a last batch of {LAST_BATCH} rows compiles {result['last_batch']['kernels_compiled']} kernels again")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
