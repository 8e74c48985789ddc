"""How a recipe names a model: a folder, a file or a Hub repository, a revision of it, an adapter on top."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from yeam.errors import ConfigError, suggest

_HUB_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)?")
_REVISION = re.compile(r"[^\s@+]+")
_FORM = "path[@revision][+lora[@revision]]"


@dataclass(frozen=True)
class ModelRef:
    """A model: `path` is an absolute local path where one exists, else what was written (`~` expanded) or a Hub name.

    `lora` is an adapter to be applied to it; an adapter has no adapter of its own. `str(ref)` gives text that `parse`
    reads as the same reference. `written` is the path as the recipe has it.
    """

    path: str
    revision: str | None = None
    lora: ModelRef | None = None
    written: str = field(default="", compare=False, repr=False)

    @property
    def label(self) -> str:
        """The name in published files: relative to the current directory for a folder below it, else as written."""
        name = self.written or self.path
        if os.path.isabs(self.path) and os.path.relpath(self.path).split(os.sep)[0] != os.pardir:
            name = os.path.relpath(self.path)
        text = name if self.revision is None else f"{name}@{self.revision}"
        return text if self.lora is None else f"{text}+{self.lora.label}"

    @property
    def short(self) -> str:
        """The label; of a folder elsewhere on this machine only its own name, for sentences that are published."""
        name = replace(self, lora=None).label
        if self.is_local() and name.startswith(("/", "~", "..")):
            name = os.path.basename(os.path.normpath(self.path))
        return name if self.lora is None else f"{name}+{self.lora.short}"

    @classmethod
    def parse(cls, value: object, base_dir: str | os.PathLike[str] | None = None) -> ModelRef:
        """A reference from `path[@revision][+lora[@revision]]` or from a mapping.

        A path that exists wins over a reading that splits it at `@` or `+`. A relative path is looked for in the
        current directory first, then in `base_dir` (the folder of the recipe). The mappings are
        `{model: path | {path, revision}, lora: path | {path, revision}}` and `{path, revision, lora}`.
        Raises ConfigError, without a line number, for everything else.
        """
        if isinstance(value, ModelRef):
            return value
        if isinstance(value, str):
            return _parse_text(value, base_dir)
        if isinstance(value, Mapping):
            return _parse_mapping(value, base_dir)
        raise ConfigError(f"a model must be text or a mapping, not {value!r}", f"write {_FORM}, in quotes")

    def is_local(self) -> bool:
        """Whether the path is on this machine: it exists, or it plainly is no Hub name."""
        return os.path.exists(self.path) or _is_plainly_a_path(self.path)

    @property
    def adapter(self) -> tuple[str, str | None] | None:
        """(path, revision) of the adapter, as `open_checkpoint` takes it."""
        return None if self.lora is None else (self.lora.path, self.lora.revision)

    def __str__(self) -> str:
        text = self.path if self.revision is None else f"{self.path}@{self.revision}"
        return text if self.lora is None else f"{text}+{self.lora}"


def _is_plainly_a_path(text: str) -> bool:
    return os.path.isabs(text) or text.startswith((".", "~")) or text.count("/") > 1


def _existing(text: str, base_dir: str | os.PathLike[str] | None) -> str | None:
    """The absolute path of what `text` names on this machine, None where there is nothing."""
    if not text.strip():
        return None
    expanded = os.path.expanduser(text)
    for candidate in (expanded, *([os.path.join(base_dir, expanded)] if base_dir is not None else [])):
        if os.path.exists(candidate):
            return os.path.abspath(candidate)
    return None


def _make(path: str, revision: str | None, base_dir: str | os.PathLike[str] | None) -> ModelRef:
    """A reference without adapter from its parts, checked."""
    found = _existing(path, base_dir)
    if revision is not None and not _REVISION.fullmatch(revision):
        raise ConfigError(
            f"{revision!r} is not a revision of {path!r}",
            "name a branch, tag or commit; one whose name has '@', '+' or a space by its commit hash",
        )
    if found is not None or _is_plainly_a_path(path):
        if revision is not None:
            raise ConfigError(
                f"{path!r} is a local path and has no revision {revision!r}",
                "remove '@' and what follows, or check that the path exists if '@' belongs to it",
            )
        if found is None and ("@" in path or "+" in path):
            raise ConfigError(f"the path {path!r} does not exist", "check the path")
        return ModelRef(found if found is not None else os.path.expanduser(path), written=path)
    if not _HUB_NAME.fullmatch(path):
        raise ConfigError(
            f"{path!r} is neither an existing path nor the name of a Hub repository",
            f"write {_FORM}, the path being a folder or owner/name",
        )
    return ModelRef(path, revision)


def _parse_single(text: str, base_dir: str | os.PathLike[str] | None) -> ModelRef:
    """`path[@revision]`."""
    if _existing(text, base_dir) is not None or "@" not in text:
        return _make(text, None, base_dir)
    if text.count("@") > 1:
        raise ConfigError(f"{text!r} has more than one '@' and is no existing path", f"write {_FORM}")
    path, _, revision = text.partition("@")
    return _make(path, revision, base_dir)


def _parse_text(text: str, base_dir: str | os.PathLike[str] | None) -> ModelRef:
    text = text.strip()
    if not text.isprintable() or not text:
        raise ConfigError(f"{text!r} does not name a model", f"write {_FORM}")
    if "://" in text:
        raise ConfigError(
            f"{text!r} is an address", "name a model on the Hub as owner/name; HF_ENDPOINT names another Hub"
        )
    if "+" not in text or _existing(text, base_dir) is not None:
        return _parse_single(text, base_dir)
    readings: list[tuple[tuple[bool, bool], ModelRef]] = []
    refusals: list[ConfigError] = []
    for cut in (i for i, letter in enumerate(text) if letter == "+"):
        try:
            model, lora = _parse_single(text[:cut], base_dir), _parse_single(text[cut + 1 :], base_dir)
        except ConfigError as error:
            refusals.append(error)
        else:
            rank = (os.path.exists(model.path), os.path.exists(lora.path))
            readings.append((rank, replace(model, lora=lora)))
    if not readings:
        if len(refusals) == 1:
            raise refusals[0]
        raise ConfigError(f"{text!r} does not name a model", f"write {_FORM}, each path existing or a Hub name")
    best = max(rank for rank, _ in readings)
    chosen = [reading for rank, reading in readings if rank == best]
    if len(chosen) > 1:
        raise ConfigError(
            f"{text!r} can be read in {len(chosen)} ways: which '+' begins the adapter?",
            "write it as a mapping: {model: {path: …}, lora: {path: …}}",
        )
    return chosen[0]


def _check_keys(value: Mapping[Any, Any], known: tuple[str, ...], what: str) -> None:
    for key in value:
        if key not in known:
            raise ConfigError(f"unknown key {key!r} in {what}{suggest(str(key), known)}", f"known: {', '.join(known)}")


def _parse_part(value: object, what: str, base_dir: str | os.PathLike[str] | None) -> ModelRef:
    """One side of the mapping form: `path[@revision]` or `{path, revision}`; inside the latter nothing is split."""
    if isinstance(value, str):
        return _parse_single(value.strip(), base_dir)
    if not isinstance(value, Mapping):
        raise ConfigError(f"{what} must be text or a mapping, not {value!r}", "write {path: …, revision: …}")
    _check_keys(value, ("path", "revision"), what)
    path, revision = value.get("path"), value.get("revision")
    if not isinstance(path, str) or not path.strip() or not path.isprintable():
        raise ConfigError(f"{what} needs a 'path', which must be text", "write {path: …, revision: …}")
    if revision is not None and not isinstance(revision, str):
        raise ConfigError(f"the revision {revision!r} must be text", "put it in quotes")
    return _make(path, revision, base_dir)


def _parse_mapping(value: Mapping[Any, Any], base_dir: str | os.PathLike[str] | None) -> ModelRef:
    if value.get("override_architecture") is not None:
        raise ConfigError(
            "'override_architecture' is not supported: the family is read from config.json and the tensor names",
            "remove it; if the model's config.json names a wrong architecture, correct it there",
        )
    if "path" in value:
        _check_keys(value, ("path", "revision", "lora"), "the model")
        model = _parse_part({key: value[key] for key in value if key != "lora"}, "the model", base_dir)
    else:
        _check_keys(value, ("model", "lora", "override_architecture"), "the model")
        if "model" not in value:
            raise ConfigError("the model's mapping names no 'model'", "write {model: {path: …, revision: …}, lora: …}")
        model = _parse_part(value["model"], "'model'", base_dir)
    if value.get("lora") is None:
        return model
    return replace(model, lora=_parse_part(value["lora"], "'lora'", base_dir))
