"""open_clip models by name, with errors that say what to do."""

from __future__ import annotations

import contextlib
import difflib
import logging
import math
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import open_clip
import torch
from torch import Tensor, nn

from .weight_files import has_openai_precision, is_from_openai, read_weights, without_sizes

# Entries that do not fit, named in one error.
NAMED = 20
# The width of every attention head in OpenAI's towers.
HEAD_WIDTH = 64
FORM = "of the original CLIP's form, with its causal text transformer and end-token pooling"
OTHER_FORM = (
    "choose a model such as ViT-B-32, or encode with it yourself and pass its tokens to drl_fast.WTI (docs/recipes.md)"
)
# The ending of names of models with QuickGELU.
QUICK = "-quickgelu"
WEIGHT_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
# Weights of SigLIP, which open_clip reads.
NUMPY = (".npz", ".npy")

# drl-small: 4 + 4 layers for 64 x 64 pictures, to try a whole run on a CPU.
open_clip.add_model_config(Path(__file__).parent / "configs")


def load_clip(name: str, pretrained: str | None = None) -> tuple[open_clip.CLIP, Callable[..., Tensor]]:
    """Build a CLIP with :func:`build_clip`; return it with its tokenizer, ``tokenizer(texts, context_length=32)``."""
    # The tokenizer last: a name with another kind of text tower, whose tokenizer would be fetched, is rejected before.
    return build_clip(name, pretrained), open_clip.get_tokenizer(name)


def build_clip(name: str, pretrained: str | None = None, *, load_weights: bool = True) -> open_clip.CLIP:
    """Build an open_clip model by name.

    Args:
        name: one of ``open_clip.list_models()``, such as ``"ViT-B-32"``.
        pretrained: a tag of that model (fetched, or read from the cache), a local weight file, or None: random weights.
            A tag and OpenAI's own files (``ViT-B-32.pt``) bring their activation, QuickGELU. Any other file does not
            say which one it was trained with, and takes the name's: ``-quickgelu`` or not.
        load_weights: False leaves the weights random and fetches nothing; activation and picture statistics are those
            of the tag or file all the same.

    Raises:
        ValueError: an unknown name or tag (the nearest are named), a model of another form, a file that is missing or
            does not fit, or weights that cannot be fetched (the message says what to download).
    """
    check_name(name)
    state = _openai_weights(name, pretrained)
    if state is not None:
        clip = create_clip(name, quick_gelu=True)
        if load_weights:
            load_strictly(clip, without_sizes(state), str(pretrained))
        return clip
    tag = _tag_config(name, pretrained)
    statistics = {key: tag[key] for key in ("mean", "std") if key in tag}
    _warn_of_activation(name, pretrained)
    try:
        with quiet():
            clip = open_clip.create_model(
                name,
                pretrained if load_weights else None,
                force_quick_gelu=bool(tag.get("quick_gelu", False)),
                force_preprocess_cfg=statistics,
            )
    # A broken file or a missing network raises errors of urllib, huggingface_hub, torch or pickle.
    except Exception as error:
        raise ValueError(_advice(name, pretrained, error)) from error
    return check_clip(clip)


def check_name(name: object) -> str:
    """Return a model's name if open_clip knows it and its text tower gives one token per word.

    Nothing is fetched: ``hf-hub:`` and ``local-dir:`` names, which open_clip would follow, are refused.

    Raises:
        ValueError: an unknown name (the nearest is given), or a model of another form.
    """
    known = open_clip.list_models()
    if not isinstance(name, str) or name not in known:
        near = _near(str(name), known)
        raise ValueError(f"clip must be a model name that open_clip knows, got {name!r}; nearest: {near}")
    config = open_clip.get_model_config(name)
    text = config.get("text_cfg", {})
    causal = not text.get("no_causal_mask", False) and not text.get("embed_cls", False)
    projection = text.get("proj_type", "linear") == "linear" and not text.get("proj_bias", False)
    own_tower = "hf_model_name" not in text and not config.get("custom_text", False)
    if not (own_tower and causal and projection and text.get("pool_type", "argmax") == "argmax"):
        raise ValueError(f"clip must be {FORM}, got {name}, which is of another form; {OTHER_FORM}")
    return name


