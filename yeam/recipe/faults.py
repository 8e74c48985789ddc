"""What pydantic found wrong, in the words of a recipe."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from yeam.errors import suggest
from yeam.recipe.problems import KeyPath, Problem, describe

OTHER_TOOLS = {
    "experts": (
        "is for mergekit-moe: this recipe builds a mixture of experts from dense models, which YeAM does not",
        "build it there; what has experts already can be merged here",
    ),
    "genome": (
        "is for mergekit-evolve: this recipe searches for the parameters of a merge",
        "write the merge as a recipe with ranges (`weight: {search: [0, 1]}`) for `yeam search`",
    ),
}
"""Keys by which recipes of mergekit's other commands are known: what to say, and what to do instead."""


def problems_of(error: ValidationError, schema: type[BaseModel]) -> list[Problem]:
    """Every error of a validation of `schema` as a Problem at its path from the root."""
    problems: list[Problem] = []
    mistyped: set[tuple[KeyPath, str]] = set()
    missing: list[KeyPath] = []
    items = error.errors(include_url=False)
    for item in items:
        if item["type"] == "extra_forbidden" and len(item["loc"]) == 1 and item["loc"][0] in OTHER_TOOLS:
            message, remedy = OTHER_TOOLS[str(item["loc"][0])]
            return [Problem(tuple(item["loc"]), f"{str(item['loc'][0])!r} {message}", "whole", remedy=remedy)]
    for item in items:
        path: KeyPath = tuple(item["loc"])
        if item["type"] == "recipe":
            problems.extend(problem.below(path) for problem in item["ctx"]["problems"])
        elif item["type"] == "missing":
            missing.append(path)
        elif item["type"] == "extra_forbidden":
            known = list(_block_at(schema, path[:-1]).model_fields)
            hint = suggest(str(path[-1]), known)
            mistyped.update((path[:-1], name) for name in known if repr(name) in hint)
            remedy = "" if hint else f"known there: {', '.join(known)}"
            if remedy and "parameters" in known:
                remedy += "; a parameter of the method belongs below `parameters`"
            problems.append(Problem(path, f"unknown key {str(path[-1])!r}", "key", hint, remedy))
        else:
            value = item["input"]
            is_bare = isinstance(value, str) and value.isprintable() and path[-2:-1] in (("models",), ("sources",))
            hint = f" (write `model: {value}`)" if is_bare else ""
            problems.append(Problem(path, _wording(item["type"], item["msg"], value), hint=hint))
    for path in missing:
        # `merge_metod: linear` is one mistake, not an unknown key and a missing one
        if (path[:-1], str(path[-1])) not in mistyped:
            problems.append(Problem(path, f"{str(path[-1])!r} is missing", "key"))
    return problems


def _wording(kind: str, message: str, value: object) -> str:
    if kind in ("tuple_type", "list_type"):
        return f"must be a list, not {describe(value)}"
    if kind in ("dict_type", "mapping_type", "model_type", "model_attributes_type"):
        return f"must be a mapping of keys to values, not {describe(value)}"
    return f"is not valid: {message}"


def _block_at(schema: type[BaseModel], path: KeyPath) -> type[BaseModel]:
    """The block of the schema that lies at a path."""
    kind: Any = schema
    for step in path:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            kind = kind.model_fields[str(step)].annotation
        else:
            kind = get_args(kind)[-1 if issubclass(get_origin(kind), Mapping) else 0]
        kind = _bare(kind)
    assert isinstance(kind, type) and issubclass(kind, BaseModel), f"{path} is no block of {schema.__name__}"
    return kind


def _bare(kind: Any) -> Any:
    """An annotation without Annotated and without None."""
    while get_origin(kind) in (Annotated, Union, types.UnionType):
        kind = next(_alternatives(kind))
    return kind


def _alternatives(kind: Any) -> Iterator[Any]:
    if get_origin(kind) is Annotated:
        yield get_args(kind)[0]
    else:
        yield from (alternative for alternative in get_args(kind) if alternative is not types.NoneType)
