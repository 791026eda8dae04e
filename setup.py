"""Build the C++ extension; everything else is in pyproject.toml.

The extension uses PyTorch's stable ABI and Python's limited API, so one wheel serves torch >= 2.10 and Python >= 3.10.
It is optional: without a compiler the package is installed without it and runs on chunked PyTorch. With
DRL_FAST_REQUIRE_EXTENSION=1, which the Makefile sets if there is a compiler, a failed build is an error.
"""

import os
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
TORCH_2_10 = "0x020a000000000000"
PYTHON_3_10 = "0x030a0000"


class LimitedApiWheel(bdist_wheel):
    """Tag the wheel cp310-abi3, because it works with every Python from 3.10 on."""

    def finalize_options(self) -> None:
        self.py_limited_api = "cp310"
        super().finalize_options()


class OptionalBuild(BuildExtension):
    """Install the package without the extension if the build fails, and print why."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            if os.environ.get("DRL_FAST_REQUIRE_EXTENSION") == "1":
                raise
            # Remove an earlier build: an editable install would load it with newer Python code.
            for stale in (ROOT / "drl_fast").glob("_C*.so"):
                stale.unlink()
            print(f"drl-fast: the C++ extension was not built ({error}).")
            print("drl-fast: CPU tensors will run on the slower chunked PyTorch path.")


setup(
    packages=[*find_packages(include=["drl_fast", "drl_fast.*"]), "drl_fast.kernels"],
    package_dir={"drl_fast.kernels": "kernels"},
    ext_modules=[
        CppExtension(
            "drl_fast._C",
            sources=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.cpp")),
            depends=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.h")),
            extra_compile_args=[
                "-std=c++20",
                "-O3",
                "-g0",
                "-fvisibility=hidden",
                f"-DTORCH_TARGET_VERSION={TORCH_2_10}",
                f"-DPy_LIMITED_API={PYTHON_3_10}",
            ],
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": OptionalBuild, "bdist_wheel": LimitedApiWheel},
)
