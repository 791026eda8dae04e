"""Scoring each text against candidates of its own: time and peak memory of scoring and of a training step.

    python benchmarks/bench_rerank.py [--quick | --full]

16 queries of 12 words, 100 candidates of 12 frames each, 512 channels, both directions, with weights: ``rerank``
against a loop over the queries that calls ``token_interaction``, and against eager PyTorch, one einsum for all. "read"
is one sum over the candidates' features. Writes ``<out>/<machine>/rerank.json``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import drl_fast
import harness
import result_tables
from comparison import gradient_step
from harness import Call, Run
from problems import SEED


@dataclass(frozen=True)
class Reranking:
    """A texts of Nt words, K candidates of Nv frames each, D channels."""

    texts: int = 16
    words: int = 12
    candidates: int = 100
    frames: int = 12
    dim: int = 512

    def label(self) -> str:
        return f"({self.texts}, {self.words}, {self.candidates}, {self.frames})"


@dataclass
class Inputs:
    """Features, weights and the gradient of the scores, drawn from a fixed seed."""

    text: Tensor
    candidates: Tensor
    text_weight: Tensor
    candidate_weight: Tensor
    grad: Tensor

    def leaves(self) -> tuple[Tensor, ...]:
        return self.text, self.candidates, self.text_weight, self.candidate_weight


def draw(shape: Reranking, device: str = "cpu") -> Inputs:
    generator = torch.Generator().manual_seed(SEED)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    a, nt, k, nv, dim = shape.texts, shape.words, shape.candidates, shape.frames, shape.dim
    weights = normal(a, nt).softmax(-1), normal(a, k, nv).softmax(-1)
    drawn = [x.to(device) for x in (normal(a, nt, dim), normal(a, k, nv, dim), *weights, normal(a, k))]
    return Inputs(*(x.requires_grad_() for x in drawn[:4]), drawn[4])


# --- who is measured --------------------------------------------------------------------------------------------------
def loop(text: Tensor, candidates: Tensor, text_weight: Tensor, candidate_weight: Tensor) -> Tensor:
    """Call token_interaction for each text."""
    # By unbind: the backward of candidates[a] would fill the whole gradient with zeros for every text.
    own = zip(text.split(1), candidates.unbind(), text_weight.split(1), candidate_weight.unbind(), strict=True)
    rows = [drl_fast.token_interaction(*sides) for sides in own]
    return torch.cat(rows)


def einsum(text: Tensor, candidates: Tensor, text_weight: Tensor, candidate_weight: Tensor) -> Tensor:
    """Compute all similarities at once, as user code does."""
    words, frames = F.normalize(text, dim=-1), F.normalize(candidates, dim=-1)
    similarity = torch.einsum("atd,akvd->aktv", words, frames)
    by_text = torch.einsum("akt,at->ak", similarity.max(dim=3).values, text_weight)
    by_candidate = torch.einsum("akv,akv->ak", similarity.max(dim=2).values, candidate_weight)
    return (by_text + by_candidate) / 2


FORMS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "rerank": ("`rerank`", drl_fast.rerank),
    "loop": ("`token_interaction` in a loop", loop),
    "eager": ("eager, one einsum", einsum),
}
YARDSTICK = "read"
MODES = ("score", "train")


def make(form: str, mode: str, inputs: Inputs) -> Call:
    """Return a call that scores, or that also computes the gradients of all inputs."""
    function = FORMS[form][1]
    if mode == "train":
        return gradient_step(lambda: function(*inputs.leaves()), inputs.leaves(), inputs.grad)

    def score() -> Tensor:
        with torch.no_grad():
            return function(*inputs.leaves())

    return score


def memory_step(form: str, mode: str, shape: dict[str, int], device: str, threads: int) -> tuple[Call, Call]:
    """Make a tiny call and the measurement of a full one, for :func:`harness.measure_apart`."""
    torch.set_num_threads(threads)
    full = Reranking(**shape)
    call = make(form, mode, draw(full, device))
    warm_up = make(form, mode, draw(replace(full, texts=2, candidates=2), device))

    def measure() -> dict[str, Any]:
        used, method = harness.peak_bytes(call, device)
        return {"mb": used / harness.MB, "method": method}

    return warm_up, measure


# --- plans ------------------------------------------------------------------------------------------------------------
USUAL = Reranking()
SHAPES = {
    "quick": (USUAL,),
    "default": (USUAL, Reranking(texts=1, candidates=1000)),
    "full": (
        USUAL,
        Reranking(texts=1, candidates=1000),
        Reranking(texts=64, words=32),
        Reranking(texts=128, candidates=8),
    ),
}
SECONDS = {"quick": 1.0, "default": 3.0, "full": 6.0}
MINUTES = {"quick": 0.3, "default": 1.0, "full": 4.0}


def measure(run: Run, shapes: tuple[Reranking, ...], seconds: float) -> None:
    """Time the forms side by side, then measure each one's memory in a process of its own."""
    device, threads = run.result["device"], run.result["threads"]
    run.result["contestants"] = {name: {"label": label} for name, (label, _) in FORMS.items()}
    for shape in shapes:
        inputs = draw(shape, device)
        for mode in MODES:
            calls = {YARDSTICK: lambda x=inputs.candidates: x.detach().sum()}
            calls |= {name: make(name, mode, inputs) for name in FORMS}
            for call in calls.values():
                call()
            times = harness.interleave(calls, device, seconds, 5)
            row = {"shape": asdict(shape), "mode": mode, "results": harness.summarize(times, YARDSTICK)}
            row["against"] = {name: harness.ratios(times["rerank"], times[name]) for name in FORMS if name != "rerank"}
            shown = (f"{name} {found['ms']['median']:.3g} ms" for name, found in row["results"].items())
            run.row("time", row, f"{mode:8} {shape.label():24} {'  '.join(shown)}")
        for mode in MODES:
            for name in FORMS:
                job = {"form": name, "mode": mode, "shape": asdict(shape), "device": device, "threads": threads}
                row = {"contestant": name, **job, **harness.measure_apart("bench_rerank:memory_step", **job)}
                run.row("memory", row, f"{name:8} {mode:8} {shape.label():24} {result_tables.megabytes(row)}")


def main() -> None:
    options = harness.parser(__doc__).parse_args()
    run = Run("rerank", options, MINUTES[options.size])
    measure(run, SHAPES[options.size], SECONDS[options.size])
    result_tables.show(run.finish())


if __name__ == "__main__":
    main()
