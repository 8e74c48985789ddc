"""Inspection of a model from its headers alone."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import torch
from family_models import Saved, saved

from yeam.checkpoint.base import Checkpoint, TensorInfo
from yeam.report.inspect import inspect_model


class Headers(Checkpoint):
    """A checkpoint of which only the headers exist."""

    def __init__(self, model: Saved, dtype: str = "F64") -> None:
        self.reference, self.folder, self.config = "tiny", Path("."), model.config
        self.tensors = {name: TensorInfo(name, dtype, shape) for name, shape in model.shapes.items()}
        self.aliases: dict[str, str] = {}

    def fingerprint(self) -> str:
        return "0"

    def read(self, name: str, start: int, stop: int, buffer: torch.Tensor | None = None) -> torch.Tensor:
        raise AssertionError("inspection must not read weights")


def test_inspection_of_a_tabled_model() -> None:
    model = saved("qwen3_moe")
    found = inspect_model(Headers(model))
    assert found.parameters == sum(p.numel() for p in model.model.parameters())
    assert found.bytes == 8 * found.parameters and found.dtypes == {"F64": found.parameters}
    assert (found.family, found.coverage_tensors, found.unrecognised) == ("qwen3_moe", 1.0, ())
    assert (found.tied, found.vocab_size, found.vocab_rows) == (False, 96, 96)
    assert sum(row.tensors for row in found.roles) == found.tensors == len(model.tensors)
    assert json.loads(json.dumps(found.to_dict()))["stacks"][0]["layers"] == 3
    text = found.to_text()
    assert re.search(r"^router +2 +\S+ +F64 +\[3, 32\]$", text, re.M) and "coverage      100.0%" in text


def test_inspection_tells_what_it_does_not_know() -> None:
    model = copy.copy(saved("llama"))
    model.tensors = {**model.tensors, "model.mystery": torch.zeros(7), "model.embed_tokens.weight": torch.zeros(99, 32)}
    found = inspect_model(Headers(model))
    assert found.unrecognised == ("model.mystery",) and 0.9 < found.coverage_tensors < 1
    assert any("vocab_size 96" in note and "99 rows" in note for note in found.notes)
    assert "model.mystery" in found.to_text()
