"""From config.json, tensor names and shapes to what they mean.

A checkpoint of a family in the table is read with the table; what the table does not know (a vision tower, an added
head, a whole unknown architecture) is inferred from names and shapes. Every tensor that goes in comes out, at worst
as `other`; nothing here raises on an odd config or name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

from yeam.families.anatomy import Anatomy, Meaning, Shape
from yeam.families.configs import TEXT_SCOPES, Config, Path, at, integer, scopes
from yeam.families.modules import Modules
from yeam.families.reader import Reader, find_base, head_prefix
from yeam.families.stacks import Stack, count_paths, find_stacks
from yeam.families.table import BY_MODEL_TYPE, FAMILIES, Family
from yeam.families.ties import resolve_ties


def describe(config: Mapping[str, Any], names_to_shapes: Mapping[str, Shape]) -> Anatomy:
    """The anatomy of a checkpoint with this config.json (`{}` if there is none) and these tensors. Never raises.

    >>> q = "model.layers.0.self_attn.q_proj.weight"
    >>> a = describe({"model_type": "llama", "num_hidden_layers": 1}, {q: (8, 8)})
    >>> a.family, a.tensors[q].role, a.stacks["model.layers"].count
    ('llama', 'q', 1)
    """
    shapes = tuple((name, tuple(shape)) for name, shape in names_to_shapes.items())
    return _described(json.dumps(config, sort_keys=True, default=str), shapes)


@lru_cache(maxsize=4)  # the models of a merge are mostly alike, and each is looked at more than once
def _described(written: str, shapes: tuple[tuple[str, Shape], ...]) -> Anatomy:
    config, names_to_shapes = json.loads(written), dict(shapes)
    family, text_path = find_family(config)
    base, matched = find_base(family, names_to_shapes) if family else ("", 0)
    if family is not None and not matched:
        family = None
    notes: list[str] = []
    stacks = _stacks(config, names_to_shapes, family, text_path, base, notes)
    modules = Modules(config, names_to_shapes, stacks)
    stacks = {p: replace(s, module=modules.of_stack(p)) for p, s in stacks.items()}
    text = at(config, text_path)
    reader = Reader(family, text if isinstance(text, Mapping) else {}, base, stacks, names_to_shapes)
    tensors = {name: reader.read(name, shape) for name, shape in shapes}
    if modules.kind != "plain":
        tensors = {name: replace(meaning, module=modules.of(name)) for name, meaning in tensors.items()}
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
        tuple((*path, "vocab_size") for path, _ in _vocabularies(config)),
        (),
        None,
        family.traits(reader.config) if family else None,
        text_path,
        base,
        head_prefix(family, base),
        (*notes, *reader.notes),
    )
    ties, is_tied, note = resolve_ties(config, names_to_shapes, anatomy)
    return replace(anatomy, ties=ties, is_tied=is_tied, notes=anatomy.notes + ((note,) if note else ()))


def tied(config: Mapping[str, Any], names_to_shapes: Mapping[str, Shape]) -> list[tuple[str, str]]:
    """The (duplicate, kept) pairs of names that share one weight; see `ties.py` for the rules.

    >>> tied({"model_type": "llama", "tie_word_embeddings": True}, {"model.embed_tokens.weight": (32, 8)})
    [('lm_head.weight', 'model.embed_tokens.weight')]
    """
    return list(describe(config, names_to_shapes).ties)


def find_family(config: Config) -> tuple[Family | None, Path]:
    """The family of a config or of the text model nested in it, and the path of that config; (None, ()) if unknown."""
    candidates = [(path, part) for path, part in scopes(config) if not path or path[-1] in TEXT_SCOPES]
    for path, part in sorted(candidates, key=lambda item: -len(item[0])):  # the text model's own family says more
        family = BY_MODEL_TYPE.get(str(part.get("model_type")))
        if family is not None:
            return family, path if path else next((inner for inner, _ in candidates if inner), ())
    architectures = config.get("architectures")
    if "model_type" not in config and isinstance(architectures, list) and architectures:
        stem = re.sub(r"(For|LMHead|Model|DoubleHeads).*$", "", str(architectures[0])).lower()
        for family in FAMILIES.values():
            if stem in {t.replace("_", "") for t in family.model_types}:
                return family, ()
    return None, ()


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
                notes.append(
                    f"{prefix}: layers {count - extra} to {count - 1} are extra prediction layers, not of the stack"
                )
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
        stack = meaning.stack if meaning.site == "relative_position" else None
        if stack is not None and layers[stack] == {0} and stacks[stack].count > 1:
            tensors[name] = replace(meaning, stack=None, layer=None, place="pre")


def _vocabularies(config: Config) -> list[tuple[Path, int]]:
    """Every config that states a vocab_size; a vision tower's (CLIP's has one) is not about tokens."""
    found = [(path, integer(part, ("vocab_size",))) for path, part in scopes(config)]
    tower = re.compile("vision|image|audio|speech")
    return [(path, n) for path, n in found if n is not None and not (path and tower.search(path[-1]))]


def _mark_vocabulary(config: Config, tensors: dict[str, Meaning], shapes: Mapping[str, Shape]) -> None:
    """Set `vocab_axis` where an embedding, a head or a head's bias has one entry per token."""
    rows = {shapes[n][0] for n, m in tensors.items() if m.site == "embedding" and m.role == m.site and shapes[n]}
    sizes = {size for _, size in _vocabularies(config)} | rows
    for name, meaning in tensors.items():
        shape = shapes[name]
        if meaning.site == "embedding" and len(shape) == 2 and meaning.module not in ("vision_tower", "audio_tower"):
            tensors[name] = replace(meaning, vocab_axis=0)
        elif (
            meaning.site == "classifier"
            and name.endswith("head.weight")
            and len(shape) == 2
            and shape[0] in sizes & rows
        ):
            tensors[name] = replace(meaning, site="head", vocab_axis=0)
        elif meaning.site == "head" and len(shape) in (1, 2):
            axis = 0 if shape[0] in sizes else len(shape) - 1
            if shape[axis] in sizes:
                tensors[name] = replace(meaning, vocab_axis=axis)
