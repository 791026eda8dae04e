"""Random problems, their float64 results, and the error rule for an implementation.

The rule is cut-cross-entropy's: the error against the float64 reference may be at most twice that of plain PyTorch run
in the same dtype, plus a stated atol relative to the largest true entry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import drl_fast
from drl_fast import reference

ATOL = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
# Rounding in float32 may swap two candidates that are closer than this.
NEAR = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-6, torch.bfloat16: 2e-6}
LEAVES = ("text", "video", "text_weight", "video_weight")
TENSORS = (*LEAVES, "text_mask", "video_mask")


@dataclass
class Problem:
    """The arguments of one call of ``token_interaction``."""

    text: Tensor
    video: Tensor
    text_weight: Tensor | None = None
    video_weight: Tensor | None = None
    text_mask: Tensor | None = None
    video_mask: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def pairs(self) -> tuple[int, int]:
        return len(self.text), len(self.video)

    def args(self) -> tuple[Tensor | None, ...]:
        return tuple(getattr(self, name) for name in TENSORS)

    def map(self, change: Callable[[Tensor], Tensor]) -> Problem:
        """Return the problem with ``change`` applied to every tensor."""
        return replace(self, **{n: None if (x := getattr(self, n)) is None else change(x) for n in TENSORS})

    def double(self) -> Problem:
        return self.map(lambda x: x.cpu().double() if x.is_floating_point() else x.cpu())


@dataclass
class Result:
    """Logits and the gradients of sum(logits * probe) for every input that has one."""

    logits: Tensor
    grads: dict[str, Tensor]


def make_mask(kind: str | None, rows: int, length: int, dtype: torch.dtype = torch.bool) -> Tensor | None:
    """``prefix``: random lengths from 1; ``holes``: random; ``empty``: holes, and the first row has no real token."""
    if kind is None:
        return None
    if kind == "prefix":
        real = torch.arange(length) < torch.randint(1, length + 1, (rows, 1))
    else:
        real = torch.rand(rows, length) < 0.6
        if kind == "empty":
            real[:1] = False
    # Any non-zero value means real.
    return real if dtype == torch.bool else real.to(dtype) * 3


def make_weight(kind: str | torch.dtype | None, rows: int, length: int) -> Tensor | None:
    """Return None (uniform), or random weights of a dtype: both signs, any sum, also on masked tokens."""
    return None if kind is None else (torch.randn(rows, length, dtype=torch.float64) / length).to(kind)


def make(
    shape: tuple[int, int, int, int],
    dim: int = 17,
    dtype: torch.dtype = torch.float32,
    *,
    masks: tuple[str | None, str | None] = (None, None),
    mask_dtype: torch.dtype = torch.bool,
    weights: torch.dtype | None = None,
    seed: int = 0,
    **options: Any,
) -> Problem:
    """Draw a random problem of shape (A, Nt, B, Nv)."""
    a, nt, b, nv = shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        one_way = not options.get("bidirectional", True)
        return Problem(
            torch.randn(a, nt, dim, dtype=torch.float64).to(dtype),
            torch.randn(b, nv, dim, dtype=torch.float64).to(dtype),
            make_weight(weights, a, nt),
            None if one_way else make_weight(weights, b, nv),
            make_mask(masks[0], a, nt, mask_dtype),
            make_mask(masks[1], b, nv, mask_dtype),
            options,
        )


def run(function: Callable[..., Tensor], problem: Problem, probe: Tensor | None = None) -> Result:
    """Call ``function`` and differentiate, with the problem's own strides and dtypes."""
    leaves = {n: getattr(problem, n) for n in LEAVES if getattr(problem, n) is not None}
    leaves = {n: x.detach().requires_grad_() for n, x in leaves.items()}
    logits = function(*replace(problem, **leaves).args(), **problem.options)
    if probe is None:
        return Result(logits.detach(), {})
    grads = torch.autograd.grad(logits, list(leaves.values()), probe.to(logits))
    return Result(logits.detach(), dict(zip(leaves, grads, strict=True)))


