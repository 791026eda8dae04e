"""open_clip models by name, with errors that say what to do."""

from __future__ import annotations

import contextlib
import difflib
import logging
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import open_clip
from torch import Tensor, nn

# Entries of OpenAI's archives that are not weights.
SIZES_IN_STATE = ("input_resolution", "context_length", "vocab_size")
# The width of every attention head in OpenAI's towers.
HEAD_WIDTH = 64
WEIGHT_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", ".ckpt")

# drl-small: 4 + 4 layers for 64 x 64 pictures, to try a whole run on a CPU.
open_clip.add_model_config(Path(__file__).parent / "configs")


def load_clip(name: str, pretrained: str | None = None) -> tuple[open_clip.CLIP, Callable[..., Tensor]]:
    """Build a CLIP with :func:`build_clip`; return it with its tokenizer, ``tokenizer(texts, context_length=32)``."""
    # The tokenizer last: a name with another kind of text tower, whose tokenizer would be fetched, is rejected before.
    return build_clip(name, pretrained), open_clip.get_tokenizer(name)


def build_clip(name: str, pretrained: str | None = None, *, load_weights: bool = True) -> open_clip.CLIP:
    """Build an open_clip model by name.

    Args:
        name: one of ``open_clip.list_models()``, such as ``"ViT-B-32"``. A local file of OpenAI's weights needs the
            ``-quickgelu`` name; a tag selects the right activation itself.
        pretrained: a tag of that model (fetched, or read from the cache), a local weight file, or None: random weights.
        load_weights: False leaves the weights random and fetches nothing; activation and picture statistics are the
            tag's all the same.

    Raises:
        ValueError: an unknown name or tag (the nearest are named), a file that is missing or does not fit, or weights
            that cannot be fetched (the message says what to download).
    """
    known = open_clip.list_models()
    if name not in known:
        raise ValueError(f"clip must be a model name that open_clip knows, got {name!r}; nearest: {_near(name, known)}")
    tag = _tag_config(name, pretrained)
    statistics = {key: tag[key] for key in ("mean", "std") if key in tag}
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
    state = {name: x for name, x in state.items() if name not in SIZES_IN_STATE}
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
    width, patch = state["visual.conv1.weight"].shape[0], state["visual.conv1.weight"].shape[-1]
    grid = math.isqrt(state["visual.positional_embedding"].shape[0] - 1)
    text_width = state["ln_final.weight"].shape[0]
    try:
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
        ValueError: entries that are missing, unexpected or of another shape; each is named.
    """
    own = module.state_dict()
    problems = [f"no {key}" for key in own.keys() - state.keys()]
    problems += [f"unexpected {key}" for key in state.keys() - own.keys()]
    problems += [
        f"{key} of shape {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own.keys() & state.keys()
        if state[key].shape != own[key].shape
    ]
    if problems:
        raise ValueError(f"{name} must fit the model, got {'; '.join(sorted(problems))}")
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
        and isinstance(clip.text_projection, nn.Parameter)
    ):
        return clip
    raise ValueError(
        f"clip must be of the original CLIP's form, with its text transformer and end-token pooling, got "
        f"{type(clip).__name__} with another text tower; choose a model such as ViT-B-32"
    )


def uses_quick_gelu(clip: open_clip.CLIP) -> bool:
    """Return whether the towers use QuickGELU, OpenAI's activation; a state dict does not say."""
    return any(type(module).__name__ == "QuickGELU" for module in clip.modules())


def has_openai_heads(clip: open_clip.CLIP) -> bool:
    """Return whether all attention heads are 64 wide, OpenAI's width; a state dict does not say."""
    towers = (clip.transformer, clip.visual.transformer)
    return all(tower.resblocks[0].attn.num_heads == max(1, tower.width // HEAD_WIDTH) for tower in towers)


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
    other = f" and {name}-quickgelu as clip" if config.get("quick_gelu") and not name.endswith("-quickgelu") else ""
    return (
        f"weights {pretrained!r} of {name} could not be fetched ({reason}); on a machine with a network download "
        f"{source}, copy it here and pass its path as pretrained{other}; HF_HUB_OFFLINE=1 skips the retries"
    )


def _near(name: str, known: list[str]) -> str:
    folded = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), folded, n=4, cutoff=0.5)
    return ", ".join(folded[match] for match in close) or ", ".join(known[:4]) or "none"
