"""Tokens of open_clip's towers, whatever their form: the original CLIP's, CoCa's, or a Hugging Face text model.

A caption's tokens are its words and, last, the sentence token. Words are the text tower's last hidden states, through
its own final norm and projection. The sentence token is what the model's ``encode_text`` returns:

- Pooled at the end token (CLIP, PE-Core, EVA, MobileCLIP): the end token is the last word, and the sentence token.
- Pooled at the last or first position (SigLIP, SigLIP 2, CLIPA), at a class token behind the caption (CoCa), or over
  all words (Hugging Face models): the sentence token is a token of its own, behind the words. A caption that fills its
  row gives up its last token for it.

A frame's token is what ``encode_image`` returns. CoCa's encoders return unit vectors, and so all of its tokens are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import open_clip
import torch
from open_clip.hf_model import ClsLastHiddenStatePooler, ClsPooler, HFTextEncoder, MeanPooler
from open_clip.transformer import TextTransformer
from torch import Tensor, nn
from torch.nn import functional as F

# A CLIP's parameters that no token depends on.
OF_LOSS = ("logit_scale", "logit_bias")
# Captions of about one length share a pass of a causal tower.
LENGTH_STEP = 8
# The context that open_clip's Hugging Face towers were trained with; their own may be longer, or not limited.
HF_CONTEXT = 77
# Positions that RoBERTa's table has beyond its context.
HF_OFFSET = 2
POOLED: tuple[str, ...] = ("argmax", "eos", "last", "first")
# open_clip's max_pooler fails in its own encode_text.
HF_POOLED: tuple[str, ...] = ("mean_pooler", "cls_pooler", "cls_last_hidden_state_pooler")
# What a block of the original CLIP's text tower holds; modules outside the towers start from blocks of this form alone.
BLOCK = {
    *(
        f"{name}.{part}"
        for name in ("attn.out_proj", "ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj")
        for part in ("weight", "bias")
    ),
    *("attn.in_proj_weight", "attn.in_proj_bias"),
}


class Start(NamedTuple):
    """What temporal blocks, XTI and their positions start from."""

    positional_embedding: Tensor
    """(positions, D)"""
    blocks: dict[str, Tensor]
    """The state dict of the text tower's blocks; empty where they are not of the original CLIP's form."""


def text_tower(clip: nn.Module) -> Any:  # its parts depend on its form
    """Return the module that holds the text tower: the original CLIP is its own."""
    return clip if isinstance(clip, open_clip.CLIP) else clip.text


def is_served(clip: nn.Module) -> bool:
    """Return whether a model is one of open_clip's, with a text tower that gives one token per word."""
    if not isinstance(clip, open_clip.CLIP | open_clip.CustomTextCLIP | open_clip.CoCa):
        return False
    tower = text_tower(clip)
    if isinstance(tower, HFTextEncoder):
        return isinstance(tower.pooler, MeanPooler | ClsPooler | ClsLastHiddenStatePooler)
    return isinstance(tower, open_clip.CLIP | TextTransformer) and _pool_type(tower) in POOLED


def ends_at_end_token(clip: nn.Module) -> bool:
    """Return whether a causal text tower pools at the end token, so that padding changes nothing before it."""
    tower = text_tower(clip)
    return sentence_place(clip) == "end" and tower.attn_mask is not None


def ends_at_largest_id(clip: nn.Module) -> bool:
    """Return whether the text tower is the original CLIP's: causal, and pooled at the largest id."""
    return ends_at_end_token(clip) and _pool_type(text_tower(clip)) == "argmax"


def context(clip: nn.Module) -> int:
    """Return the largest number of token ids of a caption."""
    tower = text_tower(clip)
    if not isinstance(tower, HFTextEncoder):
        return tower.context_length
    positions = getattr(tower.config, "max_position_embeddings", None)
    return min(HF_CONTEXT, positions - HF_OFFSET) if positions else HF_CONTEXT


def vocabulary(clip: nn.Module) -> int:
    """Return the number of token ids."""
    tower = text_tower(clip)
    return tower.config.vocab_size if isinstance(tower, HFTextEncoder) else tower.token_embedding.num_embeddings


def pad_id(clip: nn.Module) -> int:
    """Return the id that fills a row behind a caption."""
    tower = text_tower(clip)
    if isinstance(tower, HFTextEncoder):
        return tower.config.pad_token_id or 0
    return getattr(tower, "pad_id", 0)


def width(clip: nn.Module) -> int:
    """Return D, the width of the tokens of both towers."""
    tower = text_tower(clip)
    projection = getattr(tower, "text_projection", None)
    if isinstance(tower, HFTextEncoder):
        return tower.output_dim
    if isinstance(projection, nn.Linear):
        return projection.out_features
    return tower.ln_final.weight.shape[0] if projection is None else projection.shape[1]


def start(clip: nn.Module) -> Start | None:
    """Return what modules outside the towers start from; None where the text tower has no such positions."""
    tower = text_tower(clip)
    if isinstance(tower, HFTextEncoder):
        return None
    blocks, size = tower.transformer.resblocks.state_dict(), tower.ln_final.weight.shape[0]
    own_form = {name.partition(".")[2] for name in blocks} == BLOCK
    if not own_form or blocks["0.mlp.c_fc.weight"].shape != (4 * size, size):
        blocks = {}
    return Start(tower.positional_embedding, blocks)


