"""`yeam push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from yeam.cli.common import Debug, Json, Private, Quiet, Revision, handled, text_wanted
from yeam.report.size import human_bytes


def push(
    folder: Annotated[Path, typer.Argument(help="The folder of a merge, or any model folder.")],
    repo: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="The repository on the Hub; it is made if need be.")
    ],
    private: Private = False,
    revision: Revision = None,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Of the commit.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Push a model folder to the Hugging Face Hub. Interrupted, the same command goes on where it was.

    The token comes from HF_TOKEN or `hf auth login`. A folder that `yeam verify` refuses is not pushed.

    Example: yeam push merged/quickstart owner/quickstart --private
    """
    import yeam

    with handled(debug, as_json):
        report = yeam.push(folder, repo, private=private, revision=revision, message=message)
        if text_wanted(report, as_json, quiet):
            typer.echo(
                f"{report.url}: {len(report.files)} files, {human_bytes(report.bytes)}, commit {report.commit[:12]}",
                err=True,
            )
