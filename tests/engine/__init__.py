"""Needs the ``train`` extra."""

import pytest

pytest.importorskip("open_clip")
pytest.importorskip("matplotlib")
