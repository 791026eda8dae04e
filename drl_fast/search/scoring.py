"""Score windows exactly, choose the best hits, and find which frame each word chose."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import TI, WTI, PreparedVideos, prepare, token_interaction
from ..data.loading import Tokenizer, tokenize
from ..engine.features import device_of
from ..model.drl import DRL
from ..model.words import Word, words_of
from ..modules.wti import interaction_options, softmax_weights
from ..numerics import unit
from .table import Block

# Windows that are put in order first.
SORTED_FIRST = 1000


class Query(NamedTuple):
    """A sentence as the model reads it."""

    tokens: Tensor
    """(1, Nt, D)"""
    mask: Tensor
    """(1, Nt) bool"""
    weights: Tensor | None
    """(1, Nt) float32: WTI's"""
    words: list[Word]

    @property
    def shares(self) -> Tensor:
        """Each token's share of the query's score, (Nt,)."""
        return self.mask[0] / self.mask.sum() if self.weights is None else self.weights[0]

    @property
    def vector(self) -> Tensor:
        """The weighted mean of the normalised tokens, (D,), on the CPU.

        Against a window's pooled vector it gives the score that token-wise interaction would give if every word matched
        the mean frame.
        """
        return unit((self.shares[:, None] * unit(self.tokens[0])).sum(dim=0)).cpu()


@torch.no_grad()
def encode_query(model: DRL, tokenizer: Tokenizer, text: str, max_words: int) -> Query:
    """Encode a sentence, padded to ``max_words`` tokens as in evaluation."""
    ids = tokenize(tokenizer, [text], max_words)
    tokens, mask = model.encode_text(ids.to(device_of(model)))
    tokens = tokens.float()
    weights = None
    if isinstance(model.interaction, WTI):
        normalized = model.interaction.weight_input == "normalized"
        weights = softmax_weights(model.interaction.text_weight_fc, tokens, mask, normalized=normalized).float()
    return Query(tokens, mask, weights, words_of(model.clip, tokenizer, ids[0]))


class Windows(NamedTuple):
    """Some windows, ready to be scored by any query."""

    ids: np.ndarray
    """(B,) LanceDB's row ids"""
    paths: np.ndarray
    """(B,) str"""
    starts: np.ndarray
    ends: np.ndarray
    videos: PreparedVideos | tuple[Tensor, Tensor]
    """Prepared for TI and WTI; else tokens (B, Nv, D) and mask (B, Nv)"""
    chosen: np.ndarray | None = None
    """(B,) bool: those that a search is about; None: all"""

    @property
    def nbytes(self) -> int:
        if isinstance(self.videos, PreparedVideos):
            return self.videos.nbytes
        return sum(x.nbytes for x in self.videos)


@torch.no_grad()
def ready(model: DRL, block: Block) -> Windows:
    """Take a block's tokens to the model's device, and prepare them if it is TI or WTI."""
    device = device_of(model)
    # Stored as float16; both sides of an interaction have one dtype.
    tokens, mask = block.tokens.to(device).float(), block.mask.to(device)
    videos: PreparedVideos | tuple[Tensor, Tensor] = tokens, mask
    interaction = model.interaction
    if isinstance(interaction, WTI) and block.weights is not None:
        # With masking="none" the mask only shaped the weights.
        real = None if interaction.masking == "none" else mask
        weights = block.weights.to(device)
        videos = prepare(tokens, weights, real, normalize=interaction.normalize, dtype=torch.float16)
    elif isinstance(interaction, TI | WTI):
        videos = interaction.prepare(tokens, mask, dtype=torch.float16)
    # Copies: a view would keep the block's tokens in memory.
    paths, starts, ends = (np.array(block.rows.column(name)) for name in ("path", "start", "end"))
    return Windows(np.array(block.ids), paths, starts, ends, videos)


@torch.no_grad()
def score(model: DRL, query: Query, windows: Windows) -> Tensor:
    """Score a query against each window, (B,) float32 on the CPU: the model's own similarity, from stored tokens.

    With TI and WTI a window's score has the same bits in any block. Their tokens are normalised and rounded to float16,
    which moves a score by about 1e-5.
    """
    if not isinstance(windows.videos, PreparedVideos):
        tokens, mask = windows.videos
        return model.similarity(query.tokens, tokens, query.mask, mask)[0].cpu()
    assert isinstance(model.interaction, TI | WTI)
    options = interaction_options(model.interaction)
    return token_interaction(query.tokens, windows.videos, query.weights, None, query.mask, None, **options)[0].cpu()


def explains(model: DRL) -> bool:
    """Return whether the model matches words to frames: TI or WTI with maxima."""
    return isinstance(model.interaction, TI | WTI) and model.interaction.pooling == "max"


@torch.no_grad()
def chosen_frames(model: DRL, query: Query, block: Block) -> list[list[int]]:
    """Return for each window the frame (of Nv) that each word of the query chose, or -1.

    A word of several tokens has the choice of the token that counts most.
    """
    device = device_of(model)
    tokens, mask = block.tokens.to(device).float(), block.mask.to(device)
    _, matches = model.similarity(query.tokens, tokens, query.mask, mask, return_matches=True)
    shares = query.shares.tolist()
    heaviest = [max(word.positions, key=lambda position: shares[position]) for word in query.words]
    return matches.video_index[0][:, heaviest].tolist()


class Best(NamedTuple):
    """A hit before its row is read."""

    row: int
    """LanceDB's row id"""
    score: float


def merge_overlapping(
    scores: np.ndarray,
    ids: np.ndarray,
    paths: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    k: int,
    per_video: int | None = None,
) -> list[Best]:
    """Choose the best ``k`` windows such that no two of one video overlap: a better window stands for its neighbours.

    At most ``per_video`` are of one video. The order is by score, then by path and start; a NaN comes last.
    """
    taken: dict[str, list[tuple[float, float]]] = {}
    found: list[Best] = []
    for i in _best_first(scores, paths, starts):
        others = taken.setdefault(paths[i], [])
        if len(others) == per_video or any(starts[i] < end and start < ends[i] for start, end in others):
            continue
        others.append((starts[i], ends[i]))
        found.append(Best(int(ids[i]), float(scores[i])))
        if len(found) == k:
            break
    return found


def _best_first(scores: np.ndarray, paths: np.ndarray, starts: np.ndarray) -> Iterator[int]:
    """Yield all rows by score, path and start. Sort some of the best first, since a search needs no others."""
    key = np.nan_to_num(-scores, nan=np.inf)
    rest, count = np.arange(len(key)), SORTED_FIRST
    while len(rest):
        limit = np.partition(key[rest], count - 1)[count - 1] if count < len(rest) else np.inf
        near = rest[key[rest] <= limit]
        yield from near[np.lexsort((starts[near], paths[near].astype(str), key[near]))]
        rest, count = rest[key[rest] > limit], 8 * count
