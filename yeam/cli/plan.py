"""`yeam plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from yeam.cli.common import AllowNan, Config, Debug, Json, Like, Overrides, Quiet, ShardSize, handled, print_json
from yeam.report.size import human_bytes

if TYPE_CHECKING:
    from rich.table import Table

    from yeam.planning.jobs import Plan


def plan(
    config: Config,
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
            for each in (costs, *costs["stages"].values()):
                each["read_by_role"] = [[*key, nbytes] for key, nbytes in each["read_by_role"].items()]
            print_json({**planned.to_dict(), "hash": planned.hash(), **costs})
            return
        if quiet:
            return
        from rich.console import Console

        console = Console()
        for stage in planned.stages:
            kept = "passes through memory" if stage.streamed else "goes to a temporary folder beside the output"
            title = f"stage {stage.name}: {stage.plan.method}, {_models(stage.plan)}; {kept}"
            console.print(_table(stage.plan, title, costs["stages"][stage.name]["read_by_role"]))
        title = f"{planned.method}, {_models(planned)}, yeam {yeam.__version__}"
        console.print(_table(planned, title, costs["read_by_role"]))
        files = f"{len(planned.shards)} file{'s' if len(planned.shards) > 1 else ''}"
        console.print(
            f"{len(planned.jobs):,} tensors, {planned.total_parameters:,} parameters; "
            f"reads {human_bytes(costs['read_bytes'])}, writes {human_bytes(planned.total_bytes)} in {files}; "
            f"peak memory about {human_bytes(costs['peak_memory'])}",
            highlight=False,
        )
        for note in planned.notes:
            console.print(f"note: {note}", markup=False, highlight=False)


def _models(planned: Plan) -> str:
    count = len(planned.models)
    return f"{count} model{'s' * (count != 1)}"


def _table(planned: Plan, title: str, reads: dict[tuple[str, str], int]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    from yeam.planning.planner import summary

    table = Table(title=escape(title))
    table.add_column("role")
    table.add_column("method")
    for heading in ("tensors", "read", "write"):
        table.add_column(heading, justify="right")
    for (role, method), (count, nbytes) in summary(planned).items():
        table.add_row(role, method, f"{count:,}", human_bytes(reads[role, method]), human_bytes(nbytes))
    return table
