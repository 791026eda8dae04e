"""Every text against every video through a network that takes pairs, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def score_pairs(
    layer: nn.Module, score: Callable[..., Tensor], text: Tensor, video: tuple[Tensor, ...], pairs: int
) -> Tensor:
    """Logits (A, B) of ``score``, at most ``pairs`` of them at a time.

    While gradients are recorded, a block keeps nothing but its logits and runs again in the backward pass, so that
    one block's activations are all that ever exist.

    Args:
        layer: the module whose parameters ``score`` reads.
        score: ``score(text rows (a, ...), video rows (b, ...), ...) -> (a, b)``.
        text: (A, ...).
        video: tensors of B rows each.
    """
    columns = min(max(len(video[0]), 1), pairs)
    rows = max(1, pairs // columns)
    run = score
    if torch.is_grad_enabled() and max(len(text), 1) * max(len(video[0]), 1) > rows * columns:
        run = _forgetful(layer, score)
    blocks = list(zip(*(x.split(columns) for x in video), strict=True))
    return torch.cat([torch.cat([run(t, *v) for v in blocks], dim=1) for t in text.split(rows)])


def _forgetful(layer: nn.Module, score: Callable[..., Tensor]) -> Callable[..., Tensor]:
    if torch.compiler.is_compiling():  # parameters are the graph's inputs there
        return lambda *rows: checkpoint(score, *rows, use_reentrant=False)
    # The backward pass must see the parameters of this call. Those of torch.func.functional_call are gone from the
    # module by then.
    parameters = {f"layer.{name}": p for name, p in layer.named_parameters()}
    caller = _Caller(layer, score)

    def again(*rows: Tensor) -> Tensor:
        return torch.func.functional_call(caller, parameters, rows)

    return lambda *rows: checkpoint(again, *rows, use_reentrant=False)


class _Caller(nn.Module):
    """One of a layer's methods as a module of its own, which ``functional_call`` can call."""

    def __init__(self, layer: nn.Module, score: Callable[..., Tensor]) -> None:
        super().__init__()
        self.layer = layer
        self.score = score

    def forward(self, *rows: Tensor) -> Tensor:
        return self.score(*rows)
