"""Training with DDP and FSDP: the gradients and losses of a single process, and its checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from drl_fast import DRL
from drl_fast.engine.config import build_model
from drl_fast.engine.fsdp import average_gradients, clip_gradients, distribute, reduce_after
from drl_fast.engine.processes import Processes
from drl_fast.engine.step import add_gradients
from drl_fast.engine.train import BEST

from ..engine.runs import after, configured, make_folder, opened
from ..engine.test_step import CASES, batch_of, model_of
from ..engine.test_train import losses
from .ranks import error_of, on_ranks

WAYS = ("ddp", "fsdp")
# Captions of one video share a batch; two processes take two and three of five, which cuts a video's captions apart.
SHARED = {"captions_per_video": 2, "batch": 5}
CHEAPER = {"lora": 2, "checkpoint_towers": True}
# The embeddings: one tower with parameters that train and others that do not.
FROZEN = {"freeze_layers": 0, "epochs": 1}
# First and last row of each process, of seven: unequal shares, or none.
SHARES = {"unequal": ((0, 2), (2, 7)), "none": ((0, 7), (7, 7))}
INTERACTIONS = ("dp", "seqLSTM", "seqTransf", "wti", "mean_maxsim")


def here(rank: int, size: int) -> Processes:
    return Processes(rank, size, torch.device("cpu"), dist.group.WORLD)


def step(processes: Processes, way: str, case: str, shares: tuple[tuple[int, int], ...], chunks: int) -> list[Tensor]:
    """Compute loss, norm and every gradient of one step."""
    model = model_of(CASES[case])
    if processes.rank == 1:
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.5)  # must be overwritten by the first process's weights
    distribute(model, way, processes)
    start, end = shares[processes.rank]
    reduce_after(model, last=False)
    found = add_gradients(
        model,
        {name: x[start:end] for name, x in batch_of().items()},
        chunks=chunks,
        group=processes.group,
        before_last=lambda: reduce_after(model, last=True),
    )
    average_gradients(model, processes)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    whole = [x.full_tensor() if isinstance(x, DTensor) else x.clone() for x in gradients]
    norm = clip_gradients(model, 1e-3)
    clipped = torch.stack([x.full_tensor().norm() if isinstance(x, DTensor) else x.norm() for x in gradients]).norm()
    return [found["total"], norm, clipped, *whole]


def _steps(rank: int, size: int) -> dict[str, list[Tensor]]:
    return {
        f"{way}, {case}, {share}, {chunks}": step(here(rank, size), way, case, SHARES[share], chunks)
        for way in WAYS
        for case in INTERACTIONS
        for share in SHARES
        for chunks in ((1, 3) if case == "wti" else (3,))
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[Tensor]]]:
    return on_ranks(2, _steps, tmp_path_factory.mktemp("steps"))


@pytest.mark.xdist_group("ranks that train")
@pytest.mark.parametrize("case", INTERACTIONS)
def test_a_step_equals_one_process(case: str, ranks: list[dict[str, list[Tensor]]]) -> None:
    alone = step(Processes(), "ddp", case, ((0, 7),), 1)
    names = [name for name in ranks[0] if f", {case}, " in name]
    assert len(names) == len(WAYS) * len(SHARES) * (2 if case == "wti" else 1)
    for name in names:
        for rank in ranks:
            assert len(rank[name]) == len(alone), name
            for found, expected in zip(rank[name], alone, strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10, msg=lambda t, n=name: f"{n}: {t}")


def _runs(rank: int, size: int, folder: Path, out: Path) -> list[int]:
    """Stop and resume a run with DDP, one with FSDP, and one that resumes with the other."""
    steps = []
    for name, (first, second) in {"ddp": WAYS[:1] * 2, "fsdp": WAYS[1:] * 2, "both": WAYS}.items():
        stop: Callable[[], bool] = after(5)
        # If one process wants to stop, all stop.
        run, _ = opened(
            configured(folder, parallel=first),
            out / name,
            stop=stop if rank == 1 else lambda: False,
            processes=here(rank, size),
        )
        run.train()
        run, _ = opened(configured(folder, parallel=second), out / name, resume=True, processes=here(rank, size))
        steps.append(run.progress.step)
        run.train()
    opened(configured(folder, **SHARED), out / "shared", processes=here(rank, size))[0].train()
    # Without code generation, which would take a minute.
    torch.compile = partial(torch.compile, backend="aot_eager")
    chunked, compiled = {**CHEAPER, "chunk": 1}, {**CHEAPER, "compile": True, "parallel": "fsdp"}
    opened(configured(folder, **chunked), out / "cheaper_ddp", processes=here(rank, size))[0].train()
    # It goes on in chunks, uncompiled.
    config = configured(folder, **compiled)
    opened(config, out / "cheaper_fsdp", stop=after(5), processes=here(rank, size))[0].train()
    config = configured(folder, parallel="fsdp", **chunked)
    opened(config, out / "cheaper_fsdp", resume=True, processes=here(rank, size))[0].train()
    frozen = configured(folder, parallel="fsdp", **FROZEN)
    opened(frozen, out / "frozen_fsdp", processes=here(rank, size))[0].train()
    return steps


def _disagree(rank: int, size: int, folder: Path, out: Path) -> list[str]:
    """Give each rank its own folder: a run that only one can resume, and a folder that only one has."""
    found = []
    for name in ("one", "none"):
        own = out / name / f"machine{rank}"
        call = partial(opened, configured(folder), own, resume=True, processes=here(rank, size))
        found.append(error_of(call))
    return found


def test_ranks_with_different_folders_raise(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "videos")
    opened(configured(folder), tmp_path / "out/one/machine0", stop=after(2))[0].train()
    first, second = on_ranks(2, _disagree, tmp_path, folder, tmp_path / "out")
    assert first == second
    assert "the run's last step (out must be a folder that all processes share) must be the same" in first[0]
    assert "got 2 on rank 0 and 0 on rank 1" in first[0]
    assert "got there on rank 0 and not there on rank 1" in first[1]


def _diverge(rank: int, size: int, folder: Path, out: Path) -> list[str]:
    found = []
    for way in WAYS:
        config = configured(folder, parallel=way, lr=1e30, clip_lr=1e30)
        run, _ = opened(config, out / way, processes=here(rank, size))
        found.append(error_of(run.train))
    return found


def test_all_ranks_stop_at_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    for found in on_ranks(2, _diverge, tmp_path, make_folder(tmp_path / "videos"), tmp_path):
        for words in found:
            assert words.startswith("FloatingPointError: training stopped at step 2")


def test_a_run_equals_one_process(tmp_path: Path) -> None:
    """Losses are equal except for rounding."""
    folder = make_folder(tmp_path / "videos")
    opened(configured(folder), tmp_path / "one")[0].train()
    expected = [float(row["total"]) for row in losses(tmp_path / "one")]
    assert on_ranks(2, _runs, tmp_path, folder, tmp_path) == [[5, 5, 5]] * 2
    opened(configured(folder, **SHARED), tmp_path / "shared_by_one")[0].train()
    found, shared = ([float(row["total"]) for row in losses(tmp_path / name)] for name in ("shared", "shared_by_one"))
    assert found == pytest.approx(shared, rel=5e-3)
    for name in ("ddp", "fsdp", "both"):
        found = [float(row["total"]) for row in losses(tmp_path / name)]
        assert found == pytest.approx(expected, rel=5e-3), name
        assert (tmp_path / name / "best/model.safetensors").exists()
    opened(configured(folder, lora=2), tmp_path / "lora")[0].train()
    expected = [float(row["total"]) for row in losses(tmp_path / "lora")]
    plain = DRL.from_pretrained(tmp_path / "one" / BEST)
    for way in WAYS:
        found = [float(row["total"]) for row in losses(tmp_path / f"cheaper_{way}")]
        assert found == pytest.approx(expected, rel=1e-4), way
        saved = DRL.from_pretrained(tmp_path / f"cheaper_{way}" / BEST)
        assert saved.state_dict().keys() == plain.state_dict().keys()
    opened(configured(folder, **FROZEN), tmp_path / "frozen")[0].train()
    one, several = ([float(row["total"]) for row in losses(tmp_path / name)] for name in ("frozen", "frozen_fsdp"))
    assert several == pytest.approx(one, rel=1e-4)
    start, saved = build_model(configured(folder))[0], DRL.from_pretrained(tmp_path / "frozen_fsdp" / BEST)
    moved = {name for name, x in saved.state_dict().items() if not torch.equal(x, start.state_dict()[name])}
    of_towers = {name.removeprefix("clip.") for name in moved if name.startswith("clip.")}
    assert not any("embedding" in name or "conv1" in name or "ln_pre" in name for name in of_towers)
    kinds = {name.removeprefix("visual.").partition(".")[0] for name in of_towers}
    assert kinds == {"transformer", "ln_post", "proj", "ln_final", "text_projection", "logit_scale"}
