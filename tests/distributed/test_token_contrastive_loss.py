"""The contrastive loss over ranks has a single process's value and gradients; an error reaches all ranks.

Starting a process takes seconds, so four processes run all cases, in groups of two, three and four. The ranks in a
group differ from the global ones.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from drl_fast import WTI, reference, token_contrastive_loss
from drl_fast.distributed import exchange
from drl_fast.ops import token_contrastive_loss as ops
from tests.distributed.ranks import error_of, on_ranks

SCALE, DIM, WORDS, FRAMES = 15.0, 8, 6, 4
WAYS = {"gathered": 1 << 30, "ring": 0}
# Global ranks of each group, and the number of pairs of each rank.
MEMBERS = {2: [1, 3], 3: [0, 2, 3], 4: [0, 1, 2, 3]}
ROWS = {2: [5, 9], 3: [4, 0, 7], 4: [3, 6, 1, 5]}
CASES: dict[str, dict[str, Any]] = {
    "uniform": {},
    "masks, owner and weights": {"masks": True, "owner": True, "weights": True},
    "exclude, masked on one rank": {"masks": "one", "masking": "exclude", "weights": True},
    "masking none, not normalised": {"masks": True, "masking": "none", "normalize": False, "owner": True},
    "double": {"dtype": torch.float64, "masks": True, "weights": True},
    "bfloat16": {"dtype": torch.bfloat16, "masks": True},
    "only video_weight": {"weights": True, "wanted": ("video_weight",)},
    "only text": {"wanted": ("text",)},
    "sigmoid": {"masks": True, "weights": True, "owner": True, "options": {"loss": "sigmoid"}},
    "soft pooling, one direction": {
        "masks": True,
        "options": {"pooling": "softmax", "temperature": 0.2, "direction": "v2t"},
    },
    "positives": {"positives": True, "weights": True},
    "positives, sigmoid, one way": {"positives": True, "options": {"loss": "sigmoid", "bidirectional": False}},
    "only logit_scale": {"wanted": ("logit_scale",), "owner": True},
}
LEAVES = ("text", "video", "text_weight", "video_weight", "logit_scale", "logit_bias")
SCALARS = {"logit_scale", "logit_bias"}


def share(rank: int, rows: list[int], case: dict[str, Any]) -> dict[str, Any]:
    """Draw one rank's arguments. Lengths differ between ranks."""
    generator = torch.Generator().manual_seed(rank)
    count, dtype = rows[rank], case.get("dtype", torch.float32)
    words, frames = WORDS - rank % 2, FRAMES - rank % 3
    # With positives a rank has more texts than videos, or fewer, or texts alone.
    texts = max(0, count + 2 - rank) if case.get("positives") else count
    found: dict[str, Any] = {
        **case.get("options", {}),
        "text": torch.randn(texts, words, DIM, generator=generator).to(dtype),
        "video": torch.randn(count, frames, DIM, generator=generator).to(dtype),
        "logit_scale": torch.tensor(SCALE),
        "masking": case.get("masking", "drl"),
        "normalize": case.get("normalize", True),
    }
    if found.get("loss") == "sigmoid":
        found["logit_bias"] = torch.tensor(-4.0)
    if case.get("positives"):
        found["positives"] = torch.randint(-1, max(count, 1), (texts,), generator=generator).clamp(max=count - 1)
    if case.get("weights"):
        found["text_weight"] = torch.rand(texts, words, generator=generator)
        found["video_weight"] = torch.rand(count, frames, generator=generator)
    if case.get("masks") is True or (case.get("masks") == "one" and rank == 0):
        found["text_mask"] = torch.rand(texts, words, generator=generator) < 0.7
        found["video_mask"] = torch.rand(count, frames, generator=generator) < 0.7
    if case.get("owner"):
        found["owner"] = torch.randint(0, 6, (count,), generator=generator)
    for name in case.get("wanted", LEAVES):
        if name in found:
            found[name].requires_grad_()
    return found


def all_logits(shares: list[dict[str, Any]]) -> Tensor:
    """Compute all logits in one process, block by block, because ranks have different lengths."""

    def block(texts: dict[str, Any], videos: dict[str, Any]) -> Tensor:
        sides = [
            (x[side].double() if x[side] is not None else None) if side in x else None
            for x, side in ((texts, "text"), (videos, "video"), (texts, "text_weight"), (videos, "video_weight"))
        ]
        names = ("masking", "normalize", "pooling", "temperature", "bidirectional")
        options = {name: texts[name] for name in names if name in texts}
        return reference.token_interaction(*sides, texts.get("text_mask"), videos.get("video_mask"), **options)

    return torch.cat([torch.cat([block(texts, videos) for videos in shares], 1) for texts in shares])


