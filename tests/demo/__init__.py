"""Needs the ``train`` extra."""

import pytest

for package in ("av", "matplotlib", "open_clip", "yaml"):
    pytest.importorskip(package)
