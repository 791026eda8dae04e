"""``python -m drl_fast.cli``: the same command where the script is not on the path, as under torchrun."""

from . import main

main()
