"""The structure of the code: import directions, no circles, no private imports, a light import."""

from __future__ import annotations

import ast
import graphlib
import importlib
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import drl_fast
from drl_fast import functional, modules, reference

ROOT = Path(__file__).parents[1]
if not (ROOT / "setup.py").exists():
    pytest.skip("no source tree beside the tests", allow_module_level=True)

# Each package may import those below it. The package's own names (`from .. import WTI`) come from modules, functional
# and metrics, so `drl_fast` is above these three and below everything that uses them.
LAYERS = [
    ["drl_fast.cli"],
    ["drl_fast.demo"],
    ["drl_fast.search", "drl_fast.console"],
    ["drl_fast.engine"],
    ["drl_fast.model", "drl_fast.data"],
    ["drl_fast"],
    ["drl_fast.modules"],
    ["drl_fast.functional", "drl_fast.metrics", "drl_fast.filmstrip"],
    ["drl_fast.ops"],
    ["drl_fast.distributed"],
    ["drl_fast.validation"],
    [
        "drl_fast.kernels",
        "drl_fast._C",
        "drl_fast.numerics",
        "drl_fast.autocast",
        "drl_fast.atomic_write",
        "drl_fast.interrupts",
    ],
]
ORACLE = "drl_fast.reference"
# Loaded at the first use of drl_fast.DRL, drl_fast.Head and drl_fast.Retriever.
LAZY = tuple(("drl_fast", f"drl_fast.{name}") for name in ("model.drl", "model.head", "search.retriever"))
FOLDERS = ("drl_fast", "kernels", "csrc", "tests", "benchmarks", "examples")
# Each takes half a second or more to import, or may be missing. (torch.compiler's decorators load torch._dynamo.)
HEAVY = {
    "PIL",
    "av",
    "lancedb",
    "matplotlib",
    "numpy",
    "open_clip",
    "psutil",
    "pyarrow",
    "rich",
    "torch._dynamo",
    "torchvision",
    "transformers",
    "typer",
    ORACLE,
}

KEPT = [
    *(f"drl_fast.data.{name}" for name in ("video", "datasets", "folder", "feature_cache", "moving_shapes")),
    *("drl_fast.engine.config", "drl_fast.engine.checkpoint", "drl_fast.model.checkpoint"),
    *("drl_fast.metrics", "drl_fast.reference"),
]
PUBLIC = {
    "drl_fast": "DP HI MLP TI WTI XTI MeanMaxSim Matches cdcr_loss cross_correlation_loss functional info_nce maxsim "
    "metrics modules rerank sigmoid_loss token_contrastive_loss token_interaction token_maxsim "
    "backend PreparedVideos prepare topk",
    "drl_fast.modules": "DP HI MLP TI WTI XTI MeanMaxSim SeqLSTM SeqTransf INTERACTIONS build_interaction",
    "drl_fast.functional": "cdcr_loss cross_correlation_loss info_nce maxsim rerank sigmoid_loss "
    "token_contrastive_loss token_interaction token_maxsim PreparedVideos prepare topk",
    "drl_fast.reference": "cdcr_loss cross_correlation_loss info_nce maxsim rerank sigmoid_loss "
    "token_contrastive_loss token_interaction token_maxsim topk",
    "drl_fast.metrics": "retrieval_metrics",
}


class Arrow(NamedTuple):
    """One import: the importing module, the imported module, and the line."""

    source: str
    target: str
    place: str


