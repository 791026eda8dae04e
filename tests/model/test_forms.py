"""Every form of open_clip's models: the sentence token is its own text vector, the frame token its image vector."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from drl_fast.data.loading import count_cut, tokenize
from drl_fast.engine.encode import head_start
from drl_fast.model import pretrained, towers
from drl_fast.model.clip import build_clip, load_tokenizer
from drl_fast.model.drl import DRL
from drl_fast.model.words import words_of

from . import forms

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")
LENGTHS = (4, 9, forms.CONTEXT, 12, 3)
END = forms.VOCABULARY - 1
# Forms whose sentence token is no token of the caption, but stands behind it.
BEHIND = {"siglip", "clipa", "coca", "roberta", "mt5"}
# Forms whose sentence token stands first in the caption.
FIRST = {"first", "bert", "nllb"}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    forms.hugging_face_configs(folder)
    return folder


def build(form: str, hub: Path) -> Any:
    config = copy.deepcopy(forms.FORMS[form])
    text = config["text_cfg"]
    if "hf_model_name" in text:
        text |= {"hf_model_name": str(hub / text["hf_model_name"]), "hf_model_pretrained": False}
    custom = config.pop("custom_text", False)
    kind = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP if custom else open_clip.CLIP
    torch.manual_seed(0)
    return kind(**config)


@pytest.fixture(scope="module", params=forms.FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(form: str, hub: Path) -> DRL:
    return DRL(build(form, hub)).eval()


def captions(model: DRL, context: int = forms.CONTEXT) -> Tensor:
    """Return ids (5, context): rows of several lengths, one of them full, that end in the largest id."""
    torch.manual_seed(1)
    ids = torch.randint(3, END, (len(LENGTHS), context))
    for row, length in enumerate(LENGTHS):
        ids[row, min(length, context) - 1] = END
        ids[row, length:] = towers.pad_id(model.clip)
    return ids


def sentences(model: DRL, ids: Tensor) -> Tensor:
    tokens, mask = model.encode_text(ids)
    assert tokens.shape == (len(ids), min(ids.shape[1], towers.context(model.clip)), model.dim)
    assert not tokens[~mask].any()
    last = (mask * torch.arange(tokens.shape[1])).argmax(1)
    return tokens[torch.arange(len(ids)), last]


def own_vectors(model: DRL, ids: Tensor) -> Tensor:
    found = model.clip.encode_text(ids)
    return found[0] if isinstance(found, tuple) else found


@torch.no_grad()
def test_the_sentence_token_is_the_models_own_text_vector(model: DRL) -> None:
    ids = captions(model)
    torch.testing.assert_close(sentences(model, ids), own_vectors(model, ids), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_rows_shorter_than_the_context(model: DRL) -> None:
    """They are what the model gives for the same captions in rows as long as its context."""
    ids, fit = captions(model), [row for row, length in enumerate(LENGTHS) if length <= 12]
    torch.testing.assert_close(sentences(model, ids[fit, :12]), own_vectors(model, ids)[fit], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_words_are_the_last_hidden_states(model: DRL, form: str) -> None:
    ids = captions(model)
    tower = towers.text_tower(model.clip)
    if isinstance(tower, open_clip.CLIP | open_clip.transformer.TextTransformer):
        owner = model.clip if isinstance(tower, open_clip.CLIP) else tower
        extra = {"intermediates_only": True, "normalize_intermediates": True, "text_output_fmt": "NLC"}
        if owner is not model.clip:
            extra["output_fmt"] = extra.pop("text_output_fmt")
        states = owner.forward_intermediates(
            text=ids, **{"indices" if owner is not model.clip else "text_indices": 1}, **extra
        )
        hidden = states["text_intermediates"][0]
        projection = tower.text_projection
        words = hidden if projection is None else projection(hidden) if callable(projection) else hidden @ projection
    else:
        real = ids != towers.pad_id(model.clip)
        words = tower.proj(tower.transformer(input_ids=ids, attention_mask=real.long()).last_hidden_state)
    if form == "coca":
        words = F.normalize(words, dim=-1)
    tokens, mask = model.encode_text(ids)
    for row, length in enumerate(LENGTHS):
        expected = words[row, 1:length] if form in FIRST else words[row, :length]
        count = min(len(expected), forms.CONTEXT - 1) if form in BEHIND else len(expected) - (form not in FIRST)
        torch.testing.assert_close(tokens[row, :count], expected[:count], rtol=1e-5, atol=1e-5)
        assert int(mask[row].sum()) == count + 1


@torch.no_grad()
def test_the_frame_token_is_the_models_own_image_vector(model: DRL) -> None:
    frames = torch.randint(0, 256, (2, 3, 3, 32, 32), dtype=torch.uint8)
    pictures = (frames.flatten(0, 1) / 255 - model.mean) / model.std
    tokens = DRL(model.clip, temporal=None, interaction="ti").encode_video(frames)
    torch.testing.assert_close(tokens.flatten(0, 1), model.clip.encode_image(pictures), rtol=1e-5, atol=1e-5)


def test_all_of_both_towers_trains(form: str, hub: Path) -> None:
    """Also from an empty batch of captions every text parameter gets a gradient, of zeros."""
    model = DRL(build(form, hub), interaction="ti", temporal=None)
    batch = {"text_ids": captions(model), "video": torch.randint(0, 256, (5, 2, 3, 32, 32), dtype=torch.uint8)}
    model(batch)["total"].backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained
    # A key's bias changes no attention.
    still = {name for name in trained if not model.get_parameter(name).grad.any()}  # type: ignore[union-attr]
    assert {name for name in still if not name.endswith(("k_proj.bias", "key.bias"))} == set()
    model.zero_grad(set_to_none=True)
    model.encode_text(batch["text_ids"][:0])[0].sum().backward()
    gradients = [p.grad for name, p in model.clip.named_parameters() if p.grad is not None]
    assert gradients
    assert not any(gradient.any() for gradient in gradients)


@torch.no_grad()
def test_long_captions_keep_their_end(model: DRL) -> None:
    """A caption that is longer than the context equals its beginning with the end token."""
    context = towers.context(model.clip)
    ids = captions(model, context + 5)
    ids[2] = ids[2].where(ids[2] != towers.pad_id(model.clip), 5).clamp(max=END - 1)
    ids[2, -1] = END
    with pytest.warns(RuntimeWarning, match=f"1 of 5 captions are longer than the CLIP's context of {context}"):
        long = sentences(model, ids)
    short = ids[:, :context].clone()
    short[2, -1] = END
    torch.testing.assert_close(long, own_vectors(model, short), rtol=1e-5, atol=1e-5)


def test_siglips_own_scale_and_bias_start_the_sigmoid_loss(hub: Path) -> None:
    clip = build("siglip", hub)
    clip.logit_scale.data.fill_(4.76)
    clip.logit_bias.data.fill_(-12.9)
    model = DRL(clip, loss="sigmoid", interaction="ti", temporal=None)
    assert model.logit_bias is not None
    assert float(model.logit_bias) == pytest.approx(-12.9)
    assert float(model.logit_scale) == pytest.approx(np.exp(4.76))
    assert not clip.logit_bias.requires_grad
    assert float(DRL(clip, interaction="ti", temporal=None).logit_scale) == pytest.approx(100)
    assert float(DRL(build("custom", hub), loss="sigmoid").logit_scale) == pytest.approx(10)


def test_modules_outside_the_towers_start_from_blocks_of_clips_form(hub: Path) -> None:
    wide = {**forms.FORMS["siglip"], "embed_dim": 32}
    wide.pop("custom_text")
    model = DRL(open_clip.CustomTextCLIP(**wide))
    assert model.temporal is not None
    own = model.clip.text.transformer.resblocks[1].mlp.c_fc.weight
    assert torch.equal(model.temporal.transformer.resblocks[1].mlp.c_fc.weight, own)
    assert model.temporal.frame_position_embeddings.weight.shape == (77, 32)
    for other in ({"mlp_ratio": 3.0}, {"ls_init_value": 0.1}):
        model = DRL(open_clip.CustomTextCLIP(**{**wide, "text_cfg": {**wide["text_cfg"], **other}}))
        assert model.temporal is not None
        positions = model.temporal.frame_position_embeddings.weight[: forms.CONTEXT]
        assert torch.equal(positions, model.clip.text.positional_embedding)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query_expansion": True, "interaction": "mean_maxsim", "temporal": None}, "query_expansion must be False"),
        ({"cdcr_padding": "competes", "cdcr": 2}, "cdcr_padding must be 'never'"),
    ],
)
def test_options_of_the_original_form(options: dict[str, Any], message: str, hub: Path) -> None:
    with pytest.raises(ValueError, match=f"{message} with this clip, got .*choose a clip such as ViT-B-32"):
        DRL(build("siglip", hub), **options)


@pytest.mark.parametrize(
    ("vision", "text"),
    [(forms.PE_CORE, {"context_length": 32, "vocab_size": 49408}), (forms.EVA, {"vocab_size": 49408})],
    ids=["PE-Core", "EVA"],
)
@torch.no_grad()
def test_pe_core_and_eva_with_their_own_tokenizer(vision: dict[str, Any], text: dict[str, Any], tmp_path: Path) -> None:
    """Their image towers are timm's; their tokenizer is OpenAI's, which comes with open_clip."""
    config = {**forms.CUSTOM, "vision_cfg": vision, "text_cfg": {**forms.TEXT, **text}}
    name = forms.register(tmp_path, f"drl-fast-{vision['timm_model_name']}", config)
    model = DRL(name, interaction="ti", temporal=None).eval()
    size, texts = model.pictures.size, ["a red cross moves left", "cats"]
    words = model.words(32)
    ids = tokenize(model.tokenizer(), texts, words)
    whole = model.tokenizer()(texts)
    torch.testing.assert_close(sentences(model, ids), model.clip.encode_text(whole), rtol=1e-5, atol=1e-5)
    tokens = model.encode_video(torch.zeros(1, 2, 3, size, size, dtype=torch.uint8))
    assert tokens.shape == (1, 2, model.dim)
    model.save_pretrained(tmp_path / "model")
    again = DRL.from_pretrained(tmp_path / "model")
    assert torch.equal(again.encode_text(ids)[0], model.encode_text(ids)[0])


@pytest.fixture(scope="module", params=[0, 1], ids=["SigLIP 2 pads with 0", "SigLIP pads with its end token"])
def siglip(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Register SigLIP's form with a local tokenizer in place of the one on the hub."""
    folder = tmp_path_factory.mktemp("siglip")
    source = str(forms.tokenizer_folder(folder / "tokenizer", padding=request.param))
    text = {
        **forms.FORMS["siglip"]["text_cfg"],
        "hf_tokenizer_name": source,
        "tokenizer_kwargs": {"clean": "canonicalize"},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("drl_fast.model.clip.PAD_IDS", {source: 1} if request.param else {})
        config = {**forms.FORMS["siglip"], "text_cfg": text}
        yield forms.register(folder / "configs", f"drl-fast-siglip-{request.param}", config)


@torch.no_grad()
def test_siglip_with_a_tokenizer(siglip: str) -> None:
    model = DRL(siglip, interaction="ti", temporal=None).eval()
    texts = ["A red square!", "a blue circle moves slowly left and right and up and down and up", "cross"]
    whole = model.tokenizer()(texts)
    assert whole.shape == (3, forms.CONTEXT)
    short = tokenize(model.tokenizer(), texts, 8)
    mask = model.encode_text(short)[1]
    padded = towers.pad_id(model.clip) == 1
    # Words, SigLIP 2's end token, and the sentence token, which in a full row takes the end token's place.
    assert mask.sum(1).tolist() == ([4, 8, 2] if padded else [5, 8, 3])
    kept = [0, 2]
    torch.testing.assert_close(sentences(model, short)[kept], model.clip.encode_text(whole)[kept], rtol=1e-5, atol=1e-5)
    assert count_cut(model.tokenizer(), texts, 8) == 1
    assert (model.pictures.resize, model.pictures.size) == ("shortest", 32)


def test_captions_that_are_cut_are_counted_where_the_end_token_becomes_padding(tmp_path: Path) -> None:
    """CLIPA's tokenizer strips it."""
    source = forms.tokenizer_folder(tmp_path, sep_token="</s>")
    tokenizer = open_clip.tokenizer.HFTokenizer(str(source), strip_sep_token=True)
    assert tokenize(tokenizer, ["a red square"], 4).tolist() == [[3, 4, 7, 0]]
    assert count_cut(tokenizer, ["a red square", "a red square moves", "a", "a red square moves left"], 4) == 2


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_tokenizer_that_pads_in_front_is_refused(side: str, tmp_path: Path) -> None:
    """A row that is shorter than the context would get padding on both sides."""
    source = forms.tokenizer_folder(tmp_path / "tokenizer", padding_side=side)
    text = {**forms.FORMS["siglip"]["text_cfg"], "hf_tokenizer_name": str(source)}
    name = forms.register(tmp_path / "configs", f"drl-fast-{side}", {**forms.FORMS["siglip"], "text_cfg": text})
    if side == "right":
        assert load_tokenizer(name)(["a"])[0, :3].tolist() == [3, 1, 0]
        return
    with pytest.raises(
        ValueError, match=r"the tokenizer of drl-fast-left must fill rows at their end, got .*\[0, 1\];"
    ):
        load_tokenizer(name)


@pytest.mark.parametrize(
    ("names", "words", "two_words"),
    [
        (["▁a", "▁play", "ing", "▁dog", "</s>"], ["a", "play+ing", "dog"], ["▁a", "▁a"]),
        (["skate", "board", "ing", "</s>"], ["skate+board+ing"], ["a", "▁a"]),
        (["skate", "board", "ing", "</s>"], ["skate+board+ing"], ["a", "Ġa"]),
        (["a", "play", "##ing", "dog", "</s>"], ["a", "play+ing", "dog"], ["a", "a"]),
        (["<unk>", "dog", "</s>", "</s>"], ["<unk>", "dog"], ["a", "a"]),
    ],
    ids=["SentencePiece", "one word of SigLIP 2", "one word of RoBERTa", "BERT", "whole words"],
)
def test_words_of_hugging_face_tokens(names: list[str], words: list[str], two_words: list[str], hub: Path) -> None:
    class Inside:
        all_special_ids, unk_token_id = [0, 1, 2], 2

        def tokenize(self, text: str) -> list[str]:
            assert text == "a a"
            return two_words

        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return [table[number] for number in ids]

        def decode(self, ids: list[int]) -> str:
            return "+".join(table[number].strip("▁#") for number in ids)

    class Tokenizer:
        tokenizer = Inside()

    known = {"</s>": 1, "<unk>": 2}
    ids = [known.get(name, 5 + i) for i, name in enumerate(names)]
    table = dict(zip(ids, names, strict=True))
    for form in ("siglip", "roberta"):
        found = words_of(build(form, hub), Tokenizer(), torch.tensor([*ids, 0, 0]))
        assert [word.text for word in found] == words
        assert [place for word in found for place in word.positions] == list(
            range(sum(name != "</s>" for name in names))
        )


def test_preparation_is_that_of_the_models_tags(monkeypatch: pytest.MonkeyPatch, tiny_clip: str) -> None:
    """Weights from a file have no tag; taken with CLIP's preparation they would silently score worse."""
    squash = {"mean": (0.5, 0.5, 0.5), "std": (0.4, 0.4, 0.4), "interpolation": "bilinear", "resize_mode": "squash"}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, tiny_clip, {"one": squash, "two": squash})
    model = DRL(tiny_clip)
    assert model.pictures == (32, "squash", "bilinear")
    assert model.std.flatten().tolist() == pytest.approx([0.4] * 3)
    other = {**squash, "resize_mode": "shortest"}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, tiny_clip, {"one": squash, "two": other})
    assert DRL(tiny_clip).pictures == (32, "shortest", "bicubic")
    clip = build_clip(tiny_clip, "two", load_weights=False)
    assert DRL(clip).pictures == (32, "shortest", "bilinear")


