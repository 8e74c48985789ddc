"""The `yeam` command and its subcommands."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from yeam._version import __version__
from yeam.cli import align, compare, evaluate, inject, inspect, listing, merge, plan, push, report, search, verify
from yeam.cli.common import handled
from yeam.cli.mergekit import KnowsMergekit
from yeam.cli.several import SeveralValues
from yeam.engine.ranks_store import place_here, rank_here
from yeam.errors import UserError

ONE_PROCESS = ("push", "align")
"""Commands that write something, and that several processes would do several times at once."""

app = typer.Typer(
    name="yeam",
    help="Merge Hugging Face models: streaming, resumable, without tuning.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
app.command(cls=KnowsMergekit)(merge.merge)
app.command()(plan.plan)
app.command(cls=SeveralValues)(inject.inject)
app.command()(inspect.inspect)
app.command(cls=SeveralValues)(compare.compare)
app.command("eval", cls=SeveralValues)(evaluate.evaluate)
app.command(cls=SeveralValues)(search.search)
app.command(cls=SeveralValues)(report.report)
app.command()(verify.verify)
app.command()(push.push)
app.command()(align.align)
app.command()(listing.methods)
app.command()(listing.plugins)
app.command()(listing.families)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"yeam {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Merge Hugging Face models: streaming, resumable, without tuning."""
    if context.invoked_subcommand in ONE_PROCESS:
        with handled(False, "--json" in sys.argv):
            if (place := place_here()) is not None:
                raise UserError(
                    f"`yeam {context.invoked_subcommand}` runs in one process, and {place.size} were started (WORLD_SIZE)",
                    "leave torchrun or accelerate launch out, or unset WORLD_SIZE",
                )
    if not sys.stderr.isatty() or rank_here() > 0 or {"-q", "--quiet", "--json"} & set(sys.argv):
        os.environ.setdefault(
            "HF_HUB_DISABLE_PROGRESS_BARS", "1"
        )  # read when huggingface_hub is imported, which is later
