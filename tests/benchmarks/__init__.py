"""The benchmarks' own arithmetic and pages. Skipped where the ``bench`` extra is not installed."""

import pytest

for package in ("matplotlib", "psutil", "threadpoolctl"):
    pytest.importorskip(package)
