"""Sizes of the packed form of both sides, from shapes alone; imports no Triton.

The packed form is one tensor of the features' dtype. First come R rows of D' channels, one per slot; D' is D padded
with zeros to a multiple of STEP:

        slots of words                          slots of frames, frame-major
        | text 4: w0 w1 ... | text 0: w0 . | .. | f0 of v0 v1 v2 ... | f1 of v0 v1 v2 ... |  ...

A text with at most 128 words takes 16, 32, 64 or 128 slots, whichever is the smallest that holds its real words. Texts
with more slots come first, so a text's first slot is a multiple of its number of slots. Longer rows take a multiple of
128 slots, in row order. Videos are padded to a multiple of VIDEO_BLOCK.

Then come 4-byte companions: per slot the token's scale (1 / norm), weight, position in the padded row, and the power of
two by which a float16 token was multiplied; per row the number of real tokens; per text its first slot; per CHUNK of 16
word slots its text, -1 if none, and what the forward kernel must know about that text; and slots by class and block of
COUNT_BLOCK texts, from which each program derives the first slot of its text.
"""

from __future__ import annotations

CHUNK = 16
LONGEST_CLASS = 128
# Zeroed slots after the last word. No kernel reads beyond them.
TAIL = 128
VIDEO_BLOCK = 128
COUNT_BLOCK = 64
CLASSES = 4
# Channels are padded with zeros to a multiple of STEP; every tile's k divides it.
STEP = 64


def most_slots(words: int) -> int:
    """Return the most slots that a row of up to ``words`` words takes."""
    for size in (16, 32, 64):
        if words <= size:
            return size
    return -(-words // LONGEST_CLASS) * LONGEST_CLASS


def word_slots(texts: int, words: int) -> int:
    """Return the number of slots for words, the tail included."""
    return texts * most_slots(words) + TAIL


def padded_videos(videos: int) -> int:
    return -(-videos // VIDEO_BLOCK) * VIDEO_BLOCK


def padded_channels(dim: int) -> int:
    return -(-dim // STEP) * STEP


def slots(texts: int, words: int, videos: int, frames: int) -> int:
    """Return R, the number of slots of both sides."""
    return word_slots(texts, words) + padded_videos(videos) * frames


def packed_size(texts: int, words: int, videos: int, frames: int, dim: int, itemsize: int) -> int:
    """Return the number of elements, of ``itemsize`` bytes, of the packed form."""
    rows = slots(texts, words, videos, frames)
    companions = 4 * rows + texts + padded_videos(videos)  # scale, weight, position, factor; length
    companions += texts + 1  # first slot; the last one is the number of slots in use
    companions += 2 * (word_slots(texts, words) // CHUNK)  # text of a chunk, and its properties
    companions += -(-texts // COUNT_BLOCK) * CLASSES
    return rows * padded_channels(dim) + companions * (4 // itemsize)
