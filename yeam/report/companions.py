"""What a model folder names and must hold beside its own weights: modules of sentence-transformers, and Python code."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from yeam.checkpoint import open_checkpoint
from yeam.checkpoint.beside import MODULES, module_files, module_weights, named_paths
from yeam.errors import CheckpointError
from yeam.planning.code import home_of, modules_named, parsed


def companion_problems(folder: Path) -> Iterator[str]:
    """A sentence for each module folder or Python file that is named and missing, and for module weights that do not open."""
    modules = parsed(folder / MODULES)
    for path in named_paths(modules):
        if not (folder / path).resolve().is_relative_to(folder.resolve()):
            yield f"{folder / MODULES}: names {path!r}, which is not in the folder: do not use it"
        elif not (folder / path).is_dir():
            yield f"{folder / path}: is missing, and {MODULES} names it: {_remedy(MODULES)}"
    for name in module_weights(module_files(folder, modules)):
        try:
            open_checkpoint(str(folder / name)).close()
        except CheckpointError as error:
            yield error.message
    if home_of(folder):  # in the Hub's cache code appears when it is used
        return
    for settings in [folder / MODULES, folder / "config.json", *sorted(folder.glob("*_config.json"))]:
        for name in dict.fromkeys(modules_named(parsed(settings))):
            if not (folder / f"{name}.py").is_file():
                yield f"{folder / name}.py: is missing, and {settings.name} names it: {_remedy(settings.name)}"


def _remedy(named_by: str) -> str:
    return f"copy it from the model that {named_by} came from, or remove what names it"
