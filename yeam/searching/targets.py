"""Where the files of a search go: the best config, the record of the trials, the picture."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from yeam.errors import ConfigError, OutputError
from yeam.recipe import LoadedRecipe
from yeam.recipe.document import read_documents
from yeam.recipe.load import Draft
from yeam.searching.space import Space
from yeam.searching.written import filled_text


@dataclass(frozen=True)
class Targets:
    """The files of a search."""

    out: Path
    storage: Path
    plot: Path | None


def targets_of(
    space: Space,
    baseline: LoadedRecipe,
    out: str | os.PathLike[str] | None,
    storage: str | os.PathLike[str] | None,
    plot: str | os.PathLike[str] | None,
    overwrite: bool,
) -> Targets:
    """Where the files go. Raises, before any work, OutputError or ConfigError for places that will not do."""
    home = baseline.path.parent if baseline.path is not None else Path()
    stem = baseline.path.stem if baseline.path is not None else baseline.name
    yaml = Path(out).expanduser() if out is not None else home / f"{stem}-best.yaml"
    found = Targets(
        yaml,
        Path(storage).expanduser() if storage is not None else yaml.with_suffix(".db"),
        Path(plot).expanduser() if plot is not None else None,
    )
    files = [path for path in (found.out, found.storage, found.plot) if path is not None]
    known = {baseline.path.resolve(): "the recipe itself"} if baseline.path is not None else {}
    for path in files:
        there = path.resolve()
        if there in known:
            raise OutputError(f"{path} would replace {known[there]}", "choose another file")
        known[there] = f"another file of this search: {path.name}"
        if not path.parent.is_dir():
            raise OutputError(f"{path}: there is no folder {path.parent}", "make it first, or choose another place")
        if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
            raise OutputError(f"{path} cannot be written", "choose another place")
    if found.plot is not None:
        from yeam.report.files import check_picture

        check_picture(found.plot)
    if found.out.exists() and not found.storage.exists() and not overwrite:
        raise OutputError(
            f"{found.out} exists, and not from this search", "pass --overwrite to replace it, or choose another --out"
        )
    _check_references(space, baseline, found.out)
    return found


def _check_references(space: Space, baseline: LoadedRecipe, out: Path) -> None:
    """A relative path is also looked for in the folder of its recipe: in OUT it must still name the same model."""
    text = filled_text(space, space.defaults)
    moved = Draft(tuple(read_documents(text, str(out))), text, out).checked()
    if (before := baseline.sources()) != (after := moved.sources()):
        lost = next((a for a, b in zip(before, after) if a != b), before[-1])
        raise ConfigError(
            f"in {out} the model {lost.written or lost.path} would be looked for in another folder",
            f"write it beside the recipe, in {baseline.path.parent if baseline.path is not None else Path()}, or use absolute paths",
        )
