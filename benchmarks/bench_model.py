"""A whole training step of DRL: what the towers cost and what the interaction with its losses, ours and dense.

    python benchmarks/bench_model.py            # some minutes on two idle cores; ten on busy ones
    python benchmarks/bench_model.py --full     # batches of 16 to 64, as far as memory goes

ViT-B/32 with random weights, seqTransf, WTI and CDCR 3 in the published setting (alpha_off = 0). The step is cut at
the tokens, as gradient caching does: the same arithmetic in the same order, with a mark between the parts. Writes
``<out>/<machine>/model.json``.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import Progress
from torch import Tensor

if str(Path(__file__).resolve().parents[1]) not in sys.path:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import contestants as who
from benchmarks import eager, harness, model_tables, tables
from benchmarks.contestants import Contestant
from benchmarks.harness import Call
from benchmarks.phases import MemoryMeter, Stopwatch
from benchmarks.problem import Problem, Shape, make_problem
from benchmarks.session import OUT, THREADS, Device, Out, Threads, conduct, largest_batches, memory_apart, tracked
from drl_fast import DRL, functional
from drl_fast.model.small import small_model

Mark = Callable[[str], None]
ALPHA_ON, CDCR_WEIGHT = 0.11, 0.001
FACTOR = 100.0  # of the problems without a model: CLIP's upper limit
# A loss takes milliseconds beside a tower's seconds: within a step each form is run so often, in turns.
REPEATS = 5
# Bytes a video of 12 frames holds in ViT-B/32 until the backward, roughly: only to refuse what cannot fit.
HELD_BY_A_VIDEO = 0.6e9
LOSS = Shape(0)


@dataclass(frozen=True)
class Plan:
    """What one run measures."""

    clip: str
    words: int
    frames: int
    rounds: dict[int, int]  # batch -> steps that are timed
    memory: tuple[int, ...]
    losses: dict[str, tuple[Shape, ...]]  # memory of the loss alone
    budgets: tuple[tuple[Shape, int], ...]  # (family of shapes, megabytes), of the loss alone


LOSSES = {
    "ours": (replace(LOSS, batch=128), replace(LOSS, batch=256)),
    "dense": (replace(LOSS, batch=64), replace(LOSS, batch=128)),
}
QUICK = Plan("ViT-B-32", 32, 12, {8: 2, 16: 2}, (8, 16), LOSSES, ((LOSS, 100),))
FULL = Plan("ViT-B-32", 32, 12, {16: 5, 32: 3, 64: 2}, (16, 32, 64), LOSSES, ((LOSS, 100), (LOSS, 500)))


# --- the two forms of the loss ----------------------------------------------------------------------------------------
def ours(tokens: tuple[Tensor, ...], scale: Tensor | float) -> Tensor:
    decorrelated = functional.cdcr_loss(*tokens, alpha_on=ALPHA_ON, alpha_off=0.0)
    return functional.token_contrastive_loss(*tokens, logit_scale=scale) + CDCR_WEIGHT * decorrelated


def dense(tokens: tuple[Tensor, ...], scale: Tensor | float) -> Tensor:
    correlation = eager.pair_correlation(*tokens, eager.by_channel)
    decorrelated = eager.decorrelation(correlation, ALPHA_ON, 0.0)
    return eager.contrastive_loss(eager.token_interaction(*tokens), scale) + CDCR_WEIGHT * decorrelated


FORMS = {"ours": ours, "dense": dense}
CONTESTANTS = (
    Contestant("ours", "drl-fast", lambda p: lambda: ours(p.inputs(), FACTOR), "token_contrastive_loss + cdcr_loss"),
    Contestant(
        "dense",
        "dense",
        lambda p: lambda: dense(p.inputs(), FACTOR),
        "the same in eager code (benchmarks/eager.py), CDCR by its diagonal alone",
        needs=who.similarities(3, 3),
    ),
)
BY_NAME = {c.name: c for c in CONTESTANTS}


# --- the step ---------------------------------------------------------------------------------------------------------
class Trainer:
    """A model, its optimiser and a batch of full captions and videos, drawn from a fixed seed."""

    def __init__(self, clip: str, words: int, frames: int, batch: int, device: str) -> None:
        torch.manual_seed(0)
        config: dict[str, Any] = {"interaction": "wti", "wti_arch": 2, "temporal": "seqTransf", "cdcr": 3}
        # "small": the demo's towers, to try this script in seconds.
        towers = small_model(32, words, seed=0)[0].clip if clip == "small" else clip
        self.model = DRL(towers, **config).to(device).train()
        self.adam = torch.optim.Adam(self.model.parameters(), lr=1e-7, betas=(0.9, 0.98), eps=1e-6)
        self.words, self.frames, self.device = words, frames, device
        self.draw(batch)

    def draw(self, batch: int) -> None:
        vocabulary, size = self.model.clip.token_embedding.weight.shape[0], self.model.clip.visual.image_size
        ids = torch.randint(vocabulary - 1, (batch, self.words))
        ids[:, -1] = vocabulary - 1
        video = torch.randint(256, (batch, self.frames, 3, *size), dtype=torch.uint8)
        self.batch = {"text_ids": ids.to(self.device), "video": video.to(self.device)}

    def step(self, mark: Mark, forms: tuple[str, ...], repeats: int = 1) -> None:
        """Forward, backward, Adam; of several forms of the loss, or repeats, all but the last are for the clock."""
        model, video_in = self.model, self.batch["video"]
        self.adam.zero_grad()
        mark("before")
        text, text_mask = model.encode_text(self.batch["text_ids"])
        mark("text")
        frames = model.frame_features(video_in.flatten(0, 1))
        mark("image")
        frames_cut = frames.detach().requires_grad_()
        assert model.temporal is not None
        video = model.temporal(frames_cut.unflatten(0, video_in.shape[:2]))
        mark("temporal")
        for form in forms * repeats:
            model.interaction.zero_grad()
            model.clip.logit_scale.grad = None
            text_cut, video_cut = text.detach().requires_grad_(), video.detach().requires_grad_()
            mark("before")
            self._loss(form, text_cut, video_cut, text_mask).backward()
            mark(form)
        assert text_cut.grad is not None
        video.backward(video_cut.grad)
        mark("temporal")
        assert frames_cut.grad is not None
        frames.backward(frames_cut.grad)
        mark("image")
        text.backward(text_cut.grad)
        mark("text")
        self.adam.step()
        mark("adam")

    def _loss(self, form: str, text: Tensor, video: Tensor, text_mask: Tensor) -> Tensor:
        video_mask = torch.ones(video.shape[:2], dtype=torch.bool, device=video.device)
        weights = self.model.interaction.weights(text, video, text_mask, video_mask)
        return FORMS[form]((text, video, *weights, text_mask, video_mask), self.model.logit_scale)


def time_step(plan: Plan, batch: int, rounds: int, device: str) -> dict[str, Any]:
    """Milliseconds of each part, and the forms' ratio, within a round."""
    trainer = Trainer(plan.clip, plan.words, plan.frames, 2, device)
    trainer.step(lambda phase: None, tuple(FORMS))
    trainer.draw(batch)
    parts: dict[str, list[float]] = {name: [] for name in (*model_tables.TOWERS, *FORMS, "adam", "step", "step_dense")}
    gain, order = [], tuple(FORMS)
    for _ in range(rounds):
        watch = Stopwatch(device)
        trainer.step(watch.mark, order, REPEATS)
        order = order[::-1]
        took = {form: [s for name, s in watch.laps if name == form] for form in FORMS}
        found = {name: watch.total(name) for name in (*model_tables.TOWERS, "adam")}
        rest = sum(found.values())
        found |= {form: statistics.median(samples) for form, samples in took.items()}
        gain += [d / o for d, o in zip(took["dense"], took["ours"], strict=True)]
        found |= {"step": rest + found["ours"], "step_dense": rest + found["dense"]}
        for name, seconds in found.items():
            parts[name].append(seconds * 1e3)
    return {
        "batch": batch,
        "ms": {name: harness.spread(values) for name, values in parts.items()},
        "dense_over_ours": harness.spread(gain),
    }


