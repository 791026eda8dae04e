"""open_clip models by name, with errors that say what to do."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Callable
from pathlib import Path

import open_clip
from torch import Tensor, nn

WEIGHT_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", ".ckpt")


def load_clip(name: str, pretrained: str | None = None) -> tuple[open_clip.CLIP, Callable[..., Tensor]]:
    """A CLIP and its tokenizer (``tokenizer(texts, context_length=32) -> ids``).

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
        clip, _, _ = open_clip.create_model_and_transforms(name, pretrained=pretrained, force_quick_gelu=quick_gelu)
    # Whatever a broken file or a missing network raises: urllib, huggingface_hub, torch and pickle each have their own.
    except Exception as error:
        raise ValueError(_advice(name, pretrained, error)) from error
    # Before the tokenizer, which other kinds of text tower would have to fetch.
    return check_clip(clip), open_clip.get_tokenizer(name)


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
    other = f" with clip {name}-quickgelu" if config.get("quick_gelu") and not name.endswith("-quickgelu") else ""
    return (
        f"weights {pretrained!r} of {name} could not be fetched ({reason}); where there is a network, download "
        f"{source}, copy it here and pass its path as pretrained{other}"
    )


def _near(name: str, known: list[str]) -> str:
    folded = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), folded, n=4, cutoff=0.5)
    return ", ".join(folded[match] for match in close) or ", ".join(known[:4]) or "none"
