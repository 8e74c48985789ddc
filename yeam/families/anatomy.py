"""What the tensors of a checkpoint mean, from its config.json and its tensor names and shapes alone.

A checkpoint of a family in the table is read with the table; what the table does not know (a vision tower, an added
head, a whole unknown architecture) is inferred from names and shapes. Every tensor that goes in comes out, at worst
as `other`; nothing here raises on an odd config or name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from yeam.families import infer
from yeam.families.configs import TEXT_SCOPES, Config, Path, at, integer, scopes
from yeam.families.layouts import view_of
from yeam.families.modules import Modules
from yeam.families.sites import role_of, roles_of
from yeam.families.stacks import Stack, count_paths, find_stacks, locate
from yeam.families.table import BY_MODEL_TYPE, FAMILIES, Family
from yeam.families.traits import Traits
from yeam.families.views import View

Shape = tuple[int, ...]
Place = Literal["pre", "layer", "post"]

_EARLY_NORMS = frozenset({"embedding_norm", "norm"})
_POST_ROLES = frozenset({"head", "norm"})
_PARAMETERS = {"weight": False, "gamma": False, "bias": True, "beta": True}


@dataclass(frozen=True)
class Meaning:
    """What one tensor is.

    `role` is one of `sites.ROLES`, `roles` adds the groups of `sites.GROUPS` (and for a bias the role of its weight): a
    `role:` filter matches if its word is in `roles`. `site` is the finer place, with the scope of the block before it
    (`q`, `attn_post_norm`, `expert.gate`, `cross.k`). `layer` is set if and only if `place` is `layer`; such a tensor is
    renamed when layers are renumbered, any other keeps its name. `expert` is the index in a per-expert layout. `view` is
    None for a tensor that is one part, stored [out, in]. `vocab_axis` is the axis with one entry per token, if any.
    """

    role: str
    roles: frozenset[str]
    site: str
    stack: str | None = None
    layer: int | None = None
    place: Place = "pre"
    module: str = "default"
    expert: int | None = None
    view: View | None = None
    vocab_axis: int | None = None


@dataclass(frozen=True)
class Anatomy:
    """What a checkpoint is made of. `family` is a name of the table, or `inferred`.

    `tensors` holds every input name, in order; `stacks` are by prefix; `modules` maps the module names of recipes to the
    tensor names; `vocab_paths` are the places of `vocab_size` in config.json; `traits` is how the (text) model computes,
    None if inferred, for the config at `text_path`; `base` is the prefix under which the base model's tensors stand in
    this checkpoint; `head_prefix` what precedes its head; `ties` see `ties.py`; `is_tied` None: there is no head, or
    one cannot tell. `notes` are oddities worth showing.
    """

    family: str
    tensors: Mapping[str, Meaning]
    stacks: Mapping[str, Stack]
    modules: Mapping[str, tuple[str, ...]]
    vocab_paths: tuple[Path, ...]
    ties: tuple[tuple[str, str], ...]
    is_tied: bool | None
    traits: Traits | None = None
    text_path: Path = ()
    base: str = ""
    head_prefix: str = ""
    notes: tuple[str, ...] = ()


def describe(config: Mapping[str, Any], names_to_shapes: Mapping[str, Shape]) -> Anatomy:
    """The anatomy of a checkpoint with this config.json (`{}` if there is none) and these tensors. Never raises.

    >>> a = describe({"model_type": "llama", "num_hidden_layers": 1}, {"model.layers.0.self_attn.q_proj.weight": (8, 8)})
    >>> a.family, a.tensors["model.layers.0.self_attn.q_proj.weight"].role, a.stacks["model.layers"].count
    ('llama', 'q', 1)
    """
    from yeam.families.ties import resolve_ties

    family, text_path = find_family(config)
    base, matched = _find_base(family, names_to_shapes) if family else ("", 0)
    if family is not None and not matched:
        family = None
    notes: list[str] = []
    stacks = _stacks(config, names_to_shapes, family, text_path, base, notes)
    modules = Modules(config, names_to_shapes, stacks)
    stacks = {p: replace(s, module=modules.of_stack(p)) for p, s in stacks.items()}
    text = at(config, text_path)
    reader = _Reader(family, text if isinstance(text, Mapping) else {}, base, stacks, names_to_shapes)
    tensors = {name: replace(reader.read(name, tuple(shape)), module=modules.of(name))
               for name, shape in names_to_shapes.items()}  # fmt: skip
    _pin_relative_positions(tensors, stacks)
    _mark_vocabulary(config, tensors, names_to_shapes)
    by_module: dict[str, list[str]] = {}
    for name, meaning in tensors.items():
        by_module.setdefault(meaning.module, []).append(name)
    anatomy = Anatomy(
        family.name if family else "inferred",
        tensors,
        stacks,
        {module: tuple(names) for module, names in by_module.items()},
        tuple((*path, "vocab_size") for path, part in scopes(config) if integer(part, ("vocab_size",)) is not None),
        (),
        None,
        family.traits(reader.config) if family else None,
        text_path,
        base,
        _head_prefix(family, base),
        (*notes, *reader.notes),
    )
    ties, is_tied, note = resolve_ties(config, names_to_shapes, anatomy)
    return replace(anatomy, ties=ties, is_tied=is_tied, notes=anatomy.notes + ((note,) if note else ()))


def find_family(config: Config) -> tuple[Family | None, Path]:
    """The family of a config, or of the text model nested in it, with the path of that config; (None, ()) if untabled."""
    candidates = [(path, part) for path, part in scopes(config) if not path or path[-1] in TEXT_SCOPES]
    for path, part in sorted(candidates, key=lambda item: -len(item[0])):  # the text model's own family says more
        family = BY_MODEL_TYPE.get(str(part.get("model_type")))
        if family is not None:
            return family, path
    architectures = config.get("architectures")
    if "model_type" not in config and isinstance(architectures, list) and architectures:
        stem = re.sub(r"(For|LMHead|Model|DoubleHeads).*$", "", str(architectures[0])).lower()
        for family in FAMILIES.values():
            if stem in {t.replace("_", "") for t in family.model_types}:
                return family, ()
    return None, ()


class _Reader:
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
        self._beside: dict[str, set[str]] = {}
        for name in shapes:
            parts = name.split(".")
            for i in range(1, len(parts)):
                self._beside.setdefault(".".join(parts[: i - 1]), set()).add(parts[i - 1])
        self._state_space = infer.state_space_blocks(shapes)

    def read(self, name: str, shape: Shape) -> Meaning:
        found = locate(self.stacks, name)
        if found is None:
            return self._outside(name, shape)
        stack, layer, rest = found
        sites = self._own.get(stack.prefix)
        known = _look_up(sites, rest) if sites is not None else None
        site, is_bias = known or self._infer(name, rest, shape, True)
        return self._meaning(name, site, is_bias, shape, "layer", known is not None, rest, stack.prefix, layer)

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
        if any(name.startswith(block + ".") for block in self._blocks_of(name)):
            return "other", False
        module = name.rpartition(".")[0]
        parent = (module if name.rpartition(".")[2] in _PARAMETERS else name).rpartition(".")[0]
        return infer.site_of(path, shape, self._beside.get(parent, ()), in_layer)

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
        )  # fmt: skip


def _look_up(sites: Mapping[str, str], rest: str) -> tuple[str, bool] | None:
    """(site, is a bias) of a path by the table, or None: the whole name first, then the module with a plain parameter."""
    module, _, last = rest.rpartition(".")
    for key, is_bias in ((rest, last.endswith("bias")), (module, _PARAMETERS.get(last))):
        site = sites.get(key) or sites.get(re.sub(r"(?<=\.)\d+(?=\.|$)", "#", key))
        if site is not None and is_bias is not None:
            return site, is_bias and site != "buffer"
    return None


def _find_base(family: Family, names: Iterable[str]) -> tuple[str, int]:
    """The prefix of the base model in this checkpoint (`model.`, ``, `language_model.model.`), and how many names fit it."""
    votes: dict[str, int] = {}
    outer = {**family.pre, **family.post}
    for name in names:
        for path, sites in family.stacks.items():
            found = re.match(rf"((?:.*\.)?){re.escape(path)}\.\d+\.(.+)$", name)
            if found and _look_up(sites, found.group(2)):
                votes[found.group(1)] = votes.get(found.group(1), 0) + 1
        for path in outer:
            if name.endswith(f"{path}.weight") and (prefix := name[: -len(path) - 7])[-1:] in ("", "."):
                votes[prefix] = votes.get(prefix, 0) + 1
    towers = re.compile(r"vision|visual|image|audio|speech")
    if any(not towers.search(prefix) for prefix in votes):
        votes = {prefix: n for prefix, n in votes.items() if not towers.search(prefix)}
    return max(votes.items(), key=lambda item: item[1], default=("", 0))


def _ancestors(base: str) -> tuple[str, ...]:
    """The prefixes that a base's head may stand under, longest first: `language_model.model.` -> itself, `language_model.`, ``."""
    parts = base.split(".")[:-1]
    return tuple("".join(f"{part}." for part in parts[:i]) for i in range(len(parts), -1, -1))


