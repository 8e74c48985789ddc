"""Does config.json tell of as many layers as there are tensors for?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from yeam.families.anatomy import Anatomy
from yeam.families.configs import DECODER_LAYERS, ENCODER_LAYERS, LAYERS, Config, Path, at, integer
from yeam.families.stacks import Stack, ranked_scopes, rename_layer
from yeam.families.table import FAMILIES

_COUNTED = frozenset({"layers", "layer", "h", "block"})


@dataclass(frozen=True)
class Contradiction:
    """A stack of which config.json says at `path` that it has `stated` layers; `missing` are those of them that hold no tensor."""

    stack: Stack
    path: Path
    stated: int
    missing: tuple[int, ...]


def in_words(found: Contradiction, anatomy: Anatomy) -> str:
    """What config.json says, what is there, and what transformers makes of it; an example names a tensor."""
    key, prefix = ".".join(found.path), found.stack.prefix
    if found.missing:
        name = next(name for name, meaning in anatomy.tensors.items() if meaning.stack == prefix)
        lost = f"no {_counted(found.missing)} (no {rename_layer(name, found.stack, found.missing[0])})"
        return f"{key} is {found.stated}, but {prefix} has {lost}, which transformers would make up"
    name = next(n for n, m in anatomy.tensors.items() if m.stack == prefix and (m.layer or 0) >= found.stated)
    return f"{key} is {found.stated}, but {prefix} has {found.stack.count} layers ({name}), which transformers would pass over"


def _counted(layers: tuple[int, ...]) -> str:
    """`layer 3`, `layers 3 to 5`, `layers 1, 4`."""
    if len(layers) == 1:
        return f"layer {layers[0]}"
    if layers == tuple(range(layers[0], layers[-1] + 1)):
        return f"layers {layers[0]} to {layers[-1]}"
    return f"layers {', '.join(map(str, layers))}"


def contradictions(config: Config, anatomy: Anatomy) -> Iterator[Contradiction]:
    """Stacks that hold fewer or more layers than config.json tells of.

    Of a family of the table it says what its class reads. Of any other stack it can be told where the config has one count
    that no stack has, in the scope of one stack whose count the config does not have.
    """
    held: dict[str, set[int]] = {prefix: set() for prefix in anatomy.stacks}
    for meaning in anatomy.tensors.values():
        if meaning.stack is not None and meaning.layer is not None:
            held[meaning.stack].add(meaning.layer)
    said = {path for stack in anatomy.stacks.values() for path in stack.config_paths}
    open_ = {prefix: _open(prefix, config, said) for prefix, stack in anatomy.stacks.items() if not stack.config_paths}
    wanted = Counter(path for paths in open_.values() for path in paths)
    for prefix, stack in anatomy.stacks.items():
        own = _own_path(stack, config, anatomy)
        path = own
        if path is None and prefix in open_:
            paths = open_[prefix]
            path = paths[0] if len(paths) == 1 and wanted[paths[0]] == 1 else None
        if path is None:
            continue
        stated = int(at(config, path))
        missing = tuple(layer for layer in range(stated) if layer not in held[prefix])
        if stated != stack.count or (own is not None and missing):
            yield Contradiction(stack, path, stated, missing)


def _own_path(stack: Stack, config: Config, anatomy: Anatomy) -> Path | None:
    """Where a config of the family states the count of one of its own stacks; None for another stack."""
    family = FAMILIES.get(anatomy.family)
    if family is None or not stack.prefix.startswith(anatomy.base):
        return None
    text = at(config, anatomy.text_path)
    for key in family.depth.get(stack.prefix[len(anatomy.base) :], ()):
        if integer(text, (key,)) is not None:
            paths = stack.config_paths
            return paths[0] if paths else (*anatomy.text_path, key)
    return None


def _open(prefix: str, config: Config, said: set[Path]) -> list[Path]:
    """Where the likeliest scope of a stack states a number of layers, if no stack has as many.

    Stages and blocks are often counted otherwise (EfficientNet's per stage), and a nested config may have an encoder's keys unread.
    """
    if prefix.rpartition(".")[2] not in _COUNTED:
        return []
    side = ENCODER_LAYERS if "encoder" in prefix else DECODER_LAYERS if "decoder" in prefix else ()
    for path, part in ranked_scopes(prefix, config):
        found = [key for key in (*ENCODER_LAYERS, *DECODER_LAYERS, *LAYERS) if integer(part, (key,)) is not None]
        if not found:
            continue
        sided = [key for key in found if key not in LAYERS]
        keys = [key for key in sided if key in side] if sided else found
        paths = [(*path, key) for key in keys if not (path and sided)]
        return [] if any(each in said for each in paths) else paths
    return []
