"""The layers against recorded results of public code (see tests/golden/README.md).

Every file in the folders is a case, so a new file needs no change here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import drl_fast
from drl_fast import functional, reference
from drl_fast.modules.wti import weight_head
from tests.implementations import Implementation
from tests.oracle import error

GOLDEN = Path(__file__).parent / "golden"
# (logits, gradients), relative to the largest entry.
TOLERANCE = {torch.float64: (1e-6, 1e-5), torch.float32: (5e-6, 3e-4)}
HALVES = [torch.bfloat16, torch.float16]


@dataclass
class Case:
    """One recorded call: a layer, its inputs and its result."""

    arrays: dict[str, Tensor]
    layer: nn.Module
    plain: Callable[..., Tensor]  # the public code's formula, in the inputs' dtype
    logits: Tensor
    masks: tuple[Tensor | None, Tensor | None]
    scale: float = 1.0

    def run(self, dtype: torch.dtype, device: str = "cpu", plain: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """Return logits and the leaves by name, for gradients."""
        self.layer.to(device=device, dtype=dtype)
        leaves = {n: self.arrays[n].to(device, dtype).requires_grad_() for n in ("text", "video")}
        masks = [None if m is None else m.to(device) for m in self.masks]
        if plain:
            logits = self.plain(self.layer, leaves["text"], leaves["video"], *masks)
        else:
            logits = self.layer(leaves["text"], leaves["video"], *masks)
        return logits * self.scale, {**leaves, **dict(self.layer.named_parameters())}


def load(path: Path) -> tuple[dict[str, Tensor], dict]:
    with np.load(path) as file:
        arrays = {
            k: torch.from_numpy(file[k]) if file[k].ndim else torch.tensor(file[k].item()).double()
            for k in file.files
            if k != "meta"
        }
        return arrays, json.loads(str(file["meta"])) if "meta" in file.files else {}


def heads_from(arrays: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the parameters of one weight head, with its name removed."""
    prefix = f"param.{name}."
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def plain_pair(layer: nn.Module, text: Tensor, video: Tensor, *masks: Tensor | None, **options: bool) -> Tensor:
    """Compute WTI and TI as public code does: dense, in one dtype."""
    t_mask, v_mask = (reference.real_mask(m, x) for m, x in zip(masks, (text, video), strict=True))
    if isinstance(layer, drl_fast.WTI):
        raw = layer.weight_input == "raw"
        t_in, v_in = (text, video) if raw else (F.normalize(text, dim=-1), F.normalize(video, dim=-1))
        wt = layer.text_weight_fc(t_in).squeeze(-1).masked_fill(~t_mask, -torch.inf).softmax(-1)
        wv = (
            layer.video_weight_fc(v_in).squeeze(-1).masked_fill(~v_mask, -torch.inf).softmax(-1)
            if layer.bidirectional
            else None
        )
    else:
        wt, wv = t_mask.to(text) / t_mask.sum(-1, keepdim=True), v_mask.to(video) / v_mask.sum(-1, keepdim=True)
    t, v = (F.normalize(text, dim=-1), F.normalize(video, dim=-1)) if layer.normalize else (text, video)
    s = torch.einsum("aid,bjd->abij", t, v)
    if layer.masking != "none":
        s = torch.einsum("abij,ai,bj->abij", s, t_mask.to(s), v_mask.to(s))
    by_text = torch.einsum("abi,ai->ab", s.amax(3), wt)
    return (by_text + torch.einsum("abj,bj->ab", s.amax(2), wv)) / 2 if layer.bidirectional else by_text


def plain_dp(layer: nn.Module, text: Tensor, video: Tensor, t_mask: Tensor, v_mask: Tensor) -> Tensor:
    last = (t_mask * torch.arange(1, t_mask.shape[1] + 1)).argmax(-1)
    t = F.normalize(text[torch.arange(len(text)), last], dim=-1)
    mean = (F.normalize(video, dim=-1) * v_mask[..., None].to(video)).sum(1) / v_mask.sum(1, keepdim=True).to(video)
    return t @ F.normalize(mean, dim=-1).T


# The public DRL code ---------------------------------------------------------------------------------------------


def drl_case(path: Path) -> tuple[Case, dict]:
    arrays, meta = load(path)
    if meta["interaction"] == "wti":
        layer: nn.Module = drl_fast.WTI(arrays["text"].shape[2], meta["wti_arch"])
        state = {f"{n}.{k}": v for n in ("text_weight_fc", "video_weight_fc") for k, v in heads_from(arrays, n).items()}
        layer.double().load_state_dict(state, strict=True)
    else:
        layer = {"ti": drl_fast.TI, "dp": drl_fast.DP}[meta["interaction"]]()
    plain = plain_dp if meta["interaction"] == "dp" else plain_pair
    masks = (arrays["text_mask"], arrays["video_mask"])
    return Case(arrays, layer, plain, arrays["eval_logits"], masks), meta


