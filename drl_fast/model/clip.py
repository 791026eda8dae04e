"""open_clip models by name, with errors that say what to do."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import logging
import math
import os
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transform import PreprocessCfg
from torch import Tensor, nn

from . import towers
from .weight_files import has_openai_precision, is_from_openai, read_weights, without_sizes

# Entries that do not fit, named in one error.
NAMED = 20
# So many tags are all named.
FEW_TAGS = 4
# The width of every attention head in OpenAI's towers.
HEAD_WIDTH = 64
OTHER_FORM = (
    "choose a model such as ViT-B-32, or encode with it yourself and import its tokens: drl-fast features --from "
    "(docs/recipes.md)"
)
CACHE = "copy its cache here (~/.cache/huggingface, or HF_HOME)"
OFFLINE = "HF_HUB_OFFLINE=1 skips the retries"
# The ending of names of models with QuickGELU.
QUICK = "-quickgelu"
WEIGHT_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
# Weights of SigLIP, which open_clip reads.
NUMPY = (".npz", ".npy")

# What a tag says of how pictures are prepared.
PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")
# SigLIP's tokenizers fill rows with their end token. The models' configurations do not say so.
PAD_IDS = {"timm/ViT-B-16-SigLIP": 1, "timm/ViT-B-16-SigLIP-i18n-256": 1}

# drl-small: 4 + 4 layers for 64 x 64 pictures, to try a whole run on a CPU.
open_clip.add_model_config(Path(__file__).parent / "configs")


def load_clip(name: str, pretrained: str | None = None) -> tuple[nn.Module, Callable[..., Tensor]]:
    """Build a CLIP with :func:`build_clip`; return it with its tokenizer, see :func:`load_tokenizer`."""
    # Weights may be gigabytes: fail on a missing tokenizer first.
    tokenizer = load_tokenizer(name, pretrained)
    return build_clip(name, pretrained), tokenizer


def load_tokenizer(name: str, pretrained: str | None = None) -> Callable[..., Tensor]:
    """Return a model's tokenizer: ``tokenizer(texts, context_length=32) -> ids (texts, 32)``.

    OpenAI's comes with open_clip. Others are fetched from the Hugging Face hub, or read from its cache.

    Args:
        pretrained: the tag or weight file that will be loaded next; checked first, and not fetched.

    Raises:
        ValueError: an unknown name or tag, a missing weight file, no ``transformers``, a tokenizer that cannot be had
            (the message says what to download, or to install), or one that puts anything but padding behind a caption.
    """
    _tag_config(check_name(name), pretrained)
    if not fetches_tokenizer(name):
        return open_clip.get_tokenizer(name)
    _need_transformers(f"the tokenizer of {name}")
    # Workers are forked; the library would warn in each of them that it turns its threads off.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        with quiet():
            tokenizer = open_clip.get_tokenizer(name)
    # A missing network raises errors of huggingface_hub, a missing package those of transformers.
    except Exception as error:
        raise ValueError(
            f"the tokenizer of {name} could not be fetched ({_reason(error)}); run open_clip.get_tokenizer({name!r}) "
            f"on a machine with a network and {CACHE}; weights are fetched apart from it; {OFFLINE}"
        ) from error
    ids = tokenizer([""])[0]
    if ids[-1] != ids[-2]:
        raise ValueError(
            f"the tokenizer of {name} must fill rows at their end, got an empty caption that ends in the ids "
            f"{ids[-2:].tolist()}; {OTHER_FORM}"
        )
    return tokenizer


def fetches_tokenizer(name: str) -> bool:
    """Return whether a model's tokenizer is on the Hugging Face hub; False for an unknown name."""
    config = open_clip.get_model_config(name) or {"text_cfg": {}}
    # open_clip's own rule.
    return "hf_tokenizer_name" in config["text_cfg"] or "siglip" in name.lower()


def example_tag(name: str | None) -> str:
    """Return a tag of a model's weights, for messages."""
    tags = [] if name is None else open_clip.list_pretrained_tags_by_model(name)
    return "openai" if "openai" in tags or not tags else tags[0]


