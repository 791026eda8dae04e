"""One file a public function: it checks its arguments and calls an operator."""

from .dot_product import dot_product
from .info_nce import info_nce
from .maxsim import maxsim
from .token_contrastive_loss import token_contrastive_loss
from .token_interaction import Matches, token_interaction

__all__ = ["Matches", "dot_product", "info_nce", "maxsim", "token_contrastive_loss", "token_interaction"]
