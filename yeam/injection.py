"""`yeam.inject`: knowledge of sources into a target, as the recipe that does it; what the command line calls, too."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yeam.arguments import check_arguments, checked
from yeam.engine.ranks_store import place_here
from yeam.errors import UserError

if TYPE_CHECKING:
    from yeam.distill.fit import Listener
    from yeam.report.merge_report import MergeReport

Reference = str | os.PathLike[str]
Source = Reference | Mapping[str, Reference]
OPTIONS = (
    "policy", "strength", "strengths", "budget", "roles", "layers", "protect", "softness", "frames", "rounds", "seed"
)  # fmt: skip
"""The options of the plugin `inject` beside the models."""


def inject_recipe(
    target: Reference, sources: Sequence[Source] | Source, base: Reference | None = None, **options: Any
) -> dict[str, Any]:
    """The recipe of an injection, for `yeam.plan` and `yeam.merge`. options: those of the plugin `inject`; None is the default."""
    listed = [sources] if isinstance(sources, str | os.PathLike | Mapping) else list(sources)
    settings: dict[str, Any] = {"sources": [_reference(source) for source in listed]}
    if base is not None:
        settings["base"] = os.fspath(base)
    settings |= {name: _plain(value) for name, value in options.items() if value is not None}
    return {
        "merge_method": "passthrough",
        "models": [{"model": os.fspath(target)}],
        "plugins": [{"inject": settings}],
    }


@checked
def inject(
    target: Reference,
    sources: Sequence[Source] | Source,
    out: Reference | None = None,
    *,
    base: Reference | None = None,
    distill: Reference | Sequence[Reference] | None = None,
    distill_progress: Listener | None = None,
    **options: Any,
) -> MergeReport:
    """Add what the sources have learned to the target, which keeps its progress, format, tokenizer and config.

    target, sources, base: references as in a recipe. base: the common ancestor; without it updates are source − target, which undo the
    target's own, and little can be added. Models of another size or family are moved into it, as by the plugin `scale_up`: `base` is then
    theirs, or a source is a mapping `{model, base}`. out: the folder to make, `./<target's name>-injected` by default. distill: text
    files to which the strengths of layer groups are fitted first (see `yeam.distill`); `distill_progress` is called with (steps done,
    steps in all). options: those of the plugin `inject` (policy, strength, strengths, budget, roles, layers, protect, …) and of
    `yeam.merge` (device, memory, overwrite, guard, durable, distributed, …).
    Raises what `yeam.merge` raises.

        >>> import yeam
        >>> family = "examples/tiny-family/models/"
        >>> yeam.inject(family + "code", [family + "names"], base=family + "base")  # doctest: +SKIP
    """
    from yeam.api import merge
    from yeam.recipe.problems import of_no_recipe

    settings = {name: options.pop(name) for name in OPTIONS if name in options}
    recipe = inject_recipe(target, sources, base, **settings)
    folder = Path(out) if out is not None else Path(f"{Path(os.fspath(target)).name}-injected")
    check_arguments(merge, recipe, folder, **options)
    if distill is None:
        with of_no_recipe():
            return merge(recipe, folder, **options)
    from dataclasses import replace

    from yeam.distill.fit import fit_strengths
    from yeam.engine.target import check_output_free

    check_output_free(folder.absolute(), bool(options.get("overwrite")))
    if options.get("distributed") and place_here() is not None:
        raise UserError(
            "strengths are fitted in one process", "fit without torchrun or accelerate, or give `strengths` instead"
        )
    if settings.get("strengths"):
        raise UserError("strengths are fitted to the text", "give either `strengths` or `distill`")
    texts = [distill] if isinstance(distill, str | os.PathLike) else list(distill)
    shared = {name: options[name] for name in ("device", "memory", "allow_nan") if name in options}
    with of_no_recipe():
        fitted = fit_strengths(recipe, [os.fspath(text) for text in texts], listener=distill_progress, **shared)
        report = merge(inject_recipe(target, sources, base, **settings, strengths=fitted.strengths), folder, **options)
    return replace(report, notes=[*report.notes, *fitted.notes])


def _reference(source: Source) -> str | dict[str, str]:
    if isinstance(source, Mapping):
        return {name: os.fspath(value) for name, value in source.items()}
    return os.fspath(source)


def _plain(value: Any) -> Any:
    """What a recipe can hold: lists and mappings."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
