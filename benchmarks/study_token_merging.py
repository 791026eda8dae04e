"""A study: merge similar tokens inside the image tower. Is it faster, and what does it do to the frame tokens?

    python benchmarks/study_token_merging.py [--quick | --full]

Nothing here is part of the library. Two forms, both without new parameters:

- within frames: each block merges the r most similar pairs of patches of a frame, as ToMe does (arXiv 2210.09461);
- across frames: the first blocks do that, then later blocks join neighbouring frames, so that patches also merge
  across frames, as TempMe does (arXiv 2409.01156).

What differs from TempMe: it trains with LoRA and adds learned frame positions where frames join, and averages the class
tokens to one video vector; here there are no new parameters, and each frame keeps its class token, which becomes the
frame's token. TempMe's published schedule (join 2, 2, 3 frames at blocks 9, 10, 11; merge 30 % there, then 10 %) is
kept.

Measured on ViT-B/32 and ViT-B/16 with random weights: time, peak memory, and how far frame tokens move. Random weights
say nothing about quality, so small towers are trained on generated clips, with and without merging, and searched.
Writes ``<out>/<machine>/token_merging.json``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as image_ops

import harness
from comparison import present
from drl_fast import DRL
from drl_fast.data.moving_shapes import ARRANGEMENTS, SIZE, draw, make_clips
from drl_fast.demo.comparison import CONTEXT, RECIPE, Row, tokenizer
from drl_fast.engine.config import RunConfig
from drl_fast.engine.in_memory import Pairs, train
from drl_fast.model.clip import create_clip
from drl_fast.model.small import HEADS, WIDTH
from harness import Call, Run

# TempMe's shares of merged tokens: where frames join, and after the attention of that block and the later ones.
JOIN_SHARE, LATER_SHARE = 0.3, 0.1
FRAMES = 4  # of a generated clip, in equal steps


@dataclass(frozen=True)
class Merging:
    """What a tower merges.

    Args:
        r: pairs of tokens that each block before the first join merges within a frame.
        joins: block, counted from 0, and how many neighbouring frames it joins.
    """

    r: int = 0
    joins: tuple[tuple[int, int], ...] = ()

    @property
    def label(self) -> str:
        joined = " x ".join(str(count) for _, count in self.joins)
        return f"r = {self.r}" + (f", joins {joined} frames" if joined else "")


# --- merging ----------------------------------------------------------------------------------------------------------
def merge(x: Tensor, size: Tensor | None, key: Tensor, kept: int, pairs: int) -> tuple[Tensor, Tensor | None]:
    """Merge the most similar ``pairs`` of tokens of each row: their average, weighted by ``size``.

    Every second token looks for its most similar partner among the others; the best pairs merge. At most half of the
    tokens can go. Gradients flow through the averages, not through the choice.

    Args:
        x: (N, T, C).
        size: (N, T, 1), how many of the tower's first tokens each one stands for; None: one each.
        key: (N, T, K), compared by cosine.
        kept: tokens at the front that never merge: class tokens.
    """
    pairs = min(pairs, (x.shape[1] - kept) // 2)
    if pairs <= 0:
        return x, size
    with torch.no_grad():
        unit = F.normalize(key[:, kept:], dim=-1)
        best, partner = (unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)).max(dim=2)
        order = best.argsort(dim=1, descending=True)
        gone, stays = order[:, :pairs, None], order[:, pairs:].sort(dim=1).values[..., None]
        target = partner[..., None].gather(1, gone)

    def combine(weighted: Tensor) -> Tensor:
        first, second = weighted[:, kept::2], weighted[:, kept + 1 :: 2]
        wide = (-1, -1, weighted.shape[2])
        second = second.scatter_add(1, target.expand(wide), first.gather(1, gone.expand(wide)))
        return torch.cat([weighted[:, :kept], first.gather(1, stays.expand(wide)), second], dim=1)

    size = torch.ones_like(x[..., :1]) if size is None else size
    total = combine(size)
    return combine(x * size) / total, total


def join(x: Tensor, kept: int, count: int) -> Tensor:
    """Put ``count`` neighbouring rows (N, T, C) into one, class tokens first: (N / count, count T, C)."""
    rows = x.unflatten(0, (-1, count))
    return torch.cat([rows[:, :, :kept].flatten(1, 2), rows[:, :, kept:].flatten(1, 2)], dim=1)


def run_block(block: nn.Module, x: Tensor, size: Tensor | None, kept: int, pairs: int) -> tuple[Tensor, Tensor | None]:
    """Run one residual block of open_clip's, merging between its attention and its MLP."""
    attention = block.attn
    projected = F.linear(block.ln_1(x), attention.in_proj_weight, attention.in_proj_bias)
    # (3, N, heads, T, width of a head)
    query, key, value = projected.unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    # A token that stands for several draws as much attention as they would (ToMe's proportional attention).
    bias = None if size is None else size.log().transpose(1, 2)[:, None]
    seen = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    x = x + block.ls_1(attention.out_proj(seen.transpose(1, 2).flatten(2)))
    x, size = merge(x, size, key.mean(dim=1), kept, pairs)
    return x + block.ls_2(block.mlp(block.ln_2(x))), size


