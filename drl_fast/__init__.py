"""drl-fast: weighted token-wise interaction for text-video retrieval, fused.

>>> import torch, drl_fast
>>> layer = drl_fast.WTI(dim=512)
>>> logits = layer(torch.randn(4, 32, 512), torch.randn(6, 12, 512))  # texts x words, videos x frames
>>> logits.shape
torch.Size([4, 6])
"""

from . import functional, metrics, modules
from .functional import (
    Matches,
    cdcr_loss,
    cross_correlation_loss,
    info_nce,
    maxsim,
    token_contrastive_loss,
    token_interaction,
)
from .modules import DP, TI, WTI

__version__ = "0.1.0"

__all__ = [
    "DP",
    "TI",
    "WTI",
    "Matches",
    "cdcr_loss",
    "cross_correlation_loss",
    "functional",
    "info_nce",
    "maxsim",
    "metrics",
    "modules",
    "token_contrastive_loss",
    "token_interaction",
]


def __getattr__(name: str) -> object:
    """``drl_fast.reference``, the oracle, is there for whoever asks: nothing in the package does."""
    if name == "reference":
        import importlib

        return importlib.import_module("drl_fast.reference")
    raise AttributeError(f"module 'drl_fast' has no attribute {name!r}")
