"""Options in signatures, masking in layer and losses, and weights copied from another model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import open_clip
import pytest
import torch

from drl_fast import DRL, functional
from drl_fast.model.clip import build_clip, clip_from_state_dict
from drl_fast.model.config import Config
from drl_fast.model.small import small_model

pytestmark = pytest.mark.usefixtures("one_thread")
# Defaults of from_upstream: options inferred from the checkpoint, and the public code's padding rule.
INFERRED = {"interaction": "auto", "temporal": "auto", "wti_arch": None, "cdcr_padding": "competes"}


@pytest.mark.parametrize("build", [DRL.__init__, DRL.from_clip_state_dict, DRL.from_upstream])
def test_signatures_spell_every_option_out(build: Callable[..., object]) -> None:
    parameters = inspect.signature(build).parameters
    assert not [p for p in parameters.values() if p.kind is p.VAR_KEYWORD]
    defaults = {f.name: f.default for f in fields(Config)}
    if build == DRL.from_upstream:
        defaults |= INFERRED
    assert {name: parameters[name].default for name in defaults} == defaults
    # Options are passed on to Config by position.
    assert [name for name in parameters if name in defaults] == [f.name for f in fields(Config)]


def openai_clip() -> open_clip.CLIP:
    """Build a CLIP of OpenAI's form: heads of width 64, QuickGELU."""
    torch.manual_seed(3)
    return clip_from_state_dict(build_clip("drl-small").state_dict())


@pytest.mark.parametrize("interaction", ["ti", "wti"])
@pytest.mark.parametrize("masking", ["drl", "exclude", "none"])
def test_masking_reaches_layer_and_loss(interaction: str, masking: str) -> None:
    model, _ = small_model(32, 16, seed=0, interaction=interaction, masking=masking)
    # Opposite directions, also in padding: all similarities are negative, so the three rules give different scores.
    text, video = torch.rand(3, 4, model.dim), -torch.rand(3, 5, model.dim)
    text_mask, video_mask = torch.rand(3, 4) < 0.7, torch.rand(3, 5) < 0.7
    text_mask[:, 0] = video_mask[:, 0] = True
    with torch.no_grad():
        found = model.similarity(text, video, text_mask, video_mask)
        loss = model.losses(text, video, text_mask, video_mask)["info_nce"]
        weights = (None, None)
        if interaction == "wti":
            weights = model.interaction.weights(text, video, text_mask, video_mask)
        wanted = {
            rule: functional.token_interaction(text, video, *weights, text_mask, video_mask, masking=rule)
            for rule in ("drl", "exclude", "none")
        }
    torch.testing.assert_close(found, wanted[masking])
    assert all((found - x).abs().max() > 1e-3 for rule, x in wanted.items() if rule != masking)
    torch.testing.assert_close(loss, functional.info_nce(wanted[masking], model.logit_scale))


def test_masking_is_saved(tmp_path: Path) -> None:
    DRL(openai_clip(), interaction="ti", temporal=None, masking="exclude").save_pretrained(tmp_path)
    again = DRL.from_pretrained(tmp_path)
    assert again.config.masking == again.interaction.masking == "exclude"


@pytest.mark.parametrize("named", [True, False])
def test_picture_statistics_are_saved(named: bool, tmp_path: Path) -> None:
    """Some tags, such as ViT-L-14's laion2b_s32b_b82k, have other statistics. A wrong mean would change every score."""
    model = DRL("drl-small" if named else openai_clip(), interaction="dp", temporal=None)
    model.mean.fill_(0.25)
    model.std.fill_(0.125)
    model.save_pretrained(tmp_path)
    again = DRL.from_pretrained(tmp_path)
    assert torch.equal(again.mean, model.mean)
    assert torch.equal(again.std, model.std)


