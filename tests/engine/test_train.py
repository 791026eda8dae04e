"""Training runs: files, resuming with equal results, and errors."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from drl_fast import DRL
from drl_fast.engine import checkpoint, plots, schedule
from drl_fast.engine.config import RunConfig
from drl_fast.engine.logs import read_log
from drl_fast.engine.train import BEST, LAST, UNREADABLE

from .runs import after, configured, make_folder, opened

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("videos"))


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an uninterrupted run, on one thread as in the other runs, for equal rounding."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole") / "run"
    run, _ = opened(configured(folder), out)
    assert run.train()
    return out


def losses(out: Path) -> list[dict[str, str]]:
    """Read the log without its times."""
    return [{name: value for name, value in row.items() if name != "seconds"} for row in read_log(out / "log.csv")]


def test_the_files_of_a_run(folder: Path, whole: Path) -> None:
    names = {path.name for path in whole.iterdir()}
    assert names == {
        ".lock",
        "config.yaml",
        LAST,
        BEST,
        "evaluations.json",
        "log.csv",
        "tensorboard",
        "loss.png",
        "recall.png",
    }
    rows = losses(whole)
    assert [int(row["step"]) for row in rows] == list(range(1, 9))
    assert [int(row["epoch"]) for row in rows] == [1] * 4 + [2] * 4
    assert all(float(row["total"]) > 0 and float(row["cdcr"]) > 0 for row in rows)
    evaluations = json.loads((whole / "evaluations.json").read_text())
    assert list(evaluations) == ["1", "2"]
    assert evaluations["2"].keys() == {"t2v", "v2t"}
    assert any((whole / "tensorboard").iterdir())


def test_the_best_model_has_the_recorded_metrics(folder: Path, whole: Path) -> None:
    """best/ is the model of the best epoch, so evaluating it again gives that epoch's numbers."""
    evaluations = json.loads((whole / "evaluations.json").read_text())
    best = max(evaluations.values(), key=lambda found: found["t2v"]["R1"])
    run, _ = opened(configured(folder), whole.parent / "other")
    model = DRL.from_pretrained(whole / BEST)
    found = run.data.evaluate(model, run.config, None, None)
    assert found.with_intervals() == best


@pytest.mark.parametrize("steps", [1, 3, 4, 7, 8])
def test_a_resumed_run_equals_an_uninterrupted_one(folder: Path, whole: Path, tmp_path: Path, steps: int) -> None:
    run, _ = opened(configured(folder), tmp_path / "run", stop=after(steps))
    assert not run.train()
    assert run.progress.step == steps
    run, notes = opened(configured(folder), tmp_path / "run", resume=True)
    assert run.progress.step == steps
    assert run.train()
    assert min(notes.losses(), default=steps + 1) == steps + 1
    assert losses(tmp_path / "run") == losses(whole)
    assert (tmp_path / "run/evaluations.json").read_text() == (whole / "evaluations.json").read_text()
    ours, theirs = (torch.load(out / LAST, weights_only=True)["model"] for out in (tmp_path / "run", whole))
    assert all(torch.equal(x, theirs[name]) for name, x in ours.items())


@pytest.mark.parametrize("interaction", ["xti", "dp"])
def test_a_resumed_run_draws_the_same_random_numbers(folder: Path, tmp_path: Path, interaction: str) -> None:
    """A step's random numbers, such as dropout's, do not depend on those before it."""
    config = configured(folder, interaction=interaction, cdcr=0, epochs=1)
    opened(config, tmp_path / "whole")[0].train()
    opened(config, tmp_path / "run", stop=after(2))[0].train()
    opened(config, tmp_path / "run", resume=True)[0].train()
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_workers_and_chunks_may_change(folder: Path, whole: Path, tmp_path: Path) -> None:
    opened(configured(folder), tmp_path / "run", stop=after(5))[0].train()
    config = configured(folder, workers=1, chunk=2, checkpoint_every=100)
    opened(config, tmp_path / "run", resume=True)[0].train()
    found, expected = losses(tmp_path / "run"), losses(whole)
    assert found[:5] == expected[:5]
    for ours, theirs in zip(found, expected, strict=True):
        assert float(ours["total"]) == pytest.approx(float(theirs["total"]), rel=1e-3)


