"""docs/architecture.md: each path exists, and each layer has a row. CITATION.cff has this version."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import drl_fast

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
if not PAGE.exists():
    pytest.skip("no documentation beside the tests", allow_module_level=True)
TEXT = PAGE.read_text(encoding="utf-8")
PATH = r"[\w.]+(?:/[\w.]*)+"


def section(title: str) -> str:
    return TEXT.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def rows(title: str) -> list[list[str]]:
    """Return the cells of a section's table, without its heading."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def exists(path: str) -> bool:
    return (ROOT / path).exists() or (ROOT / "drl_fast" / path).exists()


def test_paths_exist() -> None:
    named = re.findall(rf"`({PATH})`", TEXT) + re.findall(PATH, section("One call, from layer to kernel"))
    assert len(named) > 40
    assert [path for path in named if not exists(path)] == []


def test_every_layer_and_function_has_a_row() -> None:
    named = [name for first, *_ in rows("Which kernel serves this layer") for name in re.findall(r"`(\w+)`", first)]
    # Matches is what token_interaction returns; DRL and Head are models on top of the layers; backend chooses a kernel.
    others = {"Matches", "DRL", "Head", "backend"}
    layers = {name for name in drl_fast.__all__ if callable(getattr(drl_fast, name))} - others
    assert layers <= set(named)
    assert [name for name in named if not hasattr(drl_fast, name)] == []


def test_a_kernel_row_names_a_file_for_every_backend() -> None:
    """A row leads from a layer to the files of its kernels."""
    kernels = [row for row in rows("Which kernel serves this layer") if "csrc/" in " ".join(row)]
    assert len(kernels) >= 4
    for _, functional, operator, cpp, triton, chunked in kernels:
        assert functional.startswith("`functional/")
        assert operator.startswith("`ops/")
        assert cpp.startswith("`csrc/")
        assert triton.startswith("`kernels/")
        assert chunked.startswith("`ops/chunked/")


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == drl_fast.__version__
    assert citation["references"][0]["url"] == "https://arxiv.org/abs/2203.07111"
