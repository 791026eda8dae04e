"""Without its extension the package works on chunked PyTorch and warns once.

Each case imports a copy of the source tree in its own process.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import drl_fast

PACKAGE = Path(drl_fast.__file__).parent

# An editable install's finder would look for a missing drl_fast._C in the checkout.
SCRIPT = """
import json, sys, warnings
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, drl_fast
    from drl_fast.ops import dispatch
    import tests.test_fallback as case
    results = [case.step(), case.step()]
    layer = drl_fast.WTI(dim=8)(torch.randn(2, 3, 8), torch.randn(4, 5, 8))
print(json.dumps({
    "file": drl_fast.__file__,
    "served": [dispatch.implementation("cpu"), dispatch.cpu_capability()],
    "warnings": [[w.category.__name__, str(w.message)] for w in caught if "drl_fast" in str(w.message)],
    "results": results,
    "layer": list(layer.shape),
}))
"""


def step() -> list[list[float]]:
    """Compute logits and gradients of a small problem with holes in its masks, as lists."""
    generator = torch.Generator().manual_seed(0)
    text, video = (torch.randn(rows, n, 20, generator=generator, requires_grad=True) for rows, n in ((5, 7), (6, 4)))
    masks = [torch.rand(x.shape[:2], generator=generator) < 0.7 for x in (text, video)]
    logits = drl_fast.token_interaction(text, video, text_mask=masks[0], video_mask=masks[1])
    logits.backward(torch.randn(5, 6, generator=generator))
    return [x.flatten().tolist() for x in (logits, text.grad, video.grad)]


def run(tree: Path) -> dict:
    """Run the script with ``drl_fast`` from ``tree`` and the tests from here; return its result."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(tree), str(Path(__file__).parents[1])]),
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False, cwd=tree, env=environment
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert Path(found["file"]).is_relative_to(tree)
    return found


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Copy the package's sources, without the extension."""
    ignored = shutil.ignore_patterns("_C*", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "drl_fast", ignore=ignored)
    return tmp_path


@pytest.mark.parametrize(
    ("extension", "reason"), [(None, "No module named 'drl_fast._C'"), (b"not a library", "_C.abi3.so: ")]
)
def test_works_without_the_extension(tree: Path, extension: bytes | None, reason: str) -> None:
    """Whether it was never built, or cannot be loaded."""
    if extension is not None:
        (tree / "drl_fast" / "_C.abi3.so").write_bytes(extension)
    found = run(tree)
    assert found["served"] == ["chunked", None]
    [(category, message)] = found["warnings"]
    assert category == "RuntimeWarning"
    assert "the C++ extension is not available" in message
    assert reason in message
    assert "pip install --no-build-isolation -e ." in message
    assert "\n" not in message
    assert found["layer"] == [2, 4]
    for result in found["results"]:
        for ours, theirs in zip(step(), result, strict=True):
            torch.testing.assert_close(torch.tensor(theirs), torch.tensor(ours), rtol=1e-5, atol=1e-6)


def test_no_warning_with_the_extension(tree: Path) -> None:
    """The same tree with the extension."""
    built = list(PACKAGE.glob("_C*"))
    if not built:
        pytest.skip("no extension was built")
    for path in built:
        shutil.copy(path, tree / "drl_fast")
    found = run(tree)
    assert found["served"][0] == "cpp"
    assert found["warnings"] == []
