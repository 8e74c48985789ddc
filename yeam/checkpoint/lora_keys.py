"""The names in a PEFT adapter file: what each tensor is, and which tensor of the base it means."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from yeam.errors import CheckpointError

_PREFIX = "base_model.model."
# What wrappers of training frameworks put into names.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Containers that some versions of a model have and others have not, or have elsewhere.
_CONTAINERS = {"model", "language_model", "transformer"}
_FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")


@dataclass
class Contents:
    """An adapter file sorted out: for each module its parts by kind, and tensors that replace a base tensor whole.

    `spare` are what PEFT saves besides when the vocabulary has grown: `original_module`, which training did not touch,
    and `modules_to_save` where the same tensor is there under its plain name.

    Kinds: `lora_A`, `lora_B`, `lora_B.bias`, `lora_embedding_A`, `lora_embedding_B`, `lora_magnitude_vector`, `tokens`.
    """

    modules: dict[str, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))
    replaced: dict[str, str] = field(default_factory=dict)
    spare: list[str] = field(default_factory=list)


def sort_out(keys: Iterable[str], where: str) -> Contents:
    """What each tensor of an adapter file is. Raises CheckpointError for two tensors in one role (two adapters)."""
    contents = Contents()
    copies: dict[str, str] = {}
    for key in keys:
        parts = [part for part in key.removeprefix(_PREFIX).split(".") if part not in _WRAPPERS]
        if "original_module" in parts:
            contents.spare.append(key)
            continue
        if "modules_to_save" in parts[-3:-1]:
            copies[".".join([*parts[: parts.index("modules_to_save")], parts[-1]])] = key
            continue
        kind, module = _kind(parts)
        if kind is None:
            place: dict[str, str] = contents.replaced
            role = module
        else:
            place, role = contents.modules[module], kind
        if role in place:
            raise CheckpointError(
                f"{where}: {place[role]!r} and {key!r} are both {role!r} of one module", "save one adapter per folder"
            )
        place[role] = key
    for name, key in copies.items():
        if contents.replaced.setdefault(name, key) != key:
            contents.spare.append(key)
    return contents


def _kind(parts: list[str]) -> tuple[str | None, str]:
    """(kind, module), or (None, name of the tensor that is replaced)."""
    for position, part in enumerate(parts):
        rest = parts[position + 1 :]
        if part in _FACTORS:
            # What follows is `weight`, `bias`, an adapter's name, or the latter and one of the former.
            leaf = ".bias" if rest[-1:] == ["bias"] else ""
            return part + leaf, ".".join(parts[:position])
        if part == "token_adapter" and rest[:1] == ["trainable_tokens_delta"]:
            return "tokens", ".".join(parts[:position])
    return None, ".".join(part for part in parts if part != "base_layer")


class Names:
    """Finds the tensor of a base that an adapter means, though containers such as `model.` differ between versions."""

    def __init__(self, tensors: Mapping[str, object]) -> None:
        self._tensors = tensors
        self._core: dict[str, list[str]] | None = None
        self._ends: dict[str, list[str]] | None = None

    def find(self, name: str) -> str | None:
        """The base's name for `name`: the same, the same up to containers, or the only one that ends like it."""
        if name in self._tensors:
            return name
        if self._core is None:
            self._core = _group((_core(known), known) for known in self._tensors)
        found = self._core.get(_core(name), [])
        if not found:
            found = [end for end in _ends(name)[1:] if "." in end and end in self._tensors][:1]
        if not found:
            if self._ends is None:
                self._ends = _group((end, known) for known in self._tensors for end in _ends(known))
            found = self._ends.get(name, [])
        return found[0] if len(found) == 1 else None


def _core(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _CONTAINERS)


def _ends(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _group(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for key, value in pairs:
        groups[key].append(value)
    return groups