def plain(
    text: Tensor,
    video: Tensor,
    text_weight: Tensor | None,
    video_weight: Tensor | None,
    text_mask: Tensor | None,
    video_mask: Tensor | None,
    *,
    normalize: bool = True,
    masking: str = "drl",
    bidirectional: bool = True,
    pooling: str = "max",
    temperature: float = 1.0,
) -> Tensor:
    """Compute the logits as user code does: dense PyTorch in the features' own dtype, also in half precision."""
    dtype = text.dtype
    t_real, v_real = reference.real_mask(text_mask, text), reference.real_mask(video_mask, video)
    wt = reference.uniform_weight(t_real, dtype) if text_weight is None else text_weight.to(dtype)
    wv = reference.uniform_weight(v_real, dtype) if video_weight is None else video_weight.to(dtype)
    if masking == "none":
        t_real, v_real = torch.ones_like(t_real), torch.ones_like(v_real)
    t, v = torch.where(t_real[..., None], text, 0), torch.where(v_real[..., None], video, 0)
    if normalize:
        t, v = reference.unit(t).to(dtype), reference.unit(v).to(dtype)
    s = torch.einsum("aid,bjd->abij", t, v)
    zero_v = (masking == "drl") & (~v_real).any(-1)[None, :, None]
    zero_t = (masking == "drl") & (~t_real).any(-1)[:, None, None]
    m_t = reference.best_match(s, v_real[None, :, None, :], zero_v, dim=3)[0]
    m_v = reference.best_match(s, t_real[:, None, :, None], zero_t, dim=2)[0]
    if pooling != "max":
        drl = masking == "drl"
        m_t = reference.soft_pool(s, v_real[None, :, None, :] | drl, 3, pooling, temperature)
        m_v = reference.soft_pool(s, t_real[:, None, :, None] | drl, 2, pooling, temperature)
    by_text = torch.einsum("abi,ai->ab", m_t, torch.where(t_real, wt, 0))
    by_video = torch.einsum("abj,bj->ab", m_v, torch.where(v_real, wv, 0))
    return ((by_text + by_video) / 2 if bidirectional else by_text).to(torch.promote_types(dtype, torch.float32))


@dataclass
class Choices:
    """The matches in float64, and the distance between the best and the second-best candidate."""

    video_index: Tensor  # (A, B, Nt), -1 where no real token was chosen
    text_index: Tensor  # (A, B, Nv)
    video_gap: Tensor  # distance between the best and the second candidate, inf with only one candidate
    text_gap: Tensor


def choices(problem: Problem) -> Choices:
    """Find the matches from float64 similarities; the lowest index wins ties."""
    p = problem.double()
    t_real, v_real = reference.real_mask(p.text_mask, p.text), reference.real_mask(p.video_mask, p.video)
    if p.options.get("masking") == "none":
        t_real, v_real = torch.ones_like(t_real), torch.ones_like(v_real)
    t, v = torch.where(t_real[..., None], p.text, 0), torch.where(v_real[..., None], p.video, 0)
    if p.options.get("normalize", True):
        t, v = reference.unit(t), reference.unit(v)
    s = torch.einsum("aid,bjd->abij", t, v)
    drl = p.options.get("masking", "drl") == "drl"
    zero_v = (drl & (~v_real).any(-1))[None, :, None].expand(s.shape[:3])
    zero_t = (drl & (~t_real).any(-1))[:, None, None].expand(len(t), len(v), v.shape[1])
    by_word = _choose(s, v_real[None, :, None, :], zero_v, t_real[:, None, :])
    by_frame = _choose(s.transpose(2, 3), t_real[:, None, None, :], zero_t, v_real[None, :, :])
    return Choices(by_word[0], by_frame[0], by_word[1], by_frame[1])


def _choose(s: Tensor, competes: Tensor, zero: Tensor, chooses: Tensor) -> tuple[Tensor, Tensor]:
    s = s.masked_fill(~competes, -torch.inf)
    candidates = torch.cat(
        [s, torch.where(zero, 0.0, -torch.inf)[..., None], torch.full_like(s[..., :1], -torch.inf)], -1
    )
    top = candidates.topk(2, dim=-1).values
    index = (s == s.amax(-1, keepdim=True)).int().argmax(-1)
    nobody = ~competes.any(-1) | ~chooses | (zero & (s.amax(-1) < 0))
    gap = (top[..., 0] - top[..., 1]).nan_to_num(torch.inf, torch.inf)
    return index.masked_fill(nobody, -1), torch.where(chooses, gap, torch.inf)


