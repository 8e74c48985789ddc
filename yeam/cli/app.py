"""The `yeam` command and its subcommands."""

from __future__ import annotations

from typing import Annotated

import typer

from yeam._version import __version__
from yeam.cli import inspect, listing, merge, plan

app = typer.Typer(
    name="yeam",
    help="Merge Hugging Face models: streaming, resumable, without tuning.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
app.command()(merge.merge)
app.command()(plan.plan)
app.command()(inspect.inspect)
app.command()(listing.methods)
app.command()(listing.families)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"yeam {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Merge Hugging Face models: streaming, resumable, without tuning."""
