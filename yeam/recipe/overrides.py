"""`KEY=VALUE` from the command line, applied to the data of a recipe."""

from __future__ import annotations

import re
from collections.abc import Sequence

from yeam.errors import ConfigError
from yeam.recipe.document import Document, read_document
from yeam.recipe.problems import KeyPath, describe, show

_INDEX = re.compile(r"\[(\d+)\]")


def apply_overrides(document: Document, overrides: Sequence[str]) -> None:
    """Set each `a.b.0.c=VALUE` in the document's data, in order; VALUE is YAML, `a.b[0].c` is the same key.

    A mapping that is missing on the way is made; a list never grows. Raises ConfigError, naming the override, for a
    key that leads nowhere, a missing `=` and a VALUE that is no YAML.
    """
    for override in overrides:
        label = "--set " + " ".join(override.splitlines())
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"{label}: not of the form KEY=VALUE", "write for example parameters.softness=2")
        path = tuple(_INDEX.sub(r".\1", key.strip()).split("."))
        _assign(document, path, read_document(text, label).data, label)


def _assign(document: Document, steps: tuple[str, ...], value: object, label: str) -> None:
    here = document.data
    path: KeyPath = ()
    for number, step in enumerate(steps):
        last = number == len(steps) - 1
        if isinstance(here, list):
            if not step.isdecimal() or int(step) >= len(here):
                last_index = f"0 to {len(here) - 1}" if len(here) > 1 else "0"
                raise ConfigError(
                    f"{label}: {show(path)} is a list, and {step!r} is none of its items",
                    f"use an index of {last_index}" if here else "",
                )
            key: str | int = int(step)
        elif isinstance(here, dict):
            key = step
            if not step:
                raise ConfigError(f"{label}: the key {'.'.join(steps)!r} has an empty part", "remove the extra dot")
            if not last and here.get(step) is None:
                document.places.replace((*path, step), label)
                here[step] = {}
        else:
            raise ConfigError(
                f"{label}: {show(path)} is {describe(here)} and holds no {step!r}",
                f"set {show(path)} itself",
            )
        path = (*path, key)
        if last:
            here[key] = value
            document.places.replace(path, label)
        else:
            here = here[key]
