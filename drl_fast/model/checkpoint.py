"""Checkpoints: the public codes' state dicts, and our own folders of safetensors and JSON."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import open_clip
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..atomic_write import write_atomically
from .clip import HEAD_WIDTH, SIZES_IN_STATE, clip_from_state_dict, load_strictly, quiet

if TYPE_CHECKING:
    from .drl import DRL

WEIGHTS, CONFIG = "model.safetensors", "config.json"
FORMAT = "drl-fast 1"

# Our names and upstream's, as prefixes; the first that fits counts.
NAMES = (
    ("clip.", "clip."),
    ("temporal.frame_position_embeddings.", "frame_position_embeddings."),
    ("temporal.transformer.", "transformerClip."),
    ("temporal.lstm.", "lstm_visual."),
    ("interaction.position_embeddings.", "cross.embeddings.position_embeddings."),
    ("interaction.transformer.", "cross.transformer."),
    ("interaction.pooler.", "cross.pooler."),
    ("interaction.similarity_dense.", "similarity_dense."),
    ("interaction.text_weight_fc.", "text_weight_fc."),
    ("interaction.video_weight_fc.", "video_weight_fc."),
)
# Upstream's names for what we call otherwise.
OPTIONS = {
    "agg_module": "temporal",
    "cdcr_alpha1": "cdcr_alpha_on",
    "cdcr_alpha2": "cdcr_alpha_off",
    "cdcr_lambda": "cdcr_weight",
}


def from_upstream(cls: type[DRL], state: Mapping[str, Any] | str | os.PathLike[str], **config: Any) -> DRL:
    """Build the model that a checkpoint of the public DRL or CLIP4Clip code holds, and load all of it.

    Args:
        cls: :class:`DRL`.
        state: the state dict (``clip.*``, ``transformerClip.*``, ``text_weight_fc.*``, ...), with or without
            DistributedDataParallel's ``module.``; or the path of a file that holds one (``torch.load`` with
            ``weights_only=True``: no other pickle is read).
        config: :class:`Config`'s fields, or upstream's names for them (``agg_module``, ``cdcr_alpha1``, ...). What is
            left out is read off the entries, as ``patch`` and ``image_size`` are in any case; without weight heads or
            cross transformer the interaction is ``"dp"``. ``cdcr_padding`` is ``"competes"`` where not given, so that
            training goes on as it would have there.

    Raises:
        ValueError: entries that are missing, unexpected or of another shape, each named; a file that holds no state
            dict; an option that does not fit the entries.
    """
    tensors = read_state(state)
    options = infer(tensors)
    sizes = {name: config.pop(name) for name in ("patch", "image_size") if name in config}
    for name, value in config.items():
        ours = OPTIONS.get(name, name)
        options[ours] = None if ours == "temporal" and value in ("None", "") else value
    parts = {to_ours(name): x for name, x in tensors.items()}
    clip = {name.removeprefix("clip."): x for name, x in parts.items() if name.startswith("clip.")}
    model = cls(clip_from_state_dict(clip), **options)
    own = {"patch": model.clip.visual.patch_size, "image_size": model.clip.visual.image_size}
    for name, value in sizes.items():
        found = own[name][0] if isinstance(own[name], tuple) else own[name]
        if value != found:
            raise ValueError(f"{name} must be the state's own, {found}, got {value}; it can be left out")
    kept = {name: x for name, x in parts.items() if name.removeprefix("clip.") not in SIZES_IN_STATE}
    load_strictly(model, kept, "state")
    return model


def to_upstream(model: DRL) -> dict[str, Tensor]:
    """The model's entries under the public code's names.

    Raises:
        ValueError: an interaction that the public code does not have.
    """
    state = {}
    for name, x in model.state_dict().items():
        fits = [(ours, theirs) for ours, theirs in NAMES if name.startswith(ours)]
        if not fits:
            raise ValueError(
                f"interaction must be one that the public code has (dp, xti, ti, wti), got "
                f"{model.config.interaction!r} with {name}; use save_pretrained"
            )
        ours, theirs = fits[0]
        state[theirs + name.removeprefix(ours)] = x.detach().clone()
    return state


def to_ours(name: str) -> str:
    """Our name for an upstream entry; unknown ones stay as they are, for the strict load to name."""
    for ours, theirs in NAMES:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def read_state(state: Mapping[str, Any] | str | os.PathLike[str]) -> dict[str, Tensor]:
    """Tensors by name, from a mapping or a file; wrappers around a state dict are taken off."""
    if isinstance(state, str | os.PathLike):
        path = Path(state)
        if not path.is_file():
            raise ValueError(f"state must be a state dict or a checkpoint file, got {path}, where no file is")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        # What a broken or unsafe pickle raises is torch's, pickle's and zipfile's own.
        except Exception as error:
            raise ValueError(
                f"{path} must hold tensors alone, and could not be read ({type(error).__name__}: "
                f"{str(error).splitlines()[0]}); save its state dict anew with torch.save(model.state_dict(), ...)"
            ) from error
    for wrapper in ("model_state_dict", "state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not all(isinstance(x, Tensor) for x in state.values()):
        raise ValueError(f"state must map names to tensors, got {type(state).__name__}; pass model.state_dict()")
    return {re.sub(r"^module\.", "", name): x for name, x in state.items()}


def infer(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the entries say of the model."""
    options: dict[str, Any] = {"interaction": "dp", "temporal": None, "cdcr_padding": "competes"}
    heads = [name for name in state if re.fullmatch(r"text_weight_fc(\.\d+)?\.weight", name)]
    if heads:
        options |= {"interaction": "wti", "wti_arch": len(heads)}
    elif any(name.startswith("cross.") for name in state):
        options["interaction"] = "xti"
    if any(name.startswith("transformerClip.") for name in state):
        options["temporal"] = "seqTransf"
    elif any(name.startswith("lstm_visual.") for name in state):
        options["temporal"] = "seqLSTM"
    return options


