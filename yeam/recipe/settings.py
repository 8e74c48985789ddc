"""Parameter values: a scalar, a gradient over the layers, or a choice by tensor name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from yeam.errors import suggest
from yeam.recipe.problems import Faulty, KeyPath, Problem, describe

T = TypeVar("T")

Scalar = bool | int | float | str | None
Gradient = tuple[Scalar, ...]
"""Knots at equal distances over the layers of a slice; all numbers, or a single scalar of any kind."""


@dataclass(frozen=True)
class Filtered:
    """A value for the tensors that a filter picks: a substring of the name, `role:NAME`, or everything (None, `*`)."""

    filter: str | None
    value: Scalar | Gradient

    @property
    def picks_all(self) -> bool:
        return self.filter is None or self.filter == "*"

    @property
    def role(self) -> str | None:
        """NAME of `role:NAME`, else None."""
        return self.filter[len("role:") :] if self.filter is not None and self.filter.startswith("role:") else None


Setting = Scalar | Gradient | tuple[Filtered, ...]
"""A parameter's value as written; a tuple is never empty and never mixes plain scalars with Filtered."""


def filters_of(setting: Setting) -> tuple[Filtered, ...]:
    """The filtered items of a setting, none for a scalar or a gradient."""
    if not isinstance(setting, tuple):
        return ()
    return tuple(item for item in setting if isinstance(item, Filtered))


def parse_setting(value: Any, path: KeyPath = ()) -> Setting:
    """A setting from plain YAML data. Raises Faulty with every problem in it, at paths that begin with `path`."""
    if isinstance(value, dict):
        return (_parse_filtered(value, path),)
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return _collect(_parse_filtered, value, path)
    return _parse_plain(value, path)


def _collect(parse: Callable[[Any, KeyPath], T], items: list[Any], path: KeyPath) -> tuple[T, ...]:
    """Every item parsed; raises Faulty with the problems of all of them."""
    problems: list[Problem] = []
    parsed: list[T] = []
    for index, item in enumerate(items):
        try:
            parsed.append(parse(item, (*path, index)))
        except Faulty as error:
            problems.extend(error.problems)
    if problems:
        raise Faulty(problems)
    return tuple(parsed)


def _parse_filtered(item: Any, path: KeyPath) -> Filtered:
    if not isinstance(item, dict):
        message = f"must be a mapping {{filter, value}} like the other items of the list, not {describe(item)}"
        raise Faulty([Problem(path, message)])
    problems: list[Problem] = []
    for key in item:
        if key not in ("filter", "value"):
            hint = " (it is called 'filter')" if key == "pattern" else suggest(key, ("filter", "value"))
            problems.append(Problem((*path, key), f"unknown key {key!r}", "key", hint))
    wanted = item.get("filter")
    if wanted is not None and not isinstance(wanted, str):
        message = f"must be a part of a tensor's name, not {describe(wanted)}"
        problems.append(Problem((*path, "filter"), message, remedy="put the filter in quotes"))
    elif wanted is not None and wanted in ("", "role:"):
        remedy = "leave 'filter' out to pick every tensor"
        problems.append(Problem((*path, "filter"), "is empty", remedy=remedy))
    value: Scalar | Gradient = None
    if "value" in item:
        try:
            value = _parse_plain(item["value"], (*path, "value"))
        except Faulty as error:
            problems.extend(error.problems)
    elif not any("'value'" in problem.hint for problem in problems):
        problems.append(Problem((*path, "value"), "'value' is missing", "key"))
    if problems:
        raise Faulty(problems)
    return Filtered(wanted, value)


def _parse_plain(value: Any, path: KeyPath) -> Scalar | Gradient:
    """A scalar or a gradient."""
    if not isinstance(value, list):
        return _parse_scalar(value, path)
    if not value:
        raise Faulty([Problem(path, "is an empty list")])
    return _collect(_parse_scalar if len(value) == 1 else _parse_knot, value, path)


def _parse_knot(value: Any, path: KeyPath) -> Scalar:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Faulty([Problem(path, f"must be a number: it is a point of a gradient, not {describe(value)}")])
    return _parse_scalar(value, path)


def _parse_scalar(value: Any, path: KeyPath) -> Scalar:
    if value is None or isinstance(value, bool | str):
        return value
    if not isinstance(value, int | float):
        raise Faulty([Problem(path, f"must be a number, true, false or a string, not {describe(value)}")])
    try:
        finite = math.isfinite(value)
    except OverflowError:
        finite = False
    if not finite:
        raise Faulty([Problem(path, "must be a finite number")])
    return value


def parse_parameters(value: Any) -> dict[str, Setting]:
    """The settings of a `parameters:` block, `{}` for null. Raises Faulty with every problem in it."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise Faulty([Problem((), f"must be a mapping, not {describe(value)}")])
    problems: list[Problem] = []
    parsed: dict[str, Setting] = {}
    for name, setting in value.items():
        try:
            parsed[name] = parse_setting(setting, (name,))
        except Faulty as error:
            problems.extend(error.problems)
    if problems:
        raise Faulty(problems)
    return parsed


def plain_setting(setting: Setting) -> Any:
    """A setting as YAML data: the inverse of `parse_setting`."""
    if not isinstance(setting, tuple):
        return setting
    return [_plain_filtered(item) if isinstance(item, Filtered) else item for item in setting]


def _plain_filtered(item: Filtered) -> dict[str, Any]:
    value = list(item.value) if isinstance(item.value, tuple) else item.value
    return {"value": value} if item.filter is None else {"filter": item.filter, "value": value}


def plain_parameters(parameters: Mapping[str, Setting]) -> dict[str, Any]:
    """A `parameters:` block as YAML data."""
    return {name: plain_setting(setting) for name, setting in parameters.items()}
