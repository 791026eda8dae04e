"""The command line, one file a command. What a command needs is imported when it runs, not when it is listed."""

import typer

from .demo import demo
from .doctor import doctor
from .eval import evaluate
from .train import train

app = typer.Typer(name="drl-fast", no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)
app.command()(demo)
app.command()(train)
app.command("eval")(evaluate)
app.command()(doctor)


@app.callback()
def main() -> None:
    """Text-video retrieval by weighted token-wise interaction (WTI)."""
