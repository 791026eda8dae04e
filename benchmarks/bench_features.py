"""Training on stored tokens: what a step and an epoch of MSR-VTT's size cost, by part, ours and eager.

    python benchmarks/bench_features.py [--quick | --full]

The store has MSR-VTT's size: 9,000 videos of 12 frames, 180,000 captions of real lengths, 512 channels, random numbers.
The head is WTI with and without seqTransf, and trains as ``drl-fast train --features`` does. A step is cut at the
tokens, as gradient caching does, with a mark between the parts. The eager loss counts captions of one video as
negatives, ours leaves them out. ``--quick`` takes a twentieth of the data. Writes ``<out>/<machine>/features.json``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import eager
import harness
from bench_model import Trainer
from comparison import present
from drl_fast import reference, token_interaction
from drl_fast.data.feature_store import About, Contents, FeatureStore, Side, Writer, begin, start_bytes, write_about
from drl_fast.data.split import Split
from drl_fast.engine import schedule
from drl_fast.engine.config import RunConfig, build_head
from drl_fast.engine.data import StoredData
from drl_fast.engine.evaluate import evaluate_features
from drl_fast.engine.precision import autocast_for
from drl_fast.engine.step import take_step
from drl_fast.model.head import Head
from drl_fast.ops import token_contrastive_loss as loss_op
from harness import Call, Run
from problems import CAPTION_LENGTHS, Shape, make_problem

WORDS, FRAMES, DIM = 32, 12, 512
VIDEOS, CAPTIONS = 9_000, 20
TEST_VIDEOS = 1_000
# Of each kind, only this many different tokens are drawn: numbers do not change the time.
POOL = 1 << 14
# Rounding is measured on at most MSR-VTT's data divided by this.
SMALLEST = 9
PARTS = ("load", "temporal", "ours", "dense", "optimizer")


@dataclass(frozen=True)
class Plan:
    """What one run measures."""

    minutes: float
    share: int  # the data are MSR-VTT's divided by this
    batches: tuple[int, ...]
    precisions: tuple[str, ...] = ("bf16", "fp32")
    rounds: int = 3
    shared: int = 1024  # the batch of captions that share videos, of the loss alone and of the chunks
    clip: str = "ViT-B-32"
    pairs: int = 8  # of a step end to end


PLANS = {
    "quick": Plan(2, 20, (128, 256), ("bf16",), rounds=2, shared=256, clip="small", pairs=8),
    "default": Plan(14, 1, (128, 512, 1024)),
    "full": Plan(40, 1, (128, 256, 512, 1024, 2048, 4096)),
}


# --- the data ---------------------------------------------------------------------------------------------------------
def lengths(count: int) -> np.ndarray:
    """Draw captions' lengths from MSR-VTT's."""
    values, counts = (np.array(list(x)) for x in (CAPTION_LENGTHS, CAPTION_LENGTHS.values()))
    return np.random.default_rng(0).choice(values, count, p=counts / counts.sum())


def write_store(folder: Path, share: int, dtype: str = "fp16") -> None:
    """Write random tokens of MSR-VTT's training and test parts, divided by ``share``."""
    parts, first = {}, 0
    for part, videos, each in (("train", VIDEOS // share, CAPTIONS), ("test", TEST_VIDEOS // share, 1)):
        names = tuple(f"video{number}" for number in range(first, first + videos))
        captions = tuple(f"caption {number} of {name}" for name in names for number in range(each))
        owner = tuple(video for video in range(videos) for _ in range(each))
        parts[part] = Split("msrvtt", part, captions, owner, tuple(map(Path, names)), names)
        first += videos
    contents = Contents.of({**parts, "val": parts["test"]})
    counts = {"text": lengths(len(contents.texts)), "video": np.full(len(contents.videos), FRAMES)}
    inputs = {"max_words": WORDS, "rate": 1.0, "max_frames": FRAMES, "seconds": None}
    encoder = {"clip": "ViT-B-32", "pretrained": None, "weights": "random"}
    text = Side(len(contents.texts), DIM, 4096, WORDS, encoder)
    video = Side(len(contents.videos), DIM, 4096, FRAMES, encoder)
    data, digest = start_bytes({})
    about = About("msrvtt", dtype, "fp32", inputs, contents.digest(), digest, text, video)
    begin(folder, about, contents, data)
    pool = torch.randn(POOL + WORDS, DIM, generator=torch.Generator().manual_seed(0))
    for name, side in (("text", text), ("video", video)):
        writer = Writer(folder, name, side, dtype, 0)
        for items in side.chunks():
            starts = [item * 7919 % POOL for item in items]
            found = [pool[start : start + counts[name][item]] for item, start in zip(items, starts, strict=True)]
            writer.append(items, found, [name] * len(items))
        writer.close()
    write_about(folder, dataclasses.replace(about, finished=True))


def configured(features: Path, batch: int, precision: str, temporal: str | None, **options: Any) -> RunConfig:
    """Return the recipe of training on features, for one epoch."""
    usual: dict[str, Any] = {"epochs": 1, "skip_same_video": True, "pretrained": None}
    named = {"features": str(features), "batch": batch, "precision": precision, "temporal": temporal}
    return RunConfig("msrvtt", **{**usual, **named, **options})


class Steps:
    """A head on features, its optimizer and its batches."""

    def __init__(self, features: Path, config: RunConfig, device: str) -> None:
        store = FeatureStore(features)
        self.config, self.device = config, device
        self.data = StoredData(store, store.part("train"), store.part("test"))
        self.head = build_head(config, store).to(device).train()
        self.optimizer = schedule.optimizer(self.head, config)
        self.order = schedule.batches(self.data.train.owner, config)
        self.loaded = self.data.batches(self.head, config, self.order * 100, pin=False)

    def load(self) -> dict[str, Tensor]:
        batch, _ = next(self.loaded)
        assert batch is not None
        unused = "owner" if "video_of" in batch else ""
        return {name: x.to(self.device) for name, x in batch.items() if name != unused}

    def step(self) -> None:
        """Take a step as training does."""
        chunk = self.config.chunk
        chunks = -(-self.config.batch // chunk) if chunk else 1
        take_step(self.head, self.optimizer, self.load(), self.config, 1.0, chunks=chunks)

    def divided_step(self, mark: Callable[[str], None]) -> None:
        """Take a step, calling ``mark`` at the end of each part; the loss in both forms, ours last."""
        context = autocast_for(self.config.precision, torch.device(self.device).type)
        head, config = self.head, self.config
        batch = self.load()
        mark("load")
        self.optimizer.zero_grad()
        with context():
            encoded = head.encode(batch)
        mark("temporal")
        for form, loss in (("dense", self._dense), ("ours", self._ours)):
            head.interaction.zero_grad()
            head.log_scale.grad = None
            cut = encoded._replace(video=encoded.video.detach().requires_grad_(encoded.video.requires_grad))
            mark("before")
            with context():
                total = loss(cut, batch)
            total.backward()
            mark(form)
        if encoded.video.requires_grad:
            encoded.video.backward(cut.video.grad)
        mark("temporal")
        torch.nn.utils.clip_grad_norm_(head.parameters(), config.clip_grad)
        self.optimizer.step()
        mark("optimizer")

    def _ours(self, cut: Any, batch: dict[str, Tensor]) -> Tensor:
        return self.head.losses(*cut, batch["owner"])["total"]

    def _dense(self, cut: Any, batch: dict[str, Tensor]) -> Tensor:
        return _dense_losses(self.head)(*cut)["total"]


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def timed(steps: Steps) -> dict[str, float]:
    """Run a divided step; return the seconds of each part."""
    found = dict.fromkeys((*PARTS, "before"), 0.0)
    last = time.perf_counter()

    def mark(part: str) -> None:
        nonlocal last
        synchronize(steps.device)
        now = time.perf_counter()
        found[part] += now - last
        last = now

    steps.divided_step(mark)
    return found


# --- the rows ---------------------------------------------------------------------------------------------------------
def step_row(
    features: Path, batch: int, precision: str, temporal: str | None, rounds: int, device: str
) -> dict[str, Any]:
    """Measure the parts of a step, and both forms of the whole."""
    steps = Steps(features, configured(features, batch, precision, temporal), device)
    timed(steps)
    found = []
    for _ in range(rounds):
        parts = timed(steps)
        rest = sum(parts[name] for name in ("load", "temporal", "optimizer"))
        found.append({**parts, "step": rest + parts["ours"], "step_dense": rest + parts["dense"]})
    names = (*PARTS, "step", "step_dense")
    ms = {name: harness.spread([parts[name] * 1e3 for parts in found]) for name in names}
    per_epoch = len(steps.order)
    return {
        "batch": batch,
        "precision": precision,
        "temporal": temporal,
        "ms": ms,
        "dense_over_ours": harness.spread([parts["step_dense"] / parts["step"] for parts in found]),
        "load_share": harness.spread([parts["load"] / parts["step"] for parts in found]),
        # Counted, not run: the steps of an epoch times the median of one.
        "epoch_seconds": per_epoch * ms["step"]["median"] / 1e3,
        "epoch_seconds_dense": per_epoch * ms["step_dense"]["median"] / 1e3,
    }


def memory_of_step(
    features: str, batch: int, precision: str, chunk: int, form: str, device: str, threads: int
) -> tuple[Call, Call]:
    """Make the measurement of a step's peak memory, for :func:`harness.measure_apart`."""
    torch.set_num_threads(threads)
    folder = Path(features)
    small = Steps(folder, configured(folder, 8, precision, "seqTransf"), device)
    steps = Steps(folder, configured(folder, batch, precision, "seqTransf", chunk=chunk), device)
    for p in steps.head.parameters():  # Adam's state exists before
        p.grad = torch.zeros_like(p)
    steps.optimizer.step()

    def dense() -> None:
        losses, steps.head.losses = steps.head.losses, _dense_losses(steps.head)  # type: ignore[method-assign]
        try:
            steps.step()
        finally:
            steps.head.losses = losses  # type: ignore[method-assign]

    def measure() -> dict[str, Any]:
        used, method = harness.peak_bytes(steps.step if form == "ours" else dense, device)
        return {"mb": used / harness.MB, "method": method}

    return small.step, measure


def _dense_losses(head: Head) -> Callable[..., dict[str, Tensor]]:
    def losses(text: Tensor, video: Tensor, text_mask: Tensor, video_mask: Tensor, *_: Any, **__: Any) -> Any:
        weights = head.interaction.weights(text, video, text_mask, video_mask)
        logits = eager.token_interaction(text, video, *weights, text_mask, video_mask)
        loss = reference.info_nce(logits, head.logit_scale)
        return {"total": loss, "info_nce": loss, "cdcr": loss.new_zeros(())}

    return losses


def shared_row(features: Path, plan: Plan, precision: str, device: str) -> dict[str, Any]:
    """Compare steps whose captions share videos, four each, with steps of random captions."""
    forms = {
        name: Steps(features, configured(features, plan.shared, precision, "seqTransf", captions_per_video=k), device)
        for name, k in (("random", 0), ("four", 4))
    }
    for steps in forms.values():
        steps.step()
    times = harness.interleave({name: steps.step for name, steps in forms.items()}, device, 0, plan.rounds)
    return {"batch": plan.shared, "precision": precision, "results": harness.summarize(times, "random")}


def end_to_end_row(features: Path, plan: Plan, device: str) -> dict[str, Any]:
    """Compare a pair's time in a step end to end with its time on features, both in float32, WTI with seqTransf."""
    batch = min(512, plan.shared)
    steps = Steps(features, configured(features, batch, "fp32", "seqTransf"), device)
    trainer = Trainer(plan.clip, WORDS, FRAMES, plan.pairs, device)
    steps.step()
    whole = partial(trainer.step, lambda part: None, ("ours",))
    whole()
    times = harness.interleave({"end_to_end": whole, "features": steps.step}, device, 0, 2)
    pairs = {"end_to_end": plan.pairs, "features": batch}
    a_pair = {name: [t / pairs[name] for t in samples] for name, samples in times.items()}
    return {"pairs": pairs, "clip": plan.clip, "results": harness.summarize(a_pair, "features")}


@contextlib.contextmanager
def keeping(size: int) -> Iterator[None]:
    """Let the contrastive loss keep logits and matches of up to ``size`` bytes."""
    before, loss_op.KEPT_BYTES = loss_op.KEPT_BYTES, size
    try:
        yield
    finally:
        loss_op.KEPT_BYTES = before


def loss_rows(plan: Plan, device: str) -> dict[str, dict[str, Any]]:
    """Compare the loss with kept matches with the loss without, and a backward of weights alone with the whole one."""
    from drl_fast import token_contrastive_loss

    problem = make_problem(Shape(plan.shared, lengths="real"), device)

    def loss() -> None:
        total = token_contrastive_loss(*problem.inputs(), logit_scale=50.0)
        torch.autograd.grad(total, problem.leaves())

    def kept_none() -> None:
        with keeping(0):
            loss()

    def backward(leaves: tuple[Tensor, ...]) -> Call:
        wanted = [x.detach().requires_grad_(any(x is leaf for leaf in leaves)) for x in problem.inputs()[:4]]
        logits = token_interaction(*wanted, *problem.inputs()[4:])
        needed = [x for x in wanted if x.requires_grad]
        return lambda: torch.autograd.grad(logits, needed, problem.grad, retain_graph=True)

    found = {}
    pairs = {
        "kept": ({"recomputed": kept_none, "kept": loss}, "recomputed"),
        "backward": ({"all": backward(problem.leaves()), "weights": backward(problem.leaves()[2:])}, "all"),
    }
    for name, (calls, base) in pairs.items():
        for call in calls.values():
            call()
        times = harness.interleave(calls, device, 0, 2 * plan.rounds)
        found[name] = {"shape": dataclasses.asdict(problem.shape), "results": harness.summarize(times, base)}
    return found


def rounding_row(folder: Path, plan: Plan, dtype: str, exact: Path) -> dict[str, Any]:
    """Compare the test part's similarities from a store of ``dtype`` with those of float32."""
    sims = []
    for path in (exact, folder):
        store = FeatureStore(path)
        head = build_head(configured(path, 128, "fp32", "seqTransf"), store)
        sims.append(evaluate_features(head, store, store.part("test")).sim)
    moved = float((sims[0] - sims[1]).abs().max())
    other = int((sims[0].argmax(1) != sims[1].argmax(1)).sum())
    return {"dtype": dtype, "similarity_moved": moved, "other_answers": other, "texts": len(sims[0])}


# --- a run ------------------------------------------------------------------------------------------------------------
def measure(run: Run, plan: Plan, folder: Path) -> None:
    """Measure everything a plan names."""
    device, threads = run.result["device"], run.result["threads"]
    features = folder / "fp16"
    start = time.perf_counter()
    write_store(features, plan.share)
    size = sum(path.stat().st_size for path in features.iterdir())
    store = FeatureStore(features)
    about = {"videos": store.about.video.items, "captions": store.about.text.items, "mb": size / harness.MB}
    run.row("store", {**about, "seconds": time.perf_counter() - start}, f"{about['mb']:.0f} MB written")
    for precision in plan.precisions:
        for temporal in ("seqTransf", None):
            for batch in plan.batches:
                row = step_row(features, batch, precision, temporal, plan.rounds, device)
                parts = "  ".join(f"{name} {row['ms'][name]['median']:.3g} ms" for name in row["ms"])
                run.row("time", row, f"{precision} {temporal} batch {batch}: {parts}")
    for batch in plan.batches:
        jobs = [("ours", 0), ("dense", 0), *[("ours", 256)] * (batch == plan.shared)]
        for form, chunk in jobs:
            job = {"batch": batch, "precision": plan.precisions[0], "chunk": chunk, "form": form}
            found = harness.measure_apart(
                "bench_features:memory_of_step", features=str(features), device=device, threads=threads, **job
            )
            shown = f"{found['mb']:.0f} MB" if found["status"] == "ok" else found["status"]
            run.row("memory", {**job, **found}, f"{form} batch {batch} chunk {chunk}: {shown}")
    for precision in plan.precisions:
        row = shared_row(features, plan, precision, device)
        found = row["results"]["four"]["ratio"]["median"]
        run.row("shared", row, f"{precision}, four captions a video: {found:.2f} of random order")
    for name, row in loss_rows(plan, device).items():
        last = list(row["results"])[-1]
        run.row(name, row, f"{last}: {row['results'][last]['ratio']['median']:.2f}")
    row = end_to_end_row(features, plan, device)
    run.row("pair", row, f"end to end: {row['results']['end_to_end']['ratio']['median']:.0f} times a pair on features")
    small = max(plan.share, SMALLEST)
    for dtype in ("fp32", "fp16", "bf16"):
        write_store(folder / f"small_{dtype}", small, dtype)
        if dtype != "fp32":
            row = rounding_row(folder / f"small_{dtype}", plan, dtype, folder / "small_fp32")
            run.row("rounding", row, f"{dtype}: similarities moved by {row['similarity_moved']:.1e}")


def main() -> None:
    options = harness.parser(__doc__).parse_args()
    plan = PLANS[options.size]
    settings = dataclasses.asdict(plan)
    run = Run("features", options, settings.pop("minutes"), **settings)
    folder = Path(tempfile.mkdtemp(prefix="drl_fast_features_"))
    try:
        measure(run, plan, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    present(run)


if __name__ == "__main__":
    main()