def one_process(rows: list[int], case: dict[str, Any]) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Compute the loss of all ranks' pairs and the gradients of each rank's inputs, in float64 from all logits."""
    shares = [share(rank, rows, case) for rank in range(len(rows))]
    scale = shares[0]["logit_scale"]
    x = all_logits(shares) * scale.double()
    if case.get("owner"):
        owner = torch.cat([one["owner"] for one in shares])
        x = x.masked_fill((owner[:, None] == owner).fill_diagonal_(False), -torch.inf)
    options: dict[str, Any] = {}
    if case.get("positives"):
        firsts = [sum(len(one["video"]) for one in shares[:rank]) for rank in range(len(rows))]
        moved = [
            torch.where(one["positives"] < 0, -1, one["positives"] + f) for one, f in zip(shares, firsts, strict=True)
        ]
        options["positives"] = torch.cat(moved)
    if "logit_bias" in shares[0]:
        bias = shares[0]["logit_bias"]
        loss = reference.sigmoid_loss(x, 1.0, bias.double(), **options)
    else:
        direction = shares[0].get("direction", "both")
        loss = reference.info_nce(x, 1.0, direction=direction, **options)
    for one in shares:
        for name in SCALARS & set(one):
            one[name] = shares[0][name]
    loss.backward()
    return loss.detach(), [{n: one[n].grad for n in LEAVES if n in one and one[n].grad is not None} for one in shares]


def everything(rank: int, world: int) -> dict[str, Any]:
    groups = {size: dist.new_group(members) for size, members in MEMBERS.items()}
    found = {}
    for size, members in MEMBERS.items():
        if rank in members:
            found[f"losses of {size}"] = losses(members.index(rank), size, groups[size])
    if rank in MEMBERS[2]:
        found["ddp"] = ddp_step(MEMBERS[2].index(rank), groups[2])
    if rank in MEMBERS[3]:
        found["errors"] = disagreements(MEMBERS[3].index(rank), groups[3])
    else:
        pair = {"text": torch.ones(2, 3, DIM), "video": torch.ones(2, 3, DIM), "logit_scale": 1.0}
        found["outside"] = error_of(lambda: token_contrastive_loss(**pair, process_group=groups[3]))
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(4, everything, tmp_path_factory.mktemp("ranks"))


def losses(rank: int, size: int, group: Any) -> dict[str, Any]:
    ops.BLOCK_BYTES, ops.LEAST_WORDS = 1, 2 * WORDS
    found = {}
    for way, budget in WAYS.items():
        exchange.GATHER_BYTES = budget
        for name, case in CASES.items():
            arguments = share(rank, ROWS[size], case)
            loss = token_contrastive_loss(**arguments, process_group=group)
            loss.backward()
            grads = {n: arguments[n].grad for n in LEAVES if n in arguments and arguments[n].grad is not None}
            found[f"{way}, {name}"] = (loss.detach(), grads)
        with torch.no_grad():
            arguments = share(rank, ROWS[size], {})
            found[f"{way}, no gradients"] = token_contrastive_loss(**arguments, process_group=group)
    return found


@pytest.mark.parametrize("size", ROWS)
def test_against_one_process(size: int, ranks: list[dict[str, Any]]) -> None:
    ranks = [ranks[member][f"losses of {size}"] for member in MEMBERS[size]]
    for name, case in CASES.items():
        truth, wanted = one_process(ROWS[size], case)
        for way in WAYS:
            key = f"{way}, {name}"
            for rank, (want, (loss, grads)) in enumerate(zip(wanted, (one[key] for one in ranks), strict=True)):
                assert torch.equal(loss, ranks[0][key][0]), key
                tight = case.get("dtype") != torch.bfloat16
                assert loss.item() == pytest.approx(truth.item(), rel=1e-5), key
                assert set(grads) == set(want), key
                for leaf in set(want) - SCALARS:
                    assert grads[leaf].dtype == want[leaf].dtype
                    difference = (grads[leaf].double() - size * want[leaf].double()).abs()
                    largest = max(float(one[leaf].double().abs().max()) for one in wanted if one[leaf].numel())
                    limit = (1e-4 if tight else 2e-2) * size * largest
                    assert not difference.numel() or difference.max() <= limit, (key, rank, leaf)
            for scalar in SCALARS & set(wanted[0]):
                mean = sum(one[key][1][scalar].item() for one in ranks) / size
                assert mean == pytest.approx(wanted[0][scalar].item(), rel=1e-4, abs=1e-6), key
    for way in WAYS:
        assert len({one[f"{way}, no gradients"].item() for one in ranks}) == 1
        assert ranks[0][f"{way}, no gradients"] == ranks[0][f"{way}, uniform"][0]


class Retriever(torch.nn.Module):
    """Two towers, WTI's heads and a temperature, whose gradients DDP averages."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.text, self.video = torch.nn.Linear(5, DIM), torch.nn.Linear(7, DIM)
        self.interaction = WTI(DIM)
        self.log_scale = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, text: Tensor, video: Tensor, group: Any) -> Tensor:
        t, v = self.text(text), self.video(video)
        weights = [
            head(x).squeeze(-1).softmax(-1)
            for head, x in ((self.interaction.text_weight_fc, t), (self.interaction.video_weight_fc, v))
        ]
        return token_contrastive_loss(t, v, *weights, logit_scale=self.log_scale.exp(), process_group=group)


def ddp_data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(11, WORDS, 5, generator=generator), torch.randn(11, FRAMES, 7, generator=generator)


