"""`yeam merge`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from yeam.cli.common import (
    AllowNan,
    CacheBudget,
    Debug,
    Durable,
    Json,
    KeepDownloads,
    Like,
    Overrides,
    Private,
    Quiet,
    Revision,
    ShardSize,
    handled,
    print_json,
)
from yeam.engine.ranks_store import rank_here
from yeam.report.size import human_bytes

if TYPE_CHECKING:
    from yeam.engine.run import Progress


def merge(
    config: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    out: Annotated[
        Path | None, typer.Argument(help="The folder to make; the recipe's `output:` or ./<recipe name> otherwise.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Bound on anonymous memory; a quarter of RAM, at most 4GiB, by default."),
    ] = None,
    shard_size: ShardSize = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is a model folder.")] = False,
    resume: Annotated[bool, typer.Option(help="Continue an interrupted run, or start over.")] = True,
    allow_nan: AllowNan = False,
    like: Like = None,
    overrides: Overrides = None,
    keep_downloads: KeepDownloads = True,
    cache_budget: CacheBudget = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Push the result to the Hub; token and rights are checked first."),
    ] = None,
    private: Private = False,
    revision: Revision = None,
    guard: Annotated[
        list[Path] | None,
        typer.Option(metavar="TEXT", help="Take the merge's strength back until the host predicts this text as well."),
    ] = None,
    donor_text: Annotated[
        list[Path] | None, typer.Option(metavar="TEXT", help="With --guard: tell the gain on this text.")
    ] = None,
    guard_limit: Annotated[
        float | None, typer.Option(metavar="SHARE", help="How much of the host's loss may be added; 0.005 by default.")
    ] = None,
    durable: Durable = True,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Merge models as a recipe says.

    Example: yeam merge merge_configs/quickstart.yaml merged/quickstart

    Several processes or machines that share a folder: torchrun --nproc-per-node 4 -m yeam merge CONFIG OUT, or accelerate launch.
    """
    import yeam

    with handled(debug, as_json):
        with _progress(quiet or as_json) as listener:
            report = yeam.merge(
                config,
                out,
                device=device,
                memory=memory,
                shard_size=shard_size,
                overwrite=overwrite,
                resume=resume,
                allow_nan=allow_nan,
                like=like,
                overrides=overrides or [],
                keep_downloads=keep_downloads,
                cache_budget=cache_budget,
                push_to_hub=push_to_hub,
                private=private,
                revision=revision,
                guard=guard,
                donor_text=donor_text,
                guard_limit=guard_limit,
                durable=durable,
                distributed=True,
                progress=listener,
            )
        if rank_here() > 0:
            return
        if as_json:
            print_json(report.to_dict())
        elif not quiet:
            for note in report.notes:
                typer.echo(f"note: {note}", err=True)
            kept = f", {report.resumed} of them kept from the interrupted run" if report.resumed else ""
            typer.echo(
                f"{report.out}: {report.totals['tensors']} tensors{kept}, {human_bytes(report.totals['bytes'])}, "
                f"{report.seconds:.1f} s",
                err=True,
            )


@contextmanager
def _progress(silent: bool) -> Iterator[Callable[[Progress], None] | None]:
    """A progress bar on stderr, none when that is not a terminal."""
    if silent or rank_here() > 0 or not sys.stderr.isatty():  # rich would also believe variables such as FORCE_COLOR
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[tensors]}"),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("planning", total=None, tensors="")

        def listener(event: Progress) -> None:
            tensors = f"{event.tensors:,}/{event.total_tensors:,} tensors"
            bar.update(task, description="merging", total=event.total_bytes, completed=event.nbytes, tensors=tensors)

        yield listener
