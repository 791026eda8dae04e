"""Fixtures of the commands' tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from typer.testing import CliRunner

from drl_fast.cli import app


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run ``drl-fast`` with arguments; the result's ``flat`` is its output without line breaks and table lines."""
    # A terminal wide enough that no table is folded.
    monkeypatch.setenv("COLUMNS", "240")

    def run(*words: object) -> Any:
        result = CliRunner().invoke(app, list(map(str, words)))
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
        assert "Traceback" not in result.output
        result.flat = " ".join(result.stdout.replace("│", " ").split())
        return result

    return run