def test_steps_after_the_checkpoint_are_discarded(folder: Path, whole: Path, tmp_path: Path) -> None:
    """A kill may leave a log that is ahead of the checkpoint, a truncated last line, and half a file."""
    out = tmp_path / "run"
    opened(configured(folder), out, stop=after(3))[0].train()
    kept = (out / LAST).read_bytes()
    opened(configured(folder), out, resume=True, stop=after(2))[0].train()
    (out / LAST).write_bytes(kept)
    with (out / "log.csv").open("a") as file:
        file.write("6,2,1.25,0.5")
    (out / f".{LAST}.123.part").write_bytes(kept[:1000])
    opened(configured(folder), out, resume=True)[0].train()
    assert losses(out) == losses(whole)
    assert not list(out.glob(".*.part"))


def test_adapters_resume_and_are_merged_in_the_best_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(folder, lora=2, chunk=2)
    run, _ = opened(config, tmp_path / "whole")
    before = {name: x.clone() for name, x in run.model.state_dict().items()}
    trained = {name for name, p in run.model.named_parameters() if p.requires_grad}
    assert {name for name in trained if name.startswith("clip.") and ".lora_" not in name} == {"clip.logit_scale"}
    assert len([name for name in trained if name.startswith("interaction.")]) == 8
    groups = run.optimizer.param_groups
    assert sum(len(group["params"]) for group in groups) == len(trained)
    assert {group["peak"] for group in groups} == {config.lr}
    run.train()
    for name, x in run.model.state_dict().items():
        assert torch.equal(x, before[name]) == (name not in trained), name
    opened(config, tmp_path / "run", stop=after(5))[0].train()
    again, _ = opened(config, tmp_path / "run", resume=True)
    again.train()
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    # The first steps are those of a run without adapters, which start at 0.
    opened(configured(folder, chunk=2), tmp_path / "plain", stop=after(1))[0].train()
    assert float(losses(tmp_path / "plain")[0]["total"]) == pytest.approx(
        float(losses(tmp_path / "whole")[0]["total"]), rel=1e-6
    )
    monkeypatch.setitem(sys.modules, "peft", None)
    model = DRL.from_pretrained(tmp_path / "whole" / BEST)
    evaluations = json.loads((tmp_path / "whole/evaluations.json").read_text())
    best = max(evaluations.values(), key=lambda found: found["t2v"]["R1"])
    assert run.data.evaluate(model, config, None, None).with_intervals() == best
    with pytest.raises(ValueError, match=r"lora must be 0 without the package peft, got 2"):
        opened(config, tmp_path / "run", resume=True)


def test_adapters_train_in_bf16_as_in_float32(folder: Path, tmp_path: Path) -> None:
    found: dict[str, list[float]] = {}
    for precision in ("fp32", "bf16"):
        config = configured(folder, lora=2, chunk=2, checkpoint_towers=True, lr=1e-3, precision=precision)
        run, _ = opened(config, tmp_path / precision)
        run.train()
        assert {p.dtype for p in run.model.parameters()} == {torch.float32}
        found[precision] = [float(row["total"]) for row in losses(tmp_path / precision)]
    assert found["bf16"] != found["fp32"]
    assert found["bf16"] == pytest.approx(found["fp32"], rel=0.02)


