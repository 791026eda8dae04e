"""Needs the ``video`` extra."""

import pytest

pytest.importorskip("av")
pytest.importorskip("torchvision")
