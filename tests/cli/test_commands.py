"""The entry point: version, help at every width, and one-line errors at start."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
import torch
import typer

import drl_fast
from drl_fast.cli import main
from drl_fast.cli.commands import WIDEST_HELP, app

COMMANDS = [row.name or getattr(row.callback, "__name__", "") for row in app.registered_commands]


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int | str | None:
    """Run ``drl-fast`` in this process; return its exit status."""
    monkeypatch.setattr(sys, "argv", ["drl-fast", *words])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code


def test_version_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert run(monkeypatch, "--version") == 0
    (line,) = capsys.readouterr().out.splitlines()
    python = ".".join(map(str, sys.version_info[:3]))
    assert line.startswith(f"drl-fast {drl_fast.__version__}, torch {torch.__version__}, Python {python}, ")


@pytest.mark.parametrize("width", [40, 59, 60, 80, 120, 200])
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_wraps_between_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, command: str, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert run(monkeypatch, *command.split(), "--help") == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= min(width, WIDEST_HELP)
    assert "..." not in shown.partition("Commands:")[2]
    words = set(shown.split())
    for text in texts(command):
        # A line may end after a hyphen.
        assert {word for word in text.split() if "-" not in word} <= words


def texts(command: str) -> list[str]:
    """Return the help texts of a command and its options from the source."""
    if not command:
        return [str(row.short_help) for row in app.registered_commands]
    group: Any = typer.main.get_command(app)
    found = group.commands[command]
    return [found.help, *(parameter.help for parameter in found.params if parameter.help)]


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_the_extra(package: str) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; from drl_fast.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.fullmatch(
        rf"error: {package}(\.\w+)* is missing; the command line needs: pip install 'drl-fast\[cli\]'\n", done.stderr
    )


class Interrupt:
    """An import finder that raises KeyboardInterrupt when the commands are imported."""

    @staticmethod
    def find_spec(name: str, *_: object) -> None:
        if name == "drl_fast.cli.commands":
            raise KeyboardInterrupt


def test_interrupt_while_starting(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.delitem(sys.modules, "drl_fast.cli.commands")
    monkeypatch.setattr(sys, "meta_path", [Interrupt, *sys.meta_path])
    assert run(monkeypatch, "--version") == 130
    assert capsys.readouterr().err == "error: stopped by Ctrl-C\n"


def test_no_such_name() -> None:
    with pytest.raises(AttributeError, match=r"module 'drl_fast\.cli' has no attribute 'nothing'"):
        drl_fast.cli.nothing  # noqa: B018
