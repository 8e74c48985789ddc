"""Stages: several documents of one recipe, of which later ones merge what earlier ones make.

A document is named by its `name:`; wherever a model may stand, that name stands for what the document makes, as in
mergekit-multi. Documents come in any order. The one that no other uses is the result.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from yeam.errors import ConfigError, suggest
from yeam.recipe.problems import KeyPath
from yeam.recipe.reference import ModelRef

if TYPE_CHECKING:
    from yeam.recipe.load import LoadedRecipe


MAX_STAGES = 200


@dataclass(frozen=True)
class StageRef(ModelRef):
    """What another document of the recipe makes: `path` is that document's name. An adapter may be applied to it."""


def stage_reference(
    value: object, names: Collection[str], base_dir: str | os.PathLike[str] | None = None
) -> StageRef | None:
    """The stage that a model's place in a recipe names, as `NAME`, `NAME+lora` or `{model: NAME, lora: …}`; else None.

    A stage goes before a folder or a Hub repository of the same name. Raises ConfigError for an adapter that cannot be
    meant.
    """
    named = named_stage(value, names)
    if named is None:
        return None
    name, lora = named
    adapter = None if lora is None else ModelRef.parse(lora, base_dir)
    if adapter is not None and adapter.lora is not None:
        raise ConfigError(f"{adapter} is an adapter with an adapter", "name one adapter")
    return StageRef(name, lora=adapter, written=name)


def named_stage(value: object, names: Collection[str]) -> tuple[str, Any] | None:
    """The name of the stage that a model's place names, and what is written there as its adapter (None: nothing)."""
    if isinstance(value, Mapping) and value.keys() <= {"model", "lora"}:
        part = value.get("model")
        if isinstance(part, Mapping) and part.keys() == {"path"}:
            part = part["path"]
        return (part.strip(), value.get("lora")) if isinstance(part, str) and part.strip() in names else None
    if not isinstance(value, str):
        return None
    text = value.strip()
    if text in names:
        return text, None
    longest = max((name for name in names if text.startswith(f"{name}+")), key=len, default=None)
    return None if longest is None else (longest, text[len(longest) + 1 :])


def joined(documents: Sequence[LoadedRecipe]) -> LoadedRecipe:
    """The recipe of the document that makes the result, with `stages`: the others, each after those that it uses.

    Raises ConfigError for two documents of one name, two without, stages that use each other in a circle, a stage that
    nothing uses, and keys of a stage that only the result can have.
    """
    if len(documents) > MAX_STAGES:
        raise documents[MAX_STAGES].error((), f"more than {MAX_STAGES} documents", "merge in several recipes")
    named = _by_name(documents)
    uses = {id(d): _uses(d) for d in documents}
    order: list[LoadedRecipe] = []
    _visit_all(documents, named, uses, order)
    used = {name for names in uses.values() for name in names}
    ends = [d for d in documents if _name(d) not in used]
    result = next((d for d in ends if d.recipe.name is None), ends[-1])
    for other in documents:
        if other is result:
            continue
        if any(other is end for end in ends):
            raise other.error(
                ("name",),
                f"the stage {_name(other)!r} is not used by any other",
                f"remove the document, or name it as a model in another one{_nearly(_name(other), documents)}",
            )
        if other.recipe.output is not None:
            raise other.error(
                ("output",),
                f"the stage {_name(other)!r} is an intermediate, which is not kept: it has no output folder",
                "remove `output:`; to keep an intermediate, merge it with a recipe of its own",
            )
    return replace(result, stages=tuple(d for d in order if d is not result))


def _nearly(name: str, documents: Sequence[LoadedRecipe]) -> str:
    """Where a model is named that is nowhere on this machine, and almost so."""
    for document in documents:
        for path, ref in document.recipe.references():
            if not isinstance(ref, StageRef) and not ref.is_local() and (meant := suggest(ref.path, [name])):
                return f"; {document.locate(path)} names {ref.path!r}{meant}"
    return ""


def _name(document: LoadedRecipe) -> str:
    return (document.recipe.name or "").strip()


def _by_name(documents: Sequence[LoadedRecipe]) -> dict[str, LoadedRecipe]:
    named: dict[str, LoadedRecipe] = {}
    nameless = [d for d in documents if d.recipe.name is None]
    if len(nameless) > 1:
        raise nameless[1].error(
            (),
            f"a second document without a `name:`; the first is at {nameless[0].locate(())}",
            "name all but the one that makes the result, and use the names as models",
        )
    for document in documents:
        name = _name(document)
        if name in named:
            raise document.error(
                ("name",),
                f"two documents are named {name!r}; the first is at {named[name].locate(('name',))}",
                "give each document a name of its own",
            )
        if name:
            named[name] = document
    return named


def _uses(document: LoadedRecipe) -> dict[str, KeyPath]:
    """The stages that a document names, with the first place of each."""
    found: dict[str, KeyPath] = {}
    for path, ref in document.recipe.references():
        if isinstance(ref, StageRef):
            found.setdefault(ref.path, path)
    for number, use in enumerate(document.recipe.plugins):  # only a plugin knows which of its options are models
        for name in sorted(mentioned_stages(use.options, document.stage_names)):
            found.setdefault(name, ("plugins", number))
    return found


def _visit_all(
    documents: Sequence[LoadedRecipe],
    named: Mapping[str, LoadedRecipe],
    uses: Mapping[int, Mapping[str, KeyPath]],
    order: list[LoadedRecipe],
) -> None:
    """Put the documents into `order`, each after those that it uses."""
    done: set[int] = set()
    active: list[LoadedRecipe] = []

    def visit(document: LoadedRecipe) -> None:
        if id(document) in done:
            return
        active.append(document)
        for name, path in uses[id(document)].items():
            needed = named[name]
            if any(needed is other for other in active):
                first = next(i for i, other in enumerate(active) if other is needed)
                circle = " → ".join([*(_name(d) for d in active[first:]), name])
                raise document.error(path, f"stages use each other in a circle: {circle}", "break the circle")
            visit(needed)
        active.pop()
        done.add(id(document))
        order.append(document)

    for document in documents:
        visit(document)


def mentioned_stages(data: Any, names: Collection[str]) -> set[str]:
    """The names of stages that stand as text anywhere in a document's data, before it is checked."""
    if isinstance(data, Mapping):
        return {name for key, item in data.items() if key != "name" for name in mentioned_stages(item, names)}
    if isinstance(data, list):
        return {name for item in data for name in mentioned_stages(item, names)}
    named = named_stage(data, names)
    return {named[0]} if named is not None else set()
