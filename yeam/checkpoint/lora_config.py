"""What an `adapter_config.json` of PEFT asks for, and a clear refusal of what cannot be added to a weight.

LoRA (https://arxiv.org/abs/2106.09685) means W + (alpha / r) B A; with `use_rslora` the factor is alpha / sqrt(r)
(https://arxiv.org/abs/2312.03732); with `use_dora` every output row is rescaled to a learnt length
(https://arxiv.org/abs/2402.09353).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from yeam.errors import CheckpointError

_MERGE_IT = "merge the adapter into its base with the library that trained it, and give YeAM the result"
_REPAIR = "repair the adapter's config"
_LARGEST_ALPHA = 3e38  # of float32
# what a pattern may be made of, so that no name takes it long: a search that goes back multiplies with every repeat
_LONGEST_PATTERN, _MOST_REPEATS = 1000, 3
_CLASS = re.compile(r"\\.|\[\^?\]?[^\]]*\]")
_REPEATED = re.compile(r"[*+]|\{\d*,")
_NESTED = re.compile(r"\)(?:[*+]|\{)")
_REFUSED = {
    "alora_invocation_tokens": "activated LoRA acts on some tokens only, so no weight equals it",
    "layer_replication": "it repeats layers of its base",
    "use_qalora": "QA-LoRA pools its inputs",
    "kasa_config": "KaSA changes its base",
    "monteclora_config": "MonteCLoRA samples",
    "use_bdlora": "BD-LoRA has block-diagonal factors",
    "arrow_config": "Arrow routes between adapters",
}
# These initialisations subtract the first factors from the base, so the adapter does not fit the base as published.
_CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")


@dataclass(frozen=True)
class LoraConfig:
    """The fields of `adapter_config.json` that decide what a LoRA adapter adds; see `read_lora_config`."""

    where: str
    rank: int
    alpha: float
    rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    fan_in_fan_out: bool | None
    dora: bool
    target_parameters: tuple[str, ...]
    token_indices: Any
    keep_tied: bool

    def scale(self, module: str, rank: int) -> float:
        """The factor of B A for a module of the base whose factors have `rank`; CheckpointError if they should not."""
        expected = self.rank_pattern.get(_pattern(self.rank_pattern, module), self.rank)
        if rank != expected:
            raise CheckpointError(
                f"{self.where}: the factors of {module!r} have rank {rank} but the config says {expected}",
                "use the adapter_config.json that was saved with these weights",
            )
        alpha = self.alpha_pattern.get(_pattern(self.alpha_pattern, module), self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def tokens_of(self, module: str) -> list[int]:
        """The token ids whose rows of an embedding are replaced (`trainable_token_indices`)."""
        found = self.token_indices
        if isinstance(found, Mapping):
            matching = [value for key, value in found.items() if module == key or module.endswith(f".{key}")]
            found = matching[0] if len(matching) == 1 else None
        if not isinstance(found, list) or not all(type(index) is int and index >= 0 for index in found):
            raise CheckpointError(
                f"{self.where}: trainable_token_indices does not say which rows of {module!r} were trained", _MERGE_IT
            )
        return found


def read_lora_config(table: Mapping[str, Any], where: str) -> LoraConfig:
    """Check an `adapter_config.json`; `where` names it in errors.

    Raises CheckpointError for other kinds of adapters, and for variants of LoRA that are no change of weights or that
    fit only a changed base.
    """
    kind = table.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{where}: the adapter is of type {kind!r}; YeAM applies LORA adapters", _MERGE_IT)
    for key, reason in _REFUSED.items():
        if table.get(key):
            raise CheckpointError(f"{where}: {key} cannot be applied to a weight: {reason}", _MERGE_IT)
    start = str(table.get("init_lora_weights")).lower()
    if start.startswith(_CHANGES_BASE):
        raise CheckpointError(
            f"{where}: init_lora_weights is {start!r}: the adapter belongs to a base that this start has changed",
            "save the adapter with PEFT's `path_initial_model_for_weight_conversion`, which turns it into plain LoRA",
        )
    rank, alpha = table.get("r", 8), table.get("lora_alpha", 8)
    if not _is_rank(rank) or not _is_alpha(alpha):
        raise CheckpointError(f"{where}: r is {rank!r} and lora_alpha {alpha!r}", _REPAIR)
    targets = table.get("target_parameters") or ()
    if not isinstance(targets, (list, tuple)) or not all(isinstance(target, str) for target in targets):
        raise CheckpointError(f"{where}: target_parameters is {targets!r}, not a list of names", _REPAIR)
    return LoraConfig(
        where=where,
        rank=rank,
        alpha=float(alpha),
        rslora=bool(table.get("use_rslora")),
        rank_pattern=_patterns(table, "rank_pattern", _is_rank, where),
        alpha_pattern=_patterns(table, "alpha_pattern", _is_alpha, where),
        fan_in_fan_out=table.get("fan_in_fan_out"),
        dora=bool(table.get("use_dora")),
        target_parameters=tuple(targets),
        token_indices=table.get("trainable_token_indices"),
        keep_tied=bool(table.get("ensure_weight_tying")),
    )


def _is_rank(value: object) -> bool:
    return type(value) is int and value > 0


def _is_alpha(value: object) -> bool:
    return type(value) in (int, float) and abs(value) <= _LARGEST_ALPHA  # type: ignore[arg-type]


def _patterns(table: Mapping[str, Any], key: str, fits: Callable[[object], bool], where: str) -> Mapping[str, Any]:
    """The field, a map from patterns of modules to numbers. Raises CheckpointError for anything else."""
    found = table.get(key) or {}
    if not isinstance(found, dict) or not all(fits(value) for value in found.values()):
        raise CheckpointError(f"{where}: {key} is {found!r}, not a map from modules to numbers", _REPAIR)
    for pattern in found:
        bare = _CLASS.sub("x", pattern)
        if len(pattern) > _LONGEST_PATTERN or len(_REPEATED.findall(bare)) > _MOST_REPEATS or _NESTED.search(bare):
            raise CheckpointError(
                f"{where}: the pattern {pattern[:80]!r} in {key} could take for ever to match",
                f"write it without repeated groups, with at most {_MOST_REPEATS} of `*` and `+`",
            )
    return found


def _pattern(patterns: Mapping[str, Any], module: str) -> str:
    """The first key that, as a regular expression, matches the module's name or its end after a dot (PEFT's rule)."""
    for key in patterns:
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return key
        except re.error as error:
            raise CheckpointError(
                f"the pattern {key!r} in an adapter's config is no regular expression: {error}"
            ) from error
    return module
