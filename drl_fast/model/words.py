"""The words of a caption, and which of its tokens are theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from . import towers

# How SentencePiece and RoBERTa's byte pairs mark the first token of a word; BERT marks all others.
FIRST, OTHER = ("▁", "Ġ"), "##"
# Its second word shows which marks a tokenizer sets; some set none at the first word of a caption.
TWO_WORDS = "a a"


class Word(NamedTuple):
    """A word of a caption."""

    text: str
    positions: tuple[int, ...]
    """Of its tokens, as ``encode_text`` returns them."""


def words_of(clip: nn.Module, tokenizer: Callable[..., Tensor], ids: Tensor) -> list[Word]:
    """Join the tokens of one caption to words; start, end and other special tokens belong to none.

    Args:
        tokenizer: the one that gave the ids; see :func:`drl_fast.model.clip.load_tokenizer`.
        ids: (Nt,)
    """
    positions = towers.word_positions(clip, ids)
    inside: Any = getattr(tokenizer, "tokenizer", None)  # Hugging Face's, in open_clip's
    if inside is None:
        inside, pieces = tokenizer, getattr(tokenizer, "decoder", {})
        real = [(place, int(ids[position])) for place, position in enumerate(positions)][1:]
        if real and real[-1][1] == int(ids.max()):
            del real[-1]
        # Byte pairs of CLIP's vocabulary mark the end of a word.
        last = [pieces.get(number, "</w>").endswith("</w>") for _, number in real]
        begins = [True, *last[:-1]]
    else:
        special = set(inside.all_special_ids) - {inside.unk_token_id}
        found = [(place, int(ids[position])) for place, position in enumerate(positions)]
        real = [(place, number) for place, number in found if number not in special]
        names = inside.convert_ids_to_tokens([number for _, number in real])
        marked = any(name.startswith(FIRST) for name in inside.tokenize(TWO_WORDS))
        begins = [name.startswith(FIRST) if marked else not name.startswith(OTHER) for name in names]
    words: list[list[tuple[int, int]]] = []
    for token, new in zip(real, begins, strict=False):
        if new or not words:
            words.append([])
        words[-1].append(token)
    decoded = [inside.decode([number for _, number in word]).strip() for word in words]
    return [Word(text, tuple(place for place, _ in word)) for text, word in zip(decoded, words, strict=True) if text]
