"""State dicts of the public DRL and CLIP4Clip codes: read them, rename their entries, tell what they belong to."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..validation import describe
from .weight_files import SIZES_IN_STATE, read_file

# Prefixes: ours, theirs. The first match counts.
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
# Options whose names differ: theirs, ours.
OPTIONS = {
    "agg_module": "temporal",
    "cdcr_alpha1": "cdcr_alpha_on",
    "cdcr_alpha2": "cdcr_alpha_off",
    "cdcr_lambda": "cdcr_weight",
}


def read(state: Mapping[str, Any] | str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return weights under our names, and what :func:`infer_options` tells of them, from a mapping or a file."""
    tensors = read_state(state)
    weights = {to_ours(name): x for name, x in tensors.items() if name.removeprefix("clip.") not in SIZES_IN_STATE}
    return weights, infer_options(tensors)


def to_ours(name: str) -> str:
    """Rename one of their entries. Unknown names stay, so that the strict load reports them."""
    for ours, theirs in NAMES:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def to_upstream(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename all of a model's entries to theirs.

    Raises:
        ValueError: an interaction that the public code does not have.
    """
    renamed = {}
    for name, x in state.items():
        theirs = next((theirs + name.removeprefix(ours) for ours, theirs in NAMES if name.startswith(ours)), None)
        if theirs is None:
            raise ValueError(
                f"interaction must be one that the public code has (dp, xti, ti, wti), got one with {name}; use "
                "save_pretrained"
            )
        renamed[theirs] = x.detach().clone()
    return renamed


def read_state(state: Mapping[str, Any] | str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return tensors by name from a mapping or a file, without wrappers and DistributedDataParallel's ``module.``.

    Raises:
        ValueError: no such file, or one that holds no state dict. Files are read with ``weights_only=True``.
    """
    source = "state"
    if isinstance(state, str | os.PathLike):
        path = Path(state)
        source = str(path)
        if not path.is_file():
            raise ValueError(f"state must be a state dict or a checkpoint file, file not found: {path}")
        if path.suffix == ".safetensors":
            raise ValueError(f"{path} must be a file of torch.save, got safetensors; name the folder that holds it")
        state = read_file(path)
    if isinstance(state, Mapping) and str(state.get("format", "")).startswith("drl-fast run"):
        raise ValueError(f"{source} must be a model, got the checkpoint of a run; name the run's folder")
    for wrapper in ("model_state_dict", "state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping):
        raise ValueError(f"{source} must map names to tensors, got {type(state).__name__}; save model.state_dict()")
    wrong = next(
        (item for item in state.items() if not (isinstance(item[0], str) and isinstance(item[1], Tensor))), None
    )
    if wrong is not None:
        raise ValueError(
            f"{source} must map names to tensors, got {describe(wrong[0])} with {type(wrong[1]).__name__}; save "
            "model.state_dict()"
        )
    state = {name.removeprefix("module."): x for name, x in state.items()}
    if "visual.conv1.weight" in state:
        raise ValueError(
            f"{source} must be a whole DRL or CLIP4Clip model, got a CLIP alone, as OpenAI's files hold it; pass the "
            "file as pretrained (--set pretrained=FILE)"
        )
    return state


def infer_options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the interaction, the temporal module and, with WTI, the arch that their entries belong to.

    Entries cannot tell DP from TI, which have no weights: both are ``"dp"``.
    """
    options: dict[str, Any] = {"interaction": "dp", "temporal": None}
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