DRL = sorted(p for p in GOLDEN.glob("*.npz") if p.stem != "metrics")


@pytest.fixture(params=DRL, ids=lambda p: p.stem)
def drl(request: pytest.FixtureRequest) -> tuple[Case, dict]:
    return drl_case(request.param)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_public_code(impl: Implementation, drl: tuple[Case, dict], dtype: torch.dtype) -> None:
    case, meta = drl
    for_logits, for_grads = TOLERANCE[dtype]
    logits, leaves = case.run(dtype, impl.device)
    check("eval_logits", logits, case.logits, for_logits)
    log_scale = case.arrays["param.clip.logit_scale"].to(impl.device, dtype).requires_grad_()
    check("train_logits", logits * log_scale.exp(), case.arrays["train_logits"], for_logits)
    loss = drl_fast.info_nce(logits, log_scale.exp())
    # The loss is a difference of logits, so its error is relative to their size.
    allowed = for_logits * max(1.0, float(case.arrays["train_logits"].abs().max()))
    assert loss.item() == pytest.approx(float(case.arrays["info_nce"]), abs=allowed)
    if meta["cdcr"] != 0:
        decorrelation = cdcr(case, meta, leaves, impl.device)
        assert decorrelation.item() == pytest.approx(float(case.arrays["cdcr_loss"]), rel=1e-4)
        total = loss + meta["cdcr_lambda"] * decorrelation
        assert total.item() == pytest.approx(float(case.arrays["loss"]), abs=allowed)
        loss = loss + 0.1 * decorrelation  # the recorded gradients are of this sum
    loss.backward()
    check("grad of logit_scale", log_scale.grad, case.arrays["grad.clip.logit_scale"], for_grads)
    check_grads(leaves, {name: case.arrays[f"grad.{name}"] for name in leaves}, for_grads)


def cdcr(case: Case, meta: dict, leaves: dict[str, Tensor], device: str) -> Tensor:
    """The public code's channel decorrelation 1 (pooled), 2 (tokens) or 3 (weighted tokens)."""
    assert meta["grad_of"] == "info_nce + 0.1 * cdcr_loss"
    text, video = leaves["text"], leaves["video"]
    t_mask, v_mask = (m.to(device) for m in case.masks)
    alphas = {"alpha_on": meta["cdcr_alpha1"], "alpha_off": meta["cdcr_alpha2"]}
    if meta["cdcr"] == 1:
        return functional.cross_correlation_loss(*case.layer.pool(text, video, t_mask, v_mask), **alphas)
    weights = case.layer.weights(text, video, t_mask, v_mask) if meta["cdcr"] == 3 else (None, None)
    return functional.cdcr_loss(text, video, *weights, t_mask, v_mask, **alphas)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_public_code_in_half_precision(impl: Implementation, drl: tuple[Case, dict], dtype: torch.dtype) -> None:
    case, meta = drl
    log_scale = case.arrays["param.clip.logit_scale"]

    def loss(logits: Tensor) -> Tensor:
        return drl_fast.info_nce(logits, log_scale.exp().to(logits.device))

    compare_half(case, dtype, impl.device, loss, with_grads=meta["cdcr"] == 0)


# Another codebase's function -------------------------------------------------------------------------------------


def dropin_case(path: Path) -> tuple[Case, dict]:
    arrays, meta = load(path)
    knobs = meta["knobs"]
    options = {k: knobs[k] for k in ("masking", "normalize", "bidirectional")}
    if knobs["weights"] == "learned":
        layer: nn.Module = dropin_wti(arrays, knobs, options)
    else:
        assert knobs["weights"] == "mask", f"no layer for weights = {knobs['weights']}"
        layer = drl_fast.TI(**options)
    masks = [arrays.get(f"{side}_mask") if knobs[f"{side}_mask"] else None for side in ("text", "video")]
    # For rows without real tokens the other code returns NaN and ours 0.
    logits = arrays["logits"].nan_to_num(0.0) if knobs["empty_row"] == "nan" else arrays["logits"]
    return Case(arrays, layer, plain_pair, logits, tuple(masks), knobs["scale"]), meta


