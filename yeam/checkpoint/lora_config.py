"""What an `adapter_config.json` of PEFT asks for, and a clear refusal of what cannot be added to a weight.

LoRA (https://arxiv.org/abs/2106.09685) means W + (alpha / r) B A; with `use_rslora` the factor is alpha / sqrt(r)
(https://arxiv.org/abs/2312.03732); with `use_dora` every output row is rescaled to a learnt length
(https://arxiv.org/abs/2402.09353).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from yeam.errors import CheckpointError

_MERGE_IT = "merge the adapter into its base with the library that trained it, and give YeAM the result"
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
    if type(rank) is not int or rank < 1 or not isinstance(alpha, (int, float)):
        raise CheckpointError(f"{where}: r is {rank!r} and lora_alpha {alpha!r}", "repair the adapter's config")
    return LoraConfig(
        where=where,
        rank=rank,
        alpha=float(alpha),
        rslora=bool(table.get("use_rslora")),
        rank_pattern=table.get("rank_pattern") or {},
        alpha_pattern=table.get("alpha_pattern") or {},
        fan_in_fan_out=table.get("fan_in_fan_out"),
        dora=bool(table.get("use_dora")),
        target_parameters=tuple(table.get("target_parameters") or ()),
        token_indices=table.get("trainable_token_indices"),
        keep_tied=bool(table.get("ensure_weight_tying")),
    )


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