def test_a_file_where_tags_prepare_pictures_differently(
    monkeypatch: pytest.MonkeyPatch, tiny_clip: str, tmp_path: Path
) -> None:
    torch.save(open_clip.create_model(tiny_clip).state_dict(), tmp_path / "weights.pt")
    usual = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD, "interpolation": "bicubic"}
    tags = {"one": {**usual, "resize_mode": "shortest"}, "two": {**usual, "resize_mode": "squash"}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, tiny_clip, tags)
    with pytest.warns(RuntimeWarning, match=f"the tags of {tiny_clip} differ; .* Load .* by their tag if it is two"):
        clip = build_clip(tiny_clip, str(tmp_path / "weights.pt"))
    assert DRL(clip).pictures == (32, "shortest", "bicubic")
    for same in ({"one": tags["one"]}, {"two": tags["two"]}, {}):
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, tiny_clip, same)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            build_clip(tiny_clip, str(tmp_path / "weights.pt"))


def test_preparation_is_saved(tiny_clip: str, tmp_path: Path) -> None:
    model = DRL(tiny_clip)
    model.pictures = model.pictures._replace(resize="squash")
    model.save_pretrained(tmp_path)
    assert DRL.from_pretrained(tmp_path).pictures == (32, "squash", "bicubic")
    with pytest.raises(ValueError, match="resize 'squash' there and 'shortest' here"):
        DRL(tiny_clip).load_weights(tmp_path)


