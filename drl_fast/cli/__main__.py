"""``python -m drl_fast.cli``: the command where its script is not on the path, as under torchrun."""

from . import app

app()
