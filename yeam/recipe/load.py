"""Recipes from files, mappings and overrides, checked against the schema; errors carry the line."""

from __future__ import annotations

import numbers
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from yeam.errors import ConfigError
from yeam.recipe.document import Document, dump_yaml, read_document
from yeam.recipe.faults import problems_of
from yeam.recipe.overrides import apply_overrides
from yeam.recipe.problems import KeyPath, Locations, Problem, describe, show
from yeam.recipe.reference import ModelRef
from yeam.recipe.schema import MergeRecipe

MAX_BYTES = 64 * 2**20
"""No recipe is larger; a weight file that is taken for one is refused before it is read."""


@dataclass(frozen=True)
class LoadedRecipe:
    """A checked recipe, with the text that it came from and the place of every part of it.

    `text` is the file, verbatim (write it without newline translation), or the YAML dump of a mapping; with overrides,
    a comment that lists them and the dump of the result. `path` is None for what was not read from a file.
    """

    recipe: MergeRecipe
    text: str
    path: Path | None
    places: Locations = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        """The recipe's `name`, else the file's name without suffix, else `merge`."""
        return self.recipe.name or (self.path.stem if self.path is not None else "merge")

    def locate(self, path: KeyPath) -> str:
        """Where the part at `path`, or its nearest parent, was written: `file.yaml:12` or `--set KEY=VALUE`."""
        return self.places.locate(tuple(path))

    def error(self, path: KeyPath, message: str, remedy: str = "") -> ConfigError:
        """A ConfigError about the part at `path`: `file.yaml:12: message`."""
        return ConfigError(f"{self.locate(path)}: {message}", remedy)


def load_recipe(
    source: str | os.PathLike[str] | Mapping[str, Any] | MergeRecipe | LoadedRecipe, overrides: Sequence[str] = ()
) -> LoadedRecipe:
    """A recipe from a YAML file (by path), from plain data or from a MergeRecipe, with `KEY=VALUE` overrides applied.

    Raises ConfigError, with `file:line` for each problem, for a file that cannot be read, that is no YAML mapping, or
    that the schema refuses. Relative model paths in a file are also looked for in the file's folder.
    """
    if isinstance(source, LoadedRecipe):
        if not overrides:
            return source
        source = source.recipe
    if isinstance(source, MergeRecipe):
        source = source.plain()
    if isinstance(source, Mapping):
        try:
            data = _plain(source, ())
        except RecursionError:
            raise ConfigError("recipe: it contains itself", "pass plain data") from None
        return _finish(Document(data, Locations(None)), None, None, overrides)
    if not isinstance(source, str | os.PathLike):
        raise ConfigError(f"a recipe is a path or a mapping, not a {type(source).__name__}", "pass one of these")
    path = Path(source)
    text = _read_text(path)
    return _finish(read_document(text, str(path)), text, path, overrides)


def parse_recipe(text: str, name: str = "recipe.yaml", overrides: Sequence[str] = ()) -> LoadedRecipe:
    """A recipe from YAML text, as `load_recipe` from a file; `name` stands for the file in messages."""
    return _finish(read_document(text, name), text, None, overrides)


def _read_text(path: Path) -> str:
    try:
        if path.is_dir():
            raise ConfigError(f"{path}: is a folder, not a recipe", "name the YAML file")
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file", "check the path of the recipe") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path}: cannot be read: {reason}", "check the file and its permissions") from None
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{path}: is larger than {MAX_BYTES:,} bytes, which no recipe is", "name the YAML file")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: is not UTF-8 text", "save the recipe as UTF-8") from None


def _finish(document: Document, text: str | None, path: Path | None, overrides: Sequence[str]) -> LoadedRecipe:
    places = document.places
    if document.data is None:
        raise ConfigError(f"{places.locate(())}: the recipe is empty", "give it a merge_method and models")
    if not isinstance(document.data, dict):
        raise ConfigError(
            f"{places.locate(())}: a recipe is a mapping of keys to values, not {describe(document.data)}",
            "begin with `merge_method: …`",
        )
    if overrides:
        apply_overrides(document, overrides)
        text = _overridden_text(document, overrides)
    elif text is None:
        text = dump_yaml(document.data)
    base_dir = Path(os.path.abspath(path)).parent if path is not None else None
    try:
        recipe = MergeRecipe.model_validate(document.data, context={"base_dir": base_dir})
    except ValidationError as error:
        problems = problems_of(error, MergeRecipe)
        raise places.error(problems) from None
    return LoadedRecipe(recipe, text, path, places)


def _overridden_text(document: Document, overrides: Sequence[str]) -> str:
    origin = document.places.name or "a recipe"
    notes = [f"{origin}, changed by", *(f"  --set {override}" for override in overrides)]
    header = "".join(f"# {' '.join(note.splitlines())}\n" for note in notes)
    return header + dump_yaml(document.data)


def _plain(value: Any, path: KeyPath) -> Any:
    """A copy of Python data as YAML can hold it; raises ConfigError for what it cannot."""
    if value is None or isinstance(value, bool):
        return value
    # subclasses such as numpy.float64 or a text enum become what they stand for
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, numbers.Real):
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    if isinstance(value, ModelRef | os.PathLike):
        return str(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise Locations(None).error([Problem(path, f"has the key {key!r}, which is not text")])
        return {key: _plain(item, (*path, key)) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [_plain(item, (*path, index)) for index, item in enumerate(value)]
    raise ConfigError(f"recipe: {show(path)} is a {type(value).__name__}", "pass numbers, text, lists and mappings")
