"""Needs the ``search`` extra."""

import pytest

pytest.importorskip("lancedb")
pytest.importorskip("open_clip")