def test_compiled_and_checkpointed_towers_have_the_losses_of_plain_ones(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes on from a plain one's checkpoint, in chunks: towers run without gradients, too, as in evaluation."""
    out, graphs = tmp_path / "run", []
    opened(configured(folder), out, stop=after(3))[0].train()
    torch.compiler.reset()
    run, notes = opened(configured(folder, compile=True, checkpoint_towers=True, chunk=2), out, resume=True)
    monkeypatch.setattr(notes, "stepped", lambda values: graphs.append(counters["stats"]["unique_graphs"]))
    assert run.train()
    found, expected = ([float(row["total"]) for row in losses(path)] for path in (out, whole))
    assert found == pytest.approx(expected, rel=1e-5)
    # Of the run's five steps the first compiles, and the evaluation after it.
    assert graphs[0] > 0
    assert graphs[1:] == graphs[1:2] * 4


def test_it_learns(folder: Path, tmp_path: Path) -> None:
    run, notes = opened(configured(folder, epochs=24, lr=2e-3, clip_lr=5e-4), tmp_path / "run")
    run.train()
    found = list(notes.losses().values())
    assert sum(found[-4:]) < 0.75 * sum(found[:4])
    assert run.progress.evaluations[24]["t2v"]["R1"] > 3 * 100 / 12


def test_seeds_differ(folder: Path, whole: Path, tmp_path: Path) -> None:
    opened(configured(folder, seed=1), tmp_path / "run")[0].train()
    assert losses(tmp_path / "run") != losses(whole)


def test_a_folder_with_a_run_is_not_overwritten(folder: Path, whole: Path) -> None:
    before = (whole / LAST).read_bytes()
    with pytest.raises(ValueError, match=r"out must be a new folder, got .* which holds a run; add --resume"):
        opened(configured(folder), whole)
    assert (whole / LAST).read_bytes() == before


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"lr": 0.5}, "lr 0.01 then and 0.5 now"),
        ({"interaction": "ti", "cdcr": 2}, "interaction 'wti' then and 'ti' now; cdcr 3 then and 2 now"),
        ({"batch": 3, "seed": 4}, "batch 4 then and 3 now; seed 0 then and 4 now"),
        ({"lora": 2, "checkpoint_towers": True}, "lora 0 then and 2 now;"),
        ({"freeze_layers": 1}, "freeze_layers None then and 1 now"),
    ],
)
def test_another_configuration_cannot_resume(folder: Path, whole: Path, changed: dict[str, Any], words: str) -> None:
    text = (whole / "config.yaml").read_text()
    with pytest.raises(ValueError, match=f"config must be the one that .*{LAST} was trained with, got {words}"):
        opened(configured(folder, **changed), whole, resume=True)
    assert (whole / "config.yaml").read_text() == text


def test_another_configuration_cannot_resume_without_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    """A run that was killed before its first checkpoint."""
    out = tmp_path / "run"
    opened(configured(folder), out)
    text = (out / "config.yaml").read_text()
    with pytest.raises(
        ValueError, match=r"config must be the one that .*config.yaml was trained with, got batch 4 then"
    ):
        opened(configured(folder, batch=3), out, resume=True)
    assert (out / "config.yaml").read_text() == text
    assert opened(configured(folder), out, resume=True)[0].progress.step == 0


def test_a_run_from_before_a_field_existed_resumes(folder: Path, whole: Path, tmp_path: Path) -> None:
    """A checkpoint without ``masking`` was trained with its default."""
    shutil.copytree(whole, tmp_path / "run")
    state = torch.load(tmp_path / "run" / LAST, weights_only=True)
    del state["config"]["masking"]
    torch.save(state, tmp_path / "run" / LAST)
    assert opened(configured(folder), tmp_path / "run", resume=True)[0].progress.step == 8
    with pytest.raises(ValueError, match="masking 'drl' then and 'none' now"):
        opened(configured(folder, masking="none"), tmp_path / "run", resume=True)


def test_other_data_cannot_resume(folder: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "videos")
    (tmp_path / "videos/clip3.mp4").unlink()
    with pytest.raises(ValueError, match=r"dataset must be the one that .* other captions or videos"):
        opened(configured(tmp_path / "videos"), whole, resume=True)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", None])
def test_a_damaged_checkpoint_is_named(folder: Path, whole: Path, tmp_path: Path, content: bytes | None) -> None:
    shutil.copytree(whole, tmp_path / "run")
    last = tmp_path / "run" / LAST
    last.write_bytes(last.read_bytes()[:-20000] if content is None else content)
    with pytest.raises(ValueError, match=f"{LAST} must be a whole checkpoint, and could not be read"):
        opened(configured(folder), tmp_path / "run", resume=True)


def test_a_flipped_bit_is_noticed(folder: Path, whole: Path, tmp_path: Path) -> None:
    """At 100 random places: the checkpoint is refused, or every tensor in it is the one that was written."""
    path = tmp_path / LAST
    content = (whole / LAST).read_bytes()
    run, _ = opened(configured(folder), whole, resume=True)
    data = run.data.fingerprint
    good = checkpoint.read(whole / LAST, run.config, data)
    accepted, random = 0, np.random.default_rng(0)
    for place in random.integers(0, len(content), 100):
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(random.integers(8))
        path.write_bytes(flipped)
        with contextlib.suppress(ValueError):
            found = checkpoint.read(path, run.config, data)
            accepted += 1
            for name, x in good["model"].items():
                assert torch.equal(found["model"][name], x), (place, name)
    assert accepted < 10