def probe_for(problem: Problem) -> Tensor:
    """Draw upstream gradients. They are 0 for pairs in which rounding may change a match, and so the gradient."""
    found, near = choices(problem), NEAR[problem.text.dtype]
    close = (found.video_gap < near).any(-1)
    if problem.options.get("bidirectional", True):
        close = close | (found.text_gap < near).any(-1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return torch.where(close, 0, torch.randn(problem.pairs, dtype=torch.float64))


def term_sizes(problem: Problem, probe: Tensor) -> dict[str, float]:
    """How large the terms of logits and gradients are: of an entry, their root sum of squares; the largest entry's.

    A sum rounds as its terms do, also where they cancel: with one channel a token's gradient is a single number, and
    raw features of 512 channels have products of 60 whose weighted sum may be 0.5. So does the step from a unit token's
    gradient G to the raw token's, (G - u <u, G>) / |x|: with one channel u is a sign and the true difference exactly 0,
    but each of the two rounds as G / |x| does, and |x| may be small.
    """
    p, found, probe = problem.double(), choices(problem), probe.double()
    both = p.options.get("bidirectional", True)
    t_real, v_real = reference.real_mask(p.text_mask, p.text), reference.real_mask(p.video_mask, p.video)
    wt = reference.uniform_weight(t_real, torch.float64) if p.text_weight is None else p.text_weight
    wv = reference.uniform_weight(v_real, torch.float64) if p.video_weight is None else p.video_weight
    sides, scales = [p.text, p.video], [torch.ones(()), torch.ones(())]
    if p.options.get("normalize", True):
        scales = [(norm > 1e-12) / norm.clamp(min=1e-12) for norm in (x.norm(dim=-1, keepdim=True) for x in sides)]
        sides = [reference.unit(x) for x in sides]
    half = 0.5 if both else 1.0
    (t, v), g = sides, half * probe[:, None, :, None]
    by_word = found.video_index.transpose(1, 2)[..., None] == torch.arange(v.shape[1])
    by_frame = (found.text_index[:, None] == torch.arange(t.shape[1])[None, :, None, None]) & both
    c = g * (by_word * wt[:, :, None, None] + by_frame * wv)
    products = torch.einsum("aid,bjd->aibj", t * t, v * v)
    sums = {
        "text": (torch.einsum("aibj,bjd->aid", c, v), torch.einsum("aibj,bjd->aid", c * c, v * v)),
        "video": (torch.einsum("aibj,aid->bjd", c, t), torch.einsum("aibj,aid->bjd", c * c, t * t)),
    }
    sizes = {
        name: torch.maximum(total.abs(), squares.sqrt()) * scale
        for (name, (total, squares)), scale in zip(sums.items(), scales, strict=True)
    }
    sizes["text_weight"] = (products * by_word * g * g).sum((2, 3)).sqrt()
    sizes["video_weight"] = (products * by_frame * g * g).sum((0, 1)).sqrt()
    weights = by_word * wt.square()[:, :, None, None] + by_frame * wv.square()
    sizes["logits"] = half * (products * weights).sum((1, 3)).sqrt()
    return {name: float(x.max()) if x.numel() else 0.0 for name, x in sizes.items()}


def error(got: Tensor, truth: Tensor) -> float:
    return float((got.detach().double().cpu() - truth).abs().max()) if truth.numel() else 0.0


def judge(
    problem: Problem,
    device: str = "cpu",
    *,
    probe: Tensor | None = None,
    floor: float = 0.0,
    floors: dict[str, float] | None = None,
) -> Result:
    """Compare ``drl_fast.token_interaction`` with the reference by the rule above, and return its result.

    ``floor`` is the size below which a true gradient counts as nothing but rounding; ``floors``, as of
    :func:`term_sizes`, are those of logits and of single inputs, where they are larger.
    """
    floors = floors or {}
    probe = probe_for(problem) if probe is None else probe
    ours = run(drl_fast.token_interaction, problem.map(lambda x: x if x.device.type == device else x.to(device)), probe)
    truth = run(reference.token_interaction, problem.double(), probe)
    rival = run(plain, problem.map(lambda x: x.cpu()), probe)
    dtype = problem.text.dtype
    assert ours.logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert ours.logits.shape == problem.pairs
    assert_close("logits", ours.logits, rival.logits, truth.logits, ATOL[dtype], max(1.0, floors.get("logits", 0.0)))
    for name, grad in ours.grads.items():
        assert grad.dtype == getattr(problem, name).dtype
        assert grad.shape == getattr(problem, name).shape
        atol = max(ATOL[dtype], 2 * torch.finfo(grad.dtype).eps)
        lowest = max(floor, floors.get(name, 0.0))
        assert_close(f"grad of {name}", grad, rival.grads[name], truth.grads[name], atol, lowest)
    return ours


def assert_close(name: str, ours: Tensor, rival: Tensor, truth: Tensor, atol: float, floor: float) -> None:
    scale = max(float(truth.abs().max()), floor) if truth.numel() else 0.0
    allowed = 2 * error(rival, truth) + atol * scale
    found = error(ours, truth)
    assert found <= allowed, f"{name}: error {found:.3g} > {allowed:.3g} (plain PyTorch's is {error(rival, truth):.3g})"
