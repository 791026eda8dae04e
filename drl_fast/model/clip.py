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

# What OpenAI's archives hold beside weights.
SIZES_IN_STATE = ("input_resolution", "context_length", "vocab_size")
# Of every attention head in OpenAI's towers.
HEAD_WIDTH = 64
WEIGHT_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", ".ckpt")

# drl-small: 4 + 4 layers for pictures of 64 x 64, to see a whole run on a CPU.
open_clip.add_model_config(Path(__file__).parent / "configs")


def load_clip(name: str, pretrained: str | None = None) -> tuple[open_clip.CLIP, Callable[..., Tensor]]:
    """The CLIP of :func:`build_clip` and its tokenizer (``tokenizer(texts, context_length=32) -> ids``)."""
    # The tokenizer last: those of other kinds of text tower would have to be fetched.
    return build_clip(name, pretrained), open_clip.get_tokenizer(name)


def build_clip(name: str, pretrained: str | None = None) -> open_clip.CLIP:
    """An open_clip model by name.

    Args:
        name: one of ``open_clip.list_models()``, e.g. ``"ViT-B-32"``. A local file of OpenAI's weights wants the
            ``-quickgelu`` name; with a tag the right activation is chosen here.
        pretrained: a tag of that model (fetched, or taken from the cache), a local weight file, or None: random.

    Raises:
        ValueError: an unknown name or tag (the nearest ones are named), a file that is missing or does not fit, or
            weights that cannot be fetched (what to put where is said).
    """
    known = open_clip.list_models()
    if name not in known:
        raise ValueError(f"clip must be a model name that open_clip knows, got {name!r}; nearest: {_near(name, known)}")
    quick_gelu = False
    if pretrained is not None and not Path(pretrained).is_file():
        if pretrained.endswith(WEIGHT_SUFFIXES) or "/" in pretrained:
            raise ValueError(f"pretrained must be a tag or a weight file, got {pretrained}, where no file is")
        tags = open_clip.list_pretrained_tags_by_model(name)
        if pretrained not in tags:
            raise ValueError(
                f"pretrained must be a weight file or a tag of {name}, got {pretrained!r}; nearest: "
                f"{_near(pretrained, tags)} of {len(tags)}"
            )
        quick_gelu = bool(open_clip.get_pretrained_cfg(name, pretrained).get("quick_gelu", False))
    try:
        with quiet():
            clip, _, _ = open_clip.create_model_and_transforms(name, pretrained=pretrained, force_quick_gelu=quick_gelu)
    # Whatever a broken file or a missing network raises: urllib, huggingface_hub, torch and pickle each have their own.
    except Exception as error:
        raise ValueError(_advice(name, pretrained, error)) from error
    return check_clip(clip)


def clip_from_state_dict(state: Mapping[str, Tensor]) -> open_clip.CLIP:
    """A CLIP of the size that a state dict in OpenAI's layout has, in float32, QuickGELU as theirs.

    Raises:
        ValueError: entries that are missing or unexpected, each named, or of a shape that no CLIP has.
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
            f"state must be a CLIP with a vision transformer in OpenAI's layout, got none of {', '.join(missing)}"
        )
    patch, width = state["visual.conv1.weight"].shape[-1], state["visual.conv1.weight"].shape[0]
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
        raise ValueError(f"state must be a CLIP in OpenAI's layout, got sizes that none has ({error})") from error
    load_strictly(clip, state, "state")
    return clip


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Load every entry and miss none.

    Raises:
        ValueError: naming each entry that is missing, unexpected or of another shape.
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
    """Accept the build whose text tower gives a token a word: original CLIP, pooled at the largest id.

    Raises:
        ValueError: another build.
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


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the loggers that announce what is raised anyway, each retry twice."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def _advice(name: str, pretrained: str | None, error: Exception) -> str:
    # The first sentence: what follows in torch's and the hub's messages is advice for other callers. Shortened, on one
    # line: torch lists every parameter that does not fit.
    first = textwrap.shorten(str(error).partition(". ")[0], 300, placeholder=" ...")
    reason = f"{type(error).__name__}: {first}"
    if pretrained is None:
        return f"{name} could not be built ({reason}); choose another clip, such as ViT-B-32"
    if Path(pretrained).is_file():
        return f"{pretrained} must hold weights of {name}, and could not be loaded ({reason}); check the clip's name"
    config = open_clip.get_pretrained_cfg(name, pretrained)
    hub, url = config.get("hf_hub", ""), config.get("url", "")
    source = f"open_clip_model.safetensors from https://huggingface.co/{hub.rstrip('/')}" if hub else url
    # A file's name does not say which activation its weights were trained with; the clip's name does.
    other = f" and {name}-quickgelu as clip" if config.get("quick_gelu") and not name.endswith("-quickgelu") else ""
    return (
        f"weights {pretrained!r} of {name} could not be fetched ({reason}); where there is a network, download "
        f"{source}, copy it here and pass its path as pretrained{other}; HF_HUB_OFFLINE=1 spares the retries"
    )


def _near(name: str, known: list[str]) -> str:
    folded = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), folded, n=4, cutoff=0.5)
    return ", ".join(folded[match] for match in close) or ", ".join(known[:4]) or "none"
