"""The whole training step's benchmark in small, and that its cut-up step is the model's own."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks import bench_model, harness, model_tables, tables
from benchmarks.phases import Stopwatch
from benchmarks.problem import Shape

pytest.importorskip("open_clip")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("form", bench_model.FORMS)
def test_the_cut_step_is_the_models(form: str) -> None:
    trainer = bench_model.Trainer("small", 8, 2, 3, "cpu")
    trainer.model(trainer.batch)["total"].backward()
    want = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    watch = Stopwatch("cpu")
    other = "ours" if form == "dense" else "dense"
    trainer.step(watch.mark, (other, form), 2)
    got = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    assert got.keys() == want.keys()
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, atol=1e-6, rtol=2e-3, msg=lambda m, n=name: f"{n}: {m}")
    phases = [name for name, _ in watch.laps if name != "before"]
    towers = ["text", "image", "temporal"]
    assert phases == [*towers, other, form, other, form, *towers[::-1], "adam"]


def test_a_run_in_small(tmp_path: Path) -> None:
    shapes = (Shape(3, 4, 2, 8),)
    plan = bench_model.Plan("small", 8, 2, {2: 1, 3: 1}, (3,), {"dense": shapes}, ())
    with Progress(console=Console(file=io.StringIO())) as progress:
        result = bench_model.run(plan, "cpu", 1, "a test", progress)
    harness.save(result, tmp_path / "model.json")
    result = harness.load(tmp_path / "model.json")
    assert [row["status"] for row in (*result["phases"], *result["memory"])] == ["ok"] * 2
    for record in result["time"]:
        ms = {name: values["median"] for name, values in record["ms"].items()}
        parts = sum(ms[name] for name in (*model_tables.TOWERS, "adam"))
        assert ms["step"] == pytest.approx(parts + ms["ours"], rel=0.01)
        assert ms["step_dense"] == pytest.approx(parts + ms["dense"], rel=0.01)
    shown = Console(file=io.StringIO(), width=120)
    for table in model_tables.TABLES.values():
        shown.print(tables.rich_table(table(result)))
    assert "held by the image tower" in shown.file.getvalue()  # type: ignore[attr-defined]
    assert model_tables.model_line(result).startswith("At batch 3 on 1 CPU threads the towers take")
    assert model_tables.model_note(result) == "a test"


def test_what_cannot_fit_is_left_out() -> None:
    assert not bench_model.fits(bench_model.QUICK, 1 << 16, "cpu")
