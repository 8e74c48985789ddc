"""Recipes from files, mappings and overrides, checked against the schema; errors carry the line."""

from __future__ import annotations

import numbers
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from yeam.errors import ConfigError
from yeam.recipe.document import Document, dump_yaml, read_documents
from yeam.recipe.faults import problems_of
from yeam.recipe.globs import expand_globs
from yeam.recipe.overrides import apply_overrides
from yeam.recipe.problems import KeyPath, Locations, Problem, describe, show
from yeam.recipe.ranges import refuse_ranges
from yeam.recipe.reference import ModelRef
from yeam.recipe.schema import MergeRecipe
from yeam.recipe.stages import StageRef, joined, stage_reference

MAX_BYTES = 64 * 2**20
"""No recipe is larger; a weight file that is taken for one is refused before it is read."""


@dataclass(frozen=True)
class LoadedRecipe:
    """A checked recipe, with the text that it came from and the place of every part of it.

    `text` is the file, verbatim (write it without newline translation), or the YAML dump of a mapping; with overrides,
    a comment that lists them and the dump of the result. `path` is None for what was not read from a file.

    A recipe of several documents is that of the document which makes the result; `stages` are the others, each after
    those that it uses. `stage_names` are the names that stand for a stage in this document.
    """

    recipe: MergeRecipe
    text: str
    path: Path | None
    places: Locations = field(repr=False, compare=False)
    stages: tuple[LoadedRecipe, ...] = ()
    stage_names: tuple[str, ...] = ()

    @property
    def documents(self) -> tuple[LoadedRecipe, ...]:
        """The stages, then the recipe itself."""
        return (*self.stages, self)

    def sources(self) -> list[ModelRef]:
        """Every model that a document of the recipe names and that is no stage, once."""
        found = [ref for document in self.documents for _, ref in document.recipe.references()]
        real = [ref.lora if isinstance(ref, StageRef) else ref for ref in found]
        return list(dict.fromkeys(ref for ref in real if ref is not None))

    def reference(self, value: object) -> ModelRef:
        """The model, or the stage, that `value` names in this recipe. Raises ConfigError without a line number."""
        base_dir = None if self.path is None else Path(os.path.abspath(self.path)).parent
        return stage_reference(value, self.stage_names, base_dir) or ModelRef.parse(value, base_dir)

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


Data = Mapping[str, Any] | MergeRecipe
"""A recipe, or one document of a recipe of several stages, as Python data."""

RecipeSource = str | os.PathLike[str] | Data | Sequence[Data] | LoadedRecipe
"""A YAML file by its path, a recipe as Python data, its documents as a list, or what `load_recipe` gave."""


@dataclass(frozen=True)
class Draft:
    """A recipe as it was written: the plain data of its documents, before the schema has seen them.

    `text` and `path` as in `LoadedRecipe`. Only here may values be ranges to search in (`yeam.recipe.ranges`).
    """

    documents: tuple[Document, ...]
    text: str
    path: Path | None

    def checked(self) -> LoadedRecipe:
        """The recipe, checked against the schema. Raises ConfigError with `file:line` for each problem."""
        names = [document.data.get("name") for document in self.documents] if len(self.documents) > 1 else []
        stages = tuple(name.strip() for name in names if isinstance(name, str) and name.strip())
        recipes = [_checked(document, self.text, self.path, stages) for document in self.documents]
        return joined(recipes) if len(recipes) > 1 else recipes[0]


def load_recipe(source: RecipeSource, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """A recipe from a YAML file (by path), from plain data or from a MergeRecipe, with `KEY=VALUE` overrides applied.

    A list of mappings, like a file of several documents, is a recipe of several stages. Raises ConfigError, with
    `file:line` for each problem, for a file that cannot be read, that is no YAML mapping, or that the schema refuses,
    and for stages that do not fit together. Relative model paths in a file are also looked for in the file's folder.
    """
    if isinstance(source, LoadedRecipe) and not overrides:
        return source
    return read_draft(source, overrides).checked()


def read_draft(source: RecipeSource, overrides: Sequence[str] = ()) -> Draft:
    """As `load_recipe`, as far as that needs no schema. Raises ConfigError."""
    if isinstance(overrides, str):
        overrides = [overrides]
    if isinstance(source, LoadedRecipe):
        source = [document.recipe for document in source.documents]
    if isinstance(source, Mapping | MergeRecipe):
        source = [source]
    if isinstance(source, Sequence) and not isinstance(source, str | bytes):
        return _drafted([_document(item, n, len(source)) for n, item in enumerate(source)], None, None, overrides)
    if not isinstance(source, str | os.PathLike):
        raise ConfigError(
            f"a recipe is a path, a mapping or a list of mappings, not a {type(source).__name__}", "pass one of these"
        )
    path = Path(source)
    text = _read_text(path)
    return _drafted(read_documents(text, str(path)), text, path, overrides)


def parse_recipe(text: str, name: str = "recipe.yaml", overrides: Sequence[str] = ()) -> LoadedRecipe:
    """A recipe from YAML text, as `load_recipe` from a file; `name` stands for the file in messages."""
    documents = read_documents(text, name) or [Document(None, Locations(name))]
    return _drafted(documents, text, None, overrides).checked()


def _document(source: object, number: int, count: int) -> Document:
    places = Locations(None, title="recipe" if count == 1 else f"recipe[{number}]")
    if isinstance(source, MergeRecipe):
        source = source.plain()
    try:
        return Document(_plain(source, ()), places)
    except RecursionError:
        raise ConfigError(f"{places.title}: it contains itself", "pass plain data") from None


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


def _drafted(documents: list[Document], text: str | None, path: Path | None, overrides: Sequence[str]) -> Draft:
    if not documents:
        documents = [Document(None, Locations(str(path) if path is not None else None))]
    for document in documents:
        where = document.places.locate(())
        if document.data is None:
            raise ConfigError(f"{where}: the recipe is empty", "give it a merge_method and models")
        if not isinstance(document.data, dict):
            raise ConfigError(
                f"{where}: a recipe is a mapping of keys to values, not {describe(document.data)}",
                "begin with `merge_method: …`",
            )
    if overrides:
        apply_overrides(documents, overrides)
        text = _overridden_text(documents, overrides)
    elif text is None:
        text = dump_documents(document.data for document in documents)
    return Draft(tuple(documents), text, path)


def _checked(document: Document, text: str, path: Path | None, stages: tuple[str, ...]) -> LoadedRecipe:
    base_dir = Path(os.path.abspath(path)).parent if path is not None else None
    refuse_ranges(document)
    document = expand_globs(document, base_dir, stages)
    try:
        recipe = MergeRecipe.model_validate(document.data, context={"base_dir": base_dir, "stages": stages})
    except ValidationError as error:
        problems = problems_of(error, MergeRecipe)
        raise document.places.error(problems) from None
    return LoadedRecipe(recipe, text, path, document.places, stage_names=stages)


def _overridden_text(documents: Sequence[Document], overrides: Sequence[str]) -> str:
    origin = documents[0].places.name or "a recipe"
    notes = [f"{origin}, changed by", *(f"  --set {override}" for override in overrides)]
    header = "".join(f"# {' '.join(note.splitlines())}\n" for note in notes)
    return header + dump_documents(document.data for document in documents)


def dump_documents(data: Iterable[Any]) -> str:
    """YAML text of the documents of a recipe."""
    return "---\n".join(map(dump_yaml, data))


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