def encode(visual: nn.Module, pictures: Tensor, merging: Merging) -> Tensor:
    """Encode pictures (N, 3, H, W) to (N, D) with an open_clip ViT that reads its class token.

    Neighbouring pictures must be frames of one clip where frames join.
    """
    x = visual._embeds(pictures)
    size, kept, joins = None, 1, dict(merging.joins)
    first = min(joins, default=len(visual.transformer.resblocks))
    for number, block in enumerate(visual.transformer.resblocks):
        pairs = merging.r
        if number in joins:
            x, size = (None if rows is None else join(rows, kept, joins[number]) for rows in (x, size))
            kept *= joins[number]
            x, size = merge(x, size, x, kept, int(JOIN_SHARE * x.shape[1]))
        if number >= first:
            pairs = int(LATER_SHARE * x.shape[1])
        x, size = run_block(block, x, size, kept, pairs)
    return visual.ln_post(x[:, :kept].reshape(len(pictures), -1)) @ visual.proj


@contextmanager
def merged(visual: nn.Module, merging: Merging | None) -> Iterator[None]:
    """Let a tower merge; None: leave it alone."""
    if merging is not None:
        visual.forward = partial(encode, visual, merging=merging)
    try:
        yield
    finally:
        visual.__dict__.pop("forward", None)


# --- what is measured -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Tower:
    """A model of open_clip with random weights, and what it merges; the first form is the tower left alone."""

    name: str
    forms: tuple[Merging | None, ...]


@dataclass(frozen=True)
class Search:
    """Small towers that are trained and then searched."""

    clips: int
    held_out: int
    steps: int
    seeds: tuple[int, ...]
    at_test: tuple[Merging, ...]
    in_training: tuple[Merging, ...]
    patch: int = 16
    layers: int = 4


@dataclass(frozen=True)
class Plan:
    minutes: float
    towers: tuple[Tower, ...]
    search: Search
    clips: int = 1
    frames: int = 12
    rounds: int = 4


PUBLISHED = ((8, 2), (9, 2), (10, 3))
TOWERS = (
    Tower("ViT-B-32", (None, Merging(), Merging(2), Merging(4), Merging(2, PUBLISHED))),
    Tower("ViT-B-16", (None, Merging(), Merging(8), Merging(13), Merging(10, PUBLISHED))),
)
# 16 patches in 4 blocks: r = 3 leaves 4 of them.
WITHIN = tuple(Merging(r) for r in (1, 2, 3))
ACROSS = (Merging(2, ((3, 2),)), Merging(2, ((2, 2), (3, 2))))
SEARCH = Search(1600, 400, 200, (0,), (*WITHIN, *ACROSS), (WITHIN[1], ACROSS[1]))
SMALL = Tower("small", (None, Merging(), WITHIN[1], ACROSS[1]))
PLANS = {
    "quick": Plan(1, (SMALL,), Search(64, 16, 4, (0,), (WITHIN[1], ACROSS[0]), (ACROSS[0],)), rounds=2),
    "default": Plan(25, TOWERS, SEARCH),
    "full": Plan(60, TOWERS, replace(SEARCH, seeds=(0, 1, 2)), rounds=10),
}


