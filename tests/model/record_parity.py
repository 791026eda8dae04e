"""Record the loss curve of a dense model of upstream's form, for test_parity.py.

    python tests/model/record_parity.py        # writes tests/golden/parity.json; takes some seconds

It is plain PyTorch in float64, written from the formulas (arXiv 2203.07111; CLIP, arXiv 2103.00020; CLIP4Clip's
sequential type, arXiv 2104.08860) without code of drl_fast. The towers also compute padding, and all similarities of
the batch are one tensor.
"""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
WEIGHTS = GOLDEN / "model" / "model_wti_seqtransf.npz"
CURVE = GOLDEN / "parity.json"

STEPS, DISTINCT, SEED = 30, 3, 8
PAIRS, WORDS, FRAMES = 8, 12, 5
START, END, PIXELS = 58, 59, 16
HEAD_WIDTH = 64
# Lambda is 0.01 instead of the published 0.001, so that CDCR matters in 30 steps. With a much larger one every frame
# matches the start token. Partners then have no variance, and this dense model returns NaN (drl_fast stays finite).
RECIPE = {
    "lr": 3e-4,
    "betas": [0.9, 0.98],
    "eps": 1e-6,
    "clip_norm": 1.0,
    "alpha_on": 0.11,
    "alpha_off": 0.06,
    "lambda": 0.01,
}
State = dict[str, Tensor]


def batches() -> list[dict[str, Tensor]]:
    """Make a batch per step, ``DISTINCT`` in turn: captions of 3 to 12 tokens, videos of 2 to 5 frames, two with holes.

    They only use numpy's uniform numbers, which do not depend on torch's version.
    """
    draw, made = np.random.Generator(np.random.PCG64(SEED)), []
    for _ in range(DISTINCT):
        words = 3 + np.floor(draw.random(PAIRS) * (WORDS - 2)).astype(np.int64)
        frames = 2 + np.floor(draw.random(PAIRS) * (FRAMES - 1)).astype(np.int64)
        ids = np.floor(draw.random((PAIRS, WORDS)) * START).astype(np.int64)
        place = np.arange(WORDS)
        ids[:, 0] = START
        ids[place == words[:, None] - 1] = END
        ids[place >= words[:, None]] = 0
        real = np.arange(FRAMES) < frames[:, None]
        real[0], real[1] = [True, False, True, False, True], [False, True, True, False, False]
        colour = (draw.random((PAIRS, FRAMES, 3, 1, 1)) - 0.5) * 6  # makes frames distinguishable
        video = ((draw.random((PAIRS, FRAMES, 3, PIXELS, PIXELS)) - 0.5) * 2 + colour).astype(np.float32)
        made.append(
            {
                "text_ids": torch.from_numpy(ids),
                "video": torch.from_numpy(video),
                "video_mask": torch.from_numpy(real.astype(np.int64)),
            }
        )
    return [made[step % DISTINCT] for step in range(STEPS)]


def digest(made: list[dict[str, Tensor]]) -> str:
    """Hash all batches, to check that a curve is compared on the same ones."""
    total = hashlib.sha256()
    for batch in made:
        for name in sorted(batch):
            total.update(batch[name].numpy().tobytes())
    return total.hexdigest()


def initial_state() -> State:
    """Load the recorded weights. The logit scale starts as CLIP's, because the recorded one is too small to learn."""
    with np.load(WEIGHTS) as file:
        state = {k.removeprefix("state."): torch.from_numpy(file[k].copy()) for k in file.files if k[:6] == "state."}
    return {**state, "clip.logit_scale": torch.tensor(np.log(1 / 0.07), dtype=torch.float32)}


# --- the model --------------------------------------------------------------------------------------------------------
def blocks(x: Tensor, state: State, prefix: str, attends: Tensor, eps: float) -> Tensor:
    """Apply pre-norm blocks to (R, N, D); ``attends`` broadcasts to (R, N, N): where each position may attend."""
    layer = 0
    while f"{prefix}.{layer}.ln_1.weight" in state:

        def get(name: str, own: str = f"{prefix}.{layer}.") -> tuple[Tensor, Tensor]:
            return state[f"{own}{name}weight"], state[f"{own}{name}bias"]

        dim = x.shape[-1]
        heads = dim // HEAD_WIDTH
        qkv = F.linear(F.layer_norm(x, (dim,), *get("ln_1."), eps), *get("attn.in_proj_"))
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        score = (q @ k.transpose(2, 3)) / HEAD_WIDTH**0.5
        mixed = score.masked_fill(~attends[..., None, :, :], -torch.inf).softmax(-1) @ v
        x = x + F.linear(mixed.transpose(1, 2).flatten(2), *get("attn.out_proj."))
        hidden = F.linear(F.layer_norm(x, (dim,), *get("ln_2."), eps), *get("mlp.c_fc."))
        x = x + F.linear(hidden * torch.sigmoid(1.702 * hidden), *get("mlp.c_proj."))
        layer += 1
    return x