def encode_text(clip: nn.Module, ids: Tensor, *, expand: bool = False) -> tuple[Tensor, Tensor]:
    """Encode token ids (A, Nt), A at least 1 and Nt at most the context.

    Args:
        expand: for towers of the original form, encode all Nt positions as words, with 0 as the id of padding.

    Returns:
        tokens (A, Nt, D), of which masked ones hold anything, and mask (A, Nt) bool.
    """
    tower, lengths = text_tower(clip), word_lengths(clip, ids)
    if ends_at_end_token(clip):
        if expand:
            ids, lengths = ids.masked_fill(~_before(lengths, ids), 0), torch.full_like(lengths, ids.shape[1])
        return _normalized(clip, _by_length(tower, ids, lengths)), _before(lengths, ids)
    place = sentence_place(clip)
    if isinstance(tower, HFTextEncoder):
        states, sentence = _hugging_face(tower, ids)
    else:
        # Without a causal mask padding takes part in attention: fill the context, as the model was trained.
        padded = F.pad(ids, (0, tower.context_length - ids.shape[1]), value=pad_id(clip))
        states = hidden_states(tower, padded)
        sentence = states[:, 0 if place == "first" else -1]
    if place == "end":
        return _normalized(clip, states[:, : ids.shape[1]]), _before(lengths, ids)
    if place == "first":
        states, lengths = states[:, 1:], lengths - 1
    states = F.pad(states, (0, 0, 0, max(ids.shape[1] - states.shape[1], 0)))[:, : ids.shape[1]]
    last = lengths.clamp(0, ids.shape[1] - 1)[:, None]
    position = torch.arange(ids.shape[1], device=ids.device)
    tokens = torch.where((position == last)[..., None], sentence[:, None].to(states.dtype), states)
    return _normalized(clip, tokens), position <= last


def sentence_place(clip: nn.Module) -> str:
    """Return where a caption's sentence token is: at its ``"end"``, at its ``"first"`` id, or ``"behind"`` it."""
    tower = text_tower(clip)
    if isinstance(tower, HFTextEncoder):
        return "first" if isinstance(tower.pooler, ClsPooler | ClsLastHiddenStatePooler) else "behind"
    if getattr(tower, "cls_emb", None) is not None:
        return "behind"
    return {"argmax": "end", "eos": "end", "first": "first", "last": "behind"}[_pool_type(tower)]


def word_lengths(clip: nn.Module, ids: Tensor) -> Tensor:
    """Return (A,): how many ids of each row (A, Nt) are the caption's, the end token included where it is known."""
    tower = text_tower(clip)
    pool = "last" if isinstance(tower, HFTextEncoder) else _pool_type(tower)
    if pool == "argmax":
        return ids.argmax(dim=1) + 1
    if pool == "eos":
        end = tower.text_eos_id if isinstance(tower, open_clip.CLIP) else tower.eos_id
        return ids.eq(end).int().argmax(dim=1) + 1
    position = torch.arange(1, ids.shape[1] + 1, device=ids.device)
    return (position * (ids != pad_id(clip))).amax(dim=1)


def word_positions(clip: nn.Module, ids: Tensor) -> range:
    """Return the positions of the ids (Nt,) that a caption's tokens come from, in the tokens' order.

    A sentence token that is not the end token comes from no single id and is left out.
    """
    place, length = sentence_place(clip), int(word_lengths(clip, ids[None])[0])
    return range(place == "first", min(length, len(ids) - 1) if place == "behind" else length)


def hidden_states(tower: Any, ids: Tensor) -> Tensor:
    """Return one of open_clip's own text towers' last hidden states (A, Nt, D), normed and projected.

    A class token that the tower adds comes last.
    """
    if getattr(tower, "cls_emb", None) is not None or getattr(tower, "use_pad_mask", False):
        # The tower makes a mask for the padding of each row.
        found = tower.forward_intermediates(
            ids,
            indices=1,
            normalize_intermediates=True,
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        hidden = torch.cat([found["text_intermediates"][0], *found.get("text_intermediates_suffix", [])], dim=1)
    else:
        length, dtype = ids.shape[1], tower.transformer.get_cast_dtype()
        hidden = tower.token_embedding(ids).to(dtype) + tower.positional_embedding[:length].to(dtype)
        mask = None if tower.attn_mask is None else tower.attn_mask[:length, :length]
        hidden = tower.ln_final(tower.transformer(hidden, attn_mask=mask))
    projection = tower.text_projection
    if projection is None:
        return hidden
    return projection(hidden) if isinstance(projection, nn.Linear) else hidden @ projection


def _by_length(tower: Any, ids: Tensor, lengths: Tensor) -> Tensor:
    """Encode captions of about one length together: nothing after the end token reaches what comes before it."""
    groups = (lengths + LENGTH_STEP - 1) // LENGTH_STEP
    order, parts = groups.argsort(stable=True), []
    for rows in order.split(groups.bincount().tolist()):
        if len(rows):
            part = hidden_states(tower, ids[rows, : int(groups[rows[0]]) * LENGTH_STEP])
            parts.append(F.pad(part, (0, 0, 0, ids.shape[1] - part.shape[1])))
    return torch.cat(parts)[order.argsort()]


def _hugging_face(tower: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return tokens of all ids (A, Nt, D), and sentence tokens (A, D). Padding is masked in attention."""
    real = (ids != tower.config.pad_token_id).long()
    output = tower.transformer(input_ids=ids, attention_mask=real)
    return tower.proj(output.last_hidden_state), tower.proj(tower.pooler(output, real))


def _pool_type(tower: Any) -> str:
    return tower.text_pool_type if isinstance(tower, open_clip.CLIP) else tower.pool_type


def _before(lengths: Tensor, ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]


def _normalized(clip: nn.Module, tokens: Tensor) -> Tensor:
    return F.normalize(tokens, dim=-1) if isinstance(clip, open_clip.CoCa) else tokens