def _openai_weights(name: str, pretrained: str | None) -> Mapping[str, Tensor] | None:
    """Return the weights of a file of OpenAI's, whatever its suffix; None for any other file, a tag or None."""
    if pretrained is None or not Path(pretrained).is_file() or Path(pretrained).suffix in NUMPY:
        return None
    state = read_weights(Path(pretrained))
    if is_from_openai(state):
        return state
    if not has_openai_precision(state):
        return None
    if not name.endswith(QUICK):
        warnings.warn(
            f"drl_fast: {pretrained} has float16 matrices beside float32 vectors, as OpenAI's weights have, so its "
            "towers get QuickGELU. If the weights are not OpenAI's, convert the file to float32.",
            RuntimeWarning,
            stacklevel=4,
        )
    return state


def create_clip(name: str, *, quick_gelu: bool = False) -> open_clip.CLIP:
    """Build a model with random weights; nothing is fetched."""
    with quiet():  # open_clip warns of random weights
        return check_clip(open_clip.create_model(check_name(name), pretrained=None, force_quick_gelu=quick_gelu))


def _warn_of_activation(name: str, pretrained: str | None) -> None:
    """Warn where a weight file is loaded into a model that other weights use with QuickGELU."""
    quick = name + QUICK
    if pretrained is not None and Path(pretrained).is_file() and quick in open_clip.list_models():
        warnings.warn(
            f"drl_fast: {pretrained} does not say which activation it was trained with; {name} has GELU. If these are "
            f"OpenAI's, DFN's or MetaCLIP's weights, take {quick} as clip.",
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
        raise ValueError(
            f"pretrained must be a weight file or a tag of {name}, got {pretrained!r}; nearest: "
            f"{_near(pretrained, tags)} of {len(tags)}"
        )
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


def check_clip(clip: nn.Module) -> open_clip.CLIP:
    """Return ``clip`` if its text tower gives one token per word: the original CLIP, pooled at the largest id.

    Raises:
        ValueError: any other build.
    """
    if (
        isinstance(clip, open_clip.CLIP)
        and clip.text_pool_type == "argmax"
        and clip.attn_mask is not None
        and isinstance(clip.text_projection, nn.Parameter)
    ):
        return clip
    raise ValueError(f"clip must be {FORM}, got {type(clip).__name__} with another text tower; {OTHER_FORM}")


def uses_quick_gelu(clip: open_clip.CLIP) -> bool:
    """Return whether the towers use QuickGELU, OpenAI's activation; a state dict does not say."""
    return any(type(module).__name__ == "QuickGELU" for module in clip.modules())


def has_openai_heads(clip: open_clip.CLIP) -> bool:
    """Return whether all attention heads are 64 wide, OpenAI's width; a state dict does not say."""
    towers = [tower for tower in (clip.transformer, getattr(clip.visual, "transformer", None)) if tower is not None]
    return len(towers) == 2 and all(
        tower.resblocks[0].attn.num_heads == max(1, tower.width // HEAD_WIDTH) for tower in towers
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
    # The first sentence only, on one line: torch goes on to list every parameter, the hub to give advice to others.
    first = textwrap.shorten(str(error).partition(". ")[0], 300, placeholder=" ...")
    reason = f"{type(error).__name__}: {first}"
    if pretrained is None:
        return f"{name} could not be built ({reason}); choose another clip, such as ViT-B-32"
    if Path(pretrained).is_file():
        return f"{pretrained} must hold weights of {name}, and could not be loaded ({reason}); check the clip's name"
    config = open_clip.get_pretrained_cfg(name, pretrained)
    hub, url = config.get("hf_hub", ""), config.get("url", "")
    source = f"open_clip_model.safetensors from https://huggingface.co/{hub.rstrip('/')}" if hub else url
    # The clip's name tells which activation a file of weights was trained with; the file does not.
    other = f" and {name}-quickgelu as clip" if config.get("quick_gelu") and not name.endswith(QUICK) else ""
    return (
        f"weights {pretrained!r} of {name} could not be fetched ({reason}); on a machine with a network download "
        f"{source}, copy it here and pass its path as pretrained{other}; HF_HUB_OFFLINE=1 skips the retries"
    )


def _near(name: str, known: list[str]) -> str:
    folded = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), folded, n=4, cutoff=0.5)
    return ", ".join(folded[match] for match in close) or ", ".join(known[:4]) or "none"
