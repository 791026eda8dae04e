"""The public functions, one file each: they check their arguments and call an operator."""

from .cdcr import cdcr_loss, cross_correlation_loss
from .dot_product import dot_product
from .info_nce import info_nce
from .maxsim import maxsim
from .prepared import PreparedVideos, prepare
from .rerank import rerank
from .sigmoid_loss import sigmoid_loss
from .token_contrastive_loss import token_contrastive_loss
from .token_interaction import Matches, token_interaction
from .token_maxsim import token_maxsim
from .topk import topk

__all__ = [
    "Matches",
    "PreparedVideos",
    "cdcr_loss",
    "cross_correlation_loss",
    "dot_product",
    "info_nce",
    "maxsim",
    "prepare",
    "rerank",
    "sigmoid_loss",
    "token_contrastive_loss",
    "token_interaction",
    "token_maxsim",
    "topk",
]
