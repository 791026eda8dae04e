"""Interactions as ``nn.Module``: parameters and nothing else; the arithmetic is in :mod:`drl_fast.functional`."""

from .dp import DP
from .ti import TI
from .wti import WTI

__all__ = ["DP", "TI", "WTI"]
