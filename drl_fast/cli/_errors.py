"""How a command ends when something is wrong: one line that says what to do, and a status; never a traceback."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import typer
from rich.console import Console
from rich.markup import escape

# What shells report for a command that Ctrl-C ended.
INTERRUPTED = 130


@contextlib.contextmanager
def told(extra: str) -> Iterator[None]:
    """Turn what a command may raise into a message and exit status 1 (130 after Ctrl-C).

    Args:
        extra: the optional dependencies that the command needs, named when a package is missing.
    """
    try:
        yield
    except typer.Exit:  # a RuntimeError itself
        raise
    except (ValueError, TypeError) as error:
        raise _exit(str(error)) from error
    except OSError as error:
        # Of the system's own; ours say what to do.
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
    # Escaped: file names hold brackets, which rich takes for its markup.
    Console(stderr=True).print(f"[bold red]error[/bold red] {escape(message)}", highlight=False, soft_wrap=True)
    return typer.Exit(status)
