"""`yeam merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from yeam.cli.common import (
    AllowNan,
    CacheBudget,
    Config,
    Debug,
    Device,
    Durable,
    Json,
    KeepDownloads,
    Like,
    Memory,
    Overrides,
    Overwrite,
    Private,
    Quiet,
    Resume,
    Revision,
    ShardSize,
    handled,
    text_wanted,
)
from yeam.cli.progress import merging
from yeam.engine.ranks_store import rank_here
from yeam.report.size import human_bytes


def merge(
    config: Config,
    out: Annotated[
        Path | None, typer.Argument(help="The folder to make; the recipe's `output:` or ./<recipe name> otherwise.")
    ] = None,
    device: Device = "auto",
    memory: Memory = None,
    shard_size: ShardSize = None,
    overwrite: Overwrite = False,
    resume: Resume = True,
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

    with handled(debug, as_json, runs_models=bool(guard)):
        with merging(quiet or as_json) as listener:
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
        if rank_here() == 0 and text_wanted(report, as_json, quiet):
            kept = f", {report.resumed} of them kept from the interrupted run" if report.resumed else ""
            typer.echo(
                f"{report.out}: {report.totals['tensors']} tensors{kept}, {human_bytes(report.totals['bytes'])}, "
                f"{report.seconds:.1f} s",
                err=True,
            )
