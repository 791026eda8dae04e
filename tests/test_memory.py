"""A training step's memory grows as what it keeps, a byte a token and pair, and not as the similarities.

Each row runs in a process of its own, whose high-water mark of resident memory is set back before each step.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import drl_fast
from tests.conftest import use
from tests.implementations import IMPLEMENTATIONS

WORDS, FRAMES, CHANNELS = 32, 12, 32
# Chunked PyTorch takes its time.
BATCHES = {"cpp": (512, 1024), "chunked": (256, 512)}
MIB = 2**20
# Blocks of similarities are of one fixed size whatever the batch; packed tokens and their gradients, thread stacks and
# the matrix library's own buffers come on top.
BUFFERS = 40 * MIB

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc to read memory from")


def kept(batch: int) -> int:
    """Bytes that a step must hold beside its inputs: matches, logits and the gradients of features and weights."""
    tokens = WORDS + FRAMES
    return batch * batch * (tokens + 4) + 4 * batch * tokens * (CHANNELS + 1)


def similarities(batch: int) -> int:
    """Bytes of the dense form's one tensor."""
    return 4 * batch * batch * WORDS * FRAMES


def step(batch: int) -> int:
    """Run one forward and backward; bytes at its peak beyond what was there before it."""
    text = torch.randn(batch, WORDS, CHANNELS, requires_grad=True)
    video = torch.randn(batch, FRAMES, CHANNELS, requires_grad=True)
    weights = [torch.rand(x.shape[:2], requires_grad=True) for x in (text, video)]
    grad = torch.randn(batch, batch)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # pages that are only used again would not show
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    drl_fast.token_interaction(text, video, *weights).backward(grad)
    return status("VmHWM") - before


def status(field: str) -> int:
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])


@pytest.mark.parametrize("name", ["cpp", "chunked"])
def test_a_step_keeps_a_byte_a_token_and_pair(name: str) -> None:
    with use(name):
        pass  # skips, or fails, where it is absent
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.test_memory", name],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    small, large = BATCHES[name]
    peak = dict(zip((small, large), json.loads(done.stdout), strict=True))
    for batch in (small, large):
        assert kept(batch) / 2 < peak[batch] < kept(batch) + BUFFERS, peak
    assert kept(large) + BUFFERS < similarities(large) / 6
    # What does not grow cancels here: wider matches, or one more tensor of pairs and tokens, would show.
    assert peak[large] - peak[small] < 1.3 * (kept(large) - kept(small)) + 12 * MIB, peak


if __name__ == "__main__":
    torch.set_num_threads(1)  # waiting threads spin, which takes minutes on a busy machine
    with IMPLEMENTATIONS[sys.argv[1]].install():
        sizes = BATCHES[sys.argv[1]]
        step(sizes[0])  # what is made once for all steps
        print(json.dumps([step(batch) for batch in sizes]))
