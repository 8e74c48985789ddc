"""Which names share one weight: an LM head that is the embedding, T5's embeddings, BERT's decoder.

A pair (duplicate, kept) says that the model has both names for one weight and the file needs only `kept`. transformers
ties only if both names hold equal bytes where a file has both; headers cannot tell, so whoever writes must compare. The
rules, in this order: an explicit `tie_word_embeddings` (outer config, then the text model's); a head that is not in the
file is tied; the family's default. T5 is special: its embeddings are always shared, and an explicit false means that a
head in the file is its own weight.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from typing import TYPE_CHECKING, Any

from yeam.families.configs import Config, at
from yeam.families.table import FAMILIES, Family

if TYPE_CHECKING:
    from yeam.families.anatomy import Anatomy

_LM = re.compile(r"LMHead|ForCausalLM|ForMaskedLM|ForConditionalGeneration|ForPreTraining|DoubleHeads|ForImageTextToText|Seq2SeqLM")
# heads of architectures that are not in the table; the others say lm_head
_HEAD_NAMES = {
    "whisper": "proj_out.weight",
    "electra": "generator_lm_head.weight",
    "modernbert": "decoder.weight",
    "xlnet": "lm_loss.weight",
    "distilbert": "vocab_projector.weight",
}
Pairs = tuple[tuple[str, str], ...]


def tied(config: Mapping[str, Any], names_to_shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[str, str]]:
    """The (duplicate, kept) pairs of a checkpoint; see the top of this file.

    >>> tied({"model_type": "llama", "tie_word_embeddings": True}, {"model.embed_tokens.weight": (32, 8)})
    [('lm_head.weight', 'model.embed_tokens.weight')]
    """
    from yeam.families.anatomy import describe

    return list(describe(config, names_to_shapes).ties)


def declared_tie(config: Config, text_path: tuple[str, ...] = ()) -> bool | None:
    """What `tie_word_embeddings` says, in the outer config or else in the text model's; None where neither does."""
    for part in (config, at(config, text_path), at(config, ("text_config",))):
        value = part.get("tie_word_embeddings") if isinstance(part, Mapping) else None
        if isinstance(value, bool):
            return value
    return None


def resolve_ties(config: Config, names: Container[str], anatomy: Anatomy) -> tuple[Pairs, bool | None, str | None]:
    """(pairs, is the head tied, a note or None) for an anatomy whose own ties are not set yet."""
    family = FAMILIES.get(anatomy.family)
    pairs = _family_pairs(family, config, anatomy) if family else _inferred_pairs(config, anatomy)
    heads = [pair for pair in pairs if _is_head(pair[0])]
    if not heads:
        return _kept_in_file(pairs, names), None, None
    present = heads[0][0] in names
    declared = declared_tie(config, anatomy.text_path)
    note = None
    if family is not None and family.name == "t5":
        is_tied: bool | None = not (declared is False and present)
    elif declared is not None:
        is_tied = declared
        if not declared and not present and heads[0][1] in names:
            note = f"config.json says that {heads[0][0]} is a weight of its own (tie_word_embeddings false), but it is not there"
    elif not present:
        is_tied = True
    else:
        is_tied = anatomy.traits.tie if anatomy.traits else None
    if not is_tied:
        pairs = [pair for pair in pairs if pair not in heads and not pair[0].endswith("decoder.bias")]
    return _kept_in_file(pairs, names), is_tied, note


def _is_head(name: str) -> bool:
    return bool(re.search(r"(lm_head|embed_out|proj_out|predictions|lm_loss|vocab_projector)(\.decoder)?\.weight$|^(output|decoder)\.weight$", name))


def _has_head(config: Config, anatomy: Anatomy) -> bool:
    if any(m.site == "head" for m in anatomy.tensors.values()):
        return True
    architectures = config.get("architectures")
    if isinstance(architectures, list) and architectures:
        return bool(_LM.search(str(architectures[0])))
    family = FAMILIES.get(anatomy.family)
    # without a class name: a base model saved alone has lost the prefix that a head model gives it
    return family is not None and bool(anatomy.base) and family.name not in ("bert", "roberta")


def _family_pairs(family: Family, config: Config, anatomy: Anatomy) -> list[tuple[str, str]]:
    has_head = _has_head(config, anatomy)
    embedding = next((path for path, site in family.pre.items() if site == "embedding"), "")
    found = []
    for duplicate, kept in family.ties:
        if duplicate == "head":
            duplicate = _head_name(family, anatomy)
        elif duplicate.split(".")[0] in {path.split(".")[0] for path in family.head}:
            duplicate = anatomy.head_prefix + duplicate
        else:
            side = duplicate.split(".")[0]
            if not any(prefix.startswith(f"{anatomy.base}{side}.") for prefix in anatomy.stacks):
                continue  # an encoder alone has no decoder's embedding
            found.append((anatomy.base + duplicate, anatomy.base + kept))
            continue
        if has_head:
            outer = {"embedding": f"{anatomy.base}{embedding}.weight"}
            inner = anatomy.base if kept in ("shared.weight",) else anatomy.head_prefix
            found.append((duplicate, outer.get(kept, inner + kept)))
    return found


def _head_name(family: Family, anatomy: Anatomy) -> str:
    for name, meaning in anatomy.tensors.items():
        if meaning.site == "head" and meaning.role == "head":
            return name
    return anatomy.head_prefix + next(path for path, site in family.head.items() if site == "head") + ".weight"


def _inferred_pairs(config: Config, anatomy: Anatomy) -> list[tuple[str, str]]:
    """Head and duplicate embeddings of an unknown model, against its shared or first token embedding."""
    token = {n: m for n, m in anatomy.tensors.items() if m.site == "embedding" and m.role == "embedding"}
    token = {n: m for n, m in token.items() if m.module not in ("vision_tower", "audio_tower")}
    if not token or not _has_head(config, anatomy):
        return []
    shared = next((n for n in token if n.endswith("shared.weight")), None)
    kept = shared or next((n for n, m in token.items() if m.module == "decoder"), next(iter(token)))
    heads = [n for n, m in anatomy.tensors.items() if m.site == "head" and m.role == "head" and m.vocab_axis is not None]
    head = heads[0] if heads else _HEAD_NAMES.get(str(config.get("model_type")), "lm_head.weight")
    copies = [n for n in token if shared and n != kept and n.rpartition(".")[0].endswith("embed_tokens")]
    return [(head, kept), *((copy, kept) for copy in copies)]


def _kept_in_file(pairs: list[tuple[str, str]], names: Container[str]) -> Pairs:
    """Swap so that `kept` is a name that the file has, if it has any of the group."""
    groups: dict[str, list[str]] = {}
    for duplicate, kept in pairs:
        groups.setdefault(kept, []).append(duplicate)
    found: list[tuple[str, str]] = []
    for kept, duplicates in groups.items():
        there = kept if kept in names else next((d for d in duplicates if d in names), kept)
        found += [(name, there) for name in (*duplicates, kept) if name != there]
    return tuple(found)
