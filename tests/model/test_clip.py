"""CLIP models by name: loading, and errors about names, tags, files and unsupported models."""

from __future__ import annotations

import warnings
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from drl_fast.model.clip import build_clip, check_clip, check_name, load_clip, uses_quick_gelu
from drl_fast.model.weight_files import SIZES_IN_STATE


def weights(name: str) -> dict[str, Tensor]:
    """Return random weights with a seed that no other test uses."""
    torch.manual_seed(99)
    return load_clip(name)[0].state_dict()


def save(state: dict[str, Tensor], path: Path, kind: str) -> None:
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save({"epoch": 3, "state_dict": state} if kind == "nested" else state, path)


def test_random_weights_and_tokenizer(tiny_clip: str) -> None:
    clip, tokenizer = load_clip(tiny_clip)
    ids = tokenizer(["a red cross", "dogs"], context_length=9)
    assert ids.shape == (2, 9)
    assert ids.argmax(dim=1).tolist() == [4, 2]
    assert tokenizer(["dogs"]).shape == (1, clip.context_length)


@pytest.mark.parametrize(("suffix", "kind"), [("safetensors", "safetensors"), ("pt", "flat"), ("bin", "nested")])
def test_weights_from_a_file(tiny_clip: str, tmp_path: Path, suffix: str, kind: str) -> None:
    state, path = weights(tiny_clip), tmp_path / f"w.{suffix}"
    save(state, path, kind)
    loaded = load_clip(tiny_clip, str(path))[0].state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], state[key]) for key in state)
    assert not torch.equal(load_clip(tiny_clip)[0].state_dict()["text_projection"], state["text_projection"])


def test_weights_of_another_model(tiny_clip: str, tmp_path: Path) -> None:
    state, path = weights(tiny_clip), tmp_path / "w.safetensors"
    state["text_projection"] = torch.zeros(7, 5)
    save_file(state, path)
    with pytest.raises(ValueError, match=rf"{path} must hold weights of {tiny_clip}, .*RuntimeError.*text_projection"):
        load_clip(tiny_clip, str(path))
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"Missing key.* \.\.\.\); check the clip's name") as caught:
        load_clip(tiny_clip, str(path))
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("suffix", "content", "words"),
    [
        ("safetensors", b"", r"must be a whole safetensors file, and could not be read \(\w+"),
        ("safetensors", b"no weights\n" * 20, r"must be a whole safetensors file, and could not be read \(\w+"),
        ("pt", b"", "is empty; copy it again"),
        (
            "pt",
            b"no weights\n" * 20,
            r"must hold tensors alone, written by torch.save, and could not be read \(\w+\); it is damaged",
        ),
    ],
)
def test_broken_file(tiny_clip: str, tmp_path: Path, suffix: str, content: bytes, words: str) -> None:
    path = tmp_path / f"w.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} {words.replace('NAME', tiny_clip)}") as e:
        load_clip(tiny_clip, str(path))
    assert "\n" not in str(e.value)


def openai_archive(state: dict[str, Tensor], path: Path) -> None:
    """Write a TorchScript archive like OpenAI's: weights in half precision, and three sizes."""
    root = torch.nn.Module()
    for name, x in {**state, **{key: torch.tensor(7) for key in SIZES_IN_STATE}}.items():
        *parents, last = name.split(".")
        place = root
        for parent in parents:
            if parent not in place._modules:
                place.add_module(parent, torch.nn.Module())
            place = place._modules[parent]
        place.register_buffer(last, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(root).save(str(path))


@pytest.mark.parametrize("kind", ["archive", "its state dict", "wrapped", "safetensors", "no suffix"])
def test_openais_own_files_load_with_their_activation(tiny_clip: str, tmp_path: Path, kind: str) -> None:
    """The name says GELU; the file is OpenAI's, so the towers have QuickGELU. Half precision becomes float32."""
    state = {name: x.half() if x.ndim >= 2 else x for name, x in weights(tiny_clip).items()}
    sized = {**state, "input_resolution": torch.tensor(32)}
    path = tmp_path / {"safetensors": "ViT.safetensors", "no suffix": "abc123"}.get(kind, "ViT.pt")
    if kind in ("archive", "no suffix"):
        openai_archive(state, path)
    elif kind == "safetensors":
        save_file(sized, path)
    else:
        wrapped = {"state_dict": {f"module.{name}": x for name, x in sized.items()}}
        torch.save(wrapped if kind == "wrapped" else sized, path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip, _ = load_clip(tiny_clip, str(path))
    assert uses_quick_gelu(clip)
    assert uses_quick_gelu(build_clip(tiny_clip, str(path), load_weights=False)), "as a resumed run asks"
    loaded = clip.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name].float()) for name in state)


def test_half_precision_is_a_sign_of_openais_weights(tiny_clip: str, tmp_path: Path) -> None:
    state = {name: x.half() if x.ndim >= 2 else x for name, x in weights(tiny_clip).items()}
    torch.save(state, tmp_path / "clip.pt")
    with pytest.warns(RuntimeWarning, match=r"float16 matrices .*get QuickGELU\. If .* convert the file to float32"):
        clip, _ = load_clip(tiny_clip, str(tmp_path / "clip.pt"))
    assert uses_quick_gelu(clip)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.save({name: x for name, x in state.items() if name != "logit_scale"}, tmp_path / "clip.pt")
        with pytest.raises(ValueError, match=r"clip\.pt"):
            load_clip(tiny_clip, str(tmp_path / "clip.pt"))
    torch.save({name: x.float() for name, x in state.items()}, tmp_path / "clip.pt")
    assert not uses_quick_gelu(load_clip(tiny_clip, str(tmp_path / "clip.pt"))[0])


