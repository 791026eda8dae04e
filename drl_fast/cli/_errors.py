"""How a command ends when something is wrong: one line that says what to do, an exit status, and no traceback."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

import typer
from rich.console import Console
from rich.markup import escape

from ..validation import printable

# What shells report for a command that Ctrl-C ended.
INTERRUPTED = 128 + signal.SIGINT


@contextlib.contextmanager
def report_errors(extra: str) -> Iterator[None]:
    """Print an exception as one line on stderr and exit with status 1, or 130 after Ctrl-C.

    Args:
        extra: the optional dependencies that the command needs; the message names them when a package is missing.
    """
    try:
        yield
    except typer.Exit:  # a RuntimeError, but no error
        raise
    except (ValueError, TypeError, FloatingPointError) as error:
        raise _exit(str(error)) from error
    except OSError as error:
        # Only the system's own errors have a number; ours already say what to do.
        remedy = "; check that the path can be read and written and that the disk has room" if error.errno else ""
        raise _exit(f"{error}{remedy}") from error
    except RuntimeError as error:
        raise _exit(str(error)) from error
    except KeyboardInterrupt as error:
        raise _exit("stopped by Ctrl-C; no file is left half written", INTERRUPTED) from error
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("drl_fast"):
            raise
        raise _exit(f"{error.name} is missing; this needs: pip install 'drl-fast[{extra}]'") from error


def _exit(message: str, status: int = 1) -> typer.Exit:
    # File names may hold brackets, which rich would read as markup.
    Console(stderr=True).print(
        f"[bold red]error:[/bold red] {escape(printable(message))}", highlight=False, soft_wrap=True
    )
    return typer.Exit(status)
