"""Check and measure the kernels on a GPU in a few minutes, from a source tree in which nothing is installed or built.

    python benchmarks/gpu_session.py [--minutes 9] [--out DIR] [--retry] [--only STEPS]     # run again to continue
    python benchmarks/gpu_session.py --show DIR/session.json                 # tables for README and docs/gpu.md
    python benchmarks/gpu_session.py --rehearse --out DIR                    # without a GPU: see gpu_device.py

This file makes the tree importable and starts gpu_steps.py: a temporary folder links to all files of the repository and
has kernels/ inside drl_fast/, where setup.py maps it. All processes of the session, tests included, run in that folder.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def link_tree(folder: Path) -> None:
    """Fill ``folder`` with links to the repository's files, as an installation would place them."""
    (folder / "drl_fast").mkdir()
    links = {path.name: path for path in ROOT.iterdir() if path.name not in ("drl_fast", ".git", ".venv")}
    links |= {f"drl_fast/{path.name}": path for path in (ROOT / "drl_fast").iterdir()}
    links["drl_fast/kernels"] = ROOT / "kernels"
    for name, target in links.items():
        (folder / name).symlink_to(target)


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="drl-fast-") as name:
        link_tree(Path(name))
        command = [sys.executable, str(Path(name, "benchmarks", "gpu_steps.py")), *sys.argv[1:]]
        path = os.pathsep.join([name, *filter(None, [os.environ.get("PYTHONPATH")])])
        return subprocess.call(command, env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"})


if __name__ == "__main__":
    sys.exit(main())
