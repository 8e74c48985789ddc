"""The licence of a merge, from what the cards of its inputs say: taken over where that is clear, said and left open where not.

A merge is a derivative of each of its inputs. Where all of them have one licence it has that one; where they differ, the one
among them into which works under each of the others may go, by the published compatibility lists:
https://www.gnu.org/licenses/license-list.html, https://www.apache.org/licenses/GPL-compatibility.html and
https://wiki.creativecommons.org/wiki/Wiki/cc_license_compatibility. Nothing else is concluded, and it is no legal advice.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from yeam.recipe import ModelRef, StageRef

if TYPE_CHECKING:
    from yeam.planning.stages import Pipeline

_COPYLEFT = {"mpl-2.0", "lgpl-2.1", "lgpl-3.0", "gpl-2.0", "gpl-3.0", "agpl-3.0"}
_PERMISSIVE = {"mit", "isc", "bsd-2-clause", "bsd-3-clause", "zlib", "unlicense", "wtfpl"}
_INTO: dict[str, set[str]] = {
    **{name: {"apache-2.0", *_COPYLEFT} for name in _PERMISSIVE},
    "cc0-1.0": {"apache-2.0", "mit", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", *_COPYLEFT},
    "apache-2.0": {"lgpl-3.0", "gpl-3.0", "agpl-3.0"},
    "mpl-2.0": _COPYLEFT - {"mpl-2.0"},
    "lgpl-2.1": {"gpl-2.0", "gpl-3.0"},
    "lgpl-3.0": {"gpl-3.0", "agpl-3.0"},
    "gpl-3.0": {"agpl-3.0"},
    "cc-by-4.0": {"cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0"},
    "cc-by-nc-4.0": {"cc-by-nc-sa-4.0"},
    "cc-by-sa-4.0": {"gpl-3.0"},
}
_ID = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
_FRONT = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|\Z)", re.DOTALL)
_LONGEST = 1 << 20  # bytes of a card that are looked at


@dataclass(frozen=True)
class Licence:
    """A licence as the Hub's cards have it: an id, and for `other` also a name and a link."""

    id: str
    name: str | None = None
    link: str | None = None

    @property
    def label(self) -> str:
        """For people: the id, or the name of one that the Hub has no id for."""
        return self.name or self.id if self.id == "other" else self.id


@dataclass(frozen=True)
class Licensing:
    """The licences of all inputs (None where no card says), and what follows for the merge."""

    inputs: tuple[tuple[ModelRef, Licence | None], ...]

    @cached_property
    def result(self) -> Licence | None:
        """The licence of the merge, None where it does not follow."""
        known = {licence for _, licence in self.inputs if licence is not None}
        if not known or any(licence is None for _, licence in self.inputs) or self._no_derivatives:
            return None
        if len(known) == 1:
            return next(iter(known))
        takers = [mine for mine in known if all(other == mine or mine.id in _INTO.get(other.id, ()) for other in known)]
        return takers[0] if len(takers) == 1 else None

    @property
    def front(self) -> dict[str, str]:
        """The keys of a card's front matter."""
        if self.result is None:
            return {}
        keys = {"license": self.result.id, "license_name": self.result.name, "license_link": self.result.link}
        return {key: value for key, value in keys.items() if value is not None}

    @property
    def sentence(self) -> str:
        """What follows, and why, in one sentence."""
        names = sorted({licence.label for _, licence in self.inputs if licence is not None})
        if self.result is not None:
            return (
                "All inputs have this licence."
                if len(names) == 1
                else f"It may take in works under {_listed(names, self.result)}."
            )
        if self._no_derivatives:
            return "An input's licence allows no derivatives, which a merge is: ask its authors before you share this model."
        unknown = [ref for ref, licence in self.inputs if licence is None]
        if unknown:
            count = "one input" if len(unknown) == 1 else f"{len(unknown)} inputs"
            return f"The card of {count} names no licence, so none is given here: find out before you share this model."
        return "How these licences go together is not known to YeAM, so none is given here: find out before you share this model."

    @property
    def is_conflict(self) -> bool:
        """Whether all licences are known, and nothing follows from them."""
        return self.result is None and bool(self.inputs) and all(licence is not None for _, licence in self.inputs)

    @property
    def _no_derivatives(self) -> bool:
        return any(licence is not None and "-nd-" in licence.id for _, licence in self.inputs)


def licensing(pipeline: Pipeline) -> Licensing:
    """What the cards of a merge's inputs say, those of adapters and of all stages included."""
    made = {stage.checkpoint.folder for stage in pipeline.stages if stage.checkpoint is not None}
    found: dict[tuple[ModelRef, Licence | None], None] = {}
    for stage in pipeline.stages:
        for member in stage.members:
            folders = [
                folder
                for folder in dict.fromkeys(member.checkpoint.folders)
                if folder not in made and _is_model(folder)
            ]
            if not folders and not isinstance(member.ref, StageRef):
                folders = [member.checkpoint.folder]  # a single file
            for folder in folders:
                lora = member.ref.lora
                is_adapter = lora is not None and (folder / "adapter_config.json").is_file()
                ref = lora if lora is not None and is_adapter else replace(member.ref, lora=None)
                found[ref, licence_in(folder / "README.md", ref)] = None
    return Licensing(tuple(found))


def licence_in(card: Path, ref: ModelRef | None = None) -> Licence | None:
    """The licence that a card's front matter names; `ref` is the model, to which a link may be relative. None if it names none."""
    try:
        with card.open("rb") as file:
            text = file.read(_LONGEST).decode("utf-8", "replace")
        front = _FRONT.match(text)
        data: Any = yaml.safe_load(front[1]) if front else None
    except (OSError, yaml.YAMLError, RecursionError, ValueError):
        return None
    said = data.get("license") if isinstance(data, dict) else None
    if isinstance(said, list) and len(said) == 1:
        said = said[0]
    name = said.strip().lower() if isinstance(said, str) else ""
    if not _ID.fullmatch(name) or name == "unknown":
        return None
    if name != "other":
        return Licence(name)
    title, link = data.get("license_name"), data.get("license_link")
    if not isinstance(title, str) or not title.strip():
        return None
    return Licence("other", " ".join(title.split())[:200], _link(link, ref))


def _link(link: object, ref: ModelRef | None) -> str | None:
    if not isinstance(link, str) or not link.strip():
        return None
    link = link.strip()
    if link.startswith(("https://", "http://")):
        return link
    if ref is None or ref.is_local() or not re.fullmatch(r"[\w.-]+", link):
        return None
    return f"https://huggingface.co/{ref.path}/blob/{ref.revision or 'main'}/{link}"


def _is_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


def _listed(names: Iterable[str], result: Licence) -> str:
    others = [name for name in names if name != result.label]
    return others[0] if len(others) == 1 else f"{', '.join(others[:-1])} and {others[-1]}"
