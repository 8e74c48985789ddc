"""`yeam compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from yeam.cli.common import Debug, Device, Json, Quiet, handled, text_wanted
from yeam.cli.progress import bar


def compare(
    a: Annotated[
        str, typer.Argument(metavar="A", help="A folder, a file or a Hub id, with +lora or @revision if need be.")
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="The other model.")],
    base: Annotated[
        str | None, typer.Option(metavar="REF", help="What both were fine-tuned from: compare their updates.")
    ] = None,
    spectrum: Annotated[bool, typer.Option(help="Effective ranks, which cost most of the time.")] = True,
    tensors: Annotated[bool, typer.Option("--tensors", help="Also a line for each tensor.")] = False,
    plot: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="Heat maps of layers × roles: .png, .svg or .pdf, or .html for a page with tables."
        ),
    ] = None,
    device: Device = "auto",
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="For the spectra; a quarter of RAM, at most 4GiB, by default.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show how two models differ: by role and tensor, in length, direction and rank.

    Example: yeam compare examples/tiny-family/models/code examples/tiny-family/models/prose --base examples/tiny-family/models/base
    """
    import yeam

    with handled(debug, as_json):
        from yeam.report.files import check_targets, write_target

        targets = plot or []
        check_targets(targets)
        with bar(quiet or as_json, "comparing") as listener:
            found = yeam.compare(a, b, base=base, spectrum=spectrum, device=device, memory=memory, progress=listener)
        from yeam.report.compare_page import pictures, render_comparison, title_of, to_text

        for path in targets:
            write_target(path, title_of(found), lambda: render_comparison(found), lambda: pictures(found))
        if text_wanted(found, as_json, quiet):
            typer.echo(to_text(found, each=tensors))
            for path in targets:
                typer.echo(f"written: {path}", err=True)
