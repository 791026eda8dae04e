"""Argument errors, in one voice: the argument, what it must be, what it was, and what to do about it."""

from __future__ import annotations

import functools
import math
import numbers
import reprlib
import sys
import unicodedata
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import autocast
from .numerics import accumulation_dtype

FEATURE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MASKINGS = ("drl", "exclude", "none")
POOLINGS = ("max", "softmax", "logsumexp")
# Unicode's categories of control and format characters, halves of surrogate pairs, and separators of lines.
UNPRINTABLE = ("Cc", "Cf", "Cs", "Zl", "Zp")
# Joins the parts of an emoji.
JOINER = "\u200d"


def describe(value: object) -> str:
    """Name a value the way an error message should: a tensor by shape and dtype, anything else by type and value."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__} of {len(value)}"
    # Shortened: nobody wants to read a whole array.
    return f"{type(value).__name__} {' '.join(reprlib.repr(value).split())}"


def printable(text: str) -> str:
    """Escape what could command a terminal, hide text or begin a line of its own."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        x.encode("unicode_escape").decode() if unicodedata.category(x) in UNPRINTABLE and x != JOINER else x
        for x in text
    )


def tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        stack = isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(x, Tensor) for x in value)
        how = f"convert it with torch.{'stack' if stack else 'as_tensor'}({name})"
        raise TypeError(
            f"{name} must be a torch.Tensor, got {describe(value)}; " + (how if value is not None else "pass one")
        )
    if value.is_nested or value.layout != torch.strided:
        kind = "a nested tensor" if value.is_nested else str(value.layout)
        raise TypeError(f"{name} must be a dense tensor, got {kind}; convert it with {name}.to_dense() or pad it")
    return value


def tokens(name: str, value: object, letters: str) -> Tensor:
    """Check token features: the rank of ``letters``, at least one token and one channel, a floating dtype we serve."""
    x = tensor(name, value)
    rank = len(letters.split(", "))
    if x.dim() != rank:
        hint = f"; add the missing dimension with {name}.unsqueeze(...)" if x.dim() == rank - 1 else ""
        raise ValueError(f"{name} must be ({letters}), got shape {tuple(x.shape)}{hint}")
    if x.dtype not in FEATURE_DTYPES:
        raise TypeError(
            f"{name} must be float32, float16, bfloat16 or float64, got {x.dtype}; convert it with {name}.float()"
        )
    if x.shape[-2] == 0 or x.shape[-1] == 0:
        raise ValueError(
            f"{name} must be ({letters}) with at least one token and one channel, got shape {tuple(x.shape)}"
        )
    if x.shape[-2] > 32767:
        raise ValueError(f"{name} must have at most 32767 tokens a row, got {x.shape[-2]}; split the rows")
    return x


def same_features(text: Tensor, video: Tensor, text_name: str, video_name: str) -> None:
    """Check that two sides can be compared: one device, one dtype, one D."""
    if video.device != text.device:
        raise ValueError(
            f"{video_name} must be on {text_name}'s device {text.device}, got {video.device}; "
            f"move it with {video_name}.to({text_name}.device)"
        )
    if video.dtype != text.dtype:
        raise TypeError(
            f"{video_name} must have {text_name}'s dtype {text.dtype}, got {video.dtype}; "
            f"convert it with {video_name}.to({text_name}.dtype)"
        )
    if video.shape[-1] != text.shape[-1]:
        raise ValueError(
            f"{video_name} must have D = {text.shape[-1]} channels to match {text_name}, got {video.shape[-1]}; "
            "project one side to the other's width"
        )


def per_token(name: str, value: object, features: Tensor, letters: str, features_name: str) -> Tensor:
    """Check a companion of features, (rows, tokens) or whatever precedes their channels: shape and device."""
    x = tensor(name, value)
    want = tuple(features.shape[:-1])
    if tuple(x.shape) != want:
        extra = f"; pass {name}.squeeze(1)" if tuple(x.shape) == (want[0], 1, want[1]) else ""
        raise ValueError(f"{name} must be ({letters}) = {want} to match {features_name}, got {tuple(x.shape)}{extra}")
    if x.device != features.device:
        raise ValueError(
            f"{name} must be on {features_name}'s device {features.device}, got {x.device}; "
            f"move it with {name}.to({features_name}.device)"
        )
    return x


