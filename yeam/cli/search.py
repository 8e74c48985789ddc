"""`yeam search`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from yeam.cli.common import (
    Batch,
    Context,
    Debug,
    Device,
    Json,
    Overrides,
    Quiet,
    TrustRemoteCode,
    handled,
    text_wanted,
)
from yeam.cli.progress import bar


def search(
    config: Annotated[Path, typer.Argument(help="The recipe, a YAML file with `{search: [0, 1]}` in place of values.")],
    text: Annotated[
        list[str],
        typer.Option(
            "--text", metavar="FILE|DIR …", help="Text files, or folders of them; the last tenth of each is held out."
        ),
    ],
    trials: Annotated[int, typer.Option(metavar="N", help="Candidates in all, those of earlier runs among them.")] = 50,
    sampler: Annotated[str, typer.Option(metavar="tpe|cmaes", help="tpe (optuna) or cmaes (cma).")] = "tpe",
    seed: Annotated[int, typer.Option(metavar="N", help="The same seed tries the same values.")] = 0,
    timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Begin no new trial after so many seconds.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.yaml", help="The best config; CONFIG-best.yaml by default.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="A picture of the trials: .png, .svg or .pdf.")
    ] = None,
    storage: Annotated[
        Path | None,
        typer.Option(metavar="FILE.db", help="Where trials are kept (SQLite); beside the best config by default."),
    ] = None,
    resume: Annotated[bool, typer.Option(help="Continue with the trials of an earlier run, or forget them.")] = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a best config that is not of this search.")
    ] = False,
    context: Context = None,
    stride: Annotated[
        int | None,
        typer.Option(metavar="N", help="Tokens scored in each window after the first; all of them by default."),
    ] = None,
    batch: Batch = None,
    dtype: Annotated[str, typer.Option(help="Of the evaluation: auto, float32, bfloat16 or float16.")] = "auto",
    device: Device = "auto",
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="For merging, beside the candidate itself; as in `yeam merge`.")
    ] = None,
    overrides: Overrides = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Find the values that a recipe leaves open, on text. For several processes: accelerate launch -m yeam search …

    Example: yeam search merge_configs/search.yaml --text README.md --trials 20 --out best.yaml
    """
    import yeam
    from yeam.engine.ranks_store import rank_here

    silent = quiet or as_json or rank_here() > 0
    with handled(debug, as_json, runs_models=True):
        with bar(silent, "trials", of_bytes=False) as listener:
            found = yeam.search(
                config,
                text,
                trials=trials,
                sampler=sampler,
                seed=seed,
                timeout=timeout,
                out=out,
                storage=storage,
                plot=plot,
                resume=resume,
                overwrite=overwrite,
                context=context,
                stride=stride,
                batch=batch,
                dtype=dtype,
                device=device,
                memory=memory,
                overrides=overrides or (),
                trust_remote_code=trust_remote_code,
                progress=listener,
            )
        if rank_here() == 0 and text_wanted(found, as_json, quiet):
            from yeam.searching.results import to_text

            typer.echo(to_text(found))
            for path in (found.out, found.plot):
                if path is not None:
                    typer.echo(f"written: {path}", err=True)
