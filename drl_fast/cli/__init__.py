"""The command line ``drl-fast``, one file per command. A command imports what it needs when it runs."""

from __future__ import annotations

import signal
import sys
from typing import Any


def main() -> None:
    """Run ``drl-fast``: the entry point of the script and of ``python -m drl_fast.cli``."""
    try:
        from .commands import run
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("drl_fast"):
            raise
        sys.exit(f"error: {error.name} is missing; the command line needs: pip install 'drl-fast[cli]'")
    except KeyboardInterrupt:
        print("error: stopped by Ctrl-C", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    run()


def __getattr__(name: str) -> Any:
    """Load ``app``, the typer application, on first use: it needs the extra ``cli``, and importing this does not."""
    if name == "app":
        from .commands import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