def dropin_wti(arrays: dict[str, Tensor], knobs: dict, options: dict) -> nn.Module:
    dim = arrays["text"].shape[2]
    layer = drl_fast.WTI(dim, weight_input=knobs["weight_input"], **options)
    # head_sizes: the widths before, between and after the linear layers. The two heads may differ.
    for side in ("text", "video") if knobs["bidirectional"] else ("text",):
        sizes = knobs["head_sizes"][knobs[f"{side}_head"]]
        head = weight_head(sizes[0], sizes[1], len(sizes) - 1).double()
        head.load_state_dict(heads_from(arrays, knobs[f"{side}_head"]), strict=True)
        setattr(layer, f"{side}_weight_fc", head)
    return layer.double()


@pytest.fixture(params=sorted((GOLDEN / "dropin").glob("*.npz")), ids=lambda p: p.stem)
def dropin(request: pytest.FixtureRequest) -> tuple[Case, dict]:
    return dropin_case(request.param)


def recorded_gradient(case: Case, knobs: dict, name: str) -> Tensor:
    """Return a parameter's recorded gradient, which is stored under the host's name for the head."""
    head, _, rest = name.partition(".")
    own = {"text_weight_fc": knobs.get("text_head", head), "video_weight_fc": knobs.get("video_head", head)}.get(
        head, head
    )
    return case.arrays[f"grad.{own}.{rest}" if rest else f"grad.{name}"]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_dropin(impl: Implementation, dropin: tuple[Case, dict], dtype: torch.dtype) -> None:
    case, meta = dropin
    for_logits, for_grads = TOLERANCE[dtype]
    logits, leaves = case.run(dtype, impl.device)
    check("logits", logits, case.logits, for_logits)
    (logits * case.arrays["probe"].to(logits)).sum().backward()
    check_grads(leaves, {name: recorded_gradient(case, meta["knobs"], name) for name in leaves}, for_grads)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_dropin_in_half_precision(impl: Implementation, dropin: tuple[Case, dict], dtype: torch.dtype) -> None:
    case, meta = dropin
    compare_half(
        case, dtype, impl.device, lambda logits: (logits * case.arrays["probe"].to(logits)).sum(), knobs=meta["knobs"]
    )


# Comparison ------------------------------------------------------------------------------------------------------


def scale_of(name: str, recorded: dict[str, Tensor]) -> float:
    """Return the largest entry of a gradient; for a head's parameters, of the whole head's gradients.

    A head's last bias adds the same number to all scores of a row, which softmax cancels. Its true gradient is 0, so it
    cannot serve as the scale of rounding errors.
    """
    head = name.partition(".")[0]
    return max(float(x.abs().max()) for n, x in recorded.items() if n.partition(".")[0] == head)


def check_grads(leaves: dict[str, Tensor], recorded: dict[str, Tensor], tolerance: float) -> None:
    for name, leaf in leaves.items():
        check(f"grad of {name}", leaf.grad, recorded[name], tolerance, scale_of(name, recorded))


def check(name: str, ours: Tensor, recorded: Tensor, tolerance: float, scale: float | None = None) -> None:
    scale = float(recorded.abs().max()) if scale is None else scale
    # If every true gradient is 0 (a softmax over one token), compare with the size of the inputs.
    found = error(ours, recorded) / max(scale, 1e-4)
    assert found <= tolerance, f"{name}: {found:.3g} of the largest entry, {tolerance:.3g} allowed"


def compare_half(
    case: Case,
    dtype: torch.dtype,
    device: str,
    loss: Callable[[Tensor], Tensor],
    with_grads: bool = True,
    knobs: dict | None = None,
) -> None:
    """Check that our error is at most twice that of the public code's formula in the same dtype."""
    errors = []
    for plain in (False, True):
        logits, leaves = case.run(dtype, "cpu" if plain else device, plain)
        case.layer.zero_grad()
        loss(logits).backward()
        found = {"logits": error(logits, case.logits)}
        if with_grads:
            recorded = {n: recorded_gradient(case, knobs or {}, n) for n in leaves}
            scale = {n: scale_of(n, recorded) for n in leaves}
            found |= {n: error(x.grad, recorded[n]) for n, x in leaves.items()}
        errors.append(found)
    for name, found in errors[0].items():
        atol = torch.finfo(dtype).eps * (scale[name] if name in leaves else 1.0)
        assert found <= 2 * errors[1][name] + atol, f"{name}: {found:.3g}, plain PyTorch {errors[1][name]:.3g}"


def test_there_are_cases() -> None:
    assert len(DRL) >= 9
    assert list((GOLDEN / "dropin").glob("*.npz"))
