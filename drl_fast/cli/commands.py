"""The commands of ``drl-fast``, their order and how their help is printed."""

from __future__ import annotations

import functools
import shutil
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from .demo import demo
from .doctor import doctor, environment
from .eval import evaluate
from .features import features
from .index import index
from .search import search
from .train import train

# Longer lines are hard to read, whatever the terminal's width.
WIDEST_HELP = 100
# Below this width two columns leave no room for whole words.
TWO_COLUMNS = 60


class Command(TyperCommand):
    """A command whose help puts each option above its text on a narrow terminal."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        if formatter.width < TWO_COLUMNS:
            formatter.write_dl = functools.partial(formatter.write_dl, col_max=4)
        super().format_options(ctx, formatter)


# rich's help tables cut words and drop line breaks; plain help wraps at every width.
app = typer.Typer(
    name="drl-fast", no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
)
# Short texts: the list of commands shows one line for each.
app.command(cls=Command, short_help="Compare all interactions")(demo)
app.command(cls=Command, short_help="Train a model")(train)
app.command(cls=Command, short_help="Encode a data set once")(features)
app.command("eval", cls=Command, short_help="Score a model")(evaluate)
app.command(cls=Command, short_help="Encode your videos")(index)
app.command(cls=Command, short_help="Find a moment")(search)
app.command(cls=Command, short_help="Check this machine")(doctor)


def print_version(asked: bool) -> None:
    if asked:
        typer.echo(environment())
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=print_version, is_eager=True, help="Print versions and exit."),
    ] = False,
) -> None:
    """Text-video retrieval by weighted token-wise interaction (WTI)."""


def run() -> None:
    """Run the command that ``sys.argv`` names, with help as wide as the terminal."""
    app(prog_name="drl-fast", terminal_width=min(shutil.get_terminal_size().columns, WIDEST_HELP))
