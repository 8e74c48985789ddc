"""The small files of a merged model: config, generation config, tokenizer, chat template, modules, code; from plan and donors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from yeam.checkpoint.base import Checkpoint
from yeam.checkpoint.beside import MODULES, OTHER_FILES, module_files, module_weights, named, own
from yeam.checkpoint.folder import read_json
from yeam.errors import CheckpointError
from yeam.planning.code import at_home, home_of, modules_named, parsed, python_files
from yeam.planning.jobs import Plan
from yeam.planning.members import Member
from yeam.vocabulary.files import tokenizer_files
from yeam.vocabulary.view import with_replaced

TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")


def small_files(plan: Plan, checkpoints: Sequence[Checkpoint]) -> Iterator[tuple[str, str | bytes]]:
    """Name and content of every file that makes the plan's tensors a model, but the tensors and their index.

    An intermediate of several stages has them as the output has. What is `pending` is left to who writes the output. Raises
    CheckpointError where a file of the donor cannot be read.
    """
    donor, other = checkpoints[plan.donor], checkpoints[plan.tokenizer_donor]
    config = plan.config
    if config is not None:
        home = home_of(donor.folder)
        config = config if home is None else at_home(config, home)
        yield "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    tokenizer = _at_home(tokenizer_files(other.folder), other.folder)
    files = {**_at_home(_of_the_model(donor.folder), donor.folder), **tokenizer}
    for index in dict.fromkeys((plan.donor, plan.tokenizer_donor)):
        files = with_replaced(files, checkpoints[index])
    needed = [name for content in (config, *_settings(files)) for name in modules_named(content)]
    if needed:
        for folder in dict.fromkeys((other.folder, donor.folder)):
            files |= python_files(folder)
    for name, source in files.items():
        if plan.chat_template is None:
            yield name, _read(source)
        elif name not in TEMPLATE_FILES:
            yield name, _without_template(source) if name == "tokenizer_config.json" else _read(source)
    if plan.chat_template is not None:
        yield TEMPLATE_FILES[0], plan.chat_template


def small_notes(donor: Member, tokenizer_donor: Member) -> list[str]:
    """What to tell about files that are taken along as they are: weights of further modules, and Python code.

    Raises CheckpointError where one of them is a link to something that is no model's (`own`), or no file of its kind.
    """
    notes = []
    own(donor.checkpoint.folder, "config.json")
    _check_tokenizer(tokenizer_files(tokenizer_donor.checkpoint.folder))
    there = [*_of_the_model(donor.checkpoint.folder), *donor.checkpoint.pending]
    for weights in dict.fromkeys(module_weights(there)):
        notes.append(f"{weights} is copied from {donor.ref.label}: modules behind the model are not merged")
    for member in dict.fromkeys((donor, tokenizer_donor)):
        folder = member.checkpoint.folder
        files: dict[str, Path | str] = {**tokenizer_files(folder)} if member is tokenizer_donor else {}
        if member is donor:
            files |= _of_the_model(folder)
        contents = [*_settings(files), *([member.checkpoint.config] if member is donor else [])]
        needed = list(dict.fromkeys(f"{name}.py" for content in contents for name in modules_named(content)))
        home, label = home_of(folder), member.ref.label
        missing = [name for name in needed if not (folder / name).is_file()]
        if needed and home is not None:
            notes.append(
                f"{', '.join(needed)}: code of {label} that the output names as {home}'s, and takes from the Hub"
            )
        elif missing:
            notes.append(
                f"{label} names Python code that it does not have: {', '.join(missing)}; the output lacks it, too"
            )
        elif needed:
            python_files(folder)
            notes.append(f"{', '.join(needed)}: code of {label}, copied with the Python files beside it, and not run")
    return notes


def _check_tokenizer(files: Mapping[str, Path]) -> None:
    """Raise CheckpointError for a tokenizer.json that begins or ends as no JSON object does; all of it would take too long to read."""
    path = files.get("tokenizer.json")
    if path is not None:
        with path.open("rb") as file:
            begin = file.read(64)
            file.seek(max(0, path.stat().st_size - 64))
            end = file.read(64)
        if not begin.lstrip().startswith(b"{") or not end.rstrip().endswith(b"}"):
            raise CheckpointError(f"{path}: is not a JSON object", "repair the file or download it again")


def _of_the_model(folder: Path) -> dict[str, Path]:
    """Name → file of `folder` that goes along and is not the tokenizer's."""
    files = named(folder, OTHER_FILES)
    return {**files, **(module_files(folder, parsed(files[MODULES])) if MODULES in files else {})}


def _settings(files: Mapping[str, Path | str]) -> Iterator[Any]:
    """The contents of the files that may name classes."""
    for name, source in files.items():
        if name == MODULES or name.endswith("_config.json"):
            yield parsed(source)


def _at_home(files: Mapping[str, Path], folder: Path) -> dict[str, Path | str]:
    """The files, with settings that name code of a repository on the Hub rewritten to say of which."""
    home, found = home_of(folder), dict[str, Path | str](files)
    for name, source in files.items():
        if home is not None and (name == MODULES or name.endswith("_config.json")):
            content = parsed(source)
            if modules_named(content):
                found[name] = json.dumps(at_home(content, home), indent=2, ensure_ascii=False) + "\n"
    return found


def _read(source: Path | str) -> bytes:
    if isinstance(source, str):
        return source.encode()
    try:
        return source.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{source} cannot be read: {error.strerror}", "check the model's files") from error


def _without_template(source: Path | str) -> bytes:
    """A template inside tokenizer_config.json would compete with the one that the recipe chose."""
    config = json.loads(source) if isinstance(source, str) else read_json(source)
    if config.pop("chat_template", None) is None:
        return _read(source)
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
