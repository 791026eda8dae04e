"""Ctrl-C while the command line starts or exits: end at once, without a traceback.

Loading torch takes seconds. A KeyboardInterrupt there would be raised inside some import, before the command can catch
it. So the process dies of the signal, as programs that do not handle it do, until the command takes over. So it does
after the command, while Python runs what libraries do at exit.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

COMMAND, MODULE = "drl-fast", "drl_fast.cli"


def end_at_once() -> None:
    """Let Ctrl-C end this process like any other signal, if it is the command line and nobody set a handler."""
    if is_command_line() and _is_ours() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def raise_interrupts() -> None:
    """Make Ctrl-C a KeyboardInterrupt again, which the commands report."""
    if _is_ours() and signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def is_command_line() -> bool:
    """Tell whether this process is ``drl-fast`` or ``python -m drl_fast.cli``."""
    script = os.path.basename(sys.argv[0]) if sys.argv else ""
    # ``python -m`` sets argv[0] to "-m" while it imports the module's package, and then to the file it runs.
    return script.removesuffix(".exe") == COMMAND or (script in ("-m", "__main__.py") and MODULE in sys.orig_argv)


def _is_ours() -> bool:
    return threading.current_thread() is threading.main_thread()
