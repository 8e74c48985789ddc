"""Chat templates: named ones that come with YeAM, the inputs' most common one (`auto`), or literal Jinja."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from yeam.errors import ConfigError, suggest

_LITERAL_LENGTH = 20  # mergekit's rule: shorter texts, or ones without a brace, are names


def named_templates() -> tuple[str, ...]:
    """The names of the templates that come with YeAM."""
    folder = files("yeam.vocabulary") / "templates"
    return tuple(
        sorted(entry.name.removesuffix(".jinja") for entry in folder.iterdir() if entry.name.endswith(".jinja"))
    )


def resolve_chat_template(setting: str | None, folders: Sequence[Path]) -> str | None:
    """The Jinja text for a recipe's `chat_template:`; None to keep what the tokenizer has.

    `auto` is the most common template among the model folders (the first of equals; None if none has one), a name one
    of `named_templates()`, anything with a brace and at least 20 characters literal Jinja. Raises ConfigError for an
    unknown name and for a template that does not compile.
    """
    if setting is None:
        return None
    if setting == "auto":
        counted = Counter(text for folder in folders if (text := template_of(folder)) is not None)
        return counted.most_common(1)[0][0] if counted else None
    if setting in named_templates():
        return (files("yeam.vocabulary") / "templates" / f"{setting}.jinja").read_text(encoding="utf-8").rstrip("\n")
    if len(setting) < _LITERAL_LENGTH or "{" not in setting:
        raise ConfigError(
            f"unknown chat template {setting!r}{suggest(setting, ('auto', *named_templates()))}",
            f"use auto, {', '.join(named_templates())}, or the text of a Jinja template",
        )
    check_template(setting)
    return setting


def template_of(folder: Path) -> str | None:
    """The default chat template of a model folder: `chat_template.jinja`, else the tokenizer config's."""
    plain = folder / "chat_template.jinja"
    if plain.is_file():
        return plain.read_text(encoding="utf-8")
    try:
        found = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template")
    except (OSError, ValueError, AttributeError):
        return None
    if isinstance(found, list):
        found = next((t.get("template") for t in found if isinstance(t, dict) and t.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def check_template(text: str) -> None:
    """Raise ConfigError, with the template's own line, if it is not valid Jinja. Nothing of it is run."""
    import re

    from jinja2 import TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        # `generation` is a tag of transformers' own that only marks a span
        environment.parse(re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", text))
    except RecursionError:
        raise ConfigError("chat_template is nested too deeply", "correct the template") from None
    except TemplateSyntaxError as error:
        raise ConfigError(
            f"the chat template does not compile: line {error.lineno}: {error.message}", "correct the template"
        ) from None
