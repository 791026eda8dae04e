"""The entry point: version, help at every width, and one-line errors at start."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import drl_fast
from drl_fast.cli import main
from drl_fast.cli.commands import WIDEST_HELP, app

# What pip installs as the command ``drl-fast``.
SCRIPT = "import sys; sys.argv[0] = '/bin/drl-fast'; from drl_fast.cli import main; main()"


def listen() -> None:
    """Handle Ctrl-C as in a terminal; a job in the background inherits that it is ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


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


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("command", [["-m", "drl_fast.cli", "doctor"], ["-c", SCRIPT, "eval", "--config", "wti"]])
def test_ctrl_c_at_any_moment_of_the_start(command: list[str]) -> None:
    """No traceback, whatever is being imported; at the first moments Python itself may not be up yet."""
    for moment in range(4):
        with subprocess.Popen(
            [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listen
        ) as process:
            time.sleep(0.2 + 0.6 * moment)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        assert "Traceback" not in errors, errors
        assert process.returncode in (-signal.SIGINT, 130, 1, 0)


def press_at_exit(folder: Path) -> dict[str, str]:
    """Return an environment in which Python presses Ctrl-C when it exits."""
    code = "import atexit, os, signal\natexit.register(os.kill, os.getpid(), signal.SIGINT)\n"
    (folder / "sitecustomize.py").write_text(code)
    return {**os.environ, "PYTHONPATH": str(folder)}


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("start", [["-m", "drl_fast.cli"], ["-mdrl_fast.cli"], ["-um", "drl_fast.cli"], ["-c", SCRIPT]])
def test_ctrl_c_while_python_exits(start: list[str], tmp_path: Path) -> None:
    """No traceback from what libraries do at exit."""
    done = subprocess.run(
        [sys.executable, *start, "--version"],
        capture_output=True,
        text=True,
        env=press_at_exit(tmp_path),
        preexec_fn=listen,
        check=False,
    )
    assert done.stdout.startswith("drl-fast")
    assert done.stderr == ""
    assert done.returncode == -signal.SIGINT


DROPPED = """
import os, signal, sys, time
import drl_fast.cli.commands

class Dropped:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(100):  # here the signal arrives
            pass

def run():
    Dropped()
    time.sleep(30)

drl_fast.cli.commands.run = run
"""


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_in_a_finaliser_stops_the_command() -> None:
    """Python itself drops the exception there and goes on."""
    command = [sys.executable, "-c", DROPPED + SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=listen, timeout=25, check=False)
    assert done.stderr == "error: stopped by Ctrl-C\n"
    assert done.returncode == 130


def test_a_program_that_names_the_command_line_is_not_it(tmp_path: Path) -> None:
    (tmp_path / "tool").mkdir()
    (tmp_path / "tool" / "__main__.py").write_text(
        "import signal, drl_fast\nprint(signal.getsignal(signal.SIGINT) is signal.default_int_handler)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "tool", "-m", "drl_fast.cli"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        preexec_fn=listen,
        check=True,
    )
    assert done.stdout == "True\n"


def test_a_library_import_leaves_the_signal_alone() -> None:
    code = "import signal, drl_fast; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, preexec_fn=listen, check=True)
    assert done.stdout == "True\n"


def test_an_ascii_terminal_gets_escapes(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    video = tmp_path / "caf\xe9"
    for words in (["train", "--config", str(video)],):
        done = subprocess.run(
            [sys.executable, "-m", "drl_fast.cli", *words], capture_output=True, text=True, env=environment, check=False
        )
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert r"caf\xe9" in done.stderr


def test_no_such_name() -> None:
    with pytest.raises(AttributeError, match=r"module 'drl_fast\.cli' has no attribute 'nothing'"):
        drl_fast.cli.nothing  # noqa: B018