def mask(name: str, value: object, features: Tensor, letters: str, features_name: str) -> Tensor | None:
    """Return the mask as bool (True = real token) in memory of its own, or None where every token is real."""
    if value is None:
        return None
    x = per_token(name, value, features, letters, features_name)
    if values_are_visible(x) and x.numel() and _has_any(~(x != 0).any()):
        _warn_no_real_token(name)
    if x.dtype == torch.bool:
        return private_copy(x)
    if values_are_visible(x):
        if (x.is_floating_point() or x.is_complex()) and _has_any(x.isnan()):
            raise ValueError(f"{name} must be zero (masked) or non-zero (real), got NaN; build it from token lengths")
        if x.dtype.is_signed and not x.is_complex() and _has_any(x < 0):
            raise ValueError(
                f"{name} must not be negative, got {x.min().item():g}, which looks like an additive mask (0 = real); "
                f"pass 1 for real tokens and 0 for padding, such as {name} == 0"
            )
    return x != 0


def values_are_visible(x: Tensor) -> bool:
    """Tell whether values may be checked: elsewhere that synchronises an accelerator or breaks a compiled graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


@functools.cache
def _warn_no_real_token(name: str) -> None:
    # The warning names the caller's line, however many functions of ours and of torch's are between.
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(("drl_fast", "torch.")):
        frame, level = frame.f_back, level + 1
    warnings.warn(
        f"drl_fast: {name} holds no real token at all, so all scores are 0 (except with masking='none'); "
        "real tokens are non-zero in a mask",
        stacklevel=level,
    )


def has_values(x: Tensor) -> bool:
    """Tell whether a tensor has values to look at: fake tensors and those that vmap or a tracer wraps have none."""
    if type(x) not in (Tensor, torch.nn.Parameter) or torch._C._functorch.is_functorch_wrapped_tensor(x):
        return False
    return torch.utils._python_dispatch._get_current_dispatch_mode() is None


def _has_any(x: Tensor) -> bool:
    return has_values(x) and bool(x.any())


def weight(name: str, value: object, features: Tensor, letters: str, features_name: str) -> Tensor:
    """Check token weights and return them in the dtype that sums are kept in; see :func:`private_copy`."""
    x = per_token(name, value, features, letters, features_name)
    if not x.is_floating_point():
        mask_name = f"pass a mask as {name.removesuffix('weight')}mask=, or " if name.endswith("_weight") else ""
        raise TypeError(f"{name} must be floating point, got {x.dtype}; {mask_name}convert it with {name}.float()")
    return private_copy(x).to(accumulation_dtype(features.dtype))


def private_copy(x: Tensor) -> Tensor:
    """Copy a small CPU tensor (mask, ids, weights or scale) whose values the backward pass must find unchanged.

    A data loader may fill the same memory with its next batch before the backward pass of this one, and autograd's
    version counter does not see what NumPy writes. A tensor that needs a gradient is returned unchanged: autograd saves
    it, as for torch's own operators. So is one on an accelerator, whose memory NumPy does not share.
    """
    return x if x.requires_grad or x.device.type != "cpu" else x.clone()


def option(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if not isinstance(value, str | int) or value not in allowed:
        choices = ", ".join(repr(a) for a in allowed)
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def pooling(value: object, temperature: object, name: str = "temperature") -> float:
    """Check a pooling and its temperature, the argument ``name``; return the temperature."""
    option("pooling", value, POOLINGS)
    if value == "max" and torch.compiler.is_compiling():
        return 1.0  # reading a number would make torch.compile build its graph twice
    if isinstance(temperature, Tensor):
        raise TypeError(f"{name} must be a number, got {describe(temperature)}; pass float(...): it is not learned")
    number = positive_number(name, temperature, "similarities are divided by it")
    # In float32, 1 / temperature overflows below and the temperature above; either makes scores NaN.
    _accept(1e-30 <= number <= 1e30, name, number, "between 1e-30 and 1e30", "similarities are divided by it")
    if value == "max" and number != 1:
        raise ValueError(
            f"{name} must be 1 with pooling='max', which does not use it, got {number}; "
            "leave it out, or choose pooling='softmax' or 'logsumexp'"
        )
    return number


def flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {describe(value)}")


def use_plain_values(config: object) -> None:
    """Replace a frozen dataclass's NumPy numbers and paths by numbers and strings, which JSON and YAML can hold.

    Values inside dicts and lists stay as they are.
    """
    for name, value in vars(config).items():
        if isinstance(value, np.generic):
            object.__setattr__(config, name, float(value) if isinstance(value, np.floating) else value.item())
        elif isinstance(value, Path):
            object.__setattr__(config, name, str(value))


def positive_int(name: str, value: object, remedy: str = "") -> int:
    """Return a whole number above 0. ``remedy``, here and below, ends the message: what to pass instead."""
    return _integer(name, value, 1, "a positive integer", remedy)


def non_negative_int(name: str, value: object, remedy: str = "") -> int:
    """Return a whole number of 0 or more."""
    return _integer(name, value, 0, "an integer >= 0", remedy)


def positive_number(name: str, value: object, remedy: str = "") -> float:
    """Return a finite number above 0, as a float."""
    x = _real(name, value, remedy)
    return _accept(0 < x < math.inf, name, x, "positive and finite", remedy)


def finite_number(name: str, value: object, remedy: str = "") -> float:
    """Return a finite number, as a float."""
    x = _real(name, value, remedy)
    return _accept(math.isfinite(x), name, x, "finite", remedy)


def non_negative_number(name: str, value: object, remedy: str = "") -> float:
    """Return a finite number of 0 or more, as a float."""
    x = _real(name, value, remedy)
    return _accept(0 <= x < math.inf, name, x, "finite and >= 0", remedy)


def fraction(name: str, value: object, remedy: str = "", *, zero: bool = True, one: bool = True) -> float:
    """Return a number between 0 and 1, as a float; ``zero`` and ``one`` say whether the ends themselves are allowed."""
    x = _real(name, value, remedy)
    interval = f"{'[' if zero else '('}0, 1{']' if one else ')'}"
    return _accept(0 < x < 1 or (zero and x == 0) or (one and x == 1), name, x, f"in {interval}", remedy)


def _integer(name: str, value: object, minimum: int, expected: str, remedy: str) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be {expected}, got {describe(value)}{_ending(remedy)}")
    number = int(value)
    if number < minimum:
        raise ValueError(f"{name} must be {expected}, got {number}{_ending(remedy)}")
    return number


def _real(name: str, value: object, remedy: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {describe(value)}{_ending(remedy)}")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _accept(valid: bool, name: str, value: float, expected: str, remedy: str) -> float:
    if not valid:
        raise ValueError(f"{name} must be {expected}, got {value}{_ending(remedy)}")
    return value


def _ending(remedy: str) -> str:
    return f"; {remedy}" if remedy else ""


class Sides(NamedTuple):
    """Checked features and boolean masks of both sides; True = real token, None = all are real."""

    text: Tensor
    video: Tensor
    text_mask: Tensor | None
    video_mask: Tensor | None


def check_sides(
    text: Tensor,
    video: Tensor,
    text_mask: Tensor | None,
    video_mask: Tensor | None,
    names: tuple[str, str] = ("text", "video"),
) -> Sides:
    """Check both sides of an interaction, and under autocast cast them to its dtype.

    Raises:
        ValueError: a rank, size or device that does not fit; a mask that is no mask.
        TypeError: no tensor, or a dtype that is not served.
    """
    t, v = names
    text = autocast.cast(tokens(t, text, "A, Nt, D"))
    video = autocast.cast(tokens(v, video, "B, Nv, D"))
    same_features(text, video, t, v)
    return Sides(
        text,
        video,
        mask(f"{t}_mask", text_mask, text, "A, Nt", t),
        mask(f"{v}_mask", video_mask, video, "B, Nv", v),
    )
