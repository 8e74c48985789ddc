"""`yeam plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from yeam.cli.common import AllowNan, Debug, Json, Like, Overrides, Quiet, ShardSize, handled, human, print_json


def plan(
    config: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    shard_size: ShardSize = None,
    allow_nan: AllowNan = False,
    like: Like = None,
    overrides: Overrides = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show what a merge would do, from the models' headers alone.

    Example: yeam plan merge_configs/quickstart.yaml
    """
    import yeam
    from yeam.api import plan_costs

    with handled(debug, as_json):
        planned, costs = plan_costs(
            config, shard_size=shard_size, allow_nan=allow_nan, like=like, overrides=overrides or []
        )
        if as_json:
            costs["read_by_role"] = [[*key, nbytes] for key, nbytes in costs["read_by_role"].items()]
            print_json({**planned.to_dict(), "hash": planned.hash(), **costs})
            return
        if quiet:
            return
        from rich.console import Console
        from rich.table import Table

        from yeam.planning.planner import summary

        table = Table(title=f"{planned.method}, {len(planned.models)} models, yeam {yeam.__version__}")
        table.add_column("role")
        table.add_column("method")
        for heading in ("tensors", "read", "write"):
            table.add_column(heading, justify="right")
        for (role, method), (count, nbytes) in summary(planned).items():
            table.add_row(role, method, f"{count:,}", human(costs["read_by_role"][role, method]), human(nbytes))
        console = Console()
        console.print(table)
        files = f"{len(planned.shards)} file{'s' if len(planned.shards) > 1 else ''}"
        console.print(
            f"{len(planned.jobs):,} tensors, {planned.total_parameters:,} parameters; "
            f"reads {human(costs['read_bytes'])}, writes {human(planned.total_bytes)} in {files}; "
            f"peak memory about {human(costs['peak_memory'])}",
            highlight=False,
        )
        for note in planned.notes:
            console.print(f"note: {note}", markup=False, highlight=False)
