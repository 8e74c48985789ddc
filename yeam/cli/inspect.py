"""`yeam inspect`."""

from __future__ import annotations

import typer

from yeam.cli.common import Debug, Json, Model, Quiet, handled, print_json


def inspect(
    model: Model,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show what a model is made of: family, roles, shapes, dtypes, and how much of it is recognised.

    Example: yeam inspect examples/tiny-family/models/base
    """
    import yeam

    with handled(debug, as_json):
        inspection = yeam.inspect(model)
        if as_json:
            print_json(inspection.to_dict())
        elif not quiet:
            typer.echo(inspection.to_text())