def small_clip(patch: int, layers: int, seed: int) -> open_clip.CLIP:
    """Build the demo's towers with smaller patches: an image tower without many tokens has nothing to merge."""
    torch.manual_seed(seed)
    return open_clip.CLIP(
        embed_dim=WIDTH,
        vision_cfg=open_clip.CLIPVisionCfg(
            layers=layers, width=WIDTH, head_width=WIDTH // HEADS, patch_size=patch, image_size=SIZE
        ),
        text_cfg=open_clip.CLIPTextCfg(layers=2, width=WIDTH, heads=HEADS, context_length=CONTEXT),
    )


def build_visual(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "small":
        return small_clip(16, 4, seed=0).visual.eval()
    return create_clip(name).visual.eval()


def frames_of(clip: Any, count: int) -> Tensor:
    """Draw ``count`` frames (count, 3, 64, 64) uint8 of a generated clip, in equal steps."""
    shown = [image_ops.pil_to_tensor(picture) for picture in draw(clip)]
    return torch.stack([shown[int(at)] for at in torch.linspace(0, len(shown) - 1, count)])


def pictures_for(visual: nn.Module, clips: int, frames: int) -> Tensor:
    """Draw frames of generated clips at the tower's size, normalized: (clips frames, 3, H, W)."""
    found = torch.cat([frames_of(clip, frames) for clip in make_clips(4 * -(-clips // 4), seed=0)[:clips]])
    found = image_ops.resize(found, list(visual.image_size), antialias=True)
    mean, std = (torch.tensor(x)[:, None, None] for x in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    return (found / 255 - mean) / std


def forward(visual: nn.Module, pictures: Tensor, merging: Merging | None) -> Tensor:
    return visual(pictures) if merging is None else encode(visual, pictures, merging)


def step(visual: nn.Module, pictures: Tensor, merging: Merging | None) -> None:
    """Run forward and backward."""
    visual.zero_grad(set_to_none=False)  # gradients exist already: memory is measured beyond them
    forward(visual, pictures, merging).square().mean().backward()


def infer(visual: nn.Module, pictures: Tensor, merging: Merging | None) -> None:
    with torch.no_grad():
        forward(visual, pictures, merging)


def label(merging: Merging | None) -> str:
    return "plain" if merging is None else merging.label


def distance(one: Tensor, other: Tensor) -> Tensor:
    """Return 1 - cosine of two tensors' last dimensions, in float64: random weights give cosines near 1."""
    return 1 - F.cosine_similarity(one.double(), other.double(), dim=-1)


def moved(visual: nn.Module, pictures: Tensor, merging: Merging, frames: int) -> dict[str, float]:
    """Return the distance of frame tokens to those without merging, and of neighbouring frames' plain tokens."""
    with torch.no_grad():
        plain, ours = (forward(visual, pictures, form) for form in (None, merging))
    away, clips = distance(plain, ours), plain.unflatten(0, (-1, frames))
    between = distance(clips[:, 1:], clips[:, :-1])
    return {"mean": float(away.mean()), "most": float(away.max()), "neighbours": float(between.mean())}


def memory_of_step(name: str, form: dict[str, Any] | None, clips: int, frames: int, device: str, threads: int) -> Any:
    """Make the measurement of a step's peak memory, for :func:`harness.measure_apart`."""
    torch.set_num_threads(threads)
    merging = None if form is None else Merging(form["r"], tuple(tuple(pair) for pair in form["joins"]))
    visual = build_visual(name).to(device)
    pictures = pictures_for(visual, clips, frames).to(device)
    step(visual, pictures, merging)  # gradients exist before

    def measure() -> dict[str, Any]:
        used, method = harness.peak_bytes(lambda: step(visual, pictures, merging), device)
        return {"mb": used / harness.MB, "method": method}

    return (lambda: None), measure


def measure_tower(run: Run, plan: Plan, tower: Tower) -> None:
    """Measure a tower's forms: time and memory of a step, and how far frame tokens move."""
    device, threads = run.result["device"], run.result["threads"]
    visual = build_visual(tower.name).to(device)
    pictures = pictures_for(visual, plan.clips, plan.frames).to(device)
    found: dict[str, dict[str, Any]] = {}
    for mode, call in (("forward", infer), ("step", step)):
        calls: dict[str, Call] = {label(form): partial(call, visual, pictures, form) for form in tower.forms}
        for warm_up in calls.values():
            warm_up()
        found[mode] = harness.summarize(harness.interleave(calls, device, 0, plan.rounds), "plain")
    for form in tower.forms:
        job = {"name": tower.name, "form": form and asdict(form), "clips": plan.clips, "frames": plan.frames}
        memory = harness.measure_apart("study_token_merging:memory_of_step", **job, device=device, threads=threads)
        row = {"tower": tower.name, "form": label(form), "memory": memory}
        row |= {mode: rows[label(form)] for mode, rows in found.items()}
        if form is not None:
            row["distance"] = moved(visual, pictures, form, plan.frames)
        ratios = "  ".join(f"{mode} {row[mode]['ratio']['median']:.2f}" for mode in found)
        run.row("towers", row, f"{tower.name} {label(form)}: of plain {ratios}")


# --- search with trained towers ---------------------------------------------------------------------------------------
def make_pairs(count: int, held_out: int, seed: int) -> tuple[Pairs, Pairs]:
    """Draw clips and tokenize their captions: for training and held out."""
    clips = make_clips(count + held_out, seed)
    video = torch.stack([frames_of(clip, FRAMES) for clip in clips])
    text = tokenizer()([clip.caption for clip in clips])
    mask = torch.ones(video.shape[:2], dtype=torch.bool)
    return Pairs(video[:count], mask[:count], text[:count]), Pairs(video[count:], mask[count:], text[count:])


@torch.no_grad()
def search(model: DRL, held: Pairs, merging: Merging | None) -> tuple[Row, Tensor]:
    """Score the held-out captions against the held-out clips; return the frames' tokens too."""
    model.eval()
    with merged(model.clip.visual, merging):
        video = torch.cat([model.encode_video(part) for part in held.video.split(64)])
    text, text_mask = model.encode_text(held.text)
    return Row(label(merging), [], model.similarity(text, video, text_mask, held.mask)), video


def train_model(plan: Search, pairs: Pairs, seed: int, merging: Merging | None) -> DRL:
    """Train the towers and WTI from random weights by the demo's recipe; with ``merging``, its tower merges."""
    torch.manual_seed(seed)
    model = DRL(small_clip(plan.patch, plan.layers, seed), interaction="wti", temporal=None)
    config = RunConfig("folder", pretrained=None, temporal=None, seed=seed, interaction="wti", **RECIPE)
    with merged(model.clip.visual, merging):
        for _ in train(model, pairs, config, plan.steps, frames=FRAMES, together=ARRANGEMENTS):
            pass
    return model


def measure_search(run: Run, plan: Search) -> None:
    """Train towers and search the held-out clips with each form of merging."""
    for seed in plan.seeds:
        pairs, held = make_pairs(plan.clips, plan.held_out, seed)
        for trained in (None, *plan.in_training):
            model = train_model(plan, pairs, seed, trained)
            _, plain = search(model, held, None)
            for tested in (None, *plan.at_test) if trained is None else (None, trained):
                found, tokens = search(model, held, tested)
                row = {"seed": seed, "trained": label(trained), "tested": label(tested), "R1": found.recall}
                row |= {"interval": found.intervals["t2v"], "candidates": len(found.sim)}
                row["distance"] = float(distance(plain, tokens).mean())
                said = f"seed {seed}, trained {row['trained']}, tested {row['tested']}: R@1 {row['R1']:.1f}"
                run.row("search", row, said)


def main() -> None:
    options = harness.parser(__doc__).parse_args()
    plan = PLANS[options.size]
    settings = asdict(plan)
    run = Run("token_merging", options, settings.pop("minutes"), **settings)
    measure_search(run, plan.search)
    for tower in plan.towers:
        measure_tower(run, plan, tower)
    present(run)


if __name__ == "__main__":
    main()