@pytest.mark.parametrize("part", ["config", "data", "progress", "model", "optimizer"])
@pytest.mark.parametrize("value", [None, "missing"])
def test_a_checkpoint_without_a_part(part: str, value: None, folder: Path, whole: Path, tmp_path: Path) -> None:
    state = torch.load(whole / LAST, weights_only=True)
    state.pop(part) if value == "missing" else state.update({part: value})
    shutil.copytree(whole, tmp_path / "run")
    torch.save(state, tmp_path / "run" / LAST)
    with pytest.raises(ValueError, match=rf"{LAST} must be a whole checkpoint, got one without a valid {part}"):
        opened(configured(folder), tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["model"].pop("clip.text_projection"),
        lambda state: state["model"].update({"clip.text_projection": torch.zeros(2)}),
        lambda state: state["model"].update({"clip.text_projection": 5}),
        lambda state: state["optimizer"].pop("param_groups"),
        lambda state: state["optimizer"].update(state=3),
        lambda state: state["progress"].update(pace=3),
        lambda state: state["progress"].update(evaluations={1: {}}),
        lambda state: state["progress"].update(evaluations={1: {"t2v": {"R1": 1.0}, "v2t": {"R1": 1.0}}}),
        lambda state: state["progress"].update(step=-3),
        lambda state: state["progress"].update(step=1.5),
        lambda state: state["built"].update(quick_gelu=not state["built"]["quick_gelu"]),
        lambda state: state["built"].update(mean=[0.1, 0.2, 0.3]),
        lambda state: state["built"].update(resize="squash"),
        lambda state: state.update(optimizer={}),
        lambda state: state["optimizer"]["state"]["clip.text_projection"].update(exp_avg=torch.zeros(2)),
        lambda state: state["optimizer"]["state"]["clip.text_projection"].update(step=torch.tensor(1e6)),
    ],
)
def test_a_checkpoint_whose_entries_do_not_fit(change: Any, folder: Path, whole: Path, tmp_path: Path) -> None:
    state = torch.load(whole / LAST, weights_only=True)
    change(state)
    shutil.copytree(whole, tmp_path / "run")
    torch.save(state, tmp_path / "run" / LAST)
    with pytest.raises(ValueError, match="the checkpoint must hold the state of this model and optimizer"):
        opened(configured(folder), tmp_path / "run", resume=True)


def test_a_checkpoint_of_before_preparation_was_recorded(folder: Path, whole: Path, tmp_path: Path) -> None:
    state = torch.load(whole / LAST, weights_only=True)
    assert (state["built"].pop("resize"), state["built"].pop("interpolation")) == ("shortest", "bicubic")
    shutil.copytree(whole, tmp_path / "run")
    torch.save(state, tmp_path / "run" / LAST)
    opened(configured(folder), tmp_path / "run", resume=True)


@pytest.mark.parametrize("config", [{}, {"dataset": torch.ones(3)}, {"lr": "fast"}])
def test_a_checkpoint_with_another_kind_of_configuration(
    config: dict[str, Any], folder: Path, whole: Path, tmp_path: Path
) -> None:
    state = torch.load(whole / LAST, weights_only=True)
    state["config"] = {**state["config"], **config} if config else {}
    shutil.copytree(whole, tmp_path / "run")
    torch.save(state, tmp_path / "run" / LAST)
    with pytest.raises(ValueError, match="config must be the one that"):
        opened(configured(folder), tmp_path / "run", resume=True)


@pytest.mark.parametrize("content", ["step;total\n1;2\n", "step,total\n1,x\n", "step,total\n\x00,1\n"])
def test_a_log_that_another_program_saved(content: str, folder: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run/log.csv").write_text(content)
    with pytest.raises(ValueError, match=r"log\.csv must be the log that training wrote"):
        opened(configured(folder), tmp_path / "run", resume=True)[0].train()


def test_a_refused_resume_leaves_no_lock(folder: Path, whole: Path) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="config must be the one that"):
            opened(configured(folder, lr=0.5), whole, resume=True)


