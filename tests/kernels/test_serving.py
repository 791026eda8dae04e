"""When the Triton kernels serve CUDA tensors, their fallback, and sizes that they reject."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from drl_fast.ops import dispatch, gpu
from drl_fast.ops import token_interaction as op
from drl_fast.ops.chunked import cdcr as chunked_cdcr
from drl_fast.ops.chunked import token_interaction as chunked

DEVICE = torch.device("cuda:0")


@pytest.fixture(autouse=True)
def _forget_devices() -> Iterator[None]:
    dispatch._triton_works.cache_clear()
    yield
    dispatch._triton_works.cache_clear()


def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Testla V100")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_from_ampere_on(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    pytest.importorskip("triton")
    pretend(monkeypatch, capability)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch._triton_works(DEVICE)
    assert dispatch.implementation("cuda") == "triton"


def test_an_older_gpu_falls_back_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (7, 0))
    with pytest.warns(RuntimeWarning, match=r"slower chunked PyTorch path \(Testla V100 has compute capability 7\.0"):
        assert not dispatch._triton_works(DEVICE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not dispatch._triton_works(DEVICE)
    assert dispatch.implementation("cuda") == "chunked"


def test_no_triton_falls_back_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (9, 0))
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else found(name))
    with pytest.warns(RuntimeWarning, match=r"\(Triton is not installed\)"):
        assert not dispatch._triton_works(DEVICE)
    assert dispatch.implementation("cuda") == "chunked"


def arguments(dtype: torch.dtype) -> tuple[Tensor, ...]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    text, video = torch.randn(3, 4, 8, dtype=dtype), torch.randn(2, 5, 8, dtype=dtype)
    mask = torch.tensor([[1, 1, 0, 1]] * 3, dtype=torch.bool)
    return text, video, torch.rand(3, 4, dtype=wide), torch.rand(2, 5, dtype=wide), mask, None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_fallback_is_chunked(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Chunked PyTorch serves float64 on any GPU, and every dtype on an old GPU, forward and backward."""
    if dtype != torch.float64:
        monkeypatch.setattr(dispatch, "triton_serves", lambda x: False)
    inputs = arguments(dtype)
    ours, want = (f(*inputs, True, True, True) for f in (gpu.token_interaction, chunked.forward))
    assert all(torch.equal(x, y) for x, y in zip(ours, want, strict=True))
    grad = torch.randn_like(want[0])
    ours, want = (
        f(grad, *inputs, *want[1:], True, True, [True] * 4) for f in (gpu.token_interaction_backward, chunked.backward)
    )
    assert all(torch.equal(x, y) for x, y in zip(ours, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_cdcr_falls_back_as_well(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    if dtype != torch.float64:
        monkeypatch.setattr(dispatch, "triton_serves", lambda x: False)
    text, video, *weights, mask, _ = arguments(dtype)
    sides = (text[:2], video, mask[:2], None)
    ours, want = (f(*sides, True, True) for f in (gpu.cdcr_statistics, chunked_cdcr.statistics))
    assert all(torch.equal(x, y) for x, y in zip(ours, want, strict=True))
    tokens = (text[:2], video, weights[0][:2], weights[1], *want[:2])
    channels, pull = torch.stack([want[2], want[3]] * 2), torch.randn(8, dtype=weights[0].dtype)
    for name, more in (("correlation", (channels[:2], True, False)), ("gradient", (channels, pull, True))):
        ours = getattr(gpu, f"cdcr_{name}")(*tokens, *more)
        want = getattr(chunked_cdcr, name)(*tokens, *more)
        assert all(torch.equal(x, y) for x, y in zip(ours, want, strict=True))


def test_more_slots_than_32_bits_can_index() -> None:
    pytest.importorskip("triton")
    from drl_fast.kernels import packing

    many, one = (packing.Side(torch.zeros(1, 1, 1).expand(rows, 16, 1), None, None) for rows in (2**27, 1))
    for text, video, rows in ((many, one, (134217728, 1)), (one, many, (1, 134217728))):
        pattern = rf"text has {rows[0]} rows of up to 16 token slots and video {rows[1]} rows.*in several calls"
        with pytest.raises(ValueError, match=pattern):
            packing.pack(text, video, True)


def test_length_classes() -> None:
    pytest.importorskip("triton")
    from drl_fast.kernels import layout

    assert [layout.most_slots(n) for n in (1, 16, 17, 32, 33, 77, 128, 300)] == [16, 16, 32, 32, 64, 128, 128, 384]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("words", "frames"), [(32, 12), (300, 4), (4, 300)])
@pytest.mark.parametrize("normalize", [True, False])
def test_operators_and_kernels_count_the_same_bytes(
    monkeypatch: pytest.MonkeyPatch, words: int, frames: int, dtype: torch.dtype, normalize: bool
) -> None:
    """The kernels import nothing of the package, so both know what a pair's matches and maxima take."""
    pytest.importorskip("triton")
    from drl_fast.kernels import packing
    from drl_fast.kernels import token_interaction as forward
    from drl_fast.kernels import token_interaction_backward as backward

    text, video = (torch.empty(2, n, 8, dtype=dtype) for n in (words, frames))
    sides = [packing.Side(x, None, None) for x in (text, video)]
    kind = op.maxima_dtype(text, video, normalize)
    assert forward.maxima_dtype(*sides, normalize) == kind
    monkeypatch.setitem(op.MATCH_BUDGET, "cpu", 0)
    for both in (True, False):
        for maxima in (True, False):
            ours = backward.bytes_per_pair(words, frames, both, kind.itemsize if maxima else 0)
            assert ours == op.bytes_of_pair(text, video, both, maxima, normalize)


@pytest.mark.parametrize("tokens", [1, 255, 1000, 2000, 32767])
def test_long_rows_are_packed_in_small_steps(tokens: int) -> None:
    """A step compares all tokens of a row with its slots, in registers."""
    pytest.importorskip("triton")
    from drl_fast.kernels import packing

    for channels in (8, 64, 4096):
        side, one = (
            packing.Side(torch.empty(1, n, channels, dtype=torch.float16, device="meta"), None, None)
            for n in (tokens, 1)
        )
        form = packing.form_of(side, one, True)
        assert form.slots * form.words <= 2**15
        assert form.slots * form.channels <= 2**12


def test_importing_the_package_does_not_import_the_kernels() -> None:
    """The first CUDA tensor does."""
    import subprocess
    import sys

    code = "import sys, drl_fast; sys.exit('drl_fast.kernels.token_interaction' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
