"""The contrastive loss straight from tokens, against the interaction followed by InfoNCE, and against eager code.

    python benchmarks/bench_contrastive.py [--quick | --full]

Time of a training step where all fit, peak memory beyond the inputs, and the largest batch in a budget. Writes
``<out>/<machine>/contrastive.json`` and its pictures.
"""

from __future__ import annotations

import eager
from comparison import PRODUCT, Comparison, Contestant, Plan, loss_step, main, similarities
from drl_fast import functional, reference
from problems import Shape, batches

SCALE = 100.0  # CLIP's upper limit of the factor
SMALL = Shape(0, 16, 8, 128)
WIDE = Shape(0)


fused = loss_step(lambda p: functional.token_contrastive_loss(*p.inputs(), logit_scale=SCALE))
two_steps = loss_step(lambda p: functional.info_nce(functional.token_interaction(*p.inputs()), SCALE))
eager_loss = loss_step(lambda p: reference.info_nce(eager.token_interaction(*p.inputs()), SCALE))
EAGER = "both in eager code (benchmarks/eager.py)"
CONTESTANTS = (
    PRODUCT,
    Contestant("fused", "drl-fast", fused, "drl_fast.functional.token_contrastive_loss"),
    Contestant("two_steps", "drl-fast, two steps", two_steps, "info_nce(token_interaction(...))"),
    Contestant("eager", "eager PyTorch", eager_loss, EAGER, similarities(3)),
)
COMPARISON = Comparison("contrastive", {"train": CONTESTANTS}, against={"fused": ("eager", "two_steps")})

_DEFAULT = (*batches(SMALL, 1024, 4096), *batches(WIDE, 512))
_FULL = (*batches(SMALL, 512, 1024, 2048, 4096), *batches(WIDE, 256, 512, 1024))
PLANS = {
    "quick": Plan(
        1,
        {"train": (*batches(SMALL, 256), *batches(WIDE, 128))},
        {"fused": batches(SMALL, 1024), "two_steps": batches(SMALL, 1024), "eager": batches(SMALL, 256)},
    ),
    "default": Plan(
        2,
        {"train": (*batches(SMALL, 256, 512), *batches(WIDE, 128, 256))},
        {"fused": _DEFAULT, "two_steps": _DEFAULT, "eager": (*batches(SMALL, 256, 512), *batches(WIDE, 512))},
        ((SMALL, 100),),
    ),
    "full": Plan(
        3.5,
        {"train": (*batches(SMALL, 256, 512, 1024), *batches(WIDE, 64, 128, 256, 512), Shape(256, lengths="real"))},
        {"fused": _FULL, "two_steps": _FULL, "eager": (*batches(SMALL, 256, 512, 1024), *batches(WIDE, 256, 512))},
        ((SMALL, 100),),
        seconds=2.0,
        rounds=5,
    ),
}

if __name__ == "__main__":
    main(COMPARISON, PLANS, __doc__, logit_scale=SCALE)
