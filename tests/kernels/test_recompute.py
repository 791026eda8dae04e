"""Beyond the budget, matches are not kept but found again for each block of text rows, with the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

import drl_fast
from drl_fast.ops import token_interaction as op
from tests.implementations import Implementation
from tests.oracle import LEAVES, Problem, judge, make, run

# (A, Nt, B, Nv): 2, 3, 2 and 2 blocks of at most 16 text rows; also captions of several tiles and 2-byte matches.
SHAPES = [(17, 5, 3, 3), (33, 5, 4, 3), (17, 130, 1, 3), (18, 3, 1, 256)]


@pytest.fixture
def recomputing(impl: Implementation) -> Implementation:
    if impl.name == "cpp":
        pytest.skip("CPU tensors' matches are always kept")
    return impl


@pytest.fixture(params=["one block", "blocks"])
def blocks(request: pytest.FixtureRequest, impl: Implementation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the Triton kernels' backward in one block and in several; chunked PyTorch has its own blocks."""
    if request.param == "blocks":
        if impl.name not in ("cuda", "interpreter"):
            pytest.skip("only the Triton kernels loop over blocks of text rows")
        from drl_fast.kernels import token_interaction_backward as kernels

        monkeypatch.setattr(kernels, "BLOCK_BYTES", 1)


def budget(monkeypatch: pytest.MonkeyPatch, impl: Implementation, size: int) -> None:
    monkeypatch.setitem(op.MATCH_BUDGET, impl.device, size)


def both_ways(monkeypatch: pytest.MonkeyPatch, impl: Implementation, p: Problem, probe: Tensor) -> None:
    """Check that logits and gradients have the same bits whether matches are kept or found again."""
    budget(monkeypatch, impl, 1 << 30)
    kept = run(drl_fast.token_interaction, p, probe)
    budget(monkeypatch, impl, 0)
    again = run(drl_fast.token_interaction, p, probe)
    assert torch.equal(kept.logits, again.logits)
    for name, grad in kept.grads.items():
        assert torch.equal(grad, again.grads[name]), name
        assert bool(grad.any()), name


