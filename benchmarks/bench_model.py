"""A whole training step of DRL: what the towers cost and what the interaction with its losses costs, ours and eager.

    python benchmarks/bench_model.py [--quick | --full] [--towers]

ViT-B/32 with random weights, seqTransf, WTI and CDCR 3 in the published setting (alpha_off = 0). The step is cut at the
tokens, as gradient caching does: the same arithmetic in the same order, with a mark between the parts. ``--quick``
takes the demo's small towers. Writes ``<out>/<machine>/model.json``.

``--towers`` measures instead what makes the towers cheaper, the options of ``drl-fast train`` side by side, with our
loss alone: time by part, and memory with weights, gradients and Adam's state. Every option has a process of its own.
It writes ``<out>/<machine>/towers.json``.
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
from drl_fast import DRL, Head, functional, reference
from drl_fast.engine.precision import autocast_for
from drl_fast.model import fine_tuning
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
WIDTHS = {"small": 128, "ViT-B-32": 512}


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


# What `--towers` compares, by name: options as of `drl-fast train`, and what they change besides time and memory.
OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "plain": ({}, ""),
    "checkpoint_towers": ({"checkpoint_towers": True}, "nothing"),
    "compile": ({"compile": True}, "rounding"),
    "lora: 8": ({"lora": 8}, "adapters train instead of the towers"),
    "freeze_layers": ({"freeze_layers": True}, "the last quarter of the blocks trains"),
    "freeze: clip": ({"freeze": "clip"}, "the towers do not train"),
    "precision: bf16": ({"precision": "bf16"}, "rounding, to 8 bits"),
    "features": ({"features": True}, "the towers do not train, nor run"),
}
FROZEN_LAYERS = {"small": 1, "ViT-B-32": 9}
BUDGET_MB = 16_000


@dataclass(frozen=True)
class Towers:
    """What `--towers` measures: every option at two batches, from which memory is extrapolated."""

    clip: str
    batches: tuple[int, int]
    minutes: float
    options: tuple[str, ...] = tuple(OPTIONS)
    words: int = 32
    frames: int = 12
    steps: int = 1  # timed steps of the larger batch


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
TOWER_PLANS = {
    "quick": Towers("small", (8, 16), 2),
    "default": Towers("ViT-B-32", (4, 16), 10),
    "full": Towers("ViT-B-32", (4, 16), 30, steps=3),
}


# --- the step ---------------------------------------------------------------------------------------------------------
class Trainer:
    """A model, its optimiser and a batch of full captions and videos, drawn from a fixed seed."""

    def __init__(
        self, clip: str, words: int, frames: int, batch: int, device: str, options: dict[str, Any] | None = None
    ) -> None:
        self.options = options or {}
        self.words, self.frames, self.device = words, frames, device
        torch.manual_seed(0)
        kinds: dict[str, Any] = {"interaction": "wti", "wti_arch": 2, "temporal": "seqTransf", "cdcr": 3}
        self.model: Head
        if self.options.get("features"):
            self.model = Head(WIDTHS[clip], **kinds)
        else:
            towers = small_model(32, words, seed=0)[0].clip if clip == "small" else clip
            self.model = DRL(towers, **kinds)
            self._change_towers(FROZEN_LAYERS[clip])
        self.model.to(device).train()
        if self.options.get("compile"):
            fine_tuning.compile_towers(self.model.get_submodule("clip"), torch.device(device))
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.adam = torch.optim.Adam(trained, lr=1e-7, betas=(0.9, 0.98), eps=1e-6)
        self.autocast = autocast_for(self.options.get("precision", "fp32"), device.partition(":")[0])
        self.draw(batch)

    def _change_towers(self, layers: int) -> None:
        clip, options = self.model.get_submodule("clip"), self.options
        if "lora" in options:
            fine_tuning.add_adapters(clip, options["lora"])
        if "freeze_layers" in options:
            fine_tuning.freeze_layers(clip, layers)
        if "checkpoint_towers" in options:
            fine_tuning.checkpoint_towers(clip)
        if options.get("freeze") == "clip":
            clip.requires_grad_(False)
            self.model.stored_scale.requires_grad_(True)

    def draw(self, batch: int) -> None:
        if not isinstance(self.model, DRL):
            text = torch.randn(batch, self.words, self.model.dim, device=self.device)
            self.batch = {"text": text, "video": torch.randn(batch, self.frames, self.model.dim, device=self.device)}
            return
        vocabulary, size = self.model.clip.token_embedding.weight.shape[0], self.model.clip.visual.image_size
        ids = torch.randint(vocabulary - 1, (batch, self.words))
        ids[:, -1] = vocabulary - 1
        video = torch.randint(256, (batch, self.frames, 3, *size), dtype=torch.uint8)
        self.batch = {"text_ids": ids.to(self.device), "video": video.to(self.device)}

    def _encode_text(self) -> tuple[Tensor, Tensor]:
        if isinstance(self.model, DRL):
            return self.model.encode_text(self.batch["text_ids"])
        return self.model.text_tokens(self.batch["text"])

    def _encode_frames(self) -> Tensor:
        frames = self.batch["video"].flatten(0, 1)
        return self.model.frame_features(frames) if isinstance(self.model, DRL) else frames

    def step(self, mark: Mark, forms: tuple[str, ...]) -> None:
        """Run forward, backward and Adam, calling ``mark`` at the end of each part.

        Of several ``forms`` of the loss all but the last are for the clock alone.
        """
        model, video_in = self.model, self.batch["video"]
        self.adam.zero_grad()
        mark("before")
        with self.autocast():
            text, text_mask = self._encode_text()
        mark("text")
        with self.autocast():
            frames = self._encode_frames()
        mark("image")
        frames_cut = frames.detach().requires_grad_()
        assert model.temporal is not None
        with self.autocast():
            video = model.temporal(frames_cut.unflatten(0, video_in.shape[:2]))
        mark("temporal")
        for form in forms:
            model.interaction.zero_grad()
            model.stored_scale.grad = None
            text_cut, video_cut = text.detach().requires_grad_(), video.detach().requires_grad_()
            mark("before")
            with self.autocast():
                loss = self._loss(form, text_cut, video_cut, text_mask)
            loss.backward()
            del loss
            mark(form)
        video.backward(video_cut.grad)
        mark("temporal")
        if frames.requires_grad:
            frames.backward(frames_cut.grad)
        mark("image")
        if text.requires_grad:
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


def option_step(
    option: str, clip: str, words: int, frames: int, batches: list[int], steps: int, device: str, threads: int
) -> tuple[Call, Call]:
    """Make the steps of one option, which return milliseconds by part and the peak, by batch.

    It is for :func:`harness.measure_apart`. The peak is all that the model needs beyond Python and its libraries. Of
    ``steps`` steps the fastest counts. Raises OSError where the peak cannot be reset.
    """
    torch.set_num_threads(threads)
    start, _ = harness.held_and_peak(device)
    trainer = Trainer(clip, words, frames, 2, device, OPTIONS[option][0])

    def warm_up() -> None:
        timed_step(trainer, ("ours",))  # compiles, too

    def call() -> dict[str, Any]:
        return {"result": [measured(batch, steps if batch == max(batches) else 1) for batch in batches]}

    def measured(batch: int, repeats: int) -> dict[str, Any]:
        trainer.draw(batch)
        trainer.adam.zero_grad()
        harness.held_and_peak(device)
        harness.reset_peak(device)
        found = []
        for _ in range(repeats):
            laps = timed_step(trainer, ("ours",))
            found.append({part: 1e3 * sum(s for name, s in laps if name == part) for part in (*TOWERS, "ours", "adam")})
        fastest = min(found, key=lambda ms: sum(ms.values()))
        peak = harness.held_and_peak(device)[1] - start
        return {"batch": batch, "ms": {**fastest, "step": sum(fastest.values())}, "peak_mb": peak / harness.MB}

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


def measure_towers(run: Run, plan: Towers) -> None:
    """Measure every option, one after the other."""
    device, threads = run.result["device"], run.result["threads"]
    made = {"clip": plan.clip, "words": plan.words, "frames": plan.frames, "batches": list(plan.batches)}
    for option in plan.options:
        found = harness.measure_apart(
            "bench_model:option_step", option=option, **made, steps=plan.steps, device=device, threads=threads
        )
        row = {"option": option, "changes": OPTIONS[option][1], **found}
        text = found["status"]
        if "result" in found:
            (small, large), last = found["result"], found["result"][-1]
            slope = (large["peak_mb"] - small["peak_mb"]) / (large["batch"] - small["batch"])
            row["largest_batch"] = max(int(large["batch"] + (BUDGET_MB - large["peak_mb"]) / slope), 0)
            text = f"batch {last['batch']}: {last['ms']['step']:.0f} ms, {last['peak_mb']:.0f} MB"
        run.row("options", row, f"{option:18} {text}")


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--note", default="", help="what else was running, say; kept with the result")
    parser.add_argument("--towers", action="store_true", help="measure what makes the towers cheaper, and only that")
    options = parser.parse_args()
    if options.towers:
        towers = TOWER_PLANS[options.size]
        settings = {"clip": towers.clip, "words": towers.words, "frames": towers.frames, "budget_mb": BUDGET_MB}
        settings["freeze_layers"] = FROZEN_LAYERS[towers.clip]
        run = Run("towers", options, towers.minutes, **settings, note=options.note)
        measure_towers(run, towers)
        present(run)
        return
    plan = PLANS[options.size]
    settings = {"clip": plan.clip, "words": plan.words, "frames": plan.frames, "note": options.note}
    run = Run(COMPARISON.name, options, plan.loss.minutes, **settings)
    measure(run, plan)
    present(run)


if __name__ == "__main__":
    main()
