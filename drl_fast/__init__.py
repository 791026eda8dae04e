"""drl-fast: weighted token-wise interaction for text-video retrieval, fused.

>>> import torch, drl_fast
>>> layer = drl_fast.WTI(dim=512)
>>> logits = layer(torch.randn(4, 32, 512), torch.randn(6, 12, 512))  # texts x words, videos x frames
>>> logits.shape
torch.Size([4, 6])
"""

from . import interrupts

interrupts.end_at_once()  # before torch is loaded, where this process is the command line

from . import functional, metrics, modules  # noqa: E402
from .functional import (  # noqa: E402
    Matches,
    PreparedVideos,
    cdcr_loss,
    cross_correlation_loss,
    info_nce,
    maxsim,
    prepare,
    rerank,
    sigmoid_loss,
    token_contrastive_loss,
    token_interaction,
    token_maxsim,
    topk,
)
from .modules import DP, HI, MLP, TI, WTI, XTI, MeanMaxSim  # noqa: E402
from .ops.backend import backend, force_from_environment  # noqa: E402

try:
    force_from_environment()
except (ValueError, RuntimeError) as error:
    if interrupts.is_command_line():
        raise SystemExit(f"error: {error}") from None
    raise

__version__ = "0.1.0"

__all__ = [
    "DP",
    "HI",
    "MLP",
    "TI",
    "WTI",
    "XTI",
    "Matches",
    "MeanMaxSim",
    "PreparedVideos",
    "backend",
    "cdcr_loss",
    "cross_correlation_loss",
    "functional",
    "info_nce",
    "maxsim",
    "metrics",
    "modules",
    "prepare",
    "rerank",
    "sigmoid_loss",
    "token_contrastive_loss",
    "token_interaction",
    "token_maxsim",
    "topk",
]


def __getattr__(name: str) -> object:
    """Load what the import of the package does not: what needs open_clip, matplotlib or lancedb, and the oracle."""
    import importlib

    if name == "DRL":
        return importlib.import_module("drl_fast.model.drl").DRL
    if name == "Head":
        return importlib.import_module("drl_fast.model.head").Head
    if name == "Retriever":
        return importlib.import_module("drl_fast.search.retriever").Retriever
    if name == "plot_matches":
        return importlib.import_module("drl_fast.filmstrip").plot_matches
    if name == "reference":
        return importlib.import_module("drl_fast.reference")
    raise AttributeError(f"module 'drl_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    # `from drl_fast import *` leaves these out, since open_clip, matplotlib and lancedb may not be installed.
    return sorted([*__all__, "DRL", "Head", "Retriever", "plot_matches", "reference", "__version__"])
