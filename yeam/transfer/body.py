"""A decoder as the matrices that it computes with: layer by layer, fused tensors split, weights [out, in], in one dtype.

A dense body has attention by heads and one MLP in every layer. A partial one may have experts, or attention of another kind,
which is not looked into (see branches.py).

Legend: D hidden width, H query heads, K key/value heads, E head dimensions, I neurons, V tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from yeam.checkpoint import Checkpoint
from yeam.errors import CheckpointError
from yeam.families import Anatomy, Meaning, Stack
from yeam.families.configs import at, dims
from yeam.families.traits import Traits

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "gpt2", "gpt_neox", "granite", "olmo2")
"""Families whose symmetries are known here, each one checked against transformers in the tests."""

WITH_EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe")
"""The same with experts in their MLPs: partial bodies."""

MLP_ONLY = ("deepseek_v3", "bamba", "jamba", "qwen3_next")
"""Multi-head latent attention, state-space or linear attention: partial bodies of which the MLPs are known."""

Parts = dict[str, "Tensor"]
"""Tensors by part: `q`, `k`, `v`, `o`, `gate`, `up`, `down`, a norm's site (`attn_norm`), and `.bias` behind each. In partial bodies
also `shared_expert.up` and `expert.3.up`, and so on."""

READERS = ("q", "k", "v", "gate", "up")
WRITERS = ("o", "down")


@dataclass(frozen=True)
class Slot:
    """Where a part is stored: the tensor's name, and which part of its view it is."""

    name: str
    part: str


