"""On a GPU: real sizes, equal bits, CUDA graphs. Skipped without a GPU; ``make gpu`` runs these tests.

For the sanitizers: ``compute-sanitizer --tool racecheck python -m pytest tests/kernels/test_gpu.py -k small``
(or memcheck, initcheck) launches every form of every kernel once, at small sizes.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import drl_fast
from drl_fast.ops import dispatch
from tests.ops import test_cdcr as cdcr
from tests.ops import test_rerank as rerank
from tests.ops import test_soft_token_interaction as soft
from tests.oracle import Problem, judge, make, run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
HALVES = [torch.bfloat16, torch.float16]
REAL = [(256, 32, 256, 12), (64, 64, 64, 64), (96, 77, 96, 20)]
SMALL = [(9, 13, 37, 5), (9, 100, 5, 12), (3, 140, 4, 9), (3, 9, 2, 260)]


def on_gpu(p: Problem) -> Problem:
    return p.map(lambda x: x.cuda())


@pytest.fixture(autouse=True)
def _served_by_triton() -> None:
    assert dispatch.implementation("cuda") == "triton", dispatch.triton_problem("cuda")


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("masks", [(None, None), ("prefix", None), ("holes", "holes")], ids=str)
@pytest.mark.parametrize("shape", REAL, ids=str)
@pytest.mark.parametrize("dim", [512, 768])
def test_real_sizes(shape: tuple[int, int, int, int], masks: tuple[str, str], dtype: torch.dtype, dim: int) -> None:
    judge(make(shape, dim, dtype, masks=masks, weights=torch.float32), "cuda")


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SMALL, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_small_sizes(shape: tuple[int, int, int, int], dtype: torch.dtype, normalize: bool) -> None:
    for bidirectional in (True, False):
        options = {"normalize": normalize, "bidirectional": bidirectional}
        judge(make(shape, 80, dtype, masks=("holes", "empty"), weights=torch.float32, **options), "cuda")


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SMALL, ids=str)
@pytest.mark.parametrize("pooling", soft.POOLINGS)
def test_soft_pooling_at_small_sizes(shape: tuple[int, int, int, int], dtype: torch.dtype, pooling: str) -> None:
    for bidirectional in (True, False):
        options = {"bidirectional": bidirectional, "pooling": pooling, "temperature": 0.1}
        soft.judge(make(shape, 80, dtype, masks=("holes", "empty"), weights=torch.float32, **options), "cuda")


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(16, 32, 100, 12), (3, 77, 20, 20)], ids=str)
@pytest.mark.parametrize("pooling", rerank.POOLINGS)
def test_rerank_at_real_sizes(pooling: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    options = {"pooling": pooling, "temperature": 1.0 if pooling == "max" else 0.1}
    r = rerank.ranking(shape, 512, dtype, masks=("prefix", "prefix"), weights=torch.float32, **options)
    rerank.judge(r, "cuda")


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("words", [13, 100, 140])
@pytest.mark.parametrize("pooling", rerank.POOLINGS)
def test_ragged_rerank_at_small_sizes(pooling: str, words: int, dtype: torch.dtype) -> None:
    for bidirectional in (True, False):
        options = {"bidirectional": bidirectional, "pooling": pooling, "temperature": 1.0 if pooling == "max" else 0.1}
        r = rerank.ranking(
            (0, words, 0, 5),
            80,
            dtype,
            masks=("holes", "empty"),
            weights=torch.float32,
            offsets=[0, 3, 3, 140, 141],
            **options,
        )
        rerank.judge(r, "cuda")


def test_rerank_in_a_cuda_graph() -> None:
    """It replays on other offsets, so no decision depends on the host."""
    r = rerank.ranking((0, 32, 0, 12), 512, torch.bfloat16, weights=torch.float32, offsets=[0, 100, 100, 170])
    r = r.map(lambda x: x.cuda())
    leaves = [x.requires_grad_() for x in map(r.arguments.get, rerank.LEAVES)]
    probe = torch.randn(170, device="cuda")

    def step() -> tuple[torch.Tensor, ...]:
        scores = drl_fast.rerank(**r.arguments)
        return scores, *torch.autograd.grad(scores, leaves, probe)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    r.offsets.copy_(torch.tensor([0, 7, 130, 170]))
    graph.replay()
    for got, want in zip([x.clone() for x in captured], step(), strict=True):
        assert torch.equal(got, want)


def test_tf32_only_if_torch_allows_it() -> None:
    """float32 products use TF32 only if torch's setting allows it."""
    p = on_gpu(make((64, 32, 64, 12), 512))
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        exact = run(drl_fast.token_interaction, p).logits
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        rounded = run(drl_fast.token_interaction, p).logits
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    truth = run(drl_fast.reference.token_interaction, p.double()).logits
    assert float((exact.cpu() - truth).abs().max()) < 1e-6
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(rounded, exact, atol=2e-3, rtol=0)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("shape", REAL, ids=str)
def test_equal_bits(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """From run to run, with and without matches, and for a part of the batch."""
    p = on_gpu(make(shape, 512, dtype, masks=("prefix", "holes"), weights=torch.float32))
    probe = torch.randn(p.pairs)
    first, second = (run(drl_fast.token_interaction, p, probe) for _ in range(2))
    assert torch.equal(first.logits, second.logits)
    assert all(torch.equal(g, second.grads[n]) for n, g in first.grads.items())
    with torch.no_grad():
        assert torch.equal(drl_fast.token_interaction(*p.args()), first.logits)
    part = replace(
        p,
        **{name: getattr(p, name)[5:12] for name in ("text", "text_weight", "text_mask")}
        | {name: getattr(p, name)[3:60] for name in ("video", "video_weight", "video_mask")},
    )
    assert torch.equal(run(drl_fast.token_interaction, part).logits, first.logits[5:12, 3:60])


@pytest.mark.parametrize("masks", [(None, None), ("prefix", "holes")], ids=str)
def test_cuda_graph(masks: tuple[str, str]) -> None:
    """Forward and backward replay on new inputs and lengths, so no decision depends on the host."""
    p = on_gpu(make((64, 32, 48, 12), 512, torch.bfloat16, masks=masks, weights=torch.float32))
    leaves = [x.requires_grad_() for x in p.args()[:4]]
    probe = torch.randn(p.pairs, device="cuda")

    def step() -> tuple[torch.Tensor, ...]:
        logits = drl_fast.token_interaction(*p.args())
        return logits, *torch.autograd.grad(logits, leaves, probe)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    other = on_gpu(make((64, 32, 48, 12), 512, torch.bfloat16, masks=masks, weights=torch.float32, seed=5))
    with torch.no_grad():
        for old, new in zip(p.args(), other.args(), strict=True):
            if old is not None:
                old.copy_(new)
    graph.replay()
    for got, want in zip([x.clone() for x in captured], step(), strict=True):
        assert torch.equal(got, want)


def test_an_offset_beyond_32_bits() -> None:
    """The matches take 4096 x 64 x 12288 bytes; those of the last pairs must be in the right place."""
    if torch.cuda.mem_get_info()[0] < 24e9:
        pytest.skip("needs 24 GB of GPU memory")
    text = torch.randn(4096, 64, 64, device="cuda", dtype=torch.bfloat16)
    video = torch.randn(12288, 2, 64, device="cuda", dtype=torch.bfloat16)
    _, whole = drl_fast.ops.token_interaction.token_interaction(
        text, video, text[..., 0].float(), None, None, None, True, False, True
    )[:2]
    _, part = drl_fast.ops.token_interaction.token_interaction(
        text[-3:], video[-5:], text[-3:, :, 0].float(), None, None, None, True, False, True
    )[:2]
    assert torch.equal(whole[-3:, :, -5:], part)


def pairs_on_gpu(shape: tuple[int, int, int], dtype: torch.dtype, seed: int = 0, **options: float) -> cdcr.Pairs:
    torch.manual_seed(seed)
    return cdcr.pairs(shape, 512, dtype, "holes", **options).map(lambda x: x.cuda())


@pytest.mark.parametrize("form", cdcr.FORMS)
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(128, 32, 12), (32, 64, 64), (33, 77, 20), (4, 300, 3)], ids=str)
def test_cdcr_at_real_sizes(shape: tuple[int, int, int], dtype: torch.dtype, form: str) -> None:
    for dim in (512, 80):
        cdcr.judge(cdcr.pairs(shape, dim, dtype, "holes", **cdcr.FORMS[form]), "cuda")