def build_clip(name: str, pretrained: str | None = None, *, load_weights: bool = True) -> nn.Module:
    """Build an open_clip model by name.

    Args:
        name: one of ``open_clip.list_models()``, such as ``"ViT-B-32"`` or ``"ViT-B-16-SigLIP2"``.
        pretrained: a tag of that model (fetched, or read from the cache), a local weight file, or None: random weights.
            A tag and OpenAI's own files (``ViT-B-32.pt``) bring their activation, QuickGELU. Any other file does not
            say which one it was trained with, and takes the name's: ``-quickgelu`` or not. A tag also says how pictures
            are prepared. A file and None take what the name's tags agree on, or else OpenAI's way.
        load_weights: False leaves the weights random; activation and preparation are those of the tag or file all the
            same. Nothing is fetched, except the configuration of a Hugging Face text tower.

    Raises:
        ValueError: an unknown name or tag (the nearest are named), a model of another form, a file that is missing or
            does not fit, or weights that cannot be fetched (the message says what to download).
    """
    check_name(name)
    state = _openai_weights(pretrained)
    if state is not None:
        clip = create_clip(name, quick_gelu=True)
        if load_weights:
            load_strictly(clip, without_sizes(state), str(pretrained))
        if not is_from_openai(state) and not name.endswith(QUICK):
            _warn_of_precision(str(pretrained))
        return clip
    tag = _tag_config(name, pretrained)
    clip = _create(name, pretrained if load_weights else None, tag)
    if pretrained is not None and Path(pretrained).is_file():  # after the file's own errors
        _warn_of_activation(name, pretrained)
        _warn_of_preparation(name, pretrained)
    return clip


def check_name(name: object) -> str:
    """Return a model's name if open_clip knows it and its text tower gives one token per word.

    Nothing is fetched: ``hf-hub:`` and ``local-dir:`` names, which open_clip would follow, are refused.

    Raises:
        ValueError: an unknown name (the nearest is given), or a model that is not served.
    """
    known = open_clip.list_models()
    if not isinstance(name, str) or name not in known:
        near = _near(str(name), known)
        raise ValueError(f"clip must be a model name that open_clip knows, got {name!r}; nearest: {near}")
    config = open_clip.get_model_config(name)
    text, size = config.get("text_cfg", {}), config.get("vision_cfg", {}).get("image_size", 224)
    pool, served = text.get("pool_type", "argmax"), towers.POOLED
    if "hf_model_name" in text:
        pool, served = text.get("hf_pooler_type") or "mean_pooler", towers.HF_POOLED
    if pool not in served:
        raise ValueError(f"clip must pool its text by {', '.join(served)}, got {name} with {pool!r}; {OTHER_FORM}")
    _check_square(name, size)
    return name


def _check_square(name: str, size: object) -> None:
    if not isinstance(size, int) and len(set(size)) != 1:  # type: ignore[call-overload]
        raise ValueError(f"clip must take square pictures, got {name} with {tuple(size)}; {OTHER_FORM}")  # type: ignore


def _openai_weights(pretrained: str | None) -> Mapping[str, Tensor] | None:
    """Return the weights of a file of OpenAI's, whatever its suffix; None for any other file, a tag or None."""
    if pretrained is None or not Path(pretrained).is_file() or Path(pretrained).suffix in NUMPY:
        return None
    state = read_weights(Path(pretrained))
    if is_from_openai(state):
        return state
    return state if has_openai_precision(state) else None


def create_clip(name: str, *, quick_gelu: bool = False) -> nn.Module:
    """Build a model with random weights; nothing is fetched, except the configuration of a Hugging Face text tower.

    Raises:
        ValueError: an unknown name, or a configuration that cannot be had.
    """
    return _create(check_name(name), None, {"quick_gelu": quick_gelu})


def _create(name: str, pretrained: str | None, settings: Mapping[str, Any]) -> nn.Module:
    """Build a model; ``settings`` as a tag has them."""
    text = open_clip.get_model_config(name)["text_cfg"]
    if "hf_model_name" in text:
        _need_transformers(f"the text tower of {name}")
    preprocessing = {key: settings[key] for key in PREPROCESSING if key in settings}
    try:
        with quiet():  # open_clip warns of random weights
            clip = open_clip.create_model(
                name,
                pretrained,
                force_quick_gelu=bool(settings.get("quick_gelu", False)),
                force_preprocess_cfg={**_common_preprocessing(name), **preprocessing},
                pretrained_text=False,
            )
    # A broken file or a missing network raises errors of urllib, huggingface_hub, torch or pickle.
    except Exception as error:
        raise ValueError(_advice(name, pretrained, error)) from error
    if text.get("hf_tokenizer_name") in PAD_IDS:
        towers.text_tower(clip).pad_id = PAD_IDS[text["hf_tokenizer_name"]]
    return check_clip(clip)


def _common_preprocessing(name: str) -> dict[str, Any]:
    """Return how pictures are prepared for all of a model's tags; nothing where tags differ."""
    found = list(_preprocessing_by_tag(name).values())
    return found[0] if found and all(other == found[0] for other in found) else {}


def _preprocessing_by_tag(name: str) -> dict[str, dict[str, Any]]:
    tags = {tag: open_clip.get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)}
    return {tag: {key: config[key] for key in PREPROCESSING if key in config} for tag, config in tags.items()}


