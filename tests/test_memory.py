"""A training step's memory grows as what it keeps: a byte a token and pair, and in the other losses the batch.

Each row runs in a process of its own, whose high-water mark of resident memory is set back before each step.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

import drl_fast
from drl_fast import functional
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


def contrastive_kept(batch: int) -> int:
    """Bytes beside the inputs: their gradients, a block's gradient of the videos and the videos packed anew."""
    return 4 * batch * (WORDS + 3 * FRAMES) * (CHANNELS + 1)


def interaction(text: Tensor, video: Tensor, *weights: Tensor) -> Tensor:
    return (drl_fast.token_interaction(text, video, *weights) * torch.randn(len(text), len(video))).sum()


def contrastive(*tensors: Tensor) -> Tensor:
    return drl_fast.token_contrastive_loss(*tensors, logit_scale=100.0)


def decorrelation(text: Tensor, video: Tensor, *weights: Tensor, alpha_off: float) -> Tensor:
    return functional.cdcr_loss(text, video, *weights, alpha_on=0.11, alpha_off=alpha_off)


LOSSES = {
    "interaction": interaction,
    "contrastive": contrastive,
    "full": partial(decorrelation, alpha_off=0.06),
    "diagonal": partial(decorrelation, alpha_off=0.0),
}
WIDTHS = {"full": 512, "diagonal": 4096}


def step(batch: int, loss: str) -> int:
    """Run one forward and backward; bytes at its peak beyond what was there before it."""
    width = WIDTHS.get(loss, CHANNELS)
    text = torch.randn(batch, WORDS, width, requires_grad=True)
    video = torch.randn(batch, FRAMES, width, requires_grad=True)
    weights = [torch.rand(x.shape[:2], requires_grad=True) for x in (text, video)]
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # pages that are only used again would not show
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    LOSSES[loss](text, video, *weights).backward()
    return status("VmHWM") - before


def status(field: str) -> int:
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])


def peaks(name: str, loss: str, batches: tuple[int, int]) -> dict[int, int]:
    """Bytes at the peak of a step, by batch."""
    with use(name):
        pass  # skips, or fails, where it is absent
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.test_memory", name, loss, *map(str, batches)],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(zip(batches, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("name", ["cpp", "chunked"])
def test_a_step_keeps_a_byte_a_token_and_pair(name: str) -> None:
    peak = peaks(name, "interaction", BATCHES[name])
    small, large = BATCHES[name]
    for batch in (small, large):
        assert kept(batch) / 2 < peak[batch] < kept(batch) + BUFFERS, peak
    assert kept(large) + BUFFERS < similarities(large) / 6
    # What does not grow cancels here: wider matches, or one more tensor of pairs and tokens, would show.
    assert peak[large] - peak[small] < 1.3 * (kept(large) - kept(small)) + 12 * MIB, peak


def test_the_contrastive_loss_grows_with_the_batch_alone() -> None:
    small, large = 1024, 2048
    peak = peaks("cpp", "contrastive", (small, large))
    for batch in (small, large):
        assert contrastive_kept(batch) / 4 < peak[batch] < contrastive_kept(batch) + BUFFERS, peak
    # One logit matrix would be 16 MB and kept matches 184 MB at 2048.
    assert peak[large] - peak[small] < contrastive_kept(large) - contrastive_kept(small) + 8 * MIB, peak
    assert contrastive_kept(large) + BUFFERS < kept(large) / 2


@pytest.mark.parametrize("name", ["cpp", "chunked"])
@pytest.mark.parametrize("form", ["full", "diagonal"])
def test_decorrelation_holds_little_beside_its_gradients(name: str, form: str) -> None:
    """The public code's N x D x D would be 1.6 GB here; with alpha_off = 0 even D x D, 64 MB, is never made."""
    batch = {"full": 48, "diagonal": 8}[form]
    gradients = 4 * batch * (WORDS + FRAMES) * (WIDTHS[form] + 1)
    peak = peaks(name, form, (batch, batch))[batch]
    # Chunked PyTorch makes some ten temporaries of a chunk's tokens, here of all of them.
    beside = {"cpp": 16 * MIB, "chunked": 16 * MIB + 12 * gradients}[name]
    assert gradients / 2 < peak < gradients + beside + (8 * WIDTHS[form] ** 2 * 4 if form == "full" else 0), peak
    assert form == "full" or name == "chunked" or peak < 4 * WIDTHS[form] ** 2 / 2


if __name__ == "__main__":
    torch.set_num_threads(1)  # waiting threads spin, which takes minutes on a busy machine
    with IMPLEMENTATIONS[sys.argv[1]].install():
        sizes = [int(x) for x in sys.argv[3:]]
        step(sizes[0], sys.argv[2])  # what is made once for all steps
        print(json.dumps([step(batch, sys.argv[2]) for batch in sizes]))