class Body:
    """The decoder of a checkpoint: a dense one, or with `partial` one whose MLPs or attention are only partly known.

    Raises CheckpointError for one whose symmetries are not known, with the reason.
    """

    def __init__(self, checkpoint: Checkpoint, anatomy: Anatomy, *, partial: bool = False) -> None:
        self.checkpoint = checkpoint
        self.partial = partial
        self.anatomy = anatomy
        self.traits = self._traits()
        self.config: Mapping[str, Any] = at(checkpoint.config, anatomy.text_path) or {}
        self.stack = self._stack()
        self.depth = self.stack.count
        self._check()

    def _refuse(self, why: str, remedy: str = "") -> CheckpointError:
        known = f"known are dense models of: {', '.join(FAMILIES)}"
        if self.partial:
            known += f"; with experts {', '.join(WITH_EXPERTS)}; MLPs only: {', '.join(MLP_ONLY)}"
        return CheckpointError(f"{self.checkpoint.reference}: {why}", remedy or known)

    def _traits(self) -> Traits:
        family, traits = self.anatomy.family, self.anatomy.traits
        name = self.checkpoint.config.get("model_type") or family
        if not self.partial and family in (*WITH_EXPERTS, *MLP_ONLY):
            what = "experts" if family in WITH_EXPERTS else "attention of a kind that cannot be aligned"
            raise self._refuse(
                f"a model of family {name!r} has {what}",
                "the plugin `scale_up` moves updates of MLPs between such models and others; this needs a dense one",
            )
        if family not in (*FAMILIES, *((*WITH_EXPERTS, *MLP_ONLY) if self.partial else ())) or traits is None:
            raise self._refuse(f"the symmetries of family {name!r} are not known")
        return traits

    def _stack(self) -> Stack:
        found = [stack for stack in self.anatomy.stacks.values() if stack.module in ("default", "text_decoder")]
        if len(found) != 1:
            raise self._refuse(f"it has {len(found)} stacks of text layers", "one stack of decoder layers is needed")
        return found[0]

    def _check(self) -> None:
        for name, meaning in self.anatomy.tensors.items():
            if meaning.stack != self.stack.prefix or meaning.role == "buffer":
                continue
            packed = self.checkpoint.config.get("quantization_config")
            if (packed and meaning.role == "other") or not self.checkpoint.tensors[name].storage.is_float:
                kind = packed.get("quant_method", "unknown") if isinstance(packed, Mapping) else "integers"
                raise self._refuse(
                    f"its weights are quantised ({kind}), as {name} shows", "name the model that it was quantised from"
                )
            if not self.partial and ("." in meaning.site or meaning.role in ("router", "latent", "other", "scale")):
                raise self._refuse(f"{name} ({meaning.site}) is no part of a dense decoder layer")
        wanted = {"up", "down", *(("gate",) if self.traits.glu else ())}
        for layer in range(self.depth):
            attention = {"q", "k", "v", "o"} if self.attends else set()
            branches = [{prefix + part for part in wanted} for prefix in self.branches(layer)]
            if missing := sorted(attention.union(*branches or [wanted]) - self.slots[layer].keys()):
                raise self._refuse(f"layer {layer} has no {', '.join(missing)}", "check the model's files")
        for part, rows in (("q", self.heads), ("k", self.kv_heads), ("v", self.kv_heads)) if self.attends else ():
            shape = self.shape(0, part)
            if shape != (rows * self.head_dim, self.hidden):
                raise self._refuse(
                    f"{part} of layer 0 is {list(shape)}, and config.json says {rows} heads of {self.head_dim}"
                )

    @cached_property
    def _dims(self) -> tuple[int, int, int, int]:
        width = dims(self.config)
        if width is None:
            raise self._refuse("config.json does not state hidden size and number of heads")
        return width.hidden, width.heads, width.kv_heads, width.head_dim

    @property
    def hidden(self) -> int:
        """D."""
        return self._dims[0]

    @property
    def heads(self) -> int:
        """H, the query heads."""
        return self._dims[1]

    @property
    def kv_heads(self) -> int:
        """K, the key/value heads."""
        return self._dims[2]

    @property
    def head_dim(self) -> int:
        """E."""
        return self._dims[3]

    @property
    def rotary(self) -> int:
        """Dimensions of a head that rotary embedding turns; even, 0 without it."""
        return 0 if self.traits.rope == "none" else int(self.traits.rotary * self.head_dim)

    @property
    def attends(self) -> bool:
        """Whether its attention is known: by heads, in every layer."""
        return self.traits.attention == "heads"

    def branches(self, layer: int) -> list[str]:
        """The MLPs of a layer, by what stands in front of their parts: `` where there is one; `shared_expert.` where every token visits
        one beside others; else those of the experts, `expert.0.` and up."""
        slots = self.slots[layer]
        for prefix in ("", "shared_expert."):
            if prefix + "up" in slots:
                return [prefix]
        count = len([part for part in slots if part.startswith("expert.") and part.endswith(".up")])
        return [f"expert.{number}." for number in range(count)]

    @property
    def is_tied(self) -> bool:
        return "head" not in self.outer

    @cached_property
    def slots(self) -> list[dict[str, Slot]]:
        """Where each part of each layer is stored."""
        found: list[dict[str, Slot]] = [{} for _ in range(self.depth)]
        for name, meaning in self.anatomy.tensors.items():
            is_known = self.attends or "attention" not in meaning.roles
            at = meaning.layer if meaning.stack == self.stack.prefix and is_known else None
            if at is not None and at < self.depth:
                found[at].update(_parts_of(name, meaning))
        return found

    @cached_property
    def outer(self) -> dict[str, Slot]:
        """Where `embedding`, `position`, `final_norm` and `head` are stored, the last one only where it is not tied."""
        duplicates = {name for name, _ in self.anatomy.ties}
        found: dict[str, Slot] = {}
        for name, meaning in self.anatomy.tensors.items():
            known = meaning.site in ("embedding", "position", "final_norm", "head")
            text = meaning.module in ("default", "text_decoder", "lm_head")
            if meaning.stack is None and known and text and name not in duplicates:
                found.update(_parts_of(name, meaning))
        return found

    def shape(self, layer: int, part: str) -> tuple[int, ...]:
        """The shape of a part, [out, in] or [out]."""
        slot = self.slots[layer][part]
        stored = self.checkpoint.tensors[slot.name].shape
        view = self.anatomy.tensors[slot.name].view
        return stored if view is None else view.parts(stored)[slot.part.removesuffix(".bias")]

    def layer(self, layer: int, dtype: torch.dtype | None = None) -> Parts:
        """Every part of a layer, in `dtype` (float32 by default)."""
        return self.read(self.slots[layer], dtype)

    def norms(self, layer: int, dtype: torch.dtype | None = None) -> Parts:
        """The norms of a layer."""
        return self.read({part: slot for part, slot in self.slots[layer].items() if "norm" in part}, dtype)

    def around(self, *parts: str, dtype: torch.dtype | None = None) -> Parts:
        """Parts outside of the layers that the model has, whole, in `dtype` (float32 by default)."""
        return self.read(
            {part: slot for part, slot in self.outer.items() if part.removesuffix(".bias") in parts}, dtype
        )

    def joined(self, parts: Mapping[str, Tensor], slots: Mapping[str, Slot]) -> Parts:
        """The stored tensors that hold these parts, by name; `slots` as in `slots[layer]` or `outer`."""
        by_name: dict[str, dict[str, Tensor]] = {}
        for part, slot in slots.items():
            by_name.setdefault(slot.name, {})[slot.part.removesuffix(".bias")] = parts[part]
        out = {}
        for name, pieces in by_name.items():
            view = self.anatomy.tensors[name].view
            out[name] = next(iter(pieces.values())) if view is None else view.join(pieces)
        return out

    def read(self, slots: Mapping[str, Slot], dtype: torch.dtype | None = None) -> Parts:
        """The parts in these slots, in `dtype` (float32 by default)."""
        import torch

        stored: dict[str, Parts] = {}
        for name in dict.fromkeys(slot.name for slot in slots.values()):
            info = self.checkpoint.tensors[name]
            tensor = self.checkpoint.read(name, 0, info.numel).view(info.shape).to(dtype or torch.float32)
            view = self.anatomy.tensors[name].view
            stored[name] = {"": tensor} if view is None else view.split(tensor)
        return {
            part: stored[slot.name][""]
            if "" in stored[slot.name]
            else stored[slot.name][slot.part.removesuffix(".bias")]
            for part, slot in slots.items()
        }


def _parts_of(name: str, meaning: Meaning) -> dict[str, Slot]:
    """Part → slot of one stored tensor; buffers, routers and what is not looked into are no parts."""
    scope, _, last = meaning.site.rpartition(".")
    if meaning.role in ("buffer", "router", "latent", "other", "scale") or last in ("router", "norm"):
        return {}
    end = ".bias" if meaning.role == "bias" else ""
    expert = "" if meaning.expert is None else f"{meaning.expert}."
    names = meaning.view.names if meaning.view is not None else (f"{expert}{last}",)
    return {(f"{scope}." if scope else "") + part + end: Slot(name, part + end) for part in names}
