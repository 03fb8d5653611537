"""`slipstream plan`, `slipstream convert`, `slipstream compile` and `slipstream eval`."""

import sys
from importlib.metadata import version
from typing import Annotated

import typer

from engine.errors import SlipstreamError
from slipstream_cli.compile import compile_kernels
from slipstream_cli.convert import convert
from slipstream_cli.perplexity import perplexity
from slipstream_cli.plan import plan

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # which fills the lines of paragraphs
    help="Tools around models that Slipstream serves. Serving itself: serve run serve_app:app",
)
app.command()(plan)
app.command()(convert)
app.command("compile")(compile_kernels)
evaluate = typer.Typer(
    no_args_is_help=True, rich_markup_mode="markdown", help="Measure what a number format costs in quality."
)
evaluate.command()(perplexity)
app.add_typer(evaluate, name="eval")


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        print(version("slipstream-llm"))
        raise typer.Exit


@app.callback()
def _top(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Nothing that all commands have in common."""


@evaluate.callback()
def _evaluate() -> None:
    """Keeps `perplexity` a command of its own: a group with one command would lose its name."""


def main() -> None:
    """What can be wrong with arguments or model ends in one line."""
    try:
        app()
    except SlipstreamError as error:
        print(f"slipstream: {error}", file=sys.stderr)
        sys.exit(1)