def memory_phases(clip: str, words: int, frames: int, batch: int, device: str, threads: int) -> tuple[Call, Call, str]:
    """Factory for a worker: peak and held memory of each phase of a step. Adam's state is there before."""
    torch.set_num_threads(threads)
    trainer = Trainer(clip, words, frames, 2, device)

    def warm_up() -> None:
        trainer.step(lambda phase: None, tuple(FORMS))
        trainer.adam.zero_grad()
        trainer.draw(batch)

    def call() -> list[dict[str, Any]]:
        meter = MemoryMeter(device)
        trainer.step(meter.mark, ("dense", "ours"))
        return meter.laps

    return warm_up, call, device


def loss_step(contestant: str, shape: Mapping[str, Any], device: str, threads: int) -> tuple[Call, Call, str]:
    """Factory for a worker: the loss alone, and its gradients."""
    torch.set_num_threads(threads)
    full = Shape(**shape)

    def training(problem: Problem) -> Call:
        return who.loss_step(BY_NAME[contestant].make(problem), problem.leaves())

    tiny, whole = (make_problem(s, device, train=True) for s in (replace(full, batch=4), full))
    return training(tiny), training(whole), device


# --- a run ------------------------------------------------------------------------------------------------------------
def fits(plan: Plan, batch: int, device: str) -> bool:
    return plan.clip == "small" or batch * HELD_BY_A_VIDEO < who.SAFE_SHARE * harness.available_bytes(device)


