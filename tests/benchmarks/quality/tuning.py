"""Training: AdamW on windows of token streams, of all weights or of LoRA factors that are then added to them.

Legend: B sequences, T tokens.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from quality.rows import Rows, windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LORA_RANK = 8


@dataclass(frozen=True)
class Regime:
    """How experts are made from the base."""

    name: str
    steps: int
    rate: float
    batch: int
    lora: bool = False


def fit(
    model: Any,
    streams: list[Rows],
    *,
    steps: int,
    rate: float,
    batch: int,
    length: int,
    seed: int,
    label: str,
    first: int | None = None,
) -> None:
    """AdamW, a short warm-up and a cosine to zero; every batch takes an equal share from each stream, prompts are not predicted."""
    generator = torch.Generator().manual_seed(seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    warmup = max(1, min(100, steps // 10))
    start = time.process_time()
    model.train()
    for step in range(steps):
        share = min((step + 1) / warmup, 1.0) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = rate * share
        parts = [windows(stream, length, batch // len(streams), generator, first) for stream in streams]
        ids_BT = torch.cat([part.ids_BT for part in parts])
        labels_BT = torch.cat([part.labels_BT for part in parts])
        loss = model(input_ids=ids_BT, labels=labels_BT, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if step % 100 == 99 or step + 1 == steps:
            seconds = time.process_time() - start
            print(f"  {label} step {step + 1}/{steps}  loss {loss.item():.3f}  {seconds:.0f} s", file=sys.stderr)
    model.eval()


def fine_tune(
    model: PreTrainedModel,
    stream: Rows,
    regime: Regime,
    *,
    length: int,
    seed: int,
    label: str,
    first: int | None = None,
) -> PreTrainedModel:
    """The model after one regime on one domain, in fp32; of LoRA with the factors added to the weights."""
    settings: dict[str, Any] = {"steps": regime.steps, "rate": regime.rate, "batch": regime.batch}
    torch.manual_seed(seed)
    if not regime.lora:
        fit(model, [stream], length=length, seed=seed, label=label, first=first, **settings)
        return model
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear"))
    fit(adapted, [stream], length=length, seed=seed, label=label, first=first, **settings)
    merged: PreTrainedModel = adapted.merge_and_unload()
    return merged
