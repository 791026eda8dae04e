"""Needs the ``video`` extra."""

import pytest

pytest.importorskip("open_clip")