@pytest.mark.parametrize(
    "options",
    [
        "torch.float32-drl-both",
        "torch.float16-drl-both",
        "torch.float16-exclude-both",
        "torch.float32-exclude-one way",
    ],
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equal_bits(
    recomputing: Implementation, blocks: None, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], options: str
) -> None:
    name, masking, ways = options.split("-")
    dtype = getattr(torch, name.removeprefix("torch."))
    p = make(
        shape, 16, dtype, masks=("empty", "holes"), weights=torch.float32, masking=masking, bidirectional=ways == "both"
    )
    both_ways(monkeypatch, recomputing, p.map(lambda x: x.to(recomputing.device)), torch.randn(p.pairs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_oracle(
    recomputing: Implementation,
    blocks: None,
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    budget(monkeypatch, recomputing, 0)
    judge(make(shape, 16, dtype, masks=("holes", None), weights=torch.float32), recomputing.device)


def test_small_gradients_in_one_block_and_large_ones_in_another(
    recomputing: Implementation, blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All blocks scale their float16 coefficients by the largest of all rows, so that sums over blocks are right."""
    p = make((33, 5, 4, 3), 16, torch.float16, weights=torch.float32)
    probe = torch.randn(p.pairs, dtype=torch.float64)
    probe[:16] *= 1e-7
    p.text[20:] *= 2.0**-6
    budget(monkeypatch, recomputing, 0)
    judge(p, recomputing.device, probe=probe)


class Saved:
    """Count the matches that the graph keeps."""

    def __init__(self) -> None:
        self.matches = 0

    def pack(self, x: Tensor) -> Tensor:
        if x.dtype in (torch.uint8, torch.int16):
            self.matches += x.numel()
        return x


@pytest.fixture
def saved() -> Iterator[Saved]:
    record = Saved()
    with torch.autograd.graph.saved_tensors_hooks(record.pack, lambda x: x):
        yield record


@pytest.mark.parametrize("return_matches", [False, True])
def test_the_graph_keeps_matches_only_within_the_budget(
    recomputing: Implementation, monkeypatch: pytest.MonkeyPatch, saved: Saved, return_matches: bool
) -> None:
    p = make((5, 9, 6, 4), masks=("holes", None)).map(lambda x: x.to(recomputing.device))
    bytes_ = 5 * 6 * (9 + 4)
    p.text.requires_grad_()
    for size, held in ((bytes_, bytes_), (bytes_ - 1, 0)):
        budget(monkeypatch, recomputing, size)
        saved.matches = 0
        out: Any = drl_fast.token_interaction(*p.args(), return_matches=return_matches)
        assert saved.matches == held
        if return_matches:
            assert out[1].video_index.shape == (5, 6, 9)
            assert out[1].text_index.shape == (5, 6, 4)
        (out[0] if return_matches else out).sum().backward()


def test_cpu_tensors_keep_their_matches() -> None:
    text, video = (torch.empty(1, 1, 1).expand(10**6, n, 8) for n in (32, 12))
    assert op.keeps_matches(text, video, True, True, True)


@pytest.mark.parametrize(("batch", "kept"), [(4096, True), (5120, False)])
def test_the_budget_on_cuda(batch: int, kept: bool) -> None:
    """The choice depends on shapes only, so fake tensors suffice."""
    with torch._subclasses.FakeTensorMode():
        text, video = (torch.empty(batch, n, 512, device="cuda") for n in (32, 12))
        assert op.keeps_matches(text, video, True, False, True) is kept
        assert op.keeps_matches(text, video, False, False, True)
        # Maxima of float32 take four times the matches' bytes, those of 16-bit unit tokens twice.
        assert not op.keeps_matches(text, video, True, True, True)
        half = (text[:2800].bfloat16(), video[:2800].bfloat16(), True, True)
        assert op.keeps_matches(*half, True)
        assert not op.keeps_matches(*half, False)


def test_matches_within_the_budget_must_be_kept(impl: Implementation) -> None:
    text = torch.randn(3, 4, 8, device=impl.device, requires_grad=True)
    weight = torch.ones(3, 4, device=impl.device)
    with pytest.raises(RuntimeError, match="needs keep_matches=True"):
        op.token_interaction(text, text.detach(), weight, None, None, None, True, True, False)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(recomputing: Implementation, monkeypatch: pytest.MonkeyPatch, dynamic: bool) -> None:
    """Graphs below and above the budget give the same gradients."""
    torch._dynamo.reset()
    budget(monkeypatch, recomputing, 5 * 6 * 13)
    compiled = torch.compile(drl_fast.token_interaction, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape in [(5, 9, 6, 4), (7, 9, 6, 4)]:
        p = make(shape, 16, masks=("holes", "prefix"), weights=torch.float32).map(lambda x: x.to(recomputing.device))
        probe = torch.randn(p.pairs)
        want, got = run(drl_fast.token_interaction, p, probe), run(compiled, p, probe)
        torch.testing.assert_close(got.logits, want.logits, atol=1e-6, rtol=0)
        for name in LEAVES:
            torch.testing.assert_close(got.grads[name], want.grads[name], atol=1e-6, rtol=1e-5)


def test_one_graph_serves_all_batch_sizes(recomputing: Implementation, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    budget(monkeypatch, recomputing, 1 << 30)
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(drl_fast.token_interaction, fullgraph=True, backend=graphs, dynamic=True)
    for shape in [(5, 9, 6, 4), (7, 9, 8, 4), (11, 9, 3, 4)]:
        p = make(shape, 16, masks=("holes", "prefix"), weights=torch.float32).map(lambda x: x.to(recomputing.device))
        run(compiled, p, torch.randn(p.pairs))
    assert graphs.frame_count == 1
