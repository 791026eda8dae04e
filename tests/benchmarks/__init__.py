"""Tests of the benchmarks. They need the extras ``bench`` and ``train``."""

import pytest

for package in ("matplotlib", "open_clip", "psutil"):
    pytest.importorskip(package)
