"""Processes that start within milliseconds, because they are forked from a server that has everything imported.

A new interpreter takes seconds to import torch and open_clip. The server is started once per test process, has no
threads, and has the environment of that moment.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

# Not LanceDB: its threads would not survive the fork.
PRELOADED = ["tests.engine.runs", "drl_fast.engine.evaluate", "drl_fast.engine.load_model", "drl_fast.model.drl"]


def forkserver() -> ForkServerContext:
    """Return the context whose processes are forked from the server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context
