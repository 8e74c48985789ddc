"""Other names that the same tensor goes by in checkpoints saved by other classes or versions."""

from __future__ import annotations

import re
from collections.abc import Iterable

from yeam.families.anatomy import Anatomy
from yeam.families.table import FAMILIES

_TEXT_PREFIXES = ("language_model.model.", "model.language_model.", "language_model.")
_BASE_WORDS = ("model", "transformer", "backbone")
# interchangeable endings or parts of a name, both ways
_SYNONYMS = (
    (r"LayerNorm\.weight$", "LayerNorm.gamma"),
    (r"LayerNorm\.bias$", "LayerNorm.beta"),
    (r"LayerNorm\.gamma$", "LayerNorm.weight"),
    (r"LayerNorm\.beta$", "LayerNorm.bias"),
    (r"(^|\.)block_sparse_moe\.gate\.", r"\1mlp.gate."),
    (r"(^|\.)mlp\.gate\.", r"\1block_sparse_moe.gate."),
    (r"(^|\.)vision_tower\.vision_model\.", r"\1vision_tower."),
    (r"(^|\.)vision_tower\.(?!vision_model\.)", r"\1vision_tower.vision_model."),
    (r"^embed_out\.", "lm_head."),
    (r"^lm_head\.", "embed_out."),
)


def aliases_of(name: str, anatomy: Anatomy) -> tuple[str, ...]:
    """Names to try, in this order, for the counterpart of `name` in another checkpoint of the same architecture.

    Covers a base model saved without its head's prefix (`h.0.*`, `transformer.h.0.*`), the two orders of prefixes in
    models that see (`language_model.model.*`, `model.language_model.*`), old LayerNorm names and renamed modules.
    They are candidates: only some exist anywhere.
    """
    meaning = anatomy.tensors.get(name)
    tower = meaning is not None and meaning.module in ("vision_tower", "multi_modal_projector", "audio_tower")
    variants = _tower_variants if tower else _variants
    found = dict.fromkeys(variants(name, anatomy))
    for pattern, replacement in _SYNONYMS:
        for variant in tuple(found):
            if re.search(pattern, variant):
                found.update(dict.fromkeys(variants(re.sub(pattern, replacement, variant), anatomy)))
    found.pop(name, None)
    return tuple(found)


def _tower_variants(name: str, _: Anatomy) -> Iterable[str]:
    """A vision or audio tensor with and without the `model.` that newer versions put before it."""
    yield name
    yield name.removeprefix("model.") if name.startswith("model.") else f"model.{name}"


def _variants(name: str, anatomy: Anatomy) -> Iterable[str]:
    """`name` under every prefix that a text model is saved with, alone or inside one that sees."""
    yield name
    family = FAMILIES.get(anatomy.family)
    if family is not None:
        base, own = anatomy.base, f"{family.base}." if family.base else ""
        if _is_under(name, anatomy):
            rest = name[len(base) :]
            yield from (own + rest, rest)
            yield from (prefix + rest for prefix in _TEXT_PREFIXES)
        else:
            rest = name.removeprefix("model.").removeprefix("language_model.")
            yield from (rest, f"language_model.{rest}")
        return
    first, _, rest = name.partition(".")
    if first in _BASE_WORDS:
        yield rest
        yield from (f"{word}.{rest}" for word in _BASE_WORDS if word != first)
    else:
        yield from (f"{word}.{name}" for word in _BASE_WORDS)


def _is_under(name: str, anatomy: Anatomy) -> bool:
    """Is it a tensor of the base model, not of a head beside it?"""
    if not name.startswith(anatomy.base):
        return False
    family = FAMILIES[anatomy.family]
    rest = name[len(anatomy.base) :]
    return not any(rest.startswith(f"{path.split('.')[0]}.") for path in family.head) or rest.startswith(
        tuple(f"{path.split('.')[0]}." for path in (*family.stacks, *family.pre, *family.post))
    )
