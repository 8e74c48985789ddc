"""For `yeam verify`: as many layers as config.json tells of, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from yeam.families import Anatomy, rename_layer
from yeam.families.configs import Config
from yeam.families.counts import Contradiction, contradictions


def layer_problems(folder: Path, config: Config, anatomy: Anatomy, files: Mapping[str, str]) -> Iterator[str]:
    """A sentence for each stack with more or fewer layers than config.json says; files: the file that each tensor is in."""
    for found in contradictions(config, anatomy):
        where, key = folder / "config.json", ".".join(found.path)
        count, prefix = found.stack.count, found.stack.prefix
        if found.missing:
            at_the_end = found.missing[0] == count and found.missing[-1] == found.stated - 1
            fewer = f", or set {key} to {count}" if at_the_end else ""
            yield (
                f"{where}: {key} is {found.stated}, but {prefix} has no {_counted(found.missing)} (no {_example(found, anatomy)}), "
                f"which transformers would make up: copy the model again{fewer}"
            )
        if count > found.stated:
            name = next(n for n, m in anatomy.tensors.items() if m.stack == prefix and (m.layer or 0) >= found.stated)
            yield (
                f"{where}: {key} is {found.stated}, but {prefix} has {count} layers ({name} in {files.get(name, 'the weights')}), which "
                f"transformers would pass over: set {key} to {count}, or remove what is too much"
            )


def layers_detail(anatomy: Anatomy) -> str:
    """How many layers are stored."""
    return ", ".join(f"{prefix} {stack.count}" for prefix, stack in anatomy.stacks.items()) or "none"


def _counted(layers: tuple[int, ...]) -> str:
    """`layer 3`, `layers 3 to 5`, `layers 1, 4`."""
    if len(layers) == 1:
        return f"layer {layers[0]}"
    if layers == tuple(range(layers[0], layers[-1] + 1)):
        return f"layers {layers[0]} to {layers[-1]}"
    return f"layers {', '.join(map(str, layers))}"


def _example(found: Contradiction, anatomy: Anatomy) -> str:
    """A tensor that the first missing layer would have."""
    name = next(name for name, meaning in anatomy.tensors.items() if meaning.stack == found.stack.prefix)
    return rename_layer(name, found.stack, found.missing[0])
