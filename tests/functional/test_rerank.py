"""Bad arguments of rerank raise with the argument, its value and what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import drl_fast

T, C = torch.zeros(2, 3, 8), torch.zeros(2, 4, 5, 8)
FLAT = C.flatten(0, 1)
META = torch.device("meta")


def ragged(*offsets: int) -> dict[str, Any]:
    return {"candidates": FLAT, "offsets": torch.tensor(offsets)}


# By what is wrong: the changed arguments, the error type, and a pattern of its message.
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "text of rank 2": ({"text": T[0]}, ValueError, r"text must be \(A, Nt, D\), got shape \(3, 8\).*unsqueeze"),
    "candidates a list": ({"candidates": list(C)}, TypeError, r"candidates must be a torch\.Tensor, got list of 2"),
    "candidates of token_interaction": (
        {"candidates": FLAT},
        ValueError,
        r"candidates must be \(A, K, Nv, D\), got shape \(8, 5, 8\).*pass offsets=.*call token_interaction",
    ),
    "candidates of rank 5": (
        {"candidates": C[None]},
        ValueError,
        r"candidates must be \(A, K, Nv, D\), got shape \(1, 2, 4, 5, 8\)",
    ),
    "candidates of other texts": (
        {"candidates": C[:1]},
        ValueError,
        r"candidates must have a row for each of the 2 texts, got shape \(1, 4, 5, 8\); pass offsets=",
    ),
    "candidates of rank 4 with offsets": (
        {"offsets": torch.tensor([0, 4, 8])},
        ValueError,
        r"candidates must be \(sum K, Nv, D\), got shape \(2, 4, 5, 8\)",
    ),
    "another width": ({"candidates": C[..., :7]}, ValueError, "candidates must have D = 8 channels.*got 7.*project"),
    "another dtype": (
        {"candidates": C.half()},
        TypeError,
        r"candidates must have text's dtype torch\.float32, got torch\.float16.*candidates\.to\(text\.dtype\)",
    ),
    "another device": ({"candidates": C.to(META)}, ValueError, "candidates must be on text's device cpu, got meta"),
    "integer features": ({"candidates": C.long()}, TypeError, r"candidates must be float32.*candidates\.float\(\)"),
    "no frames": ({"candidates": C[:, :, :0]}, ValueError, r"candidates must be .*at least one token.*\(2, 4, 0, 8\)"),
    "weights of another shape": (
        {"candidate_weight": torch.ones(2, 5)},
        ValueError,
        r"candidate_weight must be \(A, K, Nv\) = \(2, 4, 5\) to match candidates, got \(2, 5\)",
    ),
    "integer weights": (
        {"candidate_weight": torch.ones(2, 4, 5).int()},
        TypeError,
        "candidate_weight must be floating point, got torch.int32; pass a mask as candidate_mask=",
    ),
    "text weights of another shape": ({"text_weight": torch.ones(3, 2)}, ValueError, r"text_weight must be.*\(2, 3\)"),
    "weights that nothing reads": (
        {"candidate_weight": torch.ones(2, 4, 5), "bidirectional": False},
        ValueError,
        "candidate_weight must be None when bidirectional=False",
    ),
    "ragged weights that are not flat": (
        {**ragged(0, 3, 8), "candidate_weight": torch.ones(2, 4, 5)},
        ValueError,
        r"candidate_weight must be \(sum K, Nv\) = \(8, 5\) to match candidates, got \(2, 4, 5\)",
    ),
    "a mask of another shape": (
        {"candidate_mask": torch.ones(2, 4)},
        ValueError,
        r"candidate_mask must be \(A, K, Nv\) = \(2, 4, 5\)",
    ),
    "an additive mask": (
        {"candidate_mask": -torch.ones(2, 4, 5)},
        ValueError,
        "candidate_mask must not be negative, got -1, which looks like an additive mask",
    ),
    "NaN in a mask": ({"candidate_mask": torch.full((2, 4, 5), torch.nan)}, ValueError, "candidate_mask must be zero"),
    "prepared candidates": (
        {"candidates": drl_fast.prepare(FLAT)},
        TypeError,
        "candidates must be a torch.Tensor, got PreparedVideos.*; pass the tokens of each text's candidates",
    ),
    "offsets a list": (
        {"candidates": FLAT, "offsets": [0, 3, 8]},
        TypeError,
        r"offsets must be a torch\.Tensor, got list of 3; convert it with torch\.as_tensor\(offsets\)",
    ),
    "int32 offsets": (
        {"candidates": FLAT, "offsets": torch.tensor([0, 3, 8]).int()},
        TypeError,
        r"offsets must be int64, got torch\.int32; convert them with offsets\.long\(\)",
    ),
    "one offset per text": (ragged(0, 3), ValueError, r"offsets must be \(A \+ 1,\) = \(3,\).*got \(2,\)"),
    "offsets on another device": (
        {"candidates": FLAT, "offsets": torch.zeros(3, dtype=torch.int64, device=META)},
        ValueError,
        r"offsets must be on text's device cpu, got meta",
    ),
    "offsets that begin late": (ragged(1, 3, 8), ValueError, "offsets must go from 0 to .* 8, got 1 to 8"),
    "offsets that end early": (ragged(0, 3, 7), ValueError, "offsets must go from 0 to .* 8, got 0 to 7"),
    "offsets that end late": (ragged(0, 3, 9), ValueError, "offsets must go from 0 to .* 8, got 0 to 9"),
    "offsets that decrease": (
        {"text": torch.zeros(3, 3, 8), **ragged(0, 5, 3, 8)},
        ValueError,
        "offsets must not decrease, got 5 before 3 at text 1; build them with a cumulative sum",
    ),
    "an unknown masking": ({"masking": "zero"}, ValueError, "masking must be one of 'drl', 'exclude', 'none', got"),
    "an unknown pooling": (
        {"pooling": "mean"},
        ValueError,
        "pooling must be one of 'max', 'softmax', 'logsumexp', got",
    ),
    "a temperature of the maximum": ({"temperature": 0.1}, ValueError, "temperature must be 1 with pooling='max'"),
    "no temperature": ({"pooling": "softmax", "temperature": 0}, ValueError, "temperature must be positive"),
    "a number as flag": ({"normalize": 1}, TypeError, "normalize must be True or False, got int 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    changes, error, message = BAD[case]
    with pytest.raises(error, match=message):
        drl_fast.rerank(**{"text": T, "candidates": C, **changes})


def test_layers_check_too() -> None:
    for layer in (drl_fast.TI(), drl_fast.WTI(8)):
        with pytest.raises(ValueError, match=r"candidates must be \(A, K, Nv, D\), got shape \(8, 5, 8\)"):
            layer.rerank(T, FLAT)
        with pytest.raises(ValueError, match=r"offsets must go from 0 to .* 8, got 0 to 3"):
            layer.rerank(T, FLAT, offsets=torch.tensor([0, 3, 3]))
    with pytest.raises(ValueError, match="must have D = 4 channels, the layer's dim, got 8"):
        drl_fast.WTI(4).rerank(T, C)


def test_bad_shapes_raise_under_compilation() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(drl_fast.rerank, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="candidates must have D = 8 channels"):
        compiled(T, C[..., :7])
    torch._dynamo.reset()


def test_no_candidates() -> None:
    assert drl_fast.rerank(T, C[:, :0]).shape == (2, 0)
    assert drl_fast.rerank(T[:0], C[:0]).shape == (0, 4)
    assert drl_fast.rerank(T, FLAT[:0], offsets=torch.tensor([0, 0, 0])).shape == (0,)