def test_a_folder_of_before_preparation_was_recorded(tiny_clip: str, tmp_path: Path) -> None:
    """Its pictures were cropped, whatever the model's tags say today."""
    model = DRL(tiny_clip)
    model.pictures = model.pictures._replace(resize="squash", interpolation="bilinear")
    config = {key: x for key, x in model.describe_config().items() if key not in ("resize", "interpolation")}
    pretrained.save_folder(tmp_path, model.state_dict(), config)
    assert DRL.from_pretrained(tmp_path).pictures == (32, "shortest", "bicubic")
    DRL(tiny_clip).load_weights(tmp_path)
    with pytest.raises(ValueError, match="resize 'shortest' there and 'squash' here; interpolation 'bicubic' there"):
        model.load_weights(tmp_path)


def test_features_of_the_original_form_start_heads_as_before(hub: Path) -> None:
    """Their start is hashed: another entry would refuse to continue older features."""
    start = {form: head_start(DRL(build(form, hub))).keys() for form in ("clip", "siglip", "mt5")}
    assert {name for name in start["clip"] if not name.startswith("blocks.")} == {"positional_embedding", "logit_scale"}
    assert {"max_positions", "logit_bias", "positional_embedding"} < start["siglip"]
    assert start["mt5"] == {"max_positions", "logit_scale"}