def test_openais_files_of_another_size(tiny_clip: str, tmp_path: Path) -> None:
    state = weights(tiny_clip)
    state["text_projection"] = torch.zeros(7, 5)
    openai_archive(state, tmp_path / "ViT.pt")
    with pytest.raises(ValueError, match=r"ViT\.pt must fit the model, got text_projection of shape \(7, 5\)"):
        load_clip(tiny_clip, str(tmp_path / "ViT.pt"))


def test_a_file_with_an_unknown_activation_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.safetensors"
    save_file(weights("drl-small"), path)
    config = open_clip.get_model_config("drl-small")
    for name in ("two-forms", "two-forms-quickgelu"):
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, {**config, "quick_gelu": name.endswith("gelu")})
    with pytest.warns(RuntimeWarning, match="does not say which activation .* take two-forms-quickgelu as clip"):
        assert not uses_quick_gelu(load_clip("two-forms", str(path))[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert uses_quick_gelu(load_clip("two-forms-quickgelu", str(path))[0])
        # A file that does not fit raises its error without a warning before it.
        save_file({"foreign": torch.ones(1)}, path)
        with pytest.raises(ValueError, match=r"w\.safetensors"):
            load_clip("two-forms", str(path))


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (
            "unpooled",
            "clip must pool its text by argmax, eos, last, first, got {name} with 'none'; choose a model such",
        ),
        ("wide", r"clip must take square pictures, got {name} with \(32, 48\); choose a model such"),
    ],
)
def test_a_model_that_is_not_served_is_an_error_before_a_download(
    form: str, message: str, tiny_clip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"{tiny_clip}-{form}"
    made = open_clip.create_model(name)

    def fetch(*_: object, **__: object) -> None:
        raise AssertionError("open_clip was asked for a model")

    monkeypatch.setattr(open_clip, "create_model", fetch)
    monkeypatch.setattr(open_clip, "get_tokenizer", fetch)
    with pytest.raises(ValueError, match=message.format(name=name)):
        load_clip(name, "some-tag")
    with pytest.raises(ValueError, match=r"clip must (be an open_clip model whose text tower|take square pictures)"):
        check_clip(made)


def test_all_models_of_open_clip_are_served() -> None:
    shipped = [name for name in open_clip.list_models() if "drl-fast" not in name and "two-forms" not in name]
    assert len(shipped) > 140
    assert [check_name(name) for name in shipped] == shipped


@pytest.mark.parametrize("name", ["hf-hub:timm/vit", "local-dir:/tmp/model", 5, None])
def test_only_names_that_open_clip_knows_are_built(name: object) -> None:
    with pytest.raises(ValueError, match="clip must be a model name that open_clip knows"):
        check_name(name)


@pytest.mark.parametrize("name", ["ViT-B/32", "vit-b-32", "ViTB32"])
def test_unknown_model_names_the_nearest(name: str) -> None:
    with pytest.raises(ValueError, match=f"clip must be a model name.*got '{name}'; nearest: ViT-B-32,"):
        load_clip(name)


@pytest.mark.parametrize("tag", ["OpenAI", "open_ai", "openaii"])
def test_unknown_tag_names_the_nearest(tag: str) -> None:
    with pytest.raises(ValueError, match=rf"a tag of ViT-B-32, got '{tag}'; nearest: openai.* of \d+"):
        load_clip("ViT-B-32", tag)


def test_unknown_tag_of_a_model_without_tags(tiny_clip: str) -> None:
    with pytest.raises(ValueError, match=f"a tag of {tiny_clip}, got 'openai'; it has no tags: give a file, or null"):
        load_clip(tiny_clip, "openai")


@pytest.mark.parametrize("path", ["weights/openai", "openai.pt", "w.safetensors", "/nowhere/w.bin"])
def test_missing_file(path: str) -> None:
    with pytest.raises(ValueError, match=f"pretrained must be a tag or a weight file, file not found: {path}"):
        load_clip("ViT-B-32", path)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("ViT-B-32", "pass its path as pretrained and ViT-B-32-quickgelu as clip"),
        ("ViT-B-32-quickgelu", "as pretrained"),
    ],
)
def test_weights_that_cannot_be_fetched(name: str, end: str) -> None:
    """The error says where to get them, and the model name with the right activation, which a file does not contain."""
    with pytest.raises(ValueError, match=f"weights 'openai' of {name} could not be fetched") as caught:
        load_clip(name, "openai")
    message = str(caught.value)
    assert (
        "download open_clip_model.safetensors from https://huggingface.co/timm/vit_base_patch32_clip_224.openai"
        in message
    )
    assert message.endswith(f"{end}; HF_HUB_OFFLINE=1 skips the retries")
    assert "\n" not in message


def test_check_clip_accepts_and_refuses(tiny_clip: str) -> None:
    clip, _ = load_clip(tiny_clip)
    assert check_clip(clip) is clip
    with pytest.raises(ValueError, match="an open_clip model whose text tower is served, got Linear"):
        check_clip(torch.nn.Linear(1, 1))


def test_a_model_that_needs_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("Please `pip install transformers`. Then try again.")

    monkeypatch.setattr(open_clip, "create_model", fail)
    with pytest.raises(
        ValueError, match=r"ViT-B-32 could not be built \(RuntimeError: Please `pip install transf.*`\);"
    ):
        load_clip("ViT-B-32")