def _need_transformers(what: str) -> None:
    if importlib.util.find_spec("transformers") is None:
        raise ValueError(f"{what} needs the package transformers, which is not installed; pip install 'drl-fast[hf]'")


def _warn_of_precision(pretrained: str) -> None:
    warnings.warn(
        f"drl_fast: {pretrained} has float16 matrices beside float32 vectors, as OpenAI's weights have, so its towers "
        "get QuickGELU. If the weights are not OpenAI's, convert the file to float32.",
        RuntimeWarning,
        stacklevel=4,
    )


def _warn_of_activation(name: str, pretrained: str) -> None:
    """Warn where a weight file is loaded into a model that other weights use with QuickGELU."""
    quick = name + QUICK
    if quick in open_clip.list_models():
        warnings.warn(
            f"drl_fast: {pretrained} does not say which activation it was trained with; {name} has GELU. If these are "
            f"OpenAI's, DFN's or MetaCLIP's weights, take {quick} as clip.",
            RuntimeWarning,
            stacklevel=4,
        )


def _warn_of_preparation(name: str, pretrained: str) -> None:
    """Warn where a weight file may need pictures that are prepared in another way than it gets them."""
    found, default = _preprocessing_by_tag(name), asdict(PreprocessCfg())
    other = [tag for tag, config in found.items() if config != {key: default[key] for key in PREPROCESSING}]
    if other and not _common_preprocessing(name):
        warnings.warn(
            f"drl_fast: {pretrained} does not say how its pictures are prepared, and the tags of {name} differ; it "
            f"gets OpenAI's way. Load these weights by their tag if it is {' or '.join(other)}.",
            RuntimeWarning,
            stacklevel=4,
        )


