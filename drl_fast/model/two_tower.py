"""A CLIP whose towers give tokens (one a word, one a frame), and an interaction over them."""

from __future__ import annotations

import math

import open_clip
import torch
from torch import Tensor, nn

from .. import WTI
from .clip import check_clip

MAX_LOGIT_SCALE = 100.0


class TwoTower(nn.Module):
    """Text and video towers of one CLIP, joined by an interaction layer.

    Args:
        clip: an open_clip ``CLIP`` (text transformer inside it, CLS-pooled image tower).
        interaction: any layer of :mod:`drl_fast.modules`, of the CLIP's embedding width.

    Raises:
        ValueError: a CLIP of another build, whose text tower gives no tokens this way.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, clip: nn.Module, interaction: nn.Module) -> None:
        super().__init__()
        self.clip = check_clip(clip)
        self.interaction = interaction
        config = open_clip.get_model_preprocess_cfg(clip)
        mean, std = config.get("mean", open_clip.OPENAI_DATASET_MEAN), config.get("std", open_clip.OPENAI_DATASET_STD)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    @property
    def logit_scale(self) -> Tensor:
        """The factor itself, at most 100."""
        return self.clip.logit_scale.clamp(max=math.log(MAX_LOGIT_SCALE)).exp()

    def encode_text(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids (A, Nt) -> tokens (A, Nt, D), mask (A, Nt): real up to and including the end token.

        The end token is the largest id of a row. Nt may be shorter than CLIP's context.
        """
        length = ids.shape[1]
        clip = self.clip
        hidden = clip.token_embedding(ids) + clip.positional_embedding[:length]
        hidden = clip.ln_final(clip.transformer(hidden, attn_mask=clip.attn_mask[:length, :length]))
        mask = torch.arange(length, device=ids.device) <= ids.argmax(dim=1, keepdim=True)
        return hidden @ clip.text_projection, mask

    def encode_video(self, frames: Tensor, mask: Tensor) -> Tensor:
        """Frames (B, Nv, 3, H, W) uint8, mask (B, Nv) bool -> tokens (B, Nv, D); masked frames are not computed: 0."""
        pictures = (frames[mask].to(self.mean.dtype) / 255 - self.mean) / self.std
        if len(pictures) == 0:  # CLIP's own reshapes fail then
            return pictures.new_zeros((*mask.shape, self.clip.text_projection.shape[1]))
        features = self.clip.encode_image(pictures)
        tokens = features.new_zeros((*mask.shape, features.shape[-1]))
        return tokens.index_put((mask,), features)

    def similarity(self, text: Tensor, video: Tensor, text_mask: Tensor, video_mask: Tensor) -> Tensor:
        """Every text against every video: logits (A, B), not scaled by temperature."""
        return self.interaction(text, video, text_mask, video_mask)


def small_model(image_size: int, context_length: int, seed: int) -> tuple[TwoTower, open_clip.SimpleTokenizer]:
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
    return TwoTower(clip, WTI(dim=width)), open_clip.SimpleTokenizer(context_length=context_length)