def text_tokens(ids: Tensor, state: State) -> Tensor:
    n = ids.shape[1]
    x = state["clip.token_embedding.weight"][ids] + state["clip.positional_embedding"][:n]
    x = blocks(x, state, "clip.transformer.resblocks", torch.ones(1, n, n).tril().bool(), 1e-5)
    x = F.layer_norm(x, x.shape[-1:], state["clip.ln_final.weight"], state["clip.ln_final.bias"])
    return x @ state["clip.text_projection"]


def frame_tokens(video: Tensor, real: Tensor, state: State) -> Tensor:
    """Run every frame, also absent ones, through the image tower, then the temporal transformer and the residual."""
    own = "clip.visual."
    kernel = state[own + "conv1.weight"]
    patches = F.conv2d(video.flatten(0, 1), kernel, stride=kernel.shape[-1]).flatten(2).transpose(1, 2)
    head = state[own + "class_embedding"].expand(len(patches), 1, -1)
    x = torch.cat([head, patches], dim=1) + state[own + "positional_embedding"]
    x = F.layer_norm(x, x.shape[-1:], state[own + "ln_pre.weight"], state[own + "ln_pre.bias"])
    x = blocks(x, state, own + "transformer.resblocks", torch.ones(1, 1, x.shape[1], dtype=torch.bool), 1e-5)
    x = F.layer_norm(x[:, 0], x.shape[-1:], state[own + "ln_post.weight"], state[own + "ln_post.bias"])
    frames = (x @ state[own + "proj"]).unflatten(0, video.shape[:2])
    placed = frames + state["frame_position_embeddings.weight"][: video.shape[1]]
    return frames + blocks(placed, state, "transformerClip.resblocks", real[:, None, :], 1e-12)


def weights(x: Tensor, real: Tensor, state: State, head: str) -> Tensor:
    hidden = F.relu(F.linear(x, state[f"{head}.0.weight"], state[f"{head}.0.bias"]))
    score = F.linear(hidden, state[f"{head}.2.weight"], state[f"{head}.2.bias"]).squeeze(-1)
    return score.masked_fill(~real, -torch.inf).softmax(-1)


def losses(batch: dict[str, Tensor], state: State) -> tuple[Tensor, Tensor]:
    """Compute InfoNCE and CDCR 3."""
    ids, v_real = batch["text_ids"], batch["video_mask"] != 0
    t_real = torch.arange(ids.shape[1]) <= ids.argmax(1, keepdim=True)
    text = text_tokens(ids, state)
    video = frame_tokens(batch["video"].to(text.dtype), v_real, state)
    w_t, w_v = weights(text, t_real, state, "text_weight_fc"), weights(video, v_real, state, "video_weight_fc")
    t, v = F.normalize(text, dim=-1), F.normalize(video, dim=-1)
    similarity = torch.einsum("aid,bjd->abij", t, v)
    masked = similarity * t_real[:, None, :, None] * v_real[None, :, None, :]
    logits = torch.einsum("abi,ai->ab", masked.amax(3), w_t) + torch.einsum("abj,bj->ab", masked.amax(2), w_v)
    scaled = state["clip.logit_scale"].exp().clamp(max=100) * logits / 2
    target = torch.arange(len(scaled))
    contrast = (F.cross_entropy(scaled, target) + F.cross_entropy(scaled.T, target)) / 2

    own = similarity.diagonal(dim1=0, dim2=1).permute(2, 0, 1)
    best_frame = own.masked_fill(~v_real[:, None, :], -torch.inf).argmax(2)
    best_word = own.masked_fill(~t_real[:, :, None], -torch.inf).argmax(1)
    pair = target[:, None]
    sides = ((t, v[pair, best_frame], w_t, t_real), (v, t[pair, best_word], w_v, v_real))
    halves = [(standard(x[real]) * w[real][:, None]).T @ standard(y[real]) / len(ids) for x, y, w, real in sides]
    c = (halves[0] + halves[1]) / 2
    on = c.diagonal()
    off = c.square().sum() - on.square().sum()
    return contrast, RECIPE["alpha_on"] * (on - 1).square().sum() + RECIPE["alpha_off"] * off


def standard(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / x.std(0)


# --- training ---------------------------------------------------------------------------------------------------------
def train() -> list[dict[str, float]]:
    state = {name: x.double().requires_grad_() for name, x in initial_state().items()}
    adam = torch.optim.Adam(state.values(), lr=RECIPE["lr"], betas=tuple(RECIPE["betas"]), eps=RECIPE["eps"])
    curve = []
    for batch in batches():
        contrast, regulariser = losses(batch, state)
        total = contrast + RECIPE["lambda"] * regulariser
        adam.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(state.values(), RECIPE["clip_norm"])
        adam.step()
        curve.append({"total": total.item(), "info_nce": contrast.item(), "cdcr": regulariser.item()})
    return curve


if __name__ == "__main__":
    torch.set_num_threads(1)
    made = {
        "made_by": "python tests/model/record_parity.py",
        "dtype": "float64",
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "weights": f"model/{WEIGHTS.name}",
        "seed": SEED,
        "batches_sha256": digest(batches()),
        "recipe": RECIPE,
        "curve": train(),
    }
    CURVE.write_text(json.dumps(made, indent=1) + "\n")
    print(f"wrote {CURVE}: loss {made['curve'][0]['total']:.4f} to {made['curve'][-1]['total']:.4f}")
