"""Evaluation of a split: equal to a plain computation, with the same bits for all chunks, caches and blocks."""

from __future__ import annotations

import copy
import dataclasses
import shutil
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from drl_fast.data.feature_cache import FeatureCache
from drl_fast.data.split import Split
from drl_fast.data.video import Sampling, read_video
from drl_fast.engine import features
from drl_fast.engine.evaluate import Evaluation, evaluate
from drl_fast.metrics import retrieval_metrics
from drl_fast.model.drl import DRL
from tests.clips import cut
from tests.engine.eval_problem import SAMPLING, WORDS, make_model, make_split, plain, tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    return make_split(tmp_path_factory.mktemp("videos"))


@pytest.fixture
def little_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make chunks so small that ten videos need several, the last one not full."""
    monkeypatch.setattr(features, "TEXTS", 4)
    monkeypatch.setattr(features, "VIDEOS", 3)


def run(model: DRL, split: Split, **options: Any) -> Evaluation:
    return evaluate(model, split, tokenizer(), SAMPLING, max_words=WORDS, **options)


def leave_out(split: Split, *numbers: int) -> Split:
    """Return the split without some videos and their captions."""
    kept = [i for i in range(len(split.videos)) if i not in numbers]
    pairs = [(text, kept.index(i)) for text, i in zip(split.captions, split.owner, strict=True) if i in kept]
    return dataclasses.replace(
        split,
        captions=tuple(text for text, _ in pairs),
        owner=tuple(i for _, i in pairs),
        videos=tuple(split.videos[i] for i in kept),
        names=tuple(split.names[i] for i in kept),
    )


def spoil(split: Split, folder: Path, *numbers: int) -> Split:
    """Copy the videos to another folder and truncate some of them."""
    videos = [Path(shutil.copy(video, folder)) for video in split.videos]
    for number in numbers:
        cut(videos[number], 0.5)
    return dataclasses.replace(split, videos=tuple(videos))


@pytest.mark.usefixtures("little_chunks")
@pytest.mark.parametrize(
    "options",
    [
        {"interaction": "wti", "temporal": "seqTransf"},
        {"interaction": "wti", "temporal": None, "wti_arch": 1},
        {"interaction": "ti", "temporal": "seqLSTM"},
        {"interaction": "dp", "temporal": "seqTransf"},
        {"interaction": "hi", "temporal": None},
        {"interaction": "mlp", "temporal": None},
        {"interaction": "xti", "temporal": "seqTransf"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_against_everything_at_once(split: Split, options: dict[str, Any]) -> None:
    model = make_model(**options)
    found = run(model, split, block=5)
    truth = plain(model, split)
    assert found.sim.dtype == torch.float32
    assert not found.sim.requires_grad
    torch.testing.assert_close(found.sim.double(), truth, rtol=0, atol=2e-6)
    assert truth.std() > 1e-4, "the test needs scores that differ"
    assert found.owner.tolist() == list(split.owner)
    assert found.metrics == retrieval_metrics(truth, torch.tensor(split.owner))
    assert found.unreadable == []


@pytest.mark.parametrize("interaction", ["wti", "ti"])
def test_blocks_change_no_bit(split: Split, interaction: str) -> None:
    model = make_model(interaction=interaction)
    whole = run(model, split, block=1000).sim
    assert all(torch.equal(run(model, split, block=block).sim, whole) for block in (1, 3, 7))


def test_token_weights_are_computed_once(split: Split) -> None:
    """Matrix products may round differently for other numbers of rows, so blocks must not compute weights."""
    model, seen = make_model(), {"text": 0, "video": 0}

    def count(side: str) -> Callable[..., None]:
        return lambda head, inputs, output: seen.update({side: seen[side] + len(output)})

    model.interaction.text_weight_fc.register_forward_hook(count("text"))
    model.interaction.video_weight_fc.register_forward_hook(count("video"))
    run(model, split, block=2)
    # Plus one of each in the check before decoding.
    assert seen == {"text": 1 + len(split.captions), "video": 1 + len(split.videos)}


def test_a_cache_changes_no_bit_and_decodes_nothing(
    split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []
    loader = features.video_loader

    def counting(paths: Sequence[Path], *arguments: Any, **options: Any) -> Iterator[Any]:
        asked.extend(paths)
        return iter(loader(paths, *arguments, **options))

    monkeypatch.setattr(features, "video_loader", counting)
    model, cache = make_model(), FeatureCache(tmp_path / "cache")
    without = run(model, split).sim
    asked.clear()
    run(model, leave_out(split, 2, 3, 7), cache=cache)
    assert len(asked) == len(split.videos) - 3
    asked.clear()
    part = run(model, split, cache=cache).sim
    assert asked == [split.videos[i] for i in (2, 3, 7)]
    asked.clear()
    full = run(model, split, cache=cache).sim
    assert asked == []
    assert torch.equal(part, without)
    assert torch.equal(full, without)
    run(model, split, cache=cache, precision="bf16")  # other features
    assert asked == list(split.videos)
    asked.clear()
    model.clip.visual.conv1.weight.data[0, 0, 0, 0] += 1
    run(model, split, cache=cache)
    assert asked == list(split.videos)


def test_fingerprint_is_of_the_image_tower_alone() -> None:
    model = make_model()
    same = features.fingerprint(model)
    model.clip.token_embedding.weight.data += 1
    model.interaction.text_weight_fc[0].weight.data += 1
    assert features.fingerprint(model) == same == features.fingerprint(make_model(interaction="dp", temporal=None))
    for change in ("mean", "clip.visual.proj", "clip.visual.ln_post.bias", "clip.visual.class_embedding"):
        other = copy.deepcopy(model)
        (other.get_buffer if change == "mean" else other.get_parameter)(change).data.view(-1)[-1] += 1e-6
        assert features.fingerprint(other) != same, change
    model.clip.visual.transformer.resblocks[0].attn.num_heads = 4
    assert features.fingerprint(model) != same


@pytest.mark.parametrize("cached", [False, True])
def test_unreadable_videos_leave_with_their_captions(split: Split, tmp_path: Path, cached: bool) -> None:
    model = make_model()
    spoiled = spoil(split, tmp_path, 0, 4)
    spoiled.videos[7].unlink()
    found = run(model, spoiled, cache=FeatureCache(tmp_path / "cache") if cached else None)
    clean = run(model, leave_out(split, 0, 4, 7))
    assert [video.name for video in found.unreadable] == [split.names[i] for i in (0, 4, 7)]
    assert all("must be" in video.reason for video in found.unreadable)
    assert torch.equal(found.sim, clean.sim)
    assert torch.equal(found.owner, clean.owner)
    assert found.metrics == clean.metrics


def test_strict_and_nothing_readable(split: Split, tmp_path: Path) -> None:
    model = make_model()
    for folder in ("one", "all"):
        (tmp_path / folder).mkdir()
    one = spoil(split, tmp_path / "one", 4)
    with pytest.raises(ValueError, match=r"readable videos alone, as strict asks, got 1 unreadable of 10: clip\[4\]"):
        run(model, one, strict=True)
    with pytest.raises(ValueError, match=r"at least one readable video, got 10 unreadable of 10: .*; and 5 more$"):
        run(model, spoil(split, tmp_path / "all", *range(10)))


def test_every_module_gets_its_mode_back(split: Split) -> None:
    model = make_model(interaction="xti").train()  # with dropout
    model.clip.visual.eval()
    before = [module.training for module in model.modules()]
    sim = run(model, split).sim
    assert [module.training for module in model.modules()] == before
    assert torch.equal(run(model.eval(), split).sim, sim)
    model.train()
    with pytest.raises(ValueError):
        run(model, split, block=0)
    with pytest.raises(RuntimeError):
        evaluate(model, split, broken, SAMPLING, max_words=WORDS)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("options", "sampling", "words", "message"),
    [
        ({}, dataclasses.replace(SAMPLING, size=64), WORDS, r"frames must be \(B, Nv, 3, 32, 32\)"),
        ({"temporal": "seqTransf"}, dataclasses.replace(SAMPLING, max_frames=17), WORDS, "at most 16 frames"),
        ({"temporal": None, "interaction": "xti"}, dataclasses.replace(SAMPLING, max_frames=16), WORDS, "at most 15"),
        ({}, SAMPLING, 2, "max_words must be at least 3"),
    ],
)
def test_bad_sizes_fail_before_a_video_is_decoded(
    split: Split, monkeypatch: pytest.MonkeyPatch, options: dict, sampling: Sampling, words: int, message: str
) -> None:
    monkeypatch.setattr(features, "video_loader", broken)
    with pytest.raises(ValueError, match=message):
        evaluate(make_model(**options), split, tokenizer(), sampling, max_words=words)


def broken(*_: object, **__: object) -> Tensor:
    raise RuntimeError("no tokenizer")


def test_bf16_is_near(split: Split) -> None:
    model = make_model()
    exact, near = run(model, split).sim, run(model, split, precision="bf16").sim
    assert near.dtype == torch.float32
    assert not torch.equal(near, exact)
    torch.testing.assert_close(near, exact, rtol=0, atol=2e-2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(model, split).sim, exact), "the caller's autocast must have no effect"


def test_frames_are_freed_after_encoding(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = features.video_loader
    alive: list[weakref.ref] = []
    most = 0

    def watching(*arguments: Any, **options: Any) -> Iterator[Any]:
        nonlocal most
        for frames in loader(*arguments, **options):
            alive.append(weakref.ref(frames))
            most = max(most, sum(frames() is not None for frames in alive))
            yield frames

    monkeypatch.setattr(features, "video_loader", watching)
    run(make_model(), split)
    assert len(alive) == len(split.videos)
    assert most <= 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("interaction", ["wti", "dp", "xti"])
def test_cuda(split: Split, interaction: str) -> None:
    model = make_model(interaction=interaction).cuda()
    found = run(model, split, block=5)
    assert found.sim.device.type == "cpu"
    torch.testing.assert_close(found.sim.double(), plain(model.cpu(), split), rtol=0, atol=1e-3)
    assert torch.equal(run(model.cuda(), split, block=5).sim, found.sim)


def test_progress(split: Split) -> None:
    calls: list[tuple[str, int, int]] = []
    run(make_model(), split, block=8, on_progress=lambda *call: calls.append(call))
    assert calls == [
        *(("videos", done, 10) for done in (0, 4, 8, 10)),
        *(("texts", done, 19) for done in (0, 19)),
        *(("scores", done, 19) for done in (0, 8, 16, 19)),
    ]


def test_captions_are_truncated_to_the_context(split: Split) -> None:
    long = dataclasses.replace(split, captions=tuple(text + " more" * 30 for text in split.captions))
    sims = [evaluate(make_model(), long, tokenizer(), SAMPLING, max_words=words).sim for words in (16, 99)]
    assert torch.equal(*sims)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"captions": (), "owner": ()}, {}, "at least one caption, got none of folder, test"),
        (
            {"captions": ("a",), "owner": (1,)},
            {},
            r"a caption for every video, got none for clip\[0\].mp4 \(9 in all\)",
        ),
        ({}, {"block": 0}, "block must be"),
        ({}, {"precision": "fp16"}, "precision must be one of 'bf16', 'fp32', got 'fp16'"),
        ({}, {"process_group": "world"}, "process_group must be a torch.distributed.ProcessGroup, got str"),
    ],
)
def test_errors(split: Split, change: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        run(make_model(), dataclasses.replace(split, **change), **options)


@pytest.mark.usefixtures("little_chunks")
@pytest.mark.parametrize("interaction", ["wti", "dp"])
def test_decoded_frames_give_the_files_bits(split: Split, monkeypatch: pytest.MonkeyPatch, interaction: str) -> None:
    model = make_model(interaction=interaction)
    expected = run(model, split)
    frames = [pictures[real] for pictures, real in (read_video(path, SAMPLING) for path in split.videos)]
    monkeypatch.setattr(features, "video_loader", broken)
    model.train()
    found = run(model, split, decoded=frames)
    assert torch.equal(found.sim, expected.sim)
    assert found.metrics == expected.metrics
    assert not found.sim.requires_grad
    assert model.training


@pytest.mark.usefixtures("little_chunks")
def test_chunks_keep_the_order(split: Split) -> None:
    model = make_model(interaction="dp")
    found = run(model, split).sim
    for chunk in (1, 1000):
        features.TEXTS = features.VIDEOS = chunk  # little_chunks restores them
        torch.testing.assert_close(run(model, split).sim, found, rtol=1e-5, atol=1e-5)
