"""A model small enough to train on a CPU in a minute."""

from __future__ import annotations

import open_clip
import torch

from .drl import DRL


def small_model(image_size: int, context_length: int, seed: int) -> tuple[DRL, open_clip.SimpleTokenizer]:
    """Four layers a tower, random weights, WTI on top; and the tokenizer: list of strings -> ids (texts, context).

    Args:
        image_size: pixels; a multiple of 16.
        context_length: text tokens, start and end included.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    width, heads = 128, 4
    clip = open_clip.CLIP(
        embed_dim=width,
        vision_cfg=open_clip.CLIPVisionCfg(
            layers=4, width=width, head_width=width // heads, patch_size=16, image_size=image_size
        ),
        text_cfg=open_clip.CLIPTextCfg(layers=4, width=width, heads=heads, context_length=context_length),
    )
    return DRL(clip, interaction="wti", temporal=None), open_clip.SimpleTokenizer(context_length=context_length)
