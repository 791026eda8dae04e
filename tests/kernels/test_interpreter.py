"""Run a selection of tests in Triton's interpreter: the kernels' arithmetic, tile by tile, without a GPU.

The interpreter must be chosen before the kernels are imported, so it runs in a new process (tests/implementations.py).
It is slow, so this is a selection: every form of every kernel, every mask rule and edge case at least once. bfloat16 is
left out because the interpreter's products are wrong (Triton 3.9), float64 because the kernels do not serve it. To run
all tests:
TRITON_INTERPRET=1 python -m pytest tests/ops -k "interpreter and not bfloat16 and not float64".
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
OPS = "tests/ops/test_token_interaction"
SOFT = "tests/ops/test_soft_token_interaction.py"
RERANK = "tests/ops/test_rerank.py"
CDCR = "tests/ops/test_cdcr.py"
CONTRASTIVE = "tests/functional/test_token_contrastive_loss.py"
ROW = "interpreter"
# File, test, and the parameters after the row's name.
SUITE: list[tuple[str, str, list[str]]] = [
    (
        f"{OPS}.py",
        "test_shapes",
        [
            "holes-(5, 1, 4, 6)",
            "holes-(4, 6, 5, 1)",
            "holes-(16, 32, 16, 12)",
            "holes-(3, 255, 2, 4)",
            "empty rows-(1, 7, 100, 3)",
            "empty rows-(33, 9, 47, 5)",
            "empty rows-(3, 256, 2, 4)",
            "none-(1, 1, 1, 1)",
            "text only-(5, 1, 4, 6)",
            "video only-(4, 6, 5, 1)",
        ],
    ),
    (f"{OPS}.py", "test_widths", ["True-1", "True-64", "False-512", "True-1030"]),
    (
        f"{OPS}.py",
        "test_options",
        # Every two of the options meet.
        [
            f"given-{options}-torch.float16"
            for options in (
                "both-unit-drl",
                "both-raw-exclude",
                "both-unit-none",
                "one way-raw-drl",
                "one way-unit-exclude",
                "one way-raw-none",
            )
        ],
    ),
    (f"{OPS}.py", "test_masks", [f"torch.float32-{rule}-empty rows" for rule in ("exclude", "none")]),
    (f"{OPS}.py", "test_empty_batches", ["prefix-(0, 3, 4, 5)", "prefix-(4, 3, 0, 5)"]),
    (f"{OPS}.py", "test_strides", ["True-channels first", "True-expanded", "False-every second"]),
    (f"{OPS}.py", "test_weight_dtypes", ["torch.float16-torch.float16"]),
    (f"{OPS}.py", "test_large_and_small_magnitudes", ["torch.float16", "torch.float32"]),
    (f"{OPS}.py", "test_scale_of_upstream_gradients", []),
    (f"{OPS}_masks.py", "test_negative_pair_at_exact_length_and_padded", []),
    (f"{OPS}_masks.py", "test_no_gradient_where_the_zero_won", []),
    (
        f"{OPS}_masks.py",
        "test_masked_features_reach_nothing",
        [
            "torch.float32-nan-drl",
            "torch.float16-inf-exclude",
        ],
    ),
    (f"{OPS}_masks.py", "test_masked_weights_count_for_nothing", ["nan-drl"]),
    (f"{OPS}_masks.py", "test_rows_without_a_real_token_score_zero", ["drl", "exclude", "none"]),
    (f"{OPS}_masks.py", "test_a_bad_real_token_affects_only_its_own_scores", ["nan"]),
    (f"{OPS}_masks.py", "test_nan_wins_the_maximum_at_every_position", ["4-drl", "1-exclude"]),
    (f"{OPS}_masks.py", "test_an_overflowing_product_is_not_hidden", ["3-True", "40-True", "3-False"]),
    (f"{OPS}_masks.py", "test_an_infinite_similarity_does_not_depend_on_the_batch", []),
    (f"{OPS}_masks.py", "test_a_bad_upstream_gradient_reaches_only_its_own_tokens", ["inf"]),
    (f"{OPS}_masks.py", "test_small_tokens_on_both_sides_keep_the_digits_of_others", []),
    (f"{OPS}_masks.py", "test_zero_vectors", ["torch.float16"]),
    (f"{OPS}_masks.py", "test_tiny_norms_that_are_not_zero", ["torch.float32"]),
    (
        f"{OPS}_matches.py",
        "test_matches_are_the_argmax",
        [f"('{kind}', '{kind}')-{rule}-(9, 11, 8, 6)" for kind, rule in (("empty", "drl"), ("prefix", "exclude"))],
    ),
    (f"{OPS}_matches.py", "test_minus_one_where_no_real_token_was_chosen", ["drl", "exclude"]),
    (f"{OPS}_matches.py", "test_minus_one_where_the_zero_won", []),
    (f"{OPS}_matches.py", "test_a_real_zero_beats_the_masked_zero", []),
    # Equal tokens may not tie here, because numpy's products round differently within a tile. Zeros tie exactly.
    (f"{OPS}_matches.py", "test_zero_tokens_tie_with_everything", []),
    (f"{OPS}_matches.py", "test_matches_do_not_change_scores_or_gradients", []),
    (f"{OPS}_autograd.py", "test_inputs_are_left_as_they_were", []),
    (
        "tests/kernels/test_descriptors.py",
        "test_values",
        [
            "(5, 9, 6, 4)-torch.float32",
            "(2, 140, 3, 5)-torch.float16",
        ],
    ),
    (
        "tests/kernels/test_recompute.py",
        "test_equal_bits",
        [
            "blocks-(17, 5, 3, 3)-torch.float16-drl-both",
            "blocks-(17, 5, 3, 3)-torch.float32-exclude-one way",
        ],
    ),
    ("tests/kernels/test_recompute.py", "test_against_the_oracle", ["blocks-(33, 5, 4, 3)-torch.float32"]),
    ("tests/kernels/test_recompute.py", "test_small_gradients_in_one_block_and_large_ones_in_another", ["blocks"]),
    ("tests/kernels/test_recompute.py", "test_the_graph_keeps_matches_only_within_the_budget", ["True"]),
    (
        SOFT,
        "test_shapes",
        ["softmax-empty-(3, 255, 2, 4)", "logsumexp-none-(1, 1, 1, 1)", "softmax-holes-(5, 1, 4, 6)"],
    ),
    (SOFT, "test_options", ["softmax-both-raw-drl-torch.float16", "logsumexp-one way-unit-exclude-torch.float32"]),
    (SOFT, "test_rows_without_a_real_token_score_zero", ["logsumexp-drl"]),
    (SOFT, "test_a_bad_upstream_gradient_reaches_only_its_own_tokens", ["nan"]),
    (
        RERANK,
        "test_shapes",
        [
            "max-empty-(3, 40, 3, 20)",
            "max-none-(1, 1, 1, 1)",
            "max-empty-(2, 140, 3, 4)",
            "softmax-text only-(2, 140, 3, 4)",
            "logsumexp-empty-(2, 300, 2, 5)",
            "max-empty-(2, 4, 3, 300)",
        ],
    ),
    (
        RERANK,
        "test_ragged",
        ["max-[0, 3, 3, 40, 41]-9", "softmax-[0, 3, 3, 40, 41]-9", f"max-{[0, *range(1, 20)]}-9", "max-[0, 0]-9"],
    ),
    (RERANK, "test_widths", ["True-1", "False-64"]),
    (
        RERANK,
        "test_options",
        [
            "max-both-unit-drl-torch.float16",
            "max-both-raw-exclude-torch.float16",
            "max-one way-unit-none-torch.float32",
            "softmax-one way-unit-exclude-torch.float32",
            "logsumexp-both-raw-drl-torch.float16",
        ],
    ),
    (RERANK, "test_nothing_to_score", ["max-(0, 3, 4, 5)", "max-(4, 3, 0, 5)"]),
    (RERANK, "test_masked_features_reach_nothing", ["max-nan-drl", "softmax-inf-exclude"]),
    (RERANK, "test_rows_without_a_real_token_score_zero", ["max-drl", "logsumexp-exclude"]),
    (RERANK, "test_a_bad_real_token_affects_only_its_own_scores", ["max-nan", "softmax-inf"]),
    (RERANK, "test_ties_go_to_the_lowest_index", []),
    (RERANK, "test_offsets_that_do_not_fit_write_nothing_outside", []),
    (CONTRASTIVE, "test_against_the_reference", ["kept-holes-True"]),
    (
        CDCR,
        "test_shapes",
        [
            f"{weights}-{shape}-{form}"
            for weights, shape, form in (
                ("plain", "(4, 1, 1)", "full"),
                ("weighted", "(33, 9, 5)", "diagonal"),
                ("weighted", "(7, 4, 9)", "full"),
                ("plain", "(16, 32, 12)", "full"),
                ("weighted", "(9, 6, 1)", "diagonal"),
                ("plain", "(9, 1, 6)", "full"),
                ("weighted", "(2, 300, 3)", "full"),
                ("weighted", "(2, 3, 300)", "diagonal"),
            )
        ],
    ),
    (CDCR, "test_masks", ["(12, 9, 5)-empty rows-full", "(12, 4, 7)-holes-diagonal", "(12, 4, 7)-video only-full"]),
    (CDCR, "test_widths", ["3-diagonal", "3-full", "64-full", "512-diagonal"]),
    (CDCR, "test_dtypes", ["None-torch.float16-full", "torch.float16-torch.float16-diagonal"]),
    (CDCR, "test_rows", ["weighted-2-diagonal", "weighted-65-full", "plain-300-diagonal"]),
    (CDCR, "test_rows_in_half_precision", ["torch.float16"]),
    (CDCR, "test_a_constant_channel_is_left_out", ["diagonal", "full"]),
    (CDCR, "test_a_nearly_constant_channel_is_accurate", ["diagonal-1e-06", "full-1e-06"]),
    (CDCR, "test_masked_tokens_are_never_read", ["nan-diagonal", "inf-full"]),
    (CDCR, "test_a_real_nan_is_not_hidden", []),
    (CDCR, "test_zero_tokens", ["diagonal", "full"]),
    (CDCR, "test_strides", ["diagonal", "full"]),
    ("tests/kernels/test_cdcr.py", "test_blocks_and_parts", ["(40, 5, 3)", "(40, 3, 5)"]),
    ("tests/kernels/test_cdcr.py", "test_equal_bits", []),
    ("tests/kernels/test_cdcr.py", "test_ties_and_nan_in_long_rows", []),
    (
        "tests/kernels/test_bounds.py",
        "test_addresses_are_inside",
        ["max-(5, 9, 6, 4)-torch.float16", "softmax-(5, 9, 6, 4)-torch.float16"],
    ),
    ("tests/kernels/test_addresses.py", "test_offsets_of_matches_are_64_bit", []),
]


def nodes() -> list[str]:
    return [
        f"{file}::{test}[{'-'.join([ROW, *([case] if case else [])])}]"
        for file, test, cases in SUITE
        for case in cases or [""]
    ]


def test_the_suite_passes() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    # These tests contain NaN, Inf and divisions by 0, about which numpy warns.
    command = [sys.executable, "-m", "pytest", "-W", "ignore::RuntimeWarning:triton", "--disable-warnings", *nodes()]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    # Every test must run: without the interpreter all of them would be skipped.
    summary = done.stdout.strip().splitlines()[-1]
    assert re.match(rf"{len(nodes())} passed\b(?!.*skipped)", summary), summary
