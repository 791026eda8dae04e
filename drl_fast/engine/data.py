"""What a run trains on and is evaluated on: videos and captions, or the tokens that a CLIP made of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..data.feature_store import FeatureStore, Part
from ..data.loading import Batch, CaptionsOfVideos, Tokenizer, Unreadable, VideoCaptions, pair_loader
from ..data.split import Split
from ..model.drl import DRL
from ..model.head import Head
from .config import RunConfig
from .evaluate import Evaluation, evaluate, evaluate_features

Loaded = tuple[Batch | None, list[Unreadable]]
OnStage = Callable[[str, int, int], None]


class Source(Protocol):
    """A data set as :class:`drl_fast.engine.train.Run` uses it."""

    strict: bool

    @property
    def train(self) -> Split: ...
    @property
    def val(self) -> Split: ...
    @property
    def fingerprint(self) -> str:
        """Hash of all that a continued run must find as it was."""

    def batches(self, model: Head, config: RunConfig, own: Sequence[Sequence[int]], pin: bool) -> Iterator[Loaded]:
        """Load batches, as of the model's ``forward``, and the videos in them that cannot be read.

        Args:
            own: the captions of each batch, by their number in ``train``.
            pin: use page-locked memory, which copies to a GPU faster.
        """

    def empty(self, model: Head, config: RunConfig) -> Batch:
        """Return a batch of 0 rows."""

    def evaluate(
        self, model: Head, config: RunConfig, group: ProcessGroup | None, on_progress: OnStage | None
    ) -> Evaluation:
        """Score the val part."""


@dataclass
class Data:
    """Videos and captions; ``model`` is a DRL."""

    train: Split
    val: Split
    tokenizer: Tokenizer
    strict: bool = False

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all pairs: names of videos and captions, in order."""
        return _hash([(split.names, split.captions, split.owner) for split in (self.train, self.val)])

    def batches(self, model: Head, config: RunConfig, own: Sequence[Sequence[int]], pin: bool) -> Iterator[Loaded]:
        assert isinstance(model, DRL)
        pairs = (CaptionsOfVideos if config.captions_per_video else VideoCaptions)(
            self.train,
            self.tokenizer,
            max_words=model.words(config.words),
            sampling=config.sampling(*model.pictures),
        )
        items: list[Any] = [pairs.groups(batch) for batch in own] if isinstance(pairs, CaptionsOfVideos) else list(own)
        return iter(pair_loader(pairs, items, workers=config.workers, pin=pin))

    def empty(self, model: Head, config: RunConfig) -> Batch:
        assert isinstance(model, DRL)
        sampling = config.sampling(*model.pictures)
        shared = {"video_of": torch.zeros(0, dtype=torch.int64)} if config.captions_per_video else {}
        return {
            "text_ids": torch.zeros(0, config.words, dtype=torch.int64),
            "video": torch.zeros(0, sampling.max_frames, 3, sampling.size, sampling.size, dtype=torch.uint8),
            "video_mask": torch.zeros(0, sampling.max_frames, dtype=torch.bool),
            "owner": torch.zeros(0, dtype=torch.int64),
            **shared,
        }

    def evaluate(
        self, model: Head, config: RunConfig, group: ProcessGroup | None, on_progress: OnStage | None
    ) -> Evaluation:
        assert isinstance(model, DRL)
        return evaluate(
            model,
            self.val,
            self.tokenizer,
            config.sampling(*model.pictures),
            max_words=config.words,
            workers=config.workers,
            strict=self.strict,
            process_group=group,
            on_progress=on_progress,
        )


@dataclass
class StoredData:
    """Tokens of a store, read from its memory map without other processes."""

    store: FeatureStore
    train_part: Part
    val_part: Part
    strict: bool = False

    @property
    def train(self) -> Split:
        return self.train_part.split

    @property
    def val(self) -> Split:
        return self.val_part.split

    @cached_property
    def fingerprint(self) -> str:
        """Hash of captions, videos and all tokens."""
        return _hash((self.store.digest, self.store.about.dtype, self.train.part, self.val.part))

    @cached_property
    def _owner(self) -> np.ndarray:
        return np.array(self.train.owner)

    def batches(self, model: Head, config: RunConfig, own: Sequence[Sequence[int]], pin: bool) -> Iterator[Loaded]:
        for captions in own:
            yield self._batch(np.array(captions, np.int64), config.captions_per_video > 0), []

    def empty(self, model: Head, config: RunConfig) -> Batch:
        return self._batch(np.zeros(0, np.int64), config.captions_per_video > 0)

    def _batch(self, captions: np.ndarray, shared: bool) -> Batch:
        owner = self._owner[captions]
        videos, video_of = np.unique(owner, return_inverse=True) if shared else (owner, owner)
        text, text_mask = self.store.read("text", self.train_part.texts[captions])
        video, video_mask = self.store.read("video", self.train_part.videos[videos])
        sides: dict[str, Tensor] = {"text": text, "text_mask": text_mask, "video": video, "video_mask": video_mask}
        ids = {"owner": torch.from_numpy(owner)}
        return {**sides, **ids, "video_of": torch.from_numpy(video_of)} if shared else {**sides, **ids}

    def evaluate(
        self, model: Head, config: RunConfig, group: ProcessGroup | None, on_progress: OnStage | None
    ) -> Evaluation:
        return evaluate_features(model, self.store, self.val_part, process_group=group, on_progress=on_progress)


def _hash(value: object) -> str:
    return hashlib.blake2b(repr(value).encode(), digest_size=16).hexdigest()
