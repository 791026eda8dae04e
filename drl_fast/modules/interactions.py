"""Build an interaction layer from its name."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from .. import validation
from .dp import DP
from .hi import HI
from .mean_maxsim import MeanMaxSim
from .mlp import MLP
from .ti import TI
from .wti import WTI
from .xti import XTI

INTERACTIONS: dict[str, type[nn.Module]] = {
    "dp": DP,
    "hi": HI,
    "mlp": MLP,
    "xti": XTI,
    "ti": TI,
    "wti": WTI,
    "mean_maxsim": MeanMaxSim,
}


def build_interaction(name: str, dim: int, **options: Any) -> nn.Module:
    """Build an interaction layer by name.

    Args:
        name: ``"dp"``, ``"hi"``, ``"mlp"``, ``"xti"``, ``"ti"``, ``"wti"`` or ``"mean_maxsim"``.
        dim: D, the width of the tokens; DP and TI ignore it.
        options: the layer's own options.

    Raises:
        ValueError: an unknown name, or a value that the layer rejects.
        TypeError: an option that the layer does not have.
    """
    validation.option("interaction", name, tuple(INTERACTIONS))
    layer = INTERACTIONS[name]
    dim = validation.positive_int("dim", dim)
    known = list(inspect.signature(layer.__init__).parameters)[1:] if layer.__init__ is not nn.Module.__init__ else []
    for option in options:
        if option not in known:
            choices = ", ".join(k for k in known if k != "dim") or "none"
            raise TypeError(f"{option} must be an option of {layer.__name__}, which has: {choices}; leave it out")
    return layer(dim, **options) if "dim" in known else layer(**options)
