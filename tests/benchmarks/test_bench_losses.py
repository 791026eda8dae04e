"""The losses' benchmarks from end to end in small; all contestants compute the same thing."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks import bench_cdcr, bench_contrastive, eager, harness, loss_tables, plots, tables
from benchmarks.problem import Shape, make_problem
from drl_fast import reference

TINY = Shape(6, 5, 3, 16)


def shown(tables_of: dict[str, Any], result: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=200)
    for table in tables_of.values():
        console.print(tables.rich_table(table(result)))
    return console.file.getvalue()  # type: ignore[attr-defined]


def run_in_small(module: Any, plan: Any, folder: Path) -> dict[str, Any]:
    with Progress(console=Console(file=io.StringIO())) as progress:
        result = module.run(plan, "cpu", torch.get_num_threads(), progress)
    harness.save(result, folder / "result.json")
    return harness.load(folder / "result.json")


def test_cdcr_in_small(tmp_path: Path) -> None:
    shapes = (Shape(3, 32, 12, 16), Shape(4, 32, 12, 16))
    memory = {"diagonal": shapes[:1], "outer": shapes[:1]}
    plan = bench_cdcr.Plan(shapes[:1], shapes, shapes[:1], memory, 0.01, 2)
    result = run_in_small(bench_cdcr, plan, tmp_path)
    names = [set(record["results"]) for record in result["time"]]
    everyone = {"products", "full", "diagonal", "eager_full", "eager_diagonal", "outer"}
    assert names == [everyone, everyone, everyone - {"outer"}]
    assert [row["status"] for row in result["memory"]] == ["ok", "ok"]
    assert "96 x 16" in shown(loss_tables.CDCR, result), "3 pairs of 32 words are 96 rows"
    for picture in plots.draw_cdcr(result, tmp_path):
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_contrastive_in_small(tmp_path: Path) -> None:
    shapes = (Shape(3, 4, 2, 8), Shape(4, 4, 2, 8))
    plan = bench_contrastive.Plan(shapes, {"fused": shapes, "eager": shapes[:1]}, (), 0.01, 2)
    result = run_in_small(bench_contrastive, plan, tmp_path)
    for record in result["time"]:
        assert set(record["results"]) == {"mm", "fused", "two_steps", "eager"}
        assert set(record["against"]) == {"eager", "two_steps"}
    assert [row["status"] for row in result["memory"]] == ["ok"] * 3
    assert "(3, 4, 2, 8)" in shown({"contrastive": loss_tables.contrastive}, result)
    for picture in plots.draw_contrastive(result, tmp_path):
        assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("lengths", ["full", "real"])
def test_cdcr_contestants_compute_the_same_thing(lengths: str) -> None:
    problem = make_problem(Shape(6, 32, 5, 16, lengths), train=True)
    for full, alphas in ((True, bench_cdcr.FULL_FORM), (False, bench_cdcr.DIAGONAL)):
        loss = reference.cdcr_loss(*problem.inputs(), **alphas)
        want = (loss.detach(), *torch.autograd.grad(loss, problem.leaves()))
        for contestant in bench_cdcr.MODES["pairs"][1:]:
            if (contestant.name in ("full", "eager_full", "outer")) != full:
                continue
            for ours, theirs in zip(contestant.make(problem)(), want, strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3, msg=lambda m, n=contestant.name: n + m)


def test_row_contestants_compute_the_same_thing() -> None:
    made = {c.name: c.make(make_problem(TINY, train=True)) for c in bench_cdcr.MODES["rows"][1:]}
    for pair in (("full", "eager_full"), ("full", "outer"), ("diagonal", "eager_diagonal")):
        for one, other in zip(*(made[name]() for name in pair), strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_contrastive_contestants_compute_the_same_thing() -> None:
    problem = make_problem(TINY, train=True)
    scaled = reference.token_interaction(*problem.inputs()) * bench_contrastive.SCALE
    assert isinstance(scaled, torch.Tensor)
    loss = reference.info_nce(scaled, 1.0)
    want = (loss.detach(), *torch.autograd.grad(loss, problem.leaves()))
    for contestant in bench_contrastive.CONTESTANTS[1:]:
        for ours, theirs in zip(bench_contrastive.training_call(contestant, problem)(), want, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


def test_the_outer_form_is_refused_where_it_cannot_fit() -> None:
    outer = bench_cdcr.MODES["pairs"][-1]
    assert outer.needs(Shape(48), True) == pytest.approx(4.8e9, rel=0.02)
    refused = outer.refusal(Shape(1 << 20), "cpu", "train")
    assert refused is not None
    assert refused.startswith("skipped: needs about")


def test_diagonal_of_the_product_is_the_channels_form() -> None:
    x, y, w = torch.randn(20, 4), torch.randn(20, 4), torch.rand(20)
    torch.testing.assert_close(eager.by_channel(x, y, w, 7), eager.by_product(x, y, w, 7).diagonal())
    torch.testing.assert_close(eager.by_outer(x, y, w, 7), eager.by_product(x, y, w, 7))
