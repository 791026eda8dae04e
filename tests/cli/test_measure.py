"""The demo's costs: both forms compute the same thing, and memory is what a call adds."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from drl_fast.cli import _measure
from drl_fast.cli._measure import CHANNELS, FRAMES, WORDS, dense, inputs, measure_apart, resident

HAS_PROC = Path("/proc/self/clear_refs").exists()


def test_inputs_have_uneven_lengths_and_weights_of_sum_one() -> None:
    text, video, text_weight, video_weight, text_mask, video_mask = inputs(40)
    assert text.shape == (40, WORDS, CHANNELS)
    assert video.shape == (40, FRAMES, CHANNELS)
    for weight, mask, least in ((text_weight, text_mask, WORDS // 4), (video_weight, video_mask, FRAMES // 4)):
        lengths = mask.sum(dim=1)
        assert lengths.min() >= least
        assert len(set(lengths.tolist())) > 3
        torch.testing.assert_close(weight.sum(dim=1), torch.ones(40))
        assert not weight[mask == 0].any()


def test_forms_agree() -> None:
    results = []
    for form in _measure.FORMS.values():
        arguments = inputs(5)
        logits = form(*arguments)
        logits.square().sum().backward()
        results.append([logits, *(x.grad for x in arguments[:2])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert _measure.FORMS["dense"] is dense


@pytest.mark.skipif(not HAS_PROC, reason="no /proc")
def test_resident_sees_what_is_held() -> None:
    before, _ = resident()
    size = 64 * 2**20
    # Pages of its own, and not what the heap had left over.
    with mmap.mmap(-1, size) as held:
        held.write(b"\1" * size)
        now, peak = resident()
    assert now - before > 0.9 * size
    assert peak >= now


def test_resident_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(self: Path) -> str:
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", missing)
    assert resident() == (0, 0)


@pytest.mark.parametrize("form", ["fused", "dense"])
def test_measured_in_a_process_of_its_own(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense holds at least one tensor of all similarities; fused holds less than that in all."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # waiting threads spin
    batch = 192
    cost = measure_apart(form, batch)
    assert cost["seconds"] > 0
    if HAS_PROC:
        similarities = 4 * batch * batch * WORDS * FRAMES
        assert (cost["bytes"] > similarities) == (form == "dense")
    else:
        assert cost["bytes"] is None


def test_a_failed_measurement_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)measuring unknown at batch 2 ended with 1: .*KeyError: 'unknown'"):
        measure_apart("unknown", 2)
