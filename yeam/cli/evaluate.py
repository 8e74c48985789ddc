"""`yeam eval`."""

from __future__ import annotations

from typing import Annotated

import typer

from yeam.cli.common import (
    Batch,
    Context,
    Debug,
    Device,
    Json,
    Model,
    Quiet,
    TrustRemoteCode,
    handled,
    text_wanted,
)
from yeam.cli.progress import bar


def evaluate(
    model: Model,
    text: Annotated[
        list[str], typer.Option("--text", metavar="FILE|DIR …", help="Text files, or folders of them; several at once.")
    ],
    against: Annotated[
        list[str] | None,
        typer.Option("--against", metavar="REF …", help="Other models to compare with; several at once."),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Tokens scored in each window after the first: 64, or the context if that is shorter."
        ),
    ] = None,
    context: Context = None,
    wikitext2: Annotated[
        bool, typer.Option("--wikitext2", help="The text is wikitext-2's test split: its rows joined with blank lines.")
    ] = False,
    batch: Batch = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Device = "auto",
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Weights beyond this are read from the disk; 80 % of what is free by default."
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    update_card: Annotated[
        bool, typer.Option("--update-card", help="Keep the result in the model's folder and show it in its card.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure perplexity and bits per byte with a sliding window, and differences from other models.

    Example: yeam eval merged/quickstart --text README.md --against examples/tiny-family/models/base
    """
    import yeam

    with handled(debug, as_json, runs_models=True):
        with bar(quiet or as_json, "tokens", of_bytes=False) as listener:
            found = yeam.evaluate(
                model,
                text,
                against=against or (),
                stride=stride,
                context=context,
                wikitext2=wikitext2,
                batch=batch,
                dtype=dtype,
                device=device,
                memory=memory,
                trust_remote_code=trust_remote_code,
                update_card=update_card,
                progress=listener,
            )
        if text_wanted(found, as_json, quiet):
            from yeam.evaluation.results import to_text

            typer.echo(to_text(found))