def run(plan: Plan, device: str, threads: int, note: str, progress: Progress) -> dict[str, Any]:
    """Measure everything a plan names."""
    settings = {"full": plan is FULL, "clip": plan.clip, "words": plan.words, "frames": plan.frames, "note": note}
    result = harness.record("model", device, threads, settings)
    result["contestants"] = {c.name: c.describe() for c in CONTESTANTS}
    result |= {"time": [], "phases": [], "memory": [], "budget": [], "skipped": []}
    batches = sorted({*plan.rounds, *plan.memory})
    for batch in tracked(progress, "training steps", batches, "batch {}".format):
        if not fits(plan, batch, device):
            result["skipped"].append(batch)
        else:
            # First: the worker must not find this process's model in memory.
            if batch in plan.memory:
                found = harness.measure_apart(
                    "call",
                    "benchmarks.bench_model:memory_phases",
                    clip=plan.clip,
                    words=plan.words,
                    frames=plan.frames,
                    batch=batch,
                    device=device,
                    threads=threads,
                )
                result["phases"].append({"batch": batch, **found})
            if batch in plan.rounds:
                result["time"].append(time_step(plan, batch, plan.rounds[batch], device))

    def memory(name: str, shape: Shape) -> dict[str, Any]:
        return memory_apart("benchmarks.bench_model:loss_step", BY_NAME[name], shape, device, threads)

    sizes = [(name, shape) for name, shapes in plan.losses.items() for shape in shapes]
    result["memory"] = [
        memory(name, shape)
        for name, shape in tracked(progress, "loss alone", sizes, lambda job: f"{job[0]} at {job[1].batch}")
    ]
    result["budget"] = largest_batches(progress, memory, result["memory"], plan.losses, plan.budgets)
    return result


def main(
    full: Annotated[bool, typer.Option(help="Batches of 16 to 64, as far as memory goes.")] = False,
    clip: Annotated[str, typer.Option(help="An open_clip model's name, or small: the demo's towers.")] = "ViT-B-32",
    device: Device = "cpu",
    threads: Threads = THREADS,
    note: Annotated[str, typer.Option(help="What else was running, say; kept with the result.")] = "",
    out: Out = OUT,
) -> None:
    """Measure a whole training step, part by part."""
    torch.set_num_threads(threads)
    plan = replace(FULL if full else QUICK, clip=clip)
    conduct(
        "model",
        lambda bars: run(plan, device, threads, note, bars),
        model_tables.TABLES.values(),
        (tables.machine_line, model_tables.model_line),
        lambda result, folder: [],
        out,
    )


if __name__ == "__main__":
    typer.run(main)
