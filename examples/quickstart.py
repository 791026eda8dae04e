"""Train a model on a folder of videos with captions and search it, in plain PyTorch.

    python examples/quickstart.py                     # generated clips and a tiny CLIP, one minute on two CPU cores
    python examples/quickstart.py --videos my_videos  # your own folder, which also holds captions.csv (video,caption)

The model is DRL with WTI and CDCR. It starts from random weights; for useful results on your own videos start from
CLIP's, DRL("ViT-B-32", pretrained="openai"), and train longer. `drl-fast train` has the paper's recipe.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import open_clip
import torch
from torch.utils.data import DataLoader

import drl_fast
from drl_fast.data import moving_shapes
from drl_fast.data.datasets import load_split
from drl_fast.data.loading import VideoCaptions, collate
from drl_fast.data.video import Sampling
from drl_fast.engine.evaluate import evaluate

CLIP, WORDS = "drl-small", 32


def generate(folder: Path, count: int) -> None:
    """Write ``count`` clips of moving shapes and their captions; four fifths are for training, the rest for testing."""
    searched = count // 5
    splits = ["train"] * (count - searched) + ["test"] * searched
    moving_shapes.write_folder(moving_shapes.make_clips(count, seed=0), folder, splits)


def run(folder: Path, epochs: int) -> float:
    """Train on the folder's training part, evaluate on its test part, return text-to-video R@1 in percent."""
    torch.manual_seed(0)
    model = drl_fast.DRL(CLIP, temporal="seqTransf", interaction="wti", cdcr=3)
    tokenizer = open_clip.get_tokenizer(CLIP)
    sampling = Sampling(rate=2, max_frames=4, size=64)

    pairs = VideoCaptions(
        load_split("folder", "train", videos=folder, annotations=folder), tokenizer, max_words=WORDS, sampling=sampling
    )
    batch = min(32, len(pairs))
    loader = DataLoader(pairs, batch_size=batch, shuffle=True, drop_last=True, collate_fn=collate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    model.train()
    for epoch in range(epochs):
        for batch, _unreadable in loader:
            losses = model(batch)  # total, info_nce, cdcr
            optimizer.zero_grad()
            losses["total"].backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {losses['total'].item():.3f}")

    test = load_split("folder", "test", videos=folder, annotations=folder)
    found = evaluate(model, test, tokenizer, sampling, max_words=WORDS)
    recall = found.metrics["t2v"]["R1"]
    print(f"text to video R@1 {recall:.1f} % among {len(test.videos)} videos (chance {100 / len(test.videos):.1f} %)")
    best = found.sim[0].topk(min(3, len(test.videos)))
    print(f'"{test.captions[0]}" finds, first to third:')
    for score, column in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        print(f"  {score:.3f}  {test.names[column]}" + "  <- its own" * (column == test.owner[0]))
    return recall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=Path, help="a folder of videos with captions.csv or captions.jsonl")
    parser.add_argument("--clips", type=int, default=400, help="clips to generate without --videos")
    parser.add_argument("--epochs", type=int, default=16)
    arguments = parser.parse_args()
    if arguments.videos:
        run(arguments.videos, arguments.epochs)
        return
    with tempfile.TemporaryDirectory() as name:
        generate(Path(name), arguments.clips)
        run(Path(name), arguments.epochs)


if __name__ == "__main__":
    main()
