"""Key paths into a recipe, where they were written, and the one message that lists everything wrong with it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from yeam.errors import ConfigError, YeamError

KeyPath = tuple[str | int, ...]
"""Steps from the root of a recipe: `("models", 0, "parameters", "weight")`."""

_PLAIN_KEY = re.compile(r"[\w-]+")
_MADE = re.compile(r"^recipe, (?:models|plugins)\[0\][^:]*: (?:plugin '\w+': (?:options: )?)?", re.MULTILINE)


def show(path: KeyPath) -> str:
    """A key path as text: `models[0].parameters.weight`, `tokens['<s>']`; the empty string for the root."""
    text = ""
    for step in path:
        if isinstance(step, int) or not _PLAIN_KEY.fullmatch(step):
            text += f"[{step!r}]"
        else:
            text += f".{step}" if text else step
    return text


def describe(value: object) -> str:
    """What a YAML value is, for `must be …, not <this>`: `the string 'x'`, `a list`, `null`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the string {value!r}" if len(value) <= 60 else f"the string {value[:57]!r}…"
    if isinstance(value, dict):
        return "a mapping"
    return "a list" if isinstance(value, list | tuple) else f"a {type(value).__name__}"


@dataclass(frozen=True)
class Problem:
    """One thing wrong at one place; `path` is relative until the value is placed in its recipe.

    With the path `models[0].weight` the text is, by `scope`: "whole": `message`; "value": `models[0].weight message`;
    "key": `message in models[0]`. The hint follows.
    """

    path: KeyPath
    message: str
    scope: Literal["whole", "value", "key"] = "value"
    hint: str = ""
    remedy: str = ""

    def below(self, parent: KeyPath) -> Problem:
        """The same problem, its path continuing `parent`."""
        return Problem((*parent, *self.path), self.message, self.scope, self.hint, self.remedy)

    def __str__(self) -> str:
        if self.scope == "whole":
            return self.message + self.hint
        if self.scope == "value":
            return f"{show(self.path) or 'the recipe'} {self.message}{self.hint}"
        parent = show(self.path[:-1])
        return f"{self.message} {f'in {parent}' if parent else 'at the top level'}{self.hint}"


class Faulty(ValueError):
    """A value that cannot be meant as written; `problems` have paths relative to that value."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(str(problem) for problem in self.problems))


@dataclass
class Locations:
    """Where each part of a recipe was written: a line of the file, or the override that set it.

    `name` is the file as the user named it, None for a recipe that was not read from text: `title` stands for that.
    """

    name: str | None
    marks: dict[KeyPath, int | str] = field(default_factory=dict)
    title: str = "recipe"

    def mark(self, path: KeyPath) -> int | str | None:
        """The mark of the path, or of its nearest parent that has one."""
        for length in range(len(path), -1, -1):
            found = self.marks.get(path[:length])
            if found is not None:
                return found
        return None

    def locate(self, path: KeyPath) -> str:
        """`file.yaml:12`; `--set KEY=VALUE` for what an override set; `recipe, models[0]` where there is no text."""
        mark = self.mark(path)
        if isinstance(mark, str):
            return mark
        if self.name is not None:
            return self.name if mark is None else f"{self.name}:{mark}"
        return f"{self.title}, {show(path)}" if path else self.title

    def replace(self, path: KeyPath, override: str) -> None:
        """Attribute the path and everything below it to an override."""
        for known in [known for known in self.marks if known[: len(path)] == path]:
            del self.marks[known]
        self.marks[path] = override

    def error(self, problems: Iterable[Problem]) -> ConfigError:
        """One ConfigError with a line per problem, in the order of the file, overrides last."""

        def order(problem: Problem) -> tuple[bool, int, str]:
            mark = self.mark(problem.path)
            return (isinstance(mark, str), mark if isinstance(mark, int) else 0, show(problem.path))

        ordered = sorted(problems, key=order)
        lines = dict.fromkeys(f"{self.locate(problem.path)}: {problem}" for problem in ordered)
        remedies = dict.fromkeys(problem.remedy for problem in ordered if problem.remedy)
        return ConfigError("\n".join(lines), "; ".join(remedies))


@contextmanager
def of_no_recipe() -> Iterator[None]:
    """Errors without their place in a recipe that the user did not write, such as the one that `yeam inject` makes."""
    try:
        yield
    except YeamError as error:
        error.message = _MADE.sub("", error.message)
        error.args = (f"{error.message}\n  remedy: {error.remedy}" if error.remedy else error.message,)
        raise
