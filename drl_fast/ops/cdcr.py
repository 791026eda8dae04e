"""Operators of CDCR, and the loss with its gradient on top of them.

An anchor x is a real token of a pair. Its partner y is the token of the pair's other side that it matches best. The
anchors of the first term are words, those of the second are frames. With channels standardised over all anchors, and
over all partners,

    C_de = sum over anchors of weight x~_d y~_e      loss = alpha_on sum_d (C_dd - 1)^2 + alpha_off sum_{d!=e} C_de^2

The forward pass has two steps, and both are sums over anchors that processes can add up: first partners, means and
scatter (sums of squared deviations), then each term's C, or only its diagonal if alpha_off = 0, which takes O(N D).
The backward pass reads the tokens again: nothing of size N x D is kept in between.

In all (roles, D) tensors the roles are words, their partners and, with two terms, frames, their partners. The backward
pass also needs ``offset``, the gradient through the mean, and ``along``, the factor of x~ in the gradient through the
deviation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import autocast
from ..distributed.group import Group
from ..numerics import accumulation_dtype, statistics_dtype
from ..validation import values_are_visible
from . import gpu
from .chunked import cdcr as chunked
from .dispatch import LIBRARY
from .no_double_backward import differentiable_once

# A channel with a smaller standard deviation counts as constant: it becomes 0 and gets no gradient.
STD_EPS = 1e-12

_TOKENS = "Tensor text, Tensor video, Tensor text_weight, Tensor? video_weight, Tensor video_index, Tensor text_index"
SCHEMAS = {
    "cdcr_statistics": "(Tensor text, Tensor video, Tensor? text_mask, Tensor? video_mask, bool normalize, bool both) "
    "-> (Tensor video_index, Tensor text_index, Tensor mean, Tensor scatter)",
    "cdcr_correlation": f"({_TOKENS}, Tensor channels, bool normalize, bool full) -> (Tensor cross, Tensor sums)",
    "cdcr_gradient": f"({_TOKENS}, Tensor channels, Tensor pull, bool normalize) "
    "-> (Tensor grad_text, Tensor grad_video, Tensor grad_text_weight, Tensor grad_video_weight)",
}
CHUNKED: dict[str, Callable[..., Any]] = {
    "cdcr_statistics": chunked.statistics,
    "cdcr_correlation": chunked.correlation,
    "cdcr_gradient": chunked.gradient,
}
for _name, _schema in SCHEMAS.items():
    LIBRARY.define(_name + _schema, tags=(torch.Tag.needs_fixed_stride_order,))
    LIBRARY.impl(_name, CHUNKED[_name], "CompositeExplicitAutograd")
    LIBRARY.impl(_name, getattr(gpu, _name), "CUDA")


@torch.library.register_fake("drl_fast::cdcr_statistics", lib=LIBRARY)
def _(
    text: Tensor, video: Tensor, text_mask: Tensor | None, video_mask: Tensor | None, normalize: bool, both: bool
) -> tuple[Tensor, ...]:
    return (
        text.new_empty(text.shape[:2], dtype=torch.int16),
        text.new_empty(video.shape[:2], dtype=torch.int16),
        *(_channels(text, 4 if both else 2) for _ in range(2)),
    )


@torch.library.register_fake("drl_fast::cdcr_correlation", lib=LIBRARY)
def _(
    text: Tensor, video: Tensor, text_weight: Tensor, video_weight: Tensor | None, *options: Any
) -> tuple[Tensor, ...]:
    *_, full = options
    terms, dim = 1 if video_weight is None else 2, text.shape[2]
    shape = (terms, dim, dim) if full else (terms, dim)
    return text.new_empty(shape, dtype=accumulation_dtype(text.dtype)), _channels(text, 2 * terms)


@torch.library.register_fake("drl_fast::cdcr_gradient", lib=LIBRARY)
def _(text: Tensor, video: Tensor, text_weight: Tensor, video_weight: Tensor | None, *_: Any) -> tuple[Tensor, ...]:
    dtype = text_weight.dtype
    return (
        text.new_empty(text.shape),
        video.new_empty(video.shape),
        text.new_empty(text.shape[:2], dtype=dtype),
        video.new_empty((0 if video_weight is None else video.shape[0], video.shape[1]), dtype=dtype),
    )


def _channels(like: Tensor, rows: int) -> Tensor:
    """Allocate statistics (rows, D)."""
    return like.new_empty((rows, like.shape[2]), dtype=statistics_dtype(like.device))


class Options(NamedTuple):
    """The loss's options."""

    alpha_on: float
    alpha_off: float
    divisor: float | None  # C is divided by it; None: by the number of anchors of each term
    normalize: bool
    both: bool  # True: frames are anchors as well, and C is the mean of the two terms
    group: Group | None = None  # the processes that hold the other pairs

    @property
    def ranks(self) -> int:
        return 1 if self.group is None else self.group.size

    def over_group(self, x: Tensor) -> Tensor:
        """Sum every process's x."""
        return x if self.group is None else self.group.add(x)

    def merged(self, count: Tensor, mean: Tensor, scatter: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Merge the statistics of all processes' anchors by Chan et al.'s update."""
        if self.group is None:
            return count, mean, scatter
        own = torch.cat([count[:, None], mean, scatter], 1)
        ranks = torch.stack(self.group.gather(own, [len(own)] * self.group.size))
        counts, means, scatters = ranks.split([1, mean.shape[1], mean.shape[1]], 2)
        total = counts.sum(0)
        mean = (counts * means).sum(0) / total.clamp(min=1)
        return total[:, 0], mean, (scatters + counts * (means - mean) ** 2).sum(0)


class Statistics(NamedTuple):
    """Statistics of the channels over the whole batch of all processes."""

    anchors: Tensor  # (roles,): number of anchors
    mean: Tensor  # (roles, D)
    inverse_std: Tensor  # (roles, D)


def loss(
    text: Tensor,
    video: Tensor,
    text_weight: Tensor | None,
    video_weight: Tensor | None,
    text_mask: Tensor | None,
    video_mask: Tensor | None,
    options: Options,
) -> Tensor:
    """Compute the decorrelation loss of B pairs, a scalar in the dtype of sums. The caller checks the arguments."""
    value, *_ = _Decorrelation.apply(text, video, text_weight, video_weight, text_mask, video_mask, options)
    return value


class _Decorrelation(torch.autograd.Function):
    """The loss, with forward and backward made of the operators above."""

    @staticmethod
    def forward(
        text: Tensor,
        video: Tensor,
        text_weight: Tensor | None,
        video_weight: Tensor | None,
        text_mask: Tensor | None,
        video_mask: Tensor | None,
        options: Options,
    ) -> tuple[Tensor | None, ...]:
        with autocast.off(text.device.type):
            partners, statistics = _statistics(text, video, text_mask, video_mask, options)
            weights = _scaled_weights(text, video, (text_weight, video_weight), statistics, options)
            channels = torch.stack([statistics.mean, statistics.inverse_std])
            arguments = (text, video, *weights, *partners, channels, options.normalize)
            full = options.alpha_off != 0
            cross, sums = torch.ops.drl_fast.cdcr_correlation(*arguments, full)
            value, pull, along = (_pull_full if full else _pull_diagonal)(options.over_group(cross), options)
            per_anchor = _through_statistics(pull, options.over_group(sums), along, statistics.anchors)
            value = value.to(accumulation_dtype(text.dtype))
        return value, *weights, *partners, torch.cat([channels, per_anchor]), pull, statistics.anchors

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        text, video, text_weight, video_weight, _, _, options = inputs
        _, *state = output
        ctx.mark_non_differentiable(*(x for x in state if x is not None))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(text, video, text_weight, video_weight, *state)
        ctx.options = options

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 7
        *inputs, text_weight, video_weight, video_index, text_index, channels, pull, count = ctx.saved_tensors
        (text, video, *given), options = inputs, ctx.options
        with torch.no_grad(), autocast.off(text.device.type):
            arguments = (text, video, text_weight, video_weight, video_index, text_index)
            factor = grad * options.ranks
            constants, per_anchor = channels.split(2)
            pull = pull * factor.to(pull.dtype)
            grad_text, grad_video, *grad_weights = torch.ops.drl_fast.cdcr_gradient(
                *arguments, torch.cat([constants, per_anchor * factor.to(per_anchor.dtype)]), pull, options.normalize
            )
            grad_weights = [
                None if weight is None else (g * _weight_scale(count[2 * term], options)).to(weight.dtype)
                for term, (g, weight) in enumerate(zip(grad_weights, given, strict=True))
            ]
        grads = differentiable_once(
            (grad_text, grad_video, *grad_weights), (grad, *inputs), "CDCR", "drl_fast.reference.cdcr_loss"
        )
        return (*grads, None, None, None)


def _statistics(
    text: Tensor, video: Tensor, text_mask: Tensor | None, video_mask: Tensor | None, options: Options
) -> tuple[tuple[Tensor, Tensor], Statistics]:
    video_index, text_index, mean, scatter = torch.ops.drl_fast.cdcr_statistics(
        text, video, text_mask, video_mask, options.normalize, options.both
    )
    anchors = torch.stack([(index >= 0).sum() for index in (video_index, text_index)])
    count = anchors.to(mean.dtype).repeat_interleave(2)[: len(mean)]
    count, mean, scatter = options.merged(count, mean, scatter)
    _refuse_too_few(count)
    std = (scatter / (count - 1).clamp(min=1)[:, None]).sqrt()
    # A deviation within the rounding of the mean counts as 0.
    constant = std <= torch.clamp(16 * torch.finfo(std.dtype).eps * mean.abs(), min=STD_EPS)
    # Overflow makes the std infinite, which would zero the channel. Return NaN instead.
    inverse_std = torch.where(constant, 0, 1 / std).masked_fill(std.isinf(), torch.nan)
    return (video_index, text_index), Statistics(count, mean, inverse_std)


def _refuse_too_few(count: Tensor) -> None:
    """Raise if masks leave fewer than 2 anchors; only on the CPU, because elsewhere the check would synchronise."""
    if type(count) is Tensor and values_are_visible(count) and bool((count < 2).any()):
        anchors = " and ".join(str(int(n)) for n in count[::2])
        raise ValueError(
            "text_mask and video_mask must leave at least 2 real tokens a side to standardise channels over, in pairs "
            f"with both sides, got {anchors}; use a larger batch"
        )


def _scaled_weights(
    text: Tensor, video: Tensor, weights: tuple[Tensor | None, Tensor | None], statistics: Statistics, options: Options
) -> tuple[Tensor, Tensor | None]:
    """Divide the anchors' weights by C's divisor and, with two terms, by 2 for their mean."""
    dtype = accumulation_dtype(text.dtype)
    scaled: list[Tensor | None] = [None, None]
    for term, (side, given) in enumerate(zip((text, video), weights, strict=True)):
        if term == 0 or options.both:
            scale = _weight_scale(statistics.anchors[2 * term], options)
            weight = torch.ones_like(side[..., 0], dtype=scale.dtype) if given is None else given
            scaled[term] = (weight * scale).to(dtype)
    assert scaled[0] is not None
    return scaled[0], scaled[1]


def _weight_scale(count: Tensor, options: Options) -> Tensor:
    divisor = count.clamp(min=1) if options.divisor is None else torch.full_like(count, options.divisor)
    return (0.5 if options.both else 1.0) / divisor


def _pull_diagonal(cross: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Return, from each diagonal of C, the loss, d loss / d C_dd (D,) and each role's sum of gradient times x~."""
    away = cross.sum(0) - 1
    pull = 2 * options.alpha_on * away
    return options.alpha_on * (away * away).sum(), pull, (pull * cross).repeat_interleave(2, 0)


def _pull_full(cross: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same from each term's C (D, D); d loss / d C is (D, D)."""
    pull, wide = cross.sum(0), statistics_dtype(cross.device)
    away = pull.diagonal().to(wide) - 1
    # Sum off-diagonal squares separately: in a trained model they are far smaller than the diagonal's.
    pull.diagonal().zero_()
    off = torch.linalg.vector_norm(pull, dim=1).to(wide).square().sum()
    value = options.alpha_on * away.square().sum() + options.alpha_off * off
    pull.mul_(2 * options.alpha_off)
    pull.diagonal().copy_(2 * options.alpha_on * away)
    along = [(pull * term).sum(dim) for term in cross for dim in (1, 0)]
    return value, pull, torch.stack(along)


def _through_statistics(pull: Tensor, sums: Tensor, along: Tensor, count: Tensor) -> Tensor:
    """Compute ``offset`` and ``along``, (2, roles, D): every token's gradient through the channels' statistics."""
    u = sums.to(pull.dtype)
    if pull.dim() == 1:
        offset = torch.stack([pull * u[role ^ 1] for role in range(len(u))])
    else:
        offset = torch.stack([(pull.T if role % 2 else pull) @ u[role ^ 1] for role in range(len(u))])
    return torch.stack(
        [offset.to(sums.dtype) / count.clamp(min=1)[:, None], along.to(sums.dtype) / (count - 1).clamp(min=1)[:, None]]
    )
