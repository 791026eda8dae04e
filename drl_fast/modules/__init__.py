"""Layers as ``nn.Module``.

WTI, TI, HI, DP and MeanMaxSim hold parameters and options; their similarities are in :mod:`drl_fast.functional`. XTI,
MLP and the temporal modules are ordinary networks, whose arithmetic is here.
"""

from .dp import DP
from .hi import HI
from .interactions import INTERACTIONS, build_interaction
from .mean_maxsim import MeanMaxSim
from .mlp import MLP
from .temporal import SeqLSTM, SeqTransf
from .ti import TI
from .wti import WTI
from .xti import XTI

__all__ = [
    "DP",
    "HI",
    "INTERACTIONS",
    "MLP",
    "TI",
    "WTI",
    "XTI",
    "MeanMaxSim",
    "SeqLSTM",
    "SeqTransf",
    "build_interaction",
]