def save_pretrained(model: DRL, folder: str | os.PathLike[str]) -> None:
    """Write weights and configuration into ``folder``; what was there stays whole until it is replaced.

    Raises:
        ValueError: a CLIP without a name whose form its weights alone do not tell.
    """
    if model.clip_name is None:
        _refuse_another_form(model)
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    config = json.dumps({"format": FORMAT, **model.describe_config()}, indent=2) + "\n"
    state = {name: x.detach().contiguous() for name, x in model.state_dict().items()}
    # The configuration rides with the weights: the two cannot come from different saves. The JSON is for people.
    write_atomically(path / WEIGHTS, lambda file: safetensors.torch.save_file(state, file, {"config": config}))
    write_atomically(path / CONFIG, lambda file: Path(file).write_text(config))


def _refuse_another_form(model: DRL) -> None:
    """A CLIP without a name is built again from its weights, as OpenAI's are: heads 64 wide, QuickGELU."""
    towers = (model.clip.transformer, model.clip.visual.transformer)
    alike = all(tower.resblocks[0].attn.num_heads == max(1, tower.width // HEAD_WIDTH) for tower in towers)
    if not alike or not model.describe_config()["quick_gelu"]:
        raise ValueError(
            "clip must have an open_clip name, or heads 64 wide and QuickGELU as OpenAI's, to be saved, got another; "
            "register it with open_clip.add_model_config and build DRL by that name"
        )


def from_pretrained(cls: type[DRL], folder: str | os.PathLike[str]) -> DRL:
    """Read a folder that :func:`save_pretrained` wrote."""
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        raise ValueError(f"folder must hold {WEIGHTS}, as save_pretrained writes it, got {folder}, where it is not")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            config = json.loads((file.metadata() or {}).get("config", "{}"))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise ValueError(f"{path} must be a whole safetensors file, and could not be read ({error})") from error
    if config.pop("format", None) != FORMAT:
        raise ValueError(f"{path} must be written by save_pretrained, got a file without its configuration")
    name, quick = config.pop("clip"), config.pop("quick_gelu")
    if name is None:
        clip = clip_from_state_dict({k.removeprefix("clip."): x for k, x in state.items() if k.startswith("clip.")})
    else:
        with quiet():  # of weights that are random until the line after next
            clip = open_clip.create_model(name, pretrained=None, force_quick_gelu=quick)
    model = cls(clip, **config)
    model.clip_name = name
    load_strictly(model, state, str(path))
    return model
