"""`yeam verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from yeam.cli.common import Debug, Json, Quiet, handled, print_json
from yeam.cli.progress import bar


def verify(
    out: Annotated[Path, typer.Argument(help="The folder of a merge, or any model folder.")],
    load: Annotated[
        bool,
        typer.Option("--load", help="Also load model and tokenizer with transformers: no weight missing or left over."),
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="With --load: run Python code that the model's folder brings.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Check a model folder: index, shards, checksums against its report, NaN, ties, modules and code. Status 2 if something is wrong.

    Example: yeam verify merged/quickstart --load
    """
    import yeam

    with handled(debug, as_json, runs_models=load):
        with bar(quiet or as_json, "reading") as listener:
            found = yeam.verify(out, load=load, trust_remote_code=trust_remote_code, progress=listener)
        if as_json:
            print_json(found.to_dict())
        elif not quiet:
            typer.echo(found.to_text())
        if not found.ok:
            count = len(found.problems)
            typer.echo(f"error: {out}: {count} problem{'s' * (count != 1)}: {found.problems[0]}", err=True)
            typer.echo("  merge again, or download the model again", err=True)
            raise typer.Exit(2)