def _tag_config(name: str, pretrained: str | None) -> Mapping[str, object]:
    """Return open_clip's settings of a tag; none for a file or random weights."""
    if pretrained is None or Path(pretrained).is_file():
        return {}
    if pretrained.endswith(WEIGHT_SUFFIXES) or "/" in pretrained:
        raise ValueError(f"pretrained must be a tag or a weight file, file not found: {pretrained}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained not in tags:
        near = f"nearest: {_near(pretrained, tags)} of {len(tags)}"
        if len(tags) <= FEW_TAGS:
            near = f"its tags: {', '.join(tags)}" if tags else "it has no tags: give a file, or null"
        raise ValueError(f"pretrained must be a weight file or a tag of {name}, got {pretrained!r}; {near}")
    return open_clip.get_pretrained_cfg(name, pretrained)


def clip_from_state_dict(state: Mapping[str, Tensor]) -> open_clip.CLIP:
    """Build the CLIP that a state dict in OpenAI's layout holds, in float32 and with QuickGELU.

    Raises:
        ValueError: entries that are missing, unexpected or of a wrong shape; each is named.
    """
    state = without_sizes(state)
    needed = [
        "visual.conv1.weight",
        "visual.positional_embedding",
        "visual.proj",
        "text_projection",
        "positional_embedding",
        "token_embedding.weight",
        "ln_final.weight",
    ]
    missing = [name for name in needed if name not in state]
    if missing:
        raise ValueError(
            f"state must be a CLIP with a vision transformer in OpenAI's layout, got one without {', '.join(missing)}"
        )
    try:
        width, patch = state["visual.conv1.weight"].shape[0], state["visual.conv1.weight"].shape[-1]
        grid = math.isqrt(state["visual.positional_embedding"].shape[0] - 1)
        text_width = state["ln_final.weight"].shape[0]
        clip = open_clip.CLIP(
            state["text_projection"].shape[1],
            open_clip.CLIPVisionCfg(
                layers=_blocks(state, "visual.transformer."),
                width=width,
                patch_size=patch,
                image_size=patch * grid,
                head_width=HEAD_WIDTH,
            ),
            open_clip.CLIPTextCfg(
                context_length=state["positional_embedding"].shape[0],
                width=text_width,
                vocab_size=state["token_embedding.weight"].shape[0],
                heads=max(1, text_width // HEAD_WIDTH),
                layers=_blocks(state, "transformer."),
            ),
            quick_gelu=True,
        )
    except Exception as error:
        raise ValueError(f"state must be a CLIP in OpenAI's layout, got impossible sizes ({error})") from error
    load_strictly(clip, state, "state")
    return clip


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Load a state dict whose entries are exactly the module's.

    Raises:
        ValueError: entries that are missing, unexpected or of another shape; the first 20 are named.
    """
    own = module.state_dict()
    problems = [f"no {key}" for key in own.keys() - state.keys()]
    problems += [f"unexpected {key}" for key in state.keys() - own.keys()]
    for key in own.keys() & state.keys():
        x = state[key]
        if x.layout != torch.strided or x.is_quantized or x.is_meta:
            problems.append(f"{key} that is no dense tensor")
        elif x.shape != own[key].shape:
            problems.append(f"{key} of shape {tuple(x.shape)} instead of {tuple(own[key].shape)}")
        elif x.is_floating_point() != own[key].is_floating_point():
            problems.append(f"{key} of {x.dtype} instead of {own[key].dtype}")
    if problems:
        more = f"; and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
        raise ValueError(f"{name} must fit the model, got {'; '.join(sorted(problems)[:NAMED])}{more}")
    module.load_state_dict(dict(state), strict=True)


def _blocks(state: Mapping[str, Tensor], prefix: str) -> int:
    prefix += "resblocks."
    return len({name.removeprefix(prefix).partition(".")[0] for name in state if name.startswith(prefix)})


def check_clip(clip: nn.Module) -> nn.Module:
    """Return ``clip`` if its text tower gives one token per word. CoCa's decoder, which nothing here uses, is removed.

    Raises:
        ValueError: a module that is no open_clip model, or one that is not served.
    """
    if not towers.is_served(clip):
        raise ValueError(
            f"clip must be an open_clip model whose text tower is served, got {type(clip).__name__}; {OTHER_FORM}"
        )
    model: Any = clip
    _check_square(type(clip).__name__, model.visual.image_size)
    if isinstance(clip, open_clip.CoCa):
        model.text_decoder = None
    if model.logit_bias is not None:
        # A loss with a bias has its own, which starts here; see DRL.
        model.logit_bias.requires_grad_(False)
    return clip


def uses_quick_gelu(clip: nn.Module) -> bool:
    """Return whether the towers use QuickGELU, OpenAI's activation; a state dict does not say."""
    return any(type(module).__name__ == "QuickGELU" for module in clip.modules())


def has_openai_heads(clip: nn.Module) -> bool:
    """Return whether it has OpenAI's form, with attention heads 64 wide; a state dict does not say."""
    if not isinstance(clip, open_clip.CLIP) or not towers.ends_at_largest_id(clip) or clip.logit_bias is not None:
        return False
    found = [tower for tower in (clip.transformer, getattr(clip.visual, "transformer", None)) if tower is not None]
    return len(found) == 2 and all(
        tower.resblocks[0].attn.num_heads == max(1, tower.width // HEAD_WIDTH) for tower in found
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence loggers that report, once per retry, what is raised anyway."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def _advice(name: str, pretrained: str | None, error: Exception) -> str:
    reason = _reason(error)
    text = open_clip.get_model_config(name)["text_cfg"].get("hf_model_name")
    if text is not None and type(error) is OSError:  # transformers' error; the hub's are subclasses
        return (
            f"the configuration of {name}'s text tower, {text}, could not be fetched ({reason}); run "
            f"transformers.AutoConfig.from_pretrained({text!r}) on a machine with a network and {CACHE}; {OFFLINE}"
        )
    if pretrained is None:
        return f"{name} could not be built ({reason}); choose another clip, such as ViT-B-32"
    if Path(pretrained).is_file():
        reason = f"it has no {error.args[0]}" if isinstance(error, KeyError) else reason
        return (
            f"{pretrained} must hold weights of {name}, and could not be loaded ({reason}); check the clip's name; a "
            "model that drl-fast saved is loaded by init_from"
        )
    config = open_clip.get_pretrained_cfg(name, pretrained)
    hub, url = config.get("hf_hub", ""), config.get("url", "")
    source = f"open_clip_model.safetensors from https://huggingface.co/{hub.rstrip('/')}" if hub else url
    # The clip's name tells which activation a file of weights was trained with; the file does not.
    other = f" and {name}-quickgelu as clip" if config.get("quick_gelu") and not name.endswith(QUICK) else ""
    return (
        f"weights {pretrained!r} of {name} could not be fetched ({reason}); on a machine with a network download "
        f"{source}, copy it here and pass its path as pretrained{other}; {OFFLINE}"
    )


def _reason(error: Exception) -> str:
    # The first sentence only, on one line: torch goes on to list every parameter, the hub to give advice to others.
    first = textwrap.shorten(" ".join(str(error).split()).partition(". ")[0], 300, placeholder=" ...")
    return f"{type(error).__name__}: {first}"


def _near(name: str, known: list[str]) -> str:
    folded = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), folded, n=4, cutoff=0.5)
    return ", ".join(folded[match] for match in close) or ", ".join(known[:4]) or "none"