def product_modules() -> dict[str, Path]:
    """Return every shipped module by its import name."""
    found = {}
    for folder, package in (("drl_fast", "drl_fast"), ("kernels", "drl_fast.kernels")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = path
    return found


MODULES = product_modules()
PACKAGES = {module for module, path in MODULES.items() if path.name == "__init__.py"}


def named(module: str, path: Path, node: ast.AST) -> Iterator[str]:
    """Yield the full names that one statement of ``module`` imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        above = package.split(".")[: len(package.split(".")) - node.level + 1]
        base = ".".join([*(above if node.level else []), *([node.module] if node.module else [])])
        for alias in node.names:  # a module of that name, or a name inside the package
            full = f"{base}.{alias.name}"
            yield full if full in MODULES or full == "drl_fast._C" else base
    elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("import_module", "__import__"):
        assert isinstance(node.args[0], ast.Constant), f"{module}:{node.lineno} imports a computed name"
        yield node.args[0].value


def arrows() -> list[Arrow]:
    """List every import in product code, also inside functions and under TYPE_CHECKING."""
    found = []
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            place = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            found += [Arrow(module, target, place) for target in named(module, path, node)]
    return found


def inside(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def layer_of(module: str) -> tuple[int, str]:
    """Return height (0 is the lowest) and name of the layer of ``module``."""
    for height, names in enumerate(reversed(LAYERS)):
        for name in names:
            if module == name or (name != "drl_fast" and inside(module, name)):
                return height, name
    raise AssertionError(f"{module} belongs to no layer: add it to LAYERS")


def test_known_imports_are_found() -> None:
    """Relative, into a package, and by import_module."""
    pairs = {(arrow.source, arrow.target) for arrow in arrows()}
    assert ("drl_fast.ops.token_interaction", "drl_fast.numerics") in pairs
    assert ("drl_fast.ops.token_interaction", "drl_fast.ops.chunked.token_interaction") in pairs
    assert ("drl_fast.functional.token_interaction", "drl_fast.ops.token_interaction") in pairs
    assert ("drl_fast.ops.dispatch", "drl_fast._C") in pairs
    assert ("drl_fast.engine.in_memory", "drl_fast.model.head") in pairs


def test_imports_go_down() -> None:
    up = []
    for arrow in arrows():
        if not inside(arrow.target, "drl_fast") or ORACLE in (arrow.source, arrow.target):
            continue
        if (arrow.source, arrow.target) in LAZY:
            continue
        source, target = layer_of(arrow.source), layer_of(arrow.target)
        if source[1] != target[1] and source[0] <= target[0]:
            up.append(f"{arrow.place}: {arrow.source} imports {arrow.target}")
    assert up == []


def test_no_import_circles() -> None:
    """Also inside packages; imports for typing and inside functions count."""
    imports: dict[str, set[str]] = {module: set() for module in MODULES}
    for arrow in arrows():
        if arrow.target in MODULES and arrow.target != arrow.source and arrow[:2] not in LAZY:
            imports[arrow.source].add(arrow.target)
    # Raises CycleError, which names the modules of a circle.
    list(graphlib.TopologicalSorter(imports).static_order())


def test_private_modules_stay_in_their_package() -> None:
    """Except ``drl_fast._C``, the extension module."""
    outside = []
    for arrow in arrows():
        package, _, name = arrow.target.rpartition(".")
        own = arrow.source.rpartition(".")[0] if arrow.source not in PACKAGES else arrow.source
        if name.startswith("_") and inside(arrow.target, "drl_fast") and own != package:
            outside.append(f"{arrow.place}: {arrow.target}")
    assert [place for place in outside if not place.endswith("drl_fast._C")] == []


def test_the_formatter_formats() -> None:
    marks = re.compile(r"#\s*fmt:\s*(skip|off)")
    found = {
        str(p.relative_to(ROOT)): len(marks.findall(p.read_text())) for f in FOLDERS for p in (ROOT / f).rglob("*.py")
    }
    assert {path: count for path, count in found.items() if count and not path.startswith("tests")} == {}
    assert sum(found.values()) <= 5


@pytest.mark.parametrize("module", KEPT)
def test_public_import_paths_exist(module: str) -> None:
    importlib.import_module(module)


def test_the_package_lists_every_public_name() -> None:
    assert set(dir(drl_fast)) >= {*drl_fast.__all__, "DRL", "Retriever", "plot_matches", "reference"}


def test_the_oracle_stands_alone() -> None:
    """If product code used the reference, or the reference product code, tests would compare code with itself.

    ``drl_fast`` may import it lazily, as ``drl_fast.reference``.
    """
    outside = [arrow for arrow in arrows() if not inside(arrow.source, ORACLE) and arrow.source != "drl_fast"]
    into = [arrow.place for arrow in outside if inside(arrow.target, ORACLE)]
    out = [arrow.place for arrow in arrows() if inside(arrow.source, ORACLE) and inside(arrow.target, "drl_fast")]
    assert into == []
    assert out == []


def test_kernels_know_nothing_of_the_package() -> None:
    out = [
        f"{arrow.place}: {arrow.target}"
        for arrow in arrows()
        if inside(arrow.source, "drl_fast.kernels")
        and inside(arrow.target, "drl_fast")
        and not inside(arrow.target, "drl_fast.kernels")
    ]
    assert out == []


def test_kernels_are_imported_by_their_shipped_name() -> None:
    """``import kernels`` only works in the repository's root."""
    assert [arrow.place for arrow in arrows() if inside(arrow.target, "kernels")] == []


def test_no_module_is_called_utils() -> None:
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    assert [str(path) for path in paths if path.stem.strip("_").lower() in {"util", "utils"}] == []


def test_one_name_for_one_operator() -> None:
    """All files of an operator have its name."""
    missing = []
    for name in ("token_interaction", "cdcr"):
        homes = [f"csrc/{name}.cpp", f"drl_fast/ops/chunked/{name}.py", f"drl_fast/functional/{name}.py"]
        missing += [home for home in [*homes, f"tests/ops/test_{name}.py"] if not (ROOT / home).exists()]
    assert missing == []


def test_operators_are_narrow() -> None:
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("drl_fast::")]
    schemas = [torch._C._get_schema(*(name.split(".") if "." in name else (name, ""))) for name in names]
    assert "drl_fast::token_interaction" in names
    assert {str(schema) for schema in schemas if len(schema.arguments) > 14} == set()


