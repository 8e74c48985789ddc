"""One model that takes any weights and reads held-out rows.

Legend: B sequences, T tokens, V vocabulary, n scored tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from quality.rows import EXACT, Rows

Weights = Mapping[str, Tensor]
BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Score:
    """loss: nats a scored token. exact: share of answers that greedy decoding gets right, token by token."""

    loss: float
    exact: float

    def of(self, domain: str) -> float:
        """What counts for a domain, higher is better: exact answers, or else minus the loss."""
        return self.exact if domain in EXACT else -self.loss


class Reader:
    """A model in fp32 whose weights are rounded to `dtype` as a merge would store them."""

    def __init__(self, model: Any, dtype: torch.dtype = torch.bfloat16) -> None:
        self.model = model.eval().requires_grad_(False)
        self.parameters = dict(model.named_parameters())
        self.dtype = dtype
        self.forwards = 0

    @torch.inference_mode()
    def take(self, weights: Weights) -> None:
        """Read with these weights from now on."""
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name].to(self.dtype))

    @torch.inference_mode()
    def score(self, rows: Rows) -> Score:
        """Of the present weights. An answer is right if every token of it is the likeliest one after those before it."""
        batch = max(1, BATCH_TOKENS // rows.ids_BT.shape[1])
        total, count, right, answers = 0.0, 0, 0, 0
        for ids_BT, answer_BT in zip(rows.ids_BT.split(batch), rows.answers_BT.split(batch)):
            self.forwards += 1
            logits_BTV = self.model(input_ids=ids_BT, use_cache=False).logits[:, :-1]
            scored_BT = answer_BT[:, 1:] > 0
            logits_nV, target_n, answer_n = logits_BTV[scored_BT], ids_BT[:, 1:][scored_BT], answer_BT[:, 1:][scored_BT]
            total += float(cross_entropy(logits_nV, target_n, reduction="sum"))
            count += len(target_n)
            wrong = answer_n[logits_nV.argmax(dim=1) != target_n].unique()
            seen = answer_n.unique()
            answers += len(seen)
            right += len(seen) - len(wrong)
        return Score(total / max(1, count), right / max(1, answers))
