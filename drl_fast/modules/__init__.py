"""Layers as ``nn.Module``: parameters and nothing else; the arithmetic is in :mod:`drl_fast.functional`.

What is made of linear layers all through (XTI, MLP, the temporal modules) has its arithmetic here.
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