def test_two_trainings_do_not_share_a_folder(folder: Path, tmp_path: Path) -> None:
    first, _ = opened(configured(folder), tmp_path / "run", stop=after(1))
    for resume in (False, True):
        with pytest.raises(ValueError, match=r"holds a run|a folder of one training at a time, got .*another one runs"):
            opened(configured(folder), tmp_path / "run", resume=resume)
    first.train()
    second, _ = opened(configured(folder), tmp_path / "run", resume=True)
    assert second.progress.step == 1


@pytest.mark.skipif(os.name == "nt", reason="POSIX names")
def test_names_that_are_not_unicode_never_end_a_run(folder: Path, tmp_path: Path) -> None:
    """A video whose file name is Latin-1, and one whose name would move the cursor; neither can be read."""
    videos = tmp_path / "videos"
    shutil.copytree(folder, videos)
    names = ["caf\udce9.mp4", "up\x1b[2J.mp4", "two\nlines\t.mp4"]
    lines = []
    for name in names:
        (videos / name).write_bytes(b"no video")
        lines.append(json.dumps({"video": name, "caption": "a film"}))
    table = (videos / "captions.csv").read_text().splitlines()[1:]
    for video, caption in (line.split(",") for line in table):
        lines.append(json.dumps({"video": video, "caption": caption}))
    (videos / "captions.csv").unlink()
    (videos / "captions.jsonl").write_text("\n".join(lines) + "\n")
    run, notes = opened(configured(videos, epochs=1), tmp_path / "run")
    assert run.train()
    assert sorted(notes.names) == sorted(names)
    listed = (tmp_path / "run" / UNREADABLE).read_text(encoding="utf-8").splitlines()
    assert {line.partition("\t")[0] for line in listed} == {"caf\\udce9.mp4", "up\\x1b[2J.mp4", "two\\nlines\\t.mp4"}


