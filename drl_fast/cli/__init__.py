"""The command line ``drl-fast``, one file per command. A command imports what it needs when it runs."""

from __future__ import annotations

import io
import signal
import sys
from typing import Any

from .. import interrupts


def main() -> None:
    """Run ``drl-fast``: the entry point of the script and of ``python -m drl_fast.cli``."""
    try:
        from .commands import run

        _escape_what_the_terminal_cannot_show()
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("drl_fast"):
            raise
        sys.exit(f"error: {error.name} is missing; the command line needs: pip install 'drl-fast[cli]'")
    except KeyboardInterrupt:
        sys.exit(_stopped())
    try:
        with interrupts.raised():
            run()
    except KeyboardInterrupt:  # between two of the commands' own handlers
        sys.exit(_stopped())


def _stopped() -> int:
    print("error: stopped by Ctrl-C", file=sys.stderr)
    return 128 + signal.SIGINT


def _escape_what_the_terminal_cannot_show() -> None:
    """Print escapes such as \\xe9 where the terminal's encoding, ASCII for example, has no such character."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # stderr does so by itself


def __getattr__(name: str) -> Any:
    """Load ``app``, the typer application, on first use: it needs the extra ``cli``, and importing this does not."""
    if name == "app":
        from .commands import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
