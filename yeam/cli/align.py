"""`yeam align`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from yeam.cli.common import Debug, Json, Quiet, handled, print_json
from yeam.errors import UserError

if TYPE_CHECKING:
    from yeam.transfer.report import AlignmentReport


def align(
    host: Annotated[str, typer.Argument(help="The model whose coordinates are taken.", show_default=False)],
    source: Annotated[str, typer.Argument(help="The model to align: same architecture and size.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="The folder to write.")] = None,
    report_only: Annotated[bool, typer.Option("--report-only", help="Match and report, write no model.")] = False,
    judge: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Match this model instead, such as the source's base.")
    ] = None,
    stream: Annotated[
        str, typer.Option(metavar="auto|rotation|permutation", help="What may be done to the residual stream.")
    ] = "auto",
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="A picture of the layers' scores.")] = None,
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Memory to use, such as 4GiB.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a model in another model's coordinates: what it computes stays, and any merge with the other becomes possible.

    Example: yeam align mistral-a mistral-b --out mistral-b-aligned
    """
    from yeam import alignment

    with handled(debug, as_json):
        if report_only == (out is not None):
            raise UserError("give --out FOLDER, or --report-only", "one of the two")
        if plot is not None:
            from yeam.report.files import check_picture

            check_picture(plot)
        options = {} if out is None else {"memory": memory, "overwrite": overwrite}
        report = alignment.align(host, source, out, judge=judge, stream=stream, **options)
        if plot is not None:
            from yeam.transfer.report import plot_alignment

            plot_alignment(report, plot)
        if as_json:
            print_json(report.to_dict())
        elif not quiet:
            _show(report)


def _show(report: AlignmentReport) -> None:
    from rich.console import Console
    from rich.table import Table

    console, found = Console(), report.stream
    table = Table(title="mean cosine of what was matched")
    for heading in ("layer", "heads", "by chance", "lead over second best", "neurons", "lead over second best"):
        table.add_column(heading, justify="right")
    for number, layer in enumerate(report.layers):
        values = (layer[key] for key in ("head_score", "head_chance", "head_margin", "neuron_score", "neuron_margin"))
        table.add_row(str(number), *(f"{value:.3f}" for value in values))
    console.print(table)
    console.print(
        f"{found['tier']}, {found['anchors']:,} shared tokens; stream: R² {found['r2']:.3f} on held-out ones, "
        f"{found['r2_by_chance']:.3f} by chance",
        highlight=False,
    )
    console.print(report.verdict, markup=False, highlight=False)
