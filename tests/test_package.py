"""The installed package: metadata, dependencies, type annotations, extension and command."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import drl_fast.kernels
import pytest
from typer.testing import CliRunner

import drl_fast
from drl_fast.cli import app
from drl_fast.ops import dispatch

try:
    INSTALLED = metadata.distribution("drl-fast")
except metadata.PackageNotFoundError:
    pytest.skip("drl-fast is not installed", allow_module_level=True)
PACKAGE = Path(drl_fast.__file__).parent
# Import names of the packages that the extras install.
OPTIONAL = ["PIL", "av", "matplotlib", "open_clip", "psutil", "rich", "safetensors", "tensorboard", "threadpoolctl"]
OPTIONAL += ["torchvision", "typer", "yaml", "lancedb", "pyarrow", "timm", "transformers", "peft"]
# typer names a command after its function if it has no name.
COMMANDS = [str(row.name or getattr(row.callback, "__name__", "")) for row in app.registered_commands]


def test_version() -> None:
    assert INSTALLED.version == drl_fast.__version__


def test_what_is_required() -> None:
    required = [line for line in INSTALLED.requires or [] if "extra ==" not in line]
    assert sorted(required) == ["numpy", "torch>=2.10"]
    assert INSTALLED.metadata["Requires-Python"] == ">=3.10"
    assert INSTALLED.metadata["License-Expression"] == "MIT"


def test_extras() -> None:
    extras = {"cli", "video", "train", "search", "hdf5", "hf", "lora", "bench", "dev"}
    assert set(INSTALLED.metadata.get_all("Provides-Extra") or []) == extras


def test_the_bare_library_needs_torch_and_numpy_alone() -> None:
    """Compute a loss and its gradient with every optional package missing."""
    code = f"""
import sys
for name in {OPTIONAL}:
    sys.modules[name] = None  # makes `import name` raise ModuleNotFoundError
import torch, drl_fast
text, video = torch.randn(3, 4, 8, requires_grad=True), torch.randn(3, 5, 8, requires_grad=True)
layer = drl_fast.WTI(8)
loss = drl_fast.info_nce(layer(text, video), 100.0)
loss = loss + drl_fast.cdcr_loss(text, video, alpha_on=0.1, alpha_off=0.1)
loss = loss + drl_fast.token_contrastive_loss(text, video, logit_scale=100.0)
loss.backward()
drl_fast.metrics.retrieval_metrics(torch.eye(3))
assert text.grad.abs().sum() > 0
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_command_needs_its_own_extra_alone() -> None:
    """Listing commands and checking the machine work without the packages of video and train."""
    others = [name for name in OPTIONAL if name not in ("rich", "typer")]
    code = f"import sys; sys.modules.update(dict.fromkeys({others})); from drl_fast.cli import main; main()"
    for words in (
        ["--help"],
        ["train", "--help"],
        ["eval", "--help"],
        ["demo", "--help"],
        ["index", "--help"],
        ["search", "--help"],
    ):
        subprocess.run([sys.executable, "-c", code, *words], check=True, stdout=subprocess.DEVNULL)


def test_type_checkers_may_read_the_annotations() -> None:
    assert (PACKAGE / "py.typed").exists()


def test_the_extension_serves_every_python() -> None:
    if dispatch.EXTENSION_ERROR is not None:
        pytest.skip(dispatch.EXTENSION_ERROR)
    assert Path(sys.modules["drl_fast._C"].__file__ or "").name == "_C.abi3.so"


def test_kernels_are_shipped_inside() -> None:
    assert drl_fast.kernels.__name__ == "drl_fast.kernels"


def test_the_command_is_installed() -> None:
    # Next to the interpreter or, after a --user install, on the PATH.
    command = shutil.which("drl-fast", path=str(Path(sys.executable).parent)) or shutil.which("drl-fast")
    assert command is not None
    done = subprocess.run([command, "--help"], capture_output=True, text=True, check=True)
    for name in COMMANDS:
        assert name in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert f"{command} [OPTIONS]" in result.output
