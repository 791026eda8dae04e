"""The benchmarks' own arithmetic and pages. Skipped where the ``bench`` or ``train`` extra is not installed."""

import pytest

for package in ("matplotlib", "open_clip", "psutil"):
    pytest.importorskip(package)
