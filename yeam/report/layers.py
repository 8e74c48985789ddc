"""For `yeam verify`: as many layers as config.json tells of, in words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from yeam.families import Anatomy
from yeam.families.configs import Config
from yeam.families.counts import contradictions, in_words


def layer_problems(folder: Path, config: Config, anatomy: Anatomy) -> Iterator[str]:
    """A sentence for each stack with more or fewer layers than config.json says, with what to do."""
    for found in contradictions(config, anatomy):
        key, count = ".".join(found.path), found.stack.count
        whole = found.missing in ((), tuple(range(count, found.stated)))
        remedies = (*(["copy the model again"] if found.missing else []), *([f"set {key} to {count}"] if whole else []))
        yield f"{folder / 'config.json'}: {in_words(found, anatomy)}: {' or '.join(remedies)}"


def layers_detail(anatomy: Anatomy) -> str:
    """How many layers are stored."""
    return ", ".join(f"{prefix} {stack.count}" for prefix, stack in anatomy.stacks.items()) or "none"
