"""From an adapter's tensors to changes of base tensors: every tensor is used, or an error names those that are not."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

from yeam.checkpoint.base import Checkpoint, TensorInfo
from yeam.checkpoint.dtypes import DTYPES
from yeam.checkpoint.folder import listed
from yeam.checkpoint.lora_config import LoraConfig
from yeam.checkpoint.lora_factors import FUSED_EXPERTS, Factors, Parameter, Wrapper, assign, find_parameter
from yeam.checkpoint.lora_keys import Contents, Names, sort_out
from yeam.checkpoint.lora_ties import Ties
from yeam.errors import CheckpointError

# Layers of GPT-2 and its relatives that transformers stores as (inputs, outputs).
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D_LAYERS = ("c_attn", "c_proj", "c_fc", "q_attn")


@dataclass(frozen=True)
class Change:
    """What happens to one tensor: it starts as the base's `of`, or as the adapter's `whole` in its place, then changes.

    `factors` add a delta, `magnitude` names the lengths of DoRA, `bias` an adapter tensor and its factor, `tokens` an
    adapter tensor and the rows that it replaces.
    """

    of: str
    whole: str | None = None
    factors: Factors | None = None
    magnitude: str | None = None
    bias: tuple[str, float] | None = None
    tokens: tuple[str, tuple[int, ...]] | None = None

    @property
    def source(self) -> str:
        return self.whole or self.of

    @property
    def computed(self) -> bool:
        return self.factors is not None or self.bias is not None or self.tokens is not None

    @property
    def parts(self) -> list[str]:
        """The adapter's tensors that the computation needs."""
        factors = [self.factors.a, self.factors.b] if self.factors else []
        others = [self.magnitude, self.bias and self.bias[0], self.tokens and self.tokens[0]]
        return factors + [part for part in others if part]


_OWN_BASE = "use the base that the adapter was trained on; its config names it as base_model_name_or_path"


def match(base: Checkpoint, adapter: Checkpoint, settings: LoraConfig, ties: Ties) -> dict[str, Change]:
    """The changes by tensor name. Raises CheckpointError for unused adapter tensors and for shapes that do not fit."""
    where = f"{adapter.folder}: adapter {adapter.reference!r}"
    return _Matcher(base, adapter, settings, ties, where).run(sort_out(adapter.tensors, where))


