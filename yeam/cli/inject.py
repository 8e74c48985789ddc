"""`yeam inject`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from yeam.cli.common import (
    AllowNan,
    Debug,
    Device,
    Durable,
    Json,
    Memory,
    Overwrite,
    Quiet,
    Resume,
    ShardSize,
    handled,
    print_json,
    print_notes,
    text_wanted,
)
from yeam.cli.progress import bar, merging
from yeam.engine.ranks_store import rank_here
from yeam.errors import UserError
from yeam.report.size import human_bytes

if TYPE_CHECKING:
    from yeam.planning.jobs import Plan


def inject(
    target: Annotated[str, typer.Option(help="The model that keeps its identity.", show_default=False)],
    sources: Annotated[
        list[str], typer.Option(metavar="S1 S2 …", help="The models that knowledge is taken from.", show_default=False)
    ],
    base: Annotated[
        str | None,
        typer.Option(help="The model that all were tuned from; of another size or family: the sources only."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The folder to make; ./<target>-injected otherwise.")] = None,
    policy: Annotated[str, typer.Option(metavar="union|consensus|priority", help="What is taken.")] = "union",
    budget: Annotated[
        float | None,
        typer.Option(help="Largest change of a tensor relative to its norm, by all sources together; 0.3 by default."),
    ] = None,
    strength: Annotated[float, typer.Option(help="Of every step; 1 is what was measured to be safe.")] = 1.0,
    roles: Annotated[
        str, typer.Option(metavar="ROLE,…", help="What is touched, such as mlp,attention,embedding,norm.")
    ] = "mlp,attention",
    protect: Annotated[
        str, typer.Option(metavar="space|rays|none", help="How the target's own progress is kept; rays is cheaper.")
    ] = "space",
    layers: Annotated[str | None, typer.Option(metavar="A-B", help="Only these layers, both included.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan with the budget of every tensor.")] = False,
    distill: Annotated[
        list[Path] | None,
        typer.Option(metavar="TEXT", help="Fit the strengths of layer groups to this text first."),
    ] = None,
    guard: Annotated[
        list[Path] | None,
        typer.Option(metavar="TEXT", help="Take the strength back until the target predicts this text as well."),
    ] = None,
    device: Device = "auto",
    memory: Memory = None,
    shard_size: ShardSize = None,
    overwrite: Overwrite = False,
    resume: Resume = True,
    allow_nan: AllowNan = False,
    durable: Durable = True,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Add what other models have learned to a target, off the directions that its own tuning uses.

    Example: yeam inject --target code --sources names prose --base base --out code-injected
    """
    import yeam
    from yeam.injection import inject_recipe
    from yeam.recipe.problems import of_no_recipe

    with handled(debug, as_json, runs_models=bool(distill or guard)):
        models = [part for text in sources for part in text.split(",") if part]
        options: dict[str, Any] = {"policy": policy, "budget": budget, "strength": strength, "roles": roles}
        options["protect"] = protect
        options |= {"layers": layers} if layers is not None else {}
        shared: dict[str, Any] = {"shard_size": shard_size, "allow_nan": allow_nan}
        if dry_run:
            if distill:
                raise UserError("--dry-run reads no weights, so nothing can be fitted", "leave --distill out")
            with of_no_recipe():
                planned = yeam.plan(inject_recipe(target, models, base, **options), **shared)
            _show(planned, as_json, quiet)
            return
        options = {name: value for name, value in options.items() if value is not None}
        with (
            bar(quiet or as_json or not distill, "fitting strengths", of_bytes=False) as fitting,
            merging(quiet or as_json) as listener,
        ):
            report = yeam.inject(
                target,
                models,
                out,
                base=base,
                distill=distill or None,
                distill_progress=fitting,
                guard=guard,
                device=device,
                memory=memory,
                overwrite=overwrite,
                resume=resume,
                durable=durable,
                distributed=True,
                progress=listener,
                **options,
                **shared,
            )
        if rank_here() == 0 and text_wanted(report, as_json, quiet):
            change = report.totals.get("relative_change") or 0.0
            typer.echo(
                f"{report.out}: {report.totals['tensors']} tensors, {human_bytes(report.totals['bytes'])}, "
                f"what was touched changed by {change:.2%}, {report.seconds:.1f} s",
                err=True,
            )


def _show(plan: Plan, as_json: bool, quiet: bool) -> None:
    """The plan of an injection: every tensor with its budget."""
    rows = [_row(job.name, job.role, job.layer, job.method, job.parameters) for job in plan.jobs]
    if as_json:
        print_json({**plan.to_dict(), "hash": plan.hash(), "injection": rows})
        return
    if quiet:
        return
    from rich.console import Console
    from rich.table import Table

    console, touched = Console(), [row for row in rows if row["budget"] > 0]
    if not touched:
        print_notes(plan.notes)
        return
    table = Table(title="the largest change of each tensor, relative to its norm")
    for heading in ("tensor", "role", "layer"):
        table.add_column(heading)
    for heading in ("budget", "strength"):
        table.add_column(heading, justify="right")
    for row in touched:
        layer = "" if row["layer"] is None else str(row["layer"])
        table.add_row(row["tensor"], row["role"], layer, f"{row['budget']:.4g}", f"{row['strength']:.4g}")
    console.print(table)
    console.print(
        f"{len(touched)} of {len(rows)} tensors are touched; the others are the target's bytes", highlight=False
    )
    print_notes(plan.notes)


def _row(name: str, role: str, layer: int | None, method: str, values: Any) -> dict[str, Any]:
    injected = method == "inject"
    budget, strength = (values["budget"], values["strength"]) if injected else (0.0, 0.0)
    return {"tensor": name, "role": role, "layer": layer, "budget": budget, "strength": strength}
