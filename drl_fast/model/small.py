"""A model small enough to train on a CPU in less than a minute."""

from __future__ import annotations

import copy
from typing import Any

import open_clip
import torch

from ..modules import XTI
from .drl import DRL

WIDTH, HEADS = 128, 4
PATCH = 32
LAYERS = 2


def small_model(
    image_size: int, context_length: int, seed: int, clip: open_clip.CLIP | None = None, **config: Any
) -> tuple[DRL, open_clip.SimpleTokenizer]:
    """Build a model with two layers per tower and random weights; return it with its tokenizer.

    XTI has one layer: the paper's four would cost several times the towers. It starts as the text tower's first layer.

    Args:
        image_size: pixels; a multiple of 32.
        context_length: text tokens, start and end included.
        seed: of the weights; the towers' are the same for every ``config``.
        clip: towers to start from, such as another small model's; they are copied.
        config: options of :class:`DRL`; the defaults are WTI and no temporal module.
    """
    torch.manual_seed(seed)
    clip = _towers(image_size, context_length) if clip is None else copy.deepcopy(clip)
    model = DRL(clip, **{"interaction": "wti", "temporal": None, **config})
    if isinstance(model.interaction, XTI):
        model.interaction = XTI(WIDTH, layers=1, heads=HEADS, max_positions=context_length)
        model.interaction.init_from_clip(clip.positional_embedding, clip.transformer.resblocks.state_dict())
    return model, open_clip.SimpleTokenizer(context_length=context_length)


def _towers(image_size: int, context_length: int) -> open_clip.CLIP:
    return open_clip.CLIP(
        embed_dim=WIDTH,
        vision_cfg=open_clip.CLIPVisionCfg(
            layers=LAYERS, width=WIDTH, head_width=WIDTH // HEADS, patch_size=PATCH, image_size=image_size
        ),
        text_cfg=open_clip.CLIPTextCfg(layers=LAYERS, width=WIDTH, heads=HEADS, context_length=context_length),
    )