def ddp_step(rank: int, group: Any) -> dict[str, dict[str, Tensor]]:
    text, video = ddp_data()
    found = {}
    for way, budget in WAYS.items():
        exchange.GATHER_BYTES = budget
        model = DistributedDataParallel(Retriever(), process_group=group)
        mine = slice(0, 4) if rank == 0 else slice(4, 11)
        model(text[mine], video[mine], group).backward()
        found[way] = {name: x.grad for name, x in model.module.named_parameters()}
    return found


def test_ddp_has_the_gradient_of_one_process(ranks: list[dict[str, Any]]) -> None:
    """For encoders, weight heads and temperature, with unequal rows."""
    model = Retriever()
    model(*ddp_data(), None).backward()
    for found in (ranks[member]["ddp"] for member in MEMBERS[2]):
        for way in WAYS:
            assert len(found[way]) > 8
            for name, parameter in model.named_parameters():
                assert float(parameter.grad.abs().max()) > 0
                torch.testing.assert_close(found[way][name], parameter.grad, rtol=1e-4, atol=1e-6, msg=f"{way}, {name}")


def disagreements(rank: int, group: Any) -> dict[str, str]:
    base = {"text": torch.ones(2, 3, DIM), "video": torch.ones(2, 4, DIM), "logit_scale": 2.0}
    last = rank == 2
    changes: dict[str, dict[str, Any]] = {
        "own error": {"logit_scale": -1.0},
        "not a tensor": {"text": "words"},
        "shapes": {"video": torch.ones(3, 4, DIM)},
        "D": {"text": torch.ones(2, 3, 5), "video": torch.ones(2, 4, 5)},
        "dtype": {"text": torch.ones(2, 3, DIM).double(), "video": torch.ones(2, 4, DIM).double()},
        "masking": {"masking": "exclude"},
        "loss": {"loss": "sigmoid", "logit_bias": -10.0},
        "pooling": {"pooling": "softmax", "temperature": 0.5},
        "positives": {"positives": torch.tensor([0, 2])},
        "scale": {"logit_scale": 3.0},
        "owner": {"owner": torch.zeros(2, dtype=torch.int64)},
        "gradients": {"text": torch.ones(2, 3, DIM, requires_grad=True)},
        "device": {"text": torch.ones(2, 3, DIM, device="meta"), "video": torch.ones(2, 4, DIM, device="meta")},
        "no error": {},
    }
    found = {}
    for name, change in changes.items():
        arguments = {**base, **(change if last else {})}
        found[name] = error_of(lambda a=arguments: token_contrastive_loss(**a, process_group=group))
    empty = {"text": torch.ones(0, 3, DIM), "video": torch.ones(0, 4, DIM), "logit_scale": 2.0}
    found["no pair"] = error_of(lambda: token_contrastive_loss(**empty, process_group=group))
    return found


def test_all_ranks_raise(ranks: list[dict[str, Any]]) -> None:
    first, _, last = (ranks[member]["errors"] for member in MEMBERS[3])
    assert first["own error"].startswith(
        "RuntimeError: token_contrastive_loss failed on rank 2: ValueError: logit_scale"
    )
    assert last["own error"].startswith("ValueError: logit_scale must be positive and finite, got -1.0")
    assert "failed on rank 2: TypeError: text must be a torch.Tensor" in first["not a tensor"]
    assert "failed on rank 2: ValueError: video must have as many rows as text" in first["shapes"]
    assert "failed on rank 2: ValueError: positives must lie in 0..1" in first["positives"]
    assert "failed on rank 2: ValueError: process_group must support text's device meta" in first["device"]
    assert "gloo for cpu tensors" in last["device"]
    for name, words in {
        "D": "D must be the same on all ranks of the group, got 8 on ranks 0, 1 and 5 on rank 2",
        "dtype": "dtype must be .* got torch.float32 on ranks 0, 1 and torch.float64 on rank 2",
        "masking": "masking must be .* got drl on ranks 0, 1 and exclude on rank 2",
        "loss": "loss must be .* got softmax on ranks 0, 1 and sigmoid on rank 2",
        "pooling": "pooling must be .* got max on ranks 0, 1 and softmax at temperature 0.5 on rank 2",
        "scale": "logit_scale must be .* got 2.0 on ranks 0, 1 and 3.0 on rank 2",
        "owner": "owner must be .* got None on ranks 0, 1 and ids on rank 2",
        "gradients": "what needs gradients must be .* got nothing on ranks 0, 1 and text on rank 2",
        "no pair": "text must hold at least one pair, got none on any rank of the group",
    }.items():
        assert first[name] == last[name]
        with pytest.raises(ValueError, match=words):
            raise ValueError(first[name])
        assert first[name].startswith("ValueError: ")
    assert first["no error"] == last["no error"] == "no error"
    assert "process_group must be a torch.distributed.ProcessGroup, got a group that this" in ranks[1]["outside"]


def test_a_group_of_another_type() -> None:
    with pytest.raises(TypeError, match=r"process_group must be a torch\.distributed\.ProcessGroup, got str"):
        token_contrastive_loss(torch.ones(2, 3, 4), torch.ones(2, 3, 4), logit_scale=1.0, process_group="world")
