"""A whole training step of DRL: what the towers cost and what the interaction with its losses costs, ours and eager.

    python benchmarks/bench_model.py [--quick | --full]

ViT-B/32 with random weights, seqTransf, WTI and CDCR 3 in the published setting (alpha_off = 0). The step is cut at the
tokens, as gradient caching does: the same arithmetic in the same order, with a mark between the parts. ``--quick``
takes the demo's small towers. Writes ``<out>/<machine>/model.json``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import eager
import harness
from comparison import SAFE_SHARE, Comparison, Contestant, Plan, loss_step, present, similarities
from drl_fast import DRL, functional, reference
from drl_fast.model.small import small_model
from harness import Call, Run
from problems import Shape, batches

Mark = Callable[[str], None]
ALPHA_ON, CDCR_WEIGHT = 0.11, 0.001
FACTOR = 100.0  # of the loss alone: CLIP's upper limit
# A loss takes milliseconds beside a tower's seconds: within a step each form is run so often, in turns.
REPEATS = 5
# Bytes that a video of 12 frames holds in ViT-B/32 until the backward, roughly: only to refuse what cannot fit.
HELD_BY_A_VIDEO = 0.6e9
TOWERS = ("text", "image", "temporal")


# --- the two forms of the loss ----------------------------------------------------------------------------------------
def our_loss(tokens: tuple[Tensor, ...], scale: Tensor | float) -> Tensor:
    decorrelated = functional.cdcr_loss(*tokens, alpha_on=ALPHA_ON, alpha_off=0.0)
    return functional.token_contrastive_loss(*tokens, logit_scale=scale) + CDCR_WEIGHT * decorrelated


def dense_loss(tokens: tuple[Tensor, ...], scale: Tensor | float) -> Tensor:
    correlation = eager.pair_correlation(tokens, eager.by_channel)
    decorrelated = eager.decorrelation(correlation, ALPHA_ON, 0.0)
    return reference.info_nce(eager.token_interaction(*tokens), scale) + CDCR_WEIGHT * decorrelated


FORMS = {"ours": our_loss, "dense": dense_loss}
ours_alone = loss_step(lambda problem: our_loss(problem.inputs(), FACTOR))
dense_alone = loss_step(lambda problem: dense_loss(problem.inputs(), FACTOR))
EAGER = "the same in eager code (benchmarks/eager.py), CDCR by its diagonal alone"
CONTESTANTS = (
    Contestant("ours", "drl-fast", ours_alone, "token_contrastive_loss + cdcr_loss"),
    Contestant("dense", "eager PyTorch", dense_alone, EAGER, similarities(3)),
)
COMPARISON = Comparison("model", {"loss": CONTESTANTS}, step="loss")


@dataclass(frozen=True)
class Steps:
    """What one run measures: whole steps, and the memory of the loss alone."""

    clip: str  # an open_clip model's name, or "small": the demo's towers
    rounds: dict[int, int]  # batch -> steps that are timed
    loss: Plan
    words: int = 32
    frames: int = 12


_LOSSES = {"ours": batches(Shape(0), 128, 256), "dense": batches(Shape(0), 64, 128)}
PLANS = {
    "quick": Steps("small", {8: 2, 16: 2}, Plan(1, memory={"ours": batches(Shape(0), 128)})),
    "default": Steps("ViT-B-32", {8: 2, 16: 2}, Plan(10, memory=_LOSSES, budgets=((Shape(0), 100),))),
    # The duration is extrapolated from the default's.
    "full": Steps("ViT-B-32", {16: 5, 32: 3, 64: 2}, Plan(30, memory=_LOSSES, budgets=((Shape(0), 100),))),
}


# --- the step ---------------------------------------------------------------------------------------------------------
class Trainer:
    """A model, its optimiser and a batch of full captions and videos, drawn from a fixed seed."""

    def __init__(self, clip: str, words: int, frames: int, batch: int, device: str) -> None:
        torch.manual_seed(0)
        towers = small_model(32, words, seed=0)[0].clip if clip == "small" else clip
        self.model = DRL(towers, interaction="wti", wti_arch=2, temporal="seqTransf", cdcr=3).to(device).train()
        self.adam = torch.optim.Adam(self.model.parameters(), lr=1e-7, betas=(0.9, 0.98), eps=1e-6)
        self.words, self.frames, self.device = words, frames, device
        self.draw(batch)

    def draw(self, batch: int) -> None:
        vocabulary, size = self.model.clip.token_embedding.weight.shape[0], self.model.clip.visual.image_size
        ids = torch.randint(vocabulary - 1, (batch, self.words))
        ids[:, -1] = vocabulary - 1
        video = torch.randint(256, (batch, self.frames, 3, *size), dtype=torch.uint8)
        self.batch = {"text_ids": ids.to(self.device), "video": video.to(self.device)}

    def step(self, mark: Mark, forms: tuple[str, ...]) -> None:
        """Run forward, backward and Adam, calling ``mark`` at the end of each part.

        Of several ``forms`` of the loss all but the last are for the clock alone.
        """
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
        for form in forms:
            model.interaction.zero_grad()
            model.clip.logit_scale.grad = None
            text_cut, video_cut = text.detach().requires_grad_(), video.detach().requires_grad_()
            mark("before")
            self._loss(form, text_cut, video_cut, text_mask).backward()
            mark(form)
        video.backward(video_cut.grad)
        mark("temporal")
        frames.backward(frames_cut.grad)
        mark("image")
        text.backward(text_cut.grad)
        mark("text")
        self.adam.step()
        mark("adam")

    def _loss(self, form: str, text: Tensor, video: Tensor, text_mask: Tensor) -> Tensor:
        # A function of its own: its graph must be gone when the next part's memory is measured.
        video_mask = torch.ones(video.shape[:2], dtype=torch.bool, device=video.device)
        weights = self.model.interaction.weights(text, video, text_mask, video_mask)
        return FORMS[form]((text, video, *weights, text_mask, video_mask), self.model.logit_scale)


def timed_step(trainer: Trainer, forms: tuple[str, ...]) -> list[tuple[str, float]]:
    """Run a step; return (part, seconds) in order."""
    laps: list[tuple[str, float]] = []
    ends: list[float] = [time.perf_counter()]

    def mark(phase: str) -> None:
        if trainer.device.startswith("cuda"):
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
        laps.append((phase, ends[-1] - ends[-2]))

    trainer.step(mark, forms)
    return laps


def time_steps(plan: Steps, batch: int, device: str) -> dict[str, Any]:
    """Measure the milliseconds of each part, and the ratio of the two forms within a round."""
    trainer = Trainer(plan.clip, plan.words, plan.frames, 2, device)
    timed_step(trainer, tuple(FORMS))
    trainer.draw(batch)
    rounds: list[dict[str, float]] = []
    gain: list[float] = []
    order = tuple(FORMS)
    for _ in range(plan.rounds[batch]):
        laps = timed_step(trainer, order * REPEATS)
        order = order[::-1]
        samples = {part: [s for name, s in laps if name == part] for part in (*TOWERS, *FORMS, "adam")}
        gain += [d / o for d, o in zip(samples["dense"], samples["ours"], strict=True)]
        found = {name: statistics.median(s) if name in FORMS else sum(s) for name, s in samples.items()}
        rest = sum(found[name] for name in (*TOWERS, "adam"))
        rounds.append({**found, "step": rest + found["ours"], "step_dense": rest + found["dense"]})
    ms = {name: harness.spread([found[name] * 1e3 for found in rounds]) for name in rounds[0]}
    return {"batch": batch, "ms": ms, "dense_over_ours": harness.spread(gain)}


def memory_phases(clip: str, words: int, frames: int, batch: int, device: str, threads: int) -> tuple[Call, Call]:
    """Make a step that returns each part's peak and what is held at its end, in MB beyond the start.

    It is for :func:`harness.measure_apart`. Adam's state exists before. Raises OSError where the peak cannot be reset.
    """
    torch.set_num_threads(threads)
    trainer = Trainer(clip, words, frames, 2, device)

    def warm_up() -> None:
        timed_step(trainer, tuple(FORMS))
        trainer.adam.zero_grad()
        trainer.draw(batch)

    def call() -> dict[str, Any]:
        laps: list[dict[str, Any]] = []
        start, _ = harness.held_and_peak(device)
        harness.reset_peak(device)

        def mark(phase: str) -> None:
            held, peak = (size - start for size in harness.held_and_peak(device))
            laps.append({"phase": phase, "peak_mb": peak / harness.MB, "held_mb": held / harness.MB})
            harness.reset_peak(device)

        trainer.step(mark, ("dense", "ours"))
        return {"result": laps}

    return warm_up, call


# --- a run ------------------------------------------------------------------------------------------------------------
def fits(clip: str, batch: int, device: str) -> bool:
    return clip == "small" or batch * HELD_BY_A_VIDEO < SAFE_SHARE * harness.available_bytes(device)


def measure(run: Run, plan: Steps) -> None:
    """Measure everything a plan names."""
    device, threads = run.result["device"], run.result["threads"]
    run.result |= {"time": [], "phases": [], "memory": [], "budget": [], "skipped": []}
    for batch in plan.rounds:
        if not fits(plan.clip, batch, device):
            run.row("skipped", {"batch": batch}, f"batch {batch}: not enough memory")
            continue
        # Memory first: the worker needs what this process's model would take.
        made = {"clip": plan.clip, "words": plan.words, "frames": plan.frames, "batch": batch}
        found = harness.measure_apart("bench_model:memory_phases", **made, device=device, threads=threads)
        peak = f"peak {max(lap['peak_mb'] for lap in found['result']):.0f} MB" if "result" in found else found["status"]
        run.row("phases", {"batch": batch, **found}, f"batch {batch}: {peak}")
        row = time_steps(plan, batch, device)
        parts = "  ".join(f"{name} {spread['median']:.3g} ms" for name, spread in row["ms"].items())
        run.row("time", row, f"batch {batch}: {parts}")
    COMPARISON.measure(run, plan.loss)


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--note", default="", help="what else was running, say; kept with the result")
    options = parser.parse_args()
    plan = PLANS[options.size]
    settings = {"clip": plan.clip, "words": plan.words, "frames": plan.frames, "note": options.note}
    run = Run(COMPARISON.name, options, plan.loss.minutes, **settings)
    measure(run, plan)
    present(run)


if __name__ == "__main__":
    main()