def test_another_file_is_no_checkpoint(folder: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    torch.save({"weights": torch.ones(2)}, tmp_path / "run" / LAST)
    with pytest.raises(ValueError, match=r"must be a checkpoint of drl-fast train \(drl-fast run 2\), got another"):
        opened(configured(folder), tmp_path / "run", resume=True)


def test_resume_without_a_run_starts_one(folder: Path, whole: Path, tmp_path: Path) -> None:
    """So a script can always pass --resume."""
    opened(configured(folder), tmp_path / "run", resume=True)[0].train()
    assert losses(tmp_path / "run") == losses(whole)


def test_a_full_disk_leaves_the_checkpoint_before(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    run, _ = opened(configured(folder), out, stop=after(3))
    run.train()
    kept = (out / LAST).read_bytes()

    def full(state: object, name: str) -> None:
        Path(name).write_bytes(kept[:5000])
        raise OSError(28, "No space left on device")

    run, _ = opened(configured(folder), out, resume=True)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.torch, "save", full)
        with pytest.raises(
            OSError,
            match=r"could not be written: No space .*; the previous checkpoint is intact; make room and continue",
        ):
            run.train()
    assert (out / LAST).read_bytes() == kept
    assert not list(out.glob(".*.part"))
    assert opened(configured(folder), out, resume=True)[0].train()


def test_unreadable_videos_are_left_out_and_named_once(folder: Path, tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    shutil.copytree(folder, videos)
    (videos / "clip1.mp4").write_bytes(b"no video")
    (videos / "clip4.mp4").write_bytes(b"")
    run, notes = opened(configured(videos), tmp_path / "run", stop=after(5))
    run.train()
    run, again = opened(configured(videos), tmp_path / "run", resume=True)
    assert run.train()
    assert sorted(notes.names + again.names) == ["clip1.mp4", "clip4.mp4"]
    lines = (tmp_path / "run" / UNREADABLE).read_text().splitlines()
    assert sorted(line.partition("\t")[0] for line in lines) == ["clip1.mp4", "clip4.mp4"]
    assert all("clip" in line.partition("\t")[2] for line in lines)
    run, _ = opened(configured(videos), tmp_path / "strict", strict=True)
    with pytest.raises(ValueError, match=r"clip\d.mp4 cannot be read, and --strict wants all of them"):
        run.train()


def test_unreadable_videos_of_the_val_part_are_named_too(folder: Path, tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    shutil.copytree(folder, videos)
    lines = (videos / "captions.csv").read_text().splitlines()
    parts = ["split", *("val" if line.startswith(("clip1.", "clip2.")) else "train" for line in lines[1:])]
    (videos / "captions.csv").write_text("\n".join(f"{a},{b}" for a, b in zip(lines, parts, strict=True)) + "\n")
    (videos / "clip1.mp4").write_bytes(b"no video")
    run, notes = opened(configured(videos, epochs=1), tmp_path / "run")
    assert run.train()
    assert notes.names == ["clip1.mp4"]
    assert run.unreadable() == {"clip1.mp4"}
    (videos / "clip1.mp4").write_bytes((folder / "clip1.mp4").read_bytes())
    (videos / "clip2.mp4").unlink()
    with pytest.raises(ValueError, match="dataset must be the one that"):
        opened(configured(videos, epochs=1), tmp_path / "run", resume=True)


def test_a_full_disk_while_logging(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard fails in its own thread; the next step raises, and the previous checkpoint is intact."""
    run, _ = opened(configured(folder, checkpoint_every=1), tmp_path / "run")

    def full(self: object, tag: str, value: float, step: int) -> None:
        def fail() -> None:
            raise OSError(28, "No space left on device")

        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()

    before = threading.excepthook
    with monkeypatch.context() as patch:
        patch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", full)
        with pytest.raises(OSError, match=r"log.csv and tensorboard/ beside it could not be written: No space left"):
            run.train()
    assert threading.excepthook is before
    assert opened(configured(folder, checkpoint_every=1), tmp_path / "run", resume=True)[0].train()


def test_a_full_disk_while_plotting(folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run ends with an error, and resumes with the results of an uninterrupted run."""

    def full(self: object, name: str, **_: object) -> None:
        Path(name).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    out = tmp_path / "run"
    run, _ = opened(configured(folder), out)
    with monkeypatch.context() as patch:
        patch.setattr(plots.Figure, "savefig", full)
        with pytest.raises(OSError, match=r"the plots in .*run could not be written: No space left on device; make"):
            run.train()
    assert not (out / "loss.png").exists()
    assert not list(out.glob(".*.part"))
    assert opened(configured(folder), out, resume=True)[0].train()
    assert losses(out) == losses(whole)
    assert (out / "evaluations.json").read_text() == (whole / "evaluations.json").read_text()
    assert (out / "loss.png").exists()
    assert (out / "recall.png").exists()


def test_the_first_checkpoint_on_a_full_disk(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(state: object, name: str) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 128 vs 0")

    run, _ = opened(configured(folder), tmp_path / "run")
    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(OSError, match=r"could not be written: its writer failed, as it does on a full disk; make room"):
        run.train()


def test_a_batch_without_a_readable_video_raises(folder: Path, tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    shutil.copytree(folder, videos)
    for path in videos.glob("*.mp4"):
        path.write_bytes(b"no video")
    run, _ = opened(configured(videos), tmp_path / "run")
    with pytest.raises(ValueError, match="videos must be readable, got a batch without one, at step 1"):
        run.train()


def test_a_loss_that_is_not_finite_stops_the_run_before_its_checkpoint(folder: Path, tmp_path: Path) -> None:
    """The previous checkpoint is kept and finite; a resumed run stops at the same step."""
    config = configured(folder, lr=1e30, clip_lr=1e30, checkpoint_every=1)
    for resume in (False, True):
        run, notes = opened(config, tmp_path / "run", resume=resume)
        with pytest.raises(FloatingPointError, match=r"stopped at step 2, .*learning rate.*--resume"):
            run.train()
        assert [values["step"] for values in notes.steps] == ([] if resume else [1])
    state = torch.load(tmp_path / "run" / LAST, weights_only=True)
    assert state["progress"]["step"] == 1
    assert all(bool(torch.isfinite(x).all()) for x in state["model"].values())
    assert [row["step"] for row in losses(tmp_path / "run")] == ["1"]


def test_skip_same_video(folder: Path, tmp_path: Path) -> None:
    """The batch has all captions; six videos have two."""
    values = []
    for skip in (False, True):
        config = configured(folder, skip_same_video=skip, batch=64, epochs=1, cdcr=0)
        run, notes = opened(config, tmp_path / str(skip))
        run.train()
        values.append(notes.losses()[1])
    assert values[1] < values[0]


def test_an_epoch_sees_every_caption_once() -> None:
    from dataclasses import replace

    config = replace(configured(Path(".")), batch=4, epochs=3)
    batches = schedule.batches(range(18), config)
    assert [len(batch) for batch in batches] == [4] * 12
    for epoch in range(3):
        seen = [row for batch in batches[4 * epoch : 4 * epoch + 4] for row in batch]
        assert len(set(seen)) == 16
        assert set(seen) <= set(range(18))
    assert batches[:4] != batches[4:8]
    assert batches == schedule.batches(range(18), config)
    assert schedule.batches(range(3), config) != schedule.batches(range(3), replace(config, seed=1))


@pytest.mark.parametrize(("captions", "batch"), [(1, 8), (2, 8), (3, 7), (4, 16), (50, 10)])
def test_groups_of_captions_of_one_video(captions: int, batch: int) -> None:
    """An epoch visits each caption at most once; groups stand together, in another order each epoch."""
    owner = [video for video in range(20) for _ in range(1 + video % 5)]
    config = RunConfig("folder", batch=batch, epochs=2, captions_per_video=captions)
    found = schedule.batches(owner, config)
    assert found == schedule.batches(owner, config)
    per_epoch = len(owner) // batch
    assert [len(part) for part in found] == [batch] * 2 * per_epoch
    epochs = [list(itertools.chain(*part)) for part in (found[:per_epoch], found[per_epoch:])]
    for order in epochs:
        assert len(set(order)) == len(order) == per_epoch * batch
        runs = [len(list(group)) for _, group in itertools.groupby(owner[i] for i in order)]
        # Two groups of one video may stand side by side by chance.
        sizes = [min(captions, 1 + video % 5) for video in range(20)]
        assert sum(runs) / len(runs) > 0.7 * sum(sizes) / len(sizes)
        if captions == 1:
            assert max(runs) < 5
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("options", [{}, {"chunk": 2}, {"interaction": "dp", "cdcr": 0}])
def test_a_run_with_several_captions_per_video(folder: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """It decodes each video once a batch, goes on as if it had not stopped, and learns."""
    config = configured(folder, captions_per_video=2, epochs=8, lr=2e-3, clip_lr=5e-4, **options)
    run, notes = opened(config, tmp_path / "whole")
    seen: list[int] = []
    run.model.clip.visual.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    assert run.train()
    assert notes.steps[-1]["total"] < notes.steps[0]["total"]
    assert {values["pairs"] for values in notes.steps} == {4}
    opened(config, tmp_path / "run", stop=after(5))[0].train()
    opened(config, tmp_path / "run", resume=True)[0].train()
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_frozen_towers_stay_as_they_are(folder: Path, tmp_path: Path) -> None:
    """All but the temperature, which trains at the new modules' rate and without weight decay."""
    config = configured(folder, freeze="clip", temporal="seqTransf")
    run, _ = opened(config, tmp_path / "run")
    before = {name: x.clone() for name, x in run.model.state_dict().items()}
    assert run.train()
    changed = {name for name, x in run.model.state_dict().items() if not torch.equal(x, before[name])}
    assert {name for name in changed if name.startswith("clip.")} == {"clip.logit_scale"}
    assert any(name.startswith("temporal.") for name in changed)
    assert {group["peak"] for group in run.optimizer.param_groups} == {config.lr}
    resumed, _ = opened(config, tmp_path / "run", resume=True)
    assert all(torch.equal(x, resumed.model.state_dict()[name]) for name, x in run.model.state_dict().items())


def test_rates_and_weight_decay_are_the_papers(folder: Path) -> None:
    config = configured(folder, temporal="seqTransf", lr=1e-4, clip_lr=1e-7, cdcr=0)
    from drl_fast.engine.config import build_model

    model, _ = build_model(config)
    optimizer = schedule.optimizer(model, config)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    names = {id(p): name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"]) == ((0.9, 0.98), 1e-6)
        for p in group["params"]:
            assert group["peak"] == (1e-7 if names[id(p)].startswith("clip.") else 1e-4)
            assert group["weight_decay"] == (0.2 if p.ndim >= 2 else 0)
    factors = [schedule.rate(step, 100, 0.1) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert factors[55] == pytest.approx(0.5)
    assert 0 < factors[-1] < 1e-3
