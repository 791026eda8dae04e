"""The two towers against open_clip's encoders, and the effect of masks and lengths."""

from __future__ import annotations

import math

import open_clip
import pytest
import torch
from PIL import Image
from torch import Tensor

from drl_fast import WTI
from drl_fast.model.drl import DRL
from drl_fast.model.small import small_model

SIZE, CONTEXT = 32, 16
pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = [
    "a red cross moves left",
    "cats",
    "dogs",
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen",
]


@pytest.fixture(scope="module")
def small() -> tuple[DRL, open_clip.SimpleTokenizer]:
    model, tokenizer = small_model(SIZE, CONTEXT, seed=0)
    return model.eval(), tokenizer


@pytest.fixture
def model(small: tuple[DRL, open_clip.SimpleTokenizer]) -> DRL:
    return small[0]


@pytest.fixture
def ids(small: tuple[DRL, open_clip.SimpleTokenizer]) -> Tensor:
    return small[1](TEXTS)


@pytest.fixture
def clips() -> tuple[Tensor, Tensor]:
    """Draw three videos of up to four frames; the second has a hole, the third no frame."""
    frames = torch.randint(0, 256, (3, 4, 3, SIZE, SIZE), dtype=torch.uint8)
    return frames, torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)


@torch.no_grad()
def test_end_token_is_open_clips_text_vector(model: DRL, ids: Tensor) -> None:
    tokens, _ = model.encode_text(ids)
    end = tokens[torch.arange(len(ids)), ids.argmax(dim=1)]
    torch.testing.assert_close(end, model.clip.encode_text(ids), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_text_mask_ends_with_the_end_token(model: DRL, ids: Tensor) -> None:
    """Also if a token's id is 0, which is a piece of a word, and if the text was truncated."""
    ids = ids.clone()
    ids[1, 1] = 0
    _, mask = model.encode_text(ids)
    assert mask.dtype == torch.bool
    assert mask.sum(dim=1).tolist() == [7, 3, 3, CONTEXT]
    assert (mask.int().diff(dim=1) <= 0).all()


@torch.no_grad()
def test_short_context_equals_full_context(model: DRL, ids: Tensor) -> None:
    """Attention only looks back, so padding after the end token changes nothing before it."""
    full, full_mask = model.encode_text(ids[:3])
    short, mask = model.encode_text(ids[:3, :7])
    torch.testing.assert_close(short, full[:, :7], rtol=1e-5, atol=1e-5)
    assert torch.equal(mask, full_mask[:, :7])


@torch.no_grad()
def test_frame_token_is_open_clips_image_vector(model: DRL, clips: tuple[Tensor, Tensor]) -> None:
    """From the same picture, preprocessed by open_clip."""
    frames, mask = clips
    tokens = model.encode_video(frames, mask)
    prepare = open_clip.image_transform(SIZE, is_train=False)
    pictures = [prepare(Image.fromarray(frame.permute(1, 2, 0).numpy())) for frame in frames[mask]]
    torch.testing.assert_close(tokens[mask], model.clip.encode_image(torch.stack(pictures)), rtol=1e-4, atol=1e-5)


def test_masked_frames_are_not_computed(model: DRL, clips: tuple[Tensor, Tensor]) -> None:
    frames, mask = clips
    seen: list[int] = []
    hook = model.clip.visual.register_forward_pre_hook(lambda _, arguments: seen.append(len(arguments[0])))
    try:
        tokens = model.encode_video(frames, mask)
    finally:
        hook.remove()
    assert seen == [6]
    assert not tokens[~mask].any()
    assert tokens[mask].any(dim=-1).all()
    other = torch.where(mask[:, :, None, None, None], frames, 255 - frames)
    assert torch.equal(model.encode_video(other, mask), tokens)


@torch.no_grad()
def test_videos_without_a_frame(model: DRL, clips: tuple[Tensor, Tensor]) -> None:
    tokens = model.encode_video(clips[0], torch.zeros(3, 4, dtype=torch.bool))
    assert tokens.shape == (3, 4, 128)
    assert not tokens.any()


def test_gradient_reaches_both_towers_and_the_interaction(clips: tuple[Tensor, Tensor]) -> None:
    model, tokenizer = small_model(SIZE, CONTEXT, seed=1)
    text, text_mask = model.encode_text(tokenizer(TEXTS))
    logits = model.similarity(text, model.encode_video(*clips), text_mask, clips[1])
    assert logits.shape == (4, 3)
    (logits * model.logit_scale).square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # Softmax cancels a constant that is added to all scores.
    assert set(without) <= {f"interaction.{side}_weight_fc.2.bias" for side in ("text", "video")}


@pytest.mark.parametrize(("stored", "served"), [(math.log(50), 50.0), (math.log(100), 100.0), (math.log(1e4), 100.0)])
def test_logit_scale_is_at_most_100(tiny_clip: str, stored: float, served: float) -> None:
    model = DRL(open_clip.create_model(tiny_clip), interaction="ti", temporal=None)
    model.clip.logit_scale.data.fill_(stored)
    assert model.logit_scale.item() == pytest.approx(served, rel=1e-5)


def test_mean_and_std_come_from_the_clip(tiny_clip: str) -> None:
    clip = open_clip.create_model(tiny_clip)
    model = DRL(clip, interaction="ti", temporal=None)
    assert model.mean.flatten().tolist() == pytest.approx(open_clip.OPENAI_DATASET_MEAN)
    own, _, _ = open_clip.create_model_and_transforms(tiny_clip, image_mean=(0.1, 0.2, 0.3), image_std=(0.4, 0.5, 0.6))
    model = DRL(own, interaction="ti", temporal=None)
    assert model.mean.shape == (3, 1, 1)
    assert model.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert model.std.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])
    # They are not in the state dict, so that a checkpoint of either model loads into the other.
    assert not {"mean", "std"} & model.state_dict().keys()


def test_small_model_depends_on_its_seed() -> None:
    one, two, other = (small_model(SIZE, CONTEXT, seed)[0].state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not torch.equal(one["clip.text_projection"], other["clip.text_projection"])
    assert isinstance(small_model(SIZE, CONTEXT, 3)[0].interaction, WTI)


@pytest.mark.parametrize("stored", [math.log(100), 4.7])
def test_the_temperature_can_leave_its_limit(tiny_clip: str, stored: float) -> None:
    """CLIP's weights start at the limit, where a clamp would have no gradient."""
    model = DRL(open_clip.create_model(tiny_clip), temporal=None)
    model.clip.logit_scale.data.fill_(stored)
    (gradient,) = torch.autograd.grad(model.logit_scale, model.clip.logit_scale)
    assert gradient.item() == pytest.approx(100, rel=1e-5)
    model.limit_logit_scale()
    assert model.clip.logit_scale.item() == pytest.approx(math.log(100), rel=1e-6)
