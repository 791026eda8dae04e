"""A head on tokens of any encoders: projections, losses of shared videos, and what DRL has in common with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import drl_fast
from drl_fast.model.head import Head

pytestmark = pytest.mark.usefixtures("one_thread")
MMS = "mean_maxsim"
ROWS: dict[str, dict[str, Any]] = {
    "dp": {"interaction": "dp", "cdcr": 1},
    "hi": {"interaction": "hi"},
    "mlp": {"interaction": "mlp"},
    "xti": {"interaction": "xti"},
    "ti": {"interaction": "ti", "cdcr": 2},
    "wti": {"interaction": "wti", "cdcr": 3, "cdcr_alpha_off": 0.1},
    MMS: {"interaction": "mean_maxsim", "query_expansion": True, "loss": "sigmoid"},
    "wti, sigmoid": {"interaction": "wti", "loss": "sigmoid"},
    "ti, exclude": {"interaction": "ti", "masking": "exclude"},
}
CAPTIONS, VIDEOS, WORDS, FRAMES = 7, 4, 6, 5


def tokens(rows: int, length: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, length, generator=generator) < 0.7
    mask[:, 0] = True
    return torch.randn(rows, length, width, dtype=torch.float64, generator=generator), mask


def batch_of(text_dim: int = 64, video_dim: int = 64) -> dict[str, Tensor]:
    text, text_mask = tokens(CAPTIONS, WORDS, text_dim, 1)
    video, video_mask = tokens(VIDEOS, FRAMES, video_dim, 2)
    return {"text": text, "text_mask": text_mask, "video": video, "video_mask": video_mask}


def head_of(row: dict[str, Any], **options: Any) -> Head:
    torch.manual_seed(0)
    return Head(64, **{"temporal": None, **row, **options}).double().eval()


VIDEO_OF = torch.tensor([2, 0, 0, 3, 2, 0, 1])


@pytest.mark.parametrize(
    ("temporal", "name"),
    [(temporal, name) for temporal in (None, "seqTransf") for name in ROWS if (temporal, name) != ("seqTransf", MMS)],
)
def test_shared_videos_have_the_losses_and_gradients_of_repeated_ones(name: str, temporal: str | None) -> None:
    shared, repeated = head_of(ROWS[name], temporal=temporal), head_of(ROWS[name], temporal=temporal)
    batch = batch_of()
    found = shared({**batch, "video_of": VIDEO_OF})
    for key in ("video", "video_mask"):
        batch[key] = batch[key][VIDEO_OF]
    expected = repeated({**batch, "owner": VIDEO_OF})
    assert found.keys() == expected.keys()
    for key, loss in expected.items():
        torch.testing.assert_close(found[key], loss, rtol=1e-9, atol=1e-11)
    found["total"].backward()
    expected["total"].backward()
    for (key, p), q in zip(shared.named_parameters(), repeated.parameters(), strict=True):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}")


def test_a_caption_for_every_video_is_the_usual_loss() -> None:
    head, batch = head_of(ROWS["wti"]), batch_of()
    batch = {key: x[:VIDEOS] for key, x in batch.items()}
    usual, shared = head(batch), head({**batch, "video_of": torch.arange(VIDEOS)})
    for key, loss in usual.items():
        torch.testing.assert_close(shared[key], loss, rtol=1e-9, atol=1e-11)


def test_captions_of_a_single_video_have_no_negatives() -> None:
    head, batch = head_of(ROWS["dp"], cdcr=0), batch_of()
    batch = {key: x[:1] if "video" in key else x for key, x in batch.items()}
    losses = head({**batch, "video_of": torch.zeros(CAPTIONS, dtype=torch.int64)})
    losses["total"].backward()
    torch.testing.assert_close(losses["info_nce"].detach(), torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-9)
    assert bool(head.log_scale.grad.isfinite())


def test_projections_exist_where_widths_differ() -> None:
    assert head_of(ROWS["wti"]).text_projection is None
    head = Head(64, 96, dim=32, temporal="seqTransf").double()
    assert {name: tuple(p.shape) for name, p in head.named_parameters() if "projection" in name} == {
        "text_projection.weight": (32, 64),
        "video_projection.weight": (32, 96),
    }
    losses = head({**batch_of(64, 96), "video_of": VIDEO_OF})
    losses["total"].backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in head.parameters())
    assert float(head.logit_scale.detach()) == pytest.approx(1 / 0.07)
    assert Head(64, 96).dim == 64
    assert Head(64, 96).text_projection is None


def test_what_stands_at_masked_positions_does_not_matter() -> None:
    head = Head(64, 64, dim=32, temporal="seqTransf").double()
    batch = {**batch_of(), "video_of": VIDEO_OF}
    head(batch)["total"].backward()
    expected = [p.grad.clone() for p in head.parameters()]
    head.zero_grad()
    for name in ("text", "video"):
        batch[name] = batch[name].masked_fill(~batch[f"{name}_mask"][..., None], torch.nan)
    head(batch)["total"].backward()
    for p, gradient in zip(head.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=0, atol=0)


def test_a_head_on_clips_tokens_is_the_drl() -> None:
    """What a DRL computes behind its towers, a head of the same weights computes from its tokens."""
    torch.manual_seed(0)
    model = drl_fast.DRL("drl-small", interaction="wti", temporal="seqTransf", cdcr=3).eval()
    head = Head(model.dim, interaction="wti", temporal="seqTransf", cdcr=3, max_positions=77).eval()
    shared = {name: x for name, x in model.state_dict().items() if name.startswith(("temporal.", "interaction."))}
    head.load_state_dict({**shared, "log_scale": model.clip.logit_scale.detach()})
    ids = torch.zeros(3, 8, dtype=torch.int64)
    ids[:, :4] = torch.tensor([49406, 320, 1929, 49407])
    frames = torch.randint(0, 256, (3, 4, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        text, text_mask = model.encode_text(ids)
        features = model.frame_features(frames.flatten(0, 1)).view(3, 4, -1)
        expected = model({"text_ids": ids, "video": frames})
        found = head({"text": text, "text_mask": text_mask, "video": features})
    for key, loss in expected.items():
        torch.testing.assert_close(found[key], loss)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda b: b.pop("text"), ValueError, "batch must hold 'text', got 'text_mask', "),
        (lambda b: b.update(video=torch.zeros(VIDEOS, FRAMES, 8)), ValueError, "video must have 64 channels, .* got 8"),
        (lambda b: b.update(video_of=VIDEO_OF[:3]), ValueError, r"video_of must be \(A,\) = \(7,\) to match text"),
        (lambda b: b.update(video_of=VIDEO_OF + 1), ValueError, "video_of must lie in 0..3, .* got 1..4"),
        (lambda b: b.update(video_of=VIDEO_OF.float()), TypeError, "video_of must be integers"),
        (lambda b: b.update(owner=VIDEO_OF), ValueError, "owner must be None with video_of"),
        (
            lambda b: b.update(text=b["text"][:0], text_mask=b["text_mask"][:0], video_of=VIDEO_OF[:0]),
            ValueError,
            "at least one",
        ),
    ],
)
def test_bad_batches(change: Any, error: type[Exception], words: str) -> None:
    batch = {**batch_of(), "video_of": VIDEO_OF}
    change(batch)
    with pytest.raises(error, match=words):
        head_of(ROWS["ti"], cdcr=0)(batch)


def test_which_side_trains(tiny_clip: str) -> None:
    assert [Head(64, temporal=None).trains(side) for side in ("text", "video")] == [False, False]
    assert [Head(64).trains(side) for side in ("text", "video")] == [False, True]
    assert [Head(32, 64, temporal=None).trains(side) for side in ("text", "video")] == [False, True]
    assert [Head(32, 64, 64, temporal=None).trains(side) for side in ("text", "video")] == [True, False]
    model = drl_fast.DRL(tiny_clip, temporal=None)
    assert [model.trains(side) for side in ("text", "video")] == [True, True]
    model.clip.requires_grad_(False)
    model.clip.logit_scale.requires_grad_(True)
    assert [model.trains(side) for side in ("text", "video")] == [False, False]
    model.clip.visual.requires_grad_(True)
    assert [model.trains(side) for side in ("text", "video")] == [False, True]


def test_soft_pooling_has_no_matches() -> None:
    head = drl_fast.Head(4, interaction="wti", temporal=None, pooling="softmax")
    x = torch.randn(2, 3, 4)
    with pytest.raises(ValueError, match="return_matches must be False with pooling='softmax'"):
        head.similarity(x, x, return_matches=True)
