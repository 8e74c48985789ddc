"""Reading one tensor name after the other: by the table where it knows the name, else by inference."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cached_property

from yeam.families import infer
from yeam.families.anatomy import Meaning, Place, Shape
from yeam.families.configs import Config
from yeam.families.layouts import view_of
from yeam.families.sites import role_of, roles_of
from yeam.families.stacks import Stack, locate
from yeam.families.table import Family
from yeam.records import altered

_EARLY_NORMS = frozenset({"embedding_norm", "norm"})
_POST_ROLES = frozenset({"head", "norm"})
_PARAMETERS = {"weight": False, "gamma": False, "bias": True, "beta": True}


class Reader:
    """Reads one name after the other; keeps what belongs to the checkpoint as a whole."""

    def __init__(
        self, family: Family | None, config: Config, base: str, stacks: Mapping[str, Stack], shapes: Mapping[str, Shape]
    ) -> None:
        self.family, self.config, self.base, self.stacks = family, config, base, stacks
        self.notes: list[str] = []
        self._own = {base + path: sites for path, sites in family.stacks.items()} if family else {}
        ancestors = _ancestors(base)
        self._outer: list[tuple[str, Mapping[str, str], Place]] = []  # (prefix, paths under it, place)
        if family is not None:
            self._outer = [(base, family.pre, "pre"), (base, family.post, "post")]
            self._outer += [(prefix, family.head, "post") for prefix in ancestors]
        self._names = tuple(shapes)
        self._alike: dict[tuple[str, str, Shape], Meaning] = {}

    @cached_property
    def _beside(self) -> dict[str, set[str]]:
        """What every module has in it."""
        found: dict[str, set[str]] = {}
        for name in self._names:
            parts = name.split(".")
            for i in range(1, len(parts) + 1):
                found.setdefault(".".join(parts[: i - 1]), set()).add(parts[i - 1])
        return found

    @cached_property
    def _state_space(self) -> frozenset[str]:
        return infer.state_space_blocks(self._names)

    def read(self, name: str, shape: Shape) -> Meaning:
        found = locate(self.stacks, name)
        if found is None:
            return self._outside(name, shape)
        stack, layer, rest = found
        alike = self._alike.get((stack.prefix, rest, shape))
        if alike is not None:  # what the table says of a tensor, it says in every layer
            return altered(alike, layer=layer)
        sites, noted = self._own.get(stack.prefix), len(self.notes)
        known = _look_up(sites, rest) if sites is not None else None
        site, is_bias = known or self._infer(name, rest, shape, True)
        meaning = self._meaning(name, site, is_bias, shape, "layer", known is not None, rest, stack.prefix, layer)
        if known is not None and len(self.notes) == noted:
            self._alike[stack.prefix, rest, shape] = meaning
        return meaning

    def _outside(self, name: str, shape: Shape) -> Meaning:
        for prefix, sites, place in self._outer:
            known = _look_up(sites, name[len(prefix) :]) if name.startswith(prefix) else None
            if known is not None:
                return self._meaning(name, *known, shape, place, True, name)
        site, is_bias = self._infer(name, name, shape, False)
        late = role_of(site) in _POST_ROLES and site not in _EARLY_NORMS
        # what follows the layers of its own tower, such as a pooling head, comes after them
        late = late or bool(re.search(r"(^|\.)(head|pooler|cls|classifier|post_\w+)\.", name))
        return self._meaning(name, site, is_bias, shape, "post" if late else "pre", False, name)

    def _infer(self, name: str, path: str, shape: Shape, in_layer: bool) -> tuple[str, bool]:
        module = name.rpartition(".")[0]
        parent = (module if name.rpartition(".")[2] in _PARAMETERS else name).rpartition(".")[0]
        found = infer.site_of(path, shape, self._beside.get(parent, ()), in_layer)
        if found[0] != "buffer" and any(name.startswith(block + ".") for block in self._blocks_of(name)):
            return "other", False
        return found

    def _blocks_of(self, name: str) -> Iterable[str]:
        parts = name.split(".")
        return (b for i in range(1, len(parts)) if (b := ".".join(parts[:i])) in self._state_space)

    def _meaning(
        self, name: str, site: str, is_bias: bool, shape: Shape, place: Place, tabled: bool, rest: str,
        stack: str | None = None, layer: int | None = None,
    ) -> Meaning:  # fmt: skip
        view = None
        if tabled and self.family is not None:
            layout = self.family.layouts.get(site)
            view = view_of(layout, site, shape, self.config, is_bias)
            if view is None and layout not in (None, "T"):
                self.notes.append(f"{name}: shape {list(shape)} does not fit the layout {layout!r} by config.json")
        expert = re.search(r"(?:^|\.)experts\.(\d+)\.", rest) if site.startswith("expert.") else None
        return Meaning(
            "bias" if is_bias else role_of(site), roles_of(site, is_bias), site, stack, layer, place,
            expert=int(expert.group(1)) if expert else None, view=view,
            inputs_first=_stores_inputs_first(site, shape, self.config.get("hidden_size")),
        )  # fmt: skip


def _stores_inputs_first(site: str, shape: Shape, hidden: object) -> bool:
    """Whether packed experts are [experts, in, out] (gpt_oss, llama4), where that can be told: the other side is not the hidden size."""
    if len(shape) != 3 or site not in ("expert.gate_up", "expert.gate", "expert.up", "expert.down"):
        return False
    first, last = shape[1] == hidden, shape[2] == hidden
    return last and not first if site == "expert.down" else first and not last


def _look_up(sites: Mapping[str, str], rest: str) -> tuple[str, bool] | None:
    """(site, is a bias) of a path by the table, or None. The whole name first, then its module."""
    module, _, last = rest.rpartition(".")
    for key, is_bias in ((rest, last.endswith("bias")), (module, _PARAMETERS.get(last))):
        site = sites.get(key) or sites.get(re.sub(r"(?<=\.)\d+(?=\.|$)", "#", key))
        if site is not None and is_bias is not None:
            return site, is_bias and site != "buffer"
    return None


def find_base(family: Family, names: Iterable[str]) -> tuple[str, int]:
    """The prefix of the base model here (`model.`, ``, `language_model.model.`), and how many names fit it."""
    votes: dict[str, int] = {}
    outer = tuple(f"{path}.weight" for path in {**family.pre, **family.post})
    stacks = [
        (re.compile(rf"((?:.*\.)?){re.escape(path)}\.\d+\.(.+)$"), sites, dict[str, bool]())
        for path, sites in family.stacks.items()
    ]
    for name in names:
        for pattern, sites, fits in stacks:
            found = pattern.match(name)
            if found is None:
                continue
            prefix, rest = found.groups()
            if rest not in fits:
                fits[rest] = _look_up(sites, rest) is not None
            if fits[rest]:
                votes[prefix] = votes.get(prefix, 0) + 1
        for path in outer if name.endswith(outer) else ():
            if name.endswith(path) and (prefix := name[: -len(path)])[-1:] in ("", "."):
                votes[prefix] = votes.get(prefix, 0) + 1
    towers = re.compile(r"vision|visual|image|audio|speech")
    if any(not towers.search(prefix) for prefix in votes):
        votes = {prefix: n for prefix, n in votes.items() if not towers.search(prefix)}
    return max(votes.items(), key=lambda item: item[1], default=("", 0))


def _ancestors(base: str) -> tuple[str, ...]:
    """The prefixes that a head may stand under, longest first: `a.model.` -> `a.model.`, `a.`, ``."""
    parts = base.split(".")[:-1]
    return tuple("".join(f"{part}." for part in parts[:i]) for i in range(len(parts), -1, -1))


def head_prefix(family: Family | None, base: str) -> str:
    """What precedes the head: the base without its last word, if that is the family's usual prefix, else ``."""
    if family is None or not family.base:
        return ""
    parts = base.split(".")[:-1]
    return "".join(f"{part}." for part in parts[:-1]) if parts[-1:] == [family.base] else ""