def _head_prefix(family: Family | None, base: str) -> str:
    """What precedes the head: the base without its own last word, `` where that word is not the family's usual prefix."""
    if family is None or not family.base:
        return ""
    parts = base.split(".")[:-1]
    return "".join(f"{part}." for part in parts[:-1]) if parts[-1:] == [family.base] else ""


def _stacks(
    config: Config, names: Iterable[str], family: Family | None, text_path: Path, base: str, notes: list[str]
) -> dict[str, Stack]:
    stacks: dict[str, Stack] = {}
    own = {base + path: family.depth.get(path, ()) for path in family.stacks} if family else {}
    for prefix, count in find_stacks(names).items():
        paths = count_paths(prefix, count, config)
        if prefix in own:
            text = at(config, text_path)
            keys = [key for key in own[prefix] if isinstance(text, Mapping) and integer(text, (key,)) == count]
            missing = isinstance(text, Mapping) and not any(integer(text, (key,)) for key in own[prefix])
            paths = tuple((*text_path, key) for key in (keys or (own[prefix][:1] if missing else ())))
        for key in ("num_nextn_predict_layers", "num_mtp_layers"):
            extra = next((n for _, part in scopes(config) if (n := integer(part, (key,)))), 0)
            if not paths and 0 < extra < count and (paths := count_paths(prefix, count - extra, config)):
                notes.append(f"{prefix}: layers {count - extra} to {count - 1} are extra prediction layers, not of the stack")
                count -= extra
        if not paths and config:
            notes.append(f"{prefix}: {count} layers in the tensors; config.json does not state this count")
        stacks[prefix] = Stack(prefix, count, paths)
    return stacks


