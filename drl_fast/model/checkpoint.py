"""The names of :mod:`drl_fast.model.pretrained` and :mod:`drl_fast.model.upstream`, under the path they had before."""

from .pretrained import BEST, CONFIG, FORMAT, WEIGHTS
from .upstream import NAMES, OPTIONS, infer_options, read_state, to_ours

__all__ = ["BEST", "CONFIG", "FORMAT", "NAMES", "OPTIONS", "WEIGHTS", "infer_options", "read_state", "to_ours"]
