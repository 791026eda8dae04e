"""Ctrl-C while the command line starts, runs or exits: an end without a traceback.

Loading torch takes seconds. A KeyboardInterrupt there would be raised inside some import, before the command can catch
it. So the process dies of the signal, as programs that do not handle it do, until the command takes over. The same
holds after the command, while libraries run what they registered for the exit.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator

COMMAND, MODULE = "drl-fast", "drl_fast.cli"
# Seconds after which an interrupt that Python dropped is sent again.
SOON = 0.05


def end_at_once() -> None:
    """Let Ctrl-C end this process like any other signal, if it is the command line and nobody set a handler."""
    if is_command_line() and _is_ours() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Make Ctrl-C a KeyboardInterrupt for the block, which is the command, and let it end the process after that."""
    if _is_ours() and signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    report = sys.unraisablehook

    def raise_again(dropped: sys.UnraisableHookArgs) -> None:
        # Python drops what is raised in a finaliser (__del__), and the command would run on. It would also drop what
        # is raised here, so a thread sends the signal again, even if the command has just ended.
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            threading.Timer(SOON, _interrupt).start()
        else:
            report(dropped)

    sys.unraisablehook = raise_again
    try:
        yield
    finally:
        sys.unraisablehook = report
        end_at_once()


def is_command_line() -> bool:
    """Tell whether this process is ``drl-fast`` or ``python -m drl_fast.cli``."""
    script = os.path.basename(sys.argv[0]) if sys.argv else ""
    if script == "-m":
        # Python imports the module's package. Of Python's arguments, the one before the program's own is the module.
        named = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1][-1:]
        return bool(named) and re.fullmatch(rf"(-\w*m)?{re.escape(MODULE)}", named[0]) is not None
    running = getattr(sys.modules.get("__main__"), "__spec__", None)
    return script.removesuffix(".exe") == COMMAND or (running is not None and running.name == f"{MODULE}.__main__")


def _interrupt() -> None:
    if hasattr(signal, "pthread_kill"):  # this also ends a system call that waits
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGINT)
    else:
        _thread.interrupt_main()


def _is_ours() -> bool:
    return threading.current_thread() is threading.main_thread()