def test_frozen_towers_have_no_dropout(hub: Path) -> None:
    """Otherwise training with frozen towers would differ from training on their features."""
    model = DRL(build("roberta", hub), interaction="ti")
    ids = captions(model)
    assert not torch.equal(model.train().encode_text(ids)[0], model.encode_text(ids)[0])
    model.clip.requires_grad_(False)
    model.clip.logit_scale.requires_grad_(True)
    assert torch.equal(model.train().encode_text(ids)[0], model.encode_text(ids)[0])
    assert model.training
    assert model.temporal is not None
    assert model.temporal.training


def test_a_clip_with_a_bias_is_not_saved_without_a_name(tmp_path: Path) -> None:
    """Its weights are not in OpenAI's layout, so it could not be read again."""
    vision = {**forms.VISION, "width": 64, "head_width": 64}
    text = {**forms.TEXT, "width": 64, "heads": 1}
    clip = open_clip.CLIP(64, vision, text, quick_gelu=True, init_logit_bias=-10)
    with pytest.raises(ValueError, match="clip must have an open_clip name, or OpenAI's form"):
        DRL(clip).save_pretrained(tmp_path)


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    remedy = r"needs the package transformers, which is not installed; pip install 'drl-fast\[hf\]'"
    with pytest.raises(ValueError, match=f"the tokenizer of ViT-B-16-SigLIP2 {remedy}"):
        load_tokenizer("ViT-B-16-SigLIP2")
    with pytest.raises(ValueError, match=f"the text tower of roberta-ViT-B-32 {remedy}"):
        build_clip("roberta-ViT-B-32")


@pytest.mark.usefixtures("no_network")
def test_a_tokenizer_or_a_configuration_that_cannot_be_had() -> None:
    with pytest.raises(
        ValueError, match=r"the tokenizer of ViT-B-16-SigLIP2 could not be fetched .*get_tokenizer"
    ) as one:
        load_tokenizer("ViT-B-16-SigLIP2")
    with pytest.raises(ValueError, match="of roberta-ViT-B-32's text tower, roberta-base, could not be fetched") as two:
        build_clip("roberta-ViT-B-32")
    assert "\n" not in str(one.value) + str(two.value)
