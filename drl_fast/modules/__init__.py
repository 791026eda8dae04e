"""Layers as ``nn.Module``.

WTI, TI, HI and DP hold parameters and options; their arithmetic is in :mod:`drl_fast.functional`. XTI, MLP and the
temporal modules are ordinary networks, whose arithmetic is here.
"""

from .dp import DP
from .hi import HI
from .interactions import INTERACTIONS, build_interaction
from .mlp import MLP
from .temporal import SeqLSTM, SeqTransf
from .ti import TI
from .wti import WTI
from .xti import XTI

__all__ = ["DP", "HI", "INTERACTIONS", "MLP", "TI", "WTI", "XTI", "SeqLSTM", "SeqTransf", "build_interaction"]