def test_a_tag_without_its_weights_has_its_activation_and_statistics() -> None:
    clip = build_clip("ViT-B-32", "openai", load_weights=False)
    assert {type(block.mlp.gelu).__name__ for block in clip.transformer.resblocks} == {"QuickGELU"}
    tag = open_clip.get_pretrained_cfg("ViT-B-16", "laion2b_s34b_b88k")
    clip = build_clip("ViT-B-16", "laion2b_s34b_b88k", load_weights=False)
    assert {type(block.mlp.gelu).__name__ for block in clip.transformer.resblocks} == {"GELU"}
    assert tuple(open_clip.get_model_preprocess_cfg(clip)["mean"]) == tuple(tag["mean"])


# Weights of another model ------------------------------------------------------------------------------------------


def source(folder: Path, kind: str, **options: object) -> tuple[DRL, Path]:
    model = DRL(openai_clip(), **options)
    for x in model.parameters():
        x.data += 0.01
    if kind == "public":
        torch.save({f"module.{name}": x for name, x in model.to_upstream().items()}, folder / "public.bin")
        return model, folder / "public.bin"
    model.save_pretrained(folder / ("run/best" if kind == "run" else "model"))
    return model, folder / ("run" if kind == "run" else "model")


@pytest.mark.parametrize("kind", ["run", "folder", "public"])
def test_weights_of_every_kind(kind: str, tmp_path: Path) -> None:
    theirs, path = source(tmp_path, kind, interaction="wti", temporal="seqTransf")
    ours = DRL(openai_clip(), interaction="wti", temporal="seqTransf", cdcr=3, masking="exclude")
    ours.load_weights(path)
    assert all(torch.equal(x, theirs.state_dict()[name]) for name, x in ours.state_dict().items())
    assert (ours.config.cdcr, ours.config.cdcr_padding, ours.config.masking) == (3, "never", "exclude")


def test_a_public_dp_checkpoint_fits_ti(tmp_path: Path) -> None:
    theirs, path = source(tmp_path, "public", interaction="dp", temporal=None)
    ours = DRL(openai_clip(), interaction="ti", temporal=None)
    ours.load_weights(path)
    assert all(torch.equal(x, theirs.state_dict()[name]) for name, x in ours.state_dict().items())


@pytest.mark.parametrize("kind", ["folder", "public"])
def test_another_architecture_is_refused_with_every_difference(kind: str, tmp_path: Path) -> None:
    _, path = source(tmp_path, kind, interaction="wti", temporal=None, wti_arch=1)
    model = DRL(openai_clip(), interaction="wti", temporal="seqLSTM", wti_arch=3)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(ValueError, match="temporal None there and 'seqLSTM' here; wti_arch 1 there and 3 here"):
        model.load_weights(path)
    with pytest.raises(ValueError, match=r"got interaction 'wti' there and 'dp' here$"):
        DRL(openai_clip(), interaction="dp", temporal=None).load_weights(path)
    with pytest.raises(ValueError, match="heads 64 wide there and others here; quick_gelu True there and False here"):
        DRL("drl-small", interaction="wti", temporal=None, wti_arch=1).load_weights(path)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_another_clip_is_refused(tiny_clip: str, tmp_path: Path) -> None:
    DRL("drl-small", interaction="dp", temporal=None).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"got clip 'drl-small' there and '{tiny_clip}' here"):
        DRL(tiny_clip, interaction="dp", temporal=None).load_weights(tmp_path)


def test_a_clip_of_another_size_is_refused(tmp_path: Path) -> None:
    _, path = source(tmp_path, "public", interaction="dp", temporal=None)
    state = {name: x for name, x in torch.load(path).items() if "visual.transformer.resblocks.3." not in name}
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"public.bin must fit the model, got no clip.visual.transformer.resblocks.3"):
        DRL(openai_clip(), interaction="dp", temporal=None).load_weights(path)


def test_missing_or_unreadable_sources(tmp_path: Path) -> None:
    model = DRL(openai_clip(), interaction="dp", temporal=None)
    (tmp_path / "model.bin").write_bytes(b"no checkpoint")
    for name, words in {"gone": "not found: .*gone", "": "found neither", "model.bin": "must hold tensors"}.items():
        with pytest.raises(ValueError, match=words):
            model.load_weights(tmp_path / name)