@pytest.mark.parametrize("form", cdcr.FORMS)
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_cdcr_of_single_rows(dtype: torch.dtype, form: str) -> None:
    cdcr.judge(cdcr.rows(5000, 512, dtype, **cdcr.FORMS[form]), "cuda")


@pytest.mark.parametrize("form", cdcr.FORMS)
def test_cdcr_has_equal_bits(form: str) -> None:
    p = pairs_on_gpu((128, 32, 12), torch.bfloat16, **cdcr.FORMS[form])
    first, second = (p.grads(drl_fast.functional) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(g, second[1][n]) for n, g in first[1].items())


@pytest.mark.parametrize("form", cdcr.FORMS)
def test_cdcr_in_a_cuda_graph(form: str) -> None:
    """It replays on other pairs, so no decision depends on the host."""
    p, other = (pairs_on_gpu((64, 32, 12), torch.bfloat16, seed, **cdcr.FORMS[form]) for seed in (0, 1))
    inputs = {name: getattr(p, name) for name in (*cdcr.LEAVES, "text_mask", "video_mask")}

    def step() -> tuple[torch.Tensor, ...]:
        loss, grads = p.grads(drl_fast.functional)
        return loss, *grads.values()

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for name, old in inputs.items():
        old.copy_(getattr(other, name))
    graph.replay()
    for got, want in zip([x.clone() for x in captured], step(), strict=True):
        assert torch.equal(got, want)