def test_importing_the_package_is_light() -> None:
    code = (
        "import json, sys, torch; before = set(sys.modules); import drl_fast;"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert "drl_fast" in loaded
    assert loaded & HEAVY == set()


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names(module: str) -> None:
    home = __import__(module, fromlist=["names"])
    names = PUBLIC[module].split()
    assert [name for name in names if not hasattr(home, name)] == []
    if hasattr(home, "__all__"):
        assert set(names) <= set(home.__all__)
        assert [name for name in home.__all__ if not hasattr(home, name)] == []


@pytest.mark.parametrize("statement", ["import drl_fast; dir(drl_fast)", "from drl_fast import *"])
def test_lazy_names_stay_unloaded(statement: str) -> None:
    code = (
        f"import sys\n{statement}\nprint(sorted({{'open_clip', 'lancedb', 'drl_fast.reference'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", ["DP", "HI", "MLP", "TI", "WTI", "XTI", "SeqLSTM", "SeqTransf"])
def test_every_layer_documents_its_forward(name: str) -> None:
    assert getattr(modules, name).forward.__doc__


def test_top_level_names_are_those_of_their_files() -> None:
    for home in (functional, modules):
        for name in set(home.__all__) & set(drl_fast.__all__):
            assert getattr(drl_fast, name) is getattr(home, name)


@pytest.mark.parametrize("name", sorted(set(functional.__all__) - {"Matches", "PreparedVideos", "prepare"}))
def test_the_oracle_has_the_same_signature(name: str) -> None:
    """Same names, kinds and defaults. Preparing computes nothing that the oracle could check."""
    ours = inspect.signature(getattr(functional, name)).parameters
    theirs = inspect.signature(getattr(reference, name)).parameters
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]