def _pin_relative_positions(tensors: dict[str, Meaning], stacks: Mapping[str, Stack]) -> None:
    """T5 keeps the position bias of a whole stack in layer 0: such a tensor stays there when layers are renumbered."""
    layers: dict[str, set[int]] = {}
    for meaning in tensors.values():
        if meaning.site == "relative_position" and meaning.stack is not None and meaning.layer is not None:
            layers.setdefault(meaning.stack, set()).add(meaning.layer)
    for name, meaning in tensors.items():
        if meaning.site == "relative_position" and meaning.stack is not None:
            if layers[meaning.stack] == {0} and stacks[meaning.stack].count > 1:
                tensors[name] = replace(meaning, stack=None, layer=None, place="pre")


def _mark_vocabulary(config: Config, tensors: dict[str, Meaning], shapes: Mapping[str, Shape]) -> None:
    """Set `vocab_axis` where an embedding, a head or a head's bias has one entry per token."""
    rows = {shapes[n][0] for n, m in tensors.items() if m.site == "embedding" and m.role == m.site and shapes[n]}
    sizes = {n for _, part in scopes(config) if (n := integer(part, ("vocab_size",))) is not None} | rows
    for name, meaning in tensors.items():
        shape = shapes[name]
        if meaning.site == "embedding" and len(shape) == 2 and meaning.module not in ("vision_tower", "audio_tower"):
            tensors[name] = replace(meaning, vocab_axis=0)
        elif meaning.site == "head" and len(shape) in (1, 2):
            axis = 0 if shape[0] in sizes else len(shape) - 1
            if shape[axis] in sizes:
                tensors[name] = replace(meaning, vocab_axis=axis)
