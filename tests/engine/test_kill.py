"""After kill -9 at any moment, files are complete and the run resumes with the losses of an uninterrupted one."""

from __future__ import annotations

import os
import random
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch

from drl_fast.engine.train import LAST
from tests.processes import forkserver

from .runs import configured, make_folder, opened
from .test_train import losses

# `make fuzz` runs the long form.
POINTS = 20 if os.environ.get("DRL_FAST_FUZZ") else 4


def _go_on(folder: Path, out: Path, workers: int) -> None:
    torch.set_num_threads(1)
    opened(configured(folder, checkpoint_every=1, workers=workers), out, resume=True)[0].train()


def test_every_kill_can_be_resumed(tmp_path: Path) -> None:
    folder, context = make_folder(tmp_path / "videos"), forkserver()

    def started(out: Path, workers: int) -> ForkServerProcess:
        process = context.Process(target=_go_on, args=(folder, out, workers))
        process.start()
        return process

    def wait_for(rows: int, out: Path, process: ForkServerProcess) -> None:
        log = out / "log.csv"
        while process.is_alive() and (log.read_text().count("\n") if log.exists() else 0) < rows:
            time.sleep(0.001)

    whole = started(tmp_path / "whole", 0)
    whole.join()
    assert whole.exitcode == 0
    expected = losses(tmp_path / "whole")
    assert len(expected) == 8
    seed = random.SystemRandom().randrange(2**32)
    moments = random.Random(seed)
    reached = []
    for point in range(POINTS):
        out = tmp_path / f"run{point}"
        workers = point % 2
        killed = started(out, workers)
        # Wait for a line of the log (0: before it exists; 1: its header), then up to the time of a step.
        wait_for(moments.randint(0, 8), out, killed)
        time.sleep(moments.uniform(0, 0.1))
        killed.kill()
        killed.join()
        if (out / LAST).exists():
            reached.append(torch.load(out / LAST, weights_only=True)["progress"]["step"])
        resumed = started(out, workers)
        resumed.join()
        assert resumed.exitcode == 0, f"point {point} of seed {seed}"
        assert losses(out) == expected, f"point {point} of seed {seed}"
        assert not list(out.glob(".*.part")), f"point {point} of seed {seed}"
    if POINTS >= 20:
        assert len(set(reached)) > 4, f"the kills of seed {seed} all came at steps {reached}"