class _Matcher:
    def __init__(self, base: Checkpoint, adapter: Checkpoint, settings: LoraConfig, ties: Ties, where: str) -> None:
        self.base, self.adapter, self.settings, self.ties, self.where = base, adapter, settings, ties, where
        self.names = Names(base.tensors)
        self.changes: dict[str, Change] = {}
        self.unused: list[str] = []
        self.wrappers: dict[str, list[Wrapper]] = defaultdict(list)

    def run(self, contents: Contents) -> dict[str, Change]:
        for name, key in contents.replaced.items():
            self._replace(name, key)
        for module, parts in contents.modules.items():
            for key in parts.values():
                if not DTYPES[code := self.adapter.tensors[key].dtype].is_float:
                    raise CheckpointError(f"{self.where}: {key!r} is of type {code}, not of real numbers", _OWN_BASE)
            self._module(module, dict(parts))
        for stem, wrappers in self.wrappers.items():
            self._experts(stem, wrappers)
        if self.unused or not self.changes:
            what = (
                f"has tensors for which the base has none: {listed(self.unused)}" if self.unused else "has no tensors"
            )
            remedy = _OWN_BASE
            if self.unused and all(
                name.endswith(".lora_B.bias") for name in self.unused
            ):  # no base of this kind has them
                remedy = (
                    "the base's layers have no bias that this could be added to: train the adapter without lora_bias"
                )
            raise CheckpointError(f"{self.where} {what} (base: {self.base.reference})", remedy)
        return self.changes

    def _target(self, name: str) -> tuple[str, str] | None:
        """(tensor of the result, base tensor that it starts from) for a name in the adapter."""
        found = self.names.find(name)
        if found is not None:
            return found, found
        if self.ties.is_missing_head(name) and self.ties.head and self.ties.embedding:
            return self.ties.head, self.ties.embedding
        return None

    def _tied_away(self, name: str) -> bool:
        """Whether the adapter, trained with tied embeddings, says here again what it says of the embedding."""
        return self.ties.keep and self.ties.is_missing_head(name)

    def _replace(self, name: str, key: str) -> None:
        target = self._target(name)
        if target is None:
            self.unused.append(key)
        elif not self._tied_away(name):
            old, new = self.base.tensors[target[1]].shape, self.adapter.tensors[key].shape
            rows_only = old[1:] == new[1:] and len(old) == len(new) and self.ties.may_resize(target[0])
            if old != new and not rows_only:
                raise self._misfit(target[1], old, key)
            self.changes[target[0]] = Change(target[1], whole=key)

    def _module(self, module: str, parts: dict[str, str]) -> None:
        embedding = "lora_embedding_A" in parts
        a = parts.pop("lora_embedding_A", None) or parts.pop("lora_A", None)
        b = parts.pop("lora_embedding_B", None) or parts.pop("lora_B", None)
        bias, magnitude, tokens = (parts.pop(k, None) for k in ("lora_B.bias", "lora_magnitude_vector", "tokens"))
        self.unused += parts.values()
        if (a is None) != (b is None) or (a is None and (bias or magnitude)):
            raise CheckpointError(
                f"{self.where}: {module!r} has only one of lora_A and lora_B: {listed(p for p in (a, b, bias) if p)}",
                "download the adapter again",
            )
        if self._tied_away(f"{module}.weight"):
            return
        if a is not None and b is not None and self._is_expert(module, a):
            self.unused += [part for part in (bias, magnitude) if part]
            self.wrappers[_stem(module)].append(Wrapper(module, self.adapter.tensors[a], self.adapter.tensors[b]))
        elif a is not None and b is not None:
            self._layer(module, a, b, bias, magnitude, embedding)
        if tokens is not None:
            self._tokens(module, tokens)

    def _layer(self, module: str, a: str, b: str, bias: str | None, magnitude: str | None, embedding: bool) -> None:
        leaves = ["weight", *self._targeted(module)]
        target = next((t for leaf in leaves if (t := self._target(f"{module}.{leaf}")) is not None), None)
        if target is None:
            self.unused += [part for part in (a, b, bias, magnitude) if part]
            return
        change = self.changes.get(target[0], Change(target[1]))
        source = (self.adapter if change.whole else self.base).tensors[change.source]
        transposed = self._orientation(source, target[0], a, b, embedding)
        scale = self.settings.scale(module, self.adapter.tensors[a].shape[0])
        outputs = source.shape[1] if transposed else source.shape[0]
        if (magnitude is not None) != self.settings.dora:
            raise CheckpointError(
                f"{self.where}: {module!r} has {'a' if magnitude else 'no'} lora_magnitude_vector but use_dora is "
                f"{self.settings.dora}",
                "use the adapter_config.json that was saved with these weights",
            )
        if magnitude is not None and self.adapter.tensors[magnitude].numel != outputs:
            raise self._misfit(source.name, source.shape, magnitude)
        self.changes[target[0]] = replace(change, factors=Factors(a, b, scale, transposed), magnitude=magnitude)
        if bias is not None:
            self._bias(module, bias, scale)

    def _bias(self, module: str, key: str, scale: float) -> None:
        target = self._target(f"{module}.bias")
        if target is None:
            self.unused.append(key)
            return
        change = self.changes.get(target[0], Change(target[1]))
        shape = self.base.tensors[target[1]].shape
        if self.adapter.tensors[key].shape != shape:
            raise self._misfit(target[1], shape, key)
        self.changes[target[0]] = replace(change, bias=(key, scale))

    def _tokens(self, module: str, key: str) -> None:
        target = self._target(f"{module}.weight")
        if target is None:
            self.unused.append(key)
            return
        change = self.changes.get(target[0], Change(target[1]))
        shape = (self.adapter if change.whole else self.base).tensors[change.source].shape
        tokens = self.settings.tokens_of(module)
        if self.adapter.tensors[key].shape != (len(tokens), *shape[1:]) or max(tokens, default=0) >= shape[0]:
            raise self._misfit(target[1], shape, key)
        self.changes[target[0]] = replace(change, tokens=(key, tuple(tokens)))

    def _orientation(self, source: TensorInfo, name: str, a: str, b: str, embedding: bool) -> bool:
        """Whether the base stores (inputs, outputs); raises CheckpointError where the factors do not fit either way."""
        w, a_shape, b_shape = source.shape, self.adapter.tensors[a].shape, self.adapter.tensors[b].shape
        if len(a_shape) < 2 or len(b_shape) < 2 or a_shape[0] != b_shape[1] or set(b_shape[2:]) - {1}:
            raise self._misfit(source.name, w, a, b)
        straight = w == (b_shape[0], *a_shape[1:])
        crossed = len(a_shape) == 2 and w == (a_shape[1], b_shape[0])
        if not (straight or crossed) or (embedding and not crossed):
            raise self._misfit(source.name, w, a, b)
        if embedding or straight != crossed:
            return crossed
        kind = self.base.config.get("model_type")
        if kind is None:
            return bool(self.settings.fan_in_fan_out)
        return kind in _CONV1D_MODELS and name.removesuffix(".weight").rpartition(".")[2] in _CONV1D_LAYERS

    def _targeted(self, module: str) -> list[str]:
        """The parameters of a module that `target_parameters` asks for."""
        pairs = [target.rpartition(".") for target in self.settings.target_parameters]
        return sorted({leaf for stem, _, leaf in pairs if not stem or f".{module}".endswith(f".{stem}")})

    def _is_expert(self, module: str, a: str) -> bool:
        if module != _stem(module):
            return True
        found = self.names.find(f"{module}.weight")
        if found is not None:
            return len(self.base.tensors[found].shape) == 3 and len(self.adapter.tensors[a].shape) == 2
        return any(self._parameter(module, leaf) for leaf in self._targeted(module))

    def _parameter(self, stem: str, leaf: str) -> Parameter | None:
        """The expert parameter of the base, stored fused or expert by expert, under this stem or its older name."""
        first = [f"{stem}.{leaf}"]
        for older in (stem, stem.replace(".mlp.experts", ".block_sparse_moe.experts")):
            first += [f"{older}.0.{parts[0]}.weight" for parts in FUSED_EXPERTS.get(leaf, ())]
        for name in first:
            found = self.names.find(name)
            ending = leaf if name == first[0] else name.rpartition(".0.")[2]
            if found is not None:
                base_stem = found.removesuffix(f".{ending}").removesuffix(".0")
                parameter = find_parameter(self.base.tensors, base_stem, leaf)
                if parameter is not None:
                    return parameter
        return None

    def _experts(self, stem: str, wrappers: list[Wrapper]) -> None:
        leaves = self._targeted(stem)
        parameters = [parameter for leaf in leaves if (parameter := self._parameter(stem, leaf)) is not None]
        for wrapper, parameter, transposed in assign(wrappers, parameters, self.where):
            experts = parameter.shape[0]
            rank = wrapper.a.shape[0] // experts
            factors = Factors(
                wrapper.a.name,
                wrapper.b.name,
                self.settings.scale(f"{stem}.{parameter.name}", rank),
                transposed,
                experts,
            )
            for name, expert, rows in parameter.pieces:
                self.changes[name] = Change(name, factors=replace(factors, expert=expert, rows=rows))

    def _misfit(self, name: str, shape: tuple[int, ...], *keys: str) -> CheckpointError:
        given: Any = ", ".join(f"{key!r} of shape {list(self.adapter.tensors[key].shape)}" for key in keys)
        return CheckpointError(
            f"{self.where}: {given} does not fit {name!r} of shape {list(shape)} in the base {self.base.reference}",
            _OWN_BASE,
        )


def _stem(module: str) -> str:
    while module.endswith(".base_layer"):
        module = module.removesuffix(".base_layer")
    return module
