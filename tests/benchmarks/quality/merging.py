"""Merges in memory: the plan and the engine of `yeam.merge`, with fp32 tensors in place of a folder."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quality.rivals import Rival
from yeam.engine.held import Held
from yeam.engine.memory import default_budget, held_already
from yeam.engine.run import run
from yeam.planning.stages import Pipeline
from yeam.recipe import load_recipe

NO_BASE = ("linear", "karcher")  # methods that do not take a base model


def recipe(rival: Rival, parameters: dict[str, Any], base: Path, sources: list[Path]) -> dict[str, Any]:
    """The recipe of one merge at strength 1, in the schema that `yeam merge` reads; its result is stored in fp32."""
    models = [
        {"model": str(source), "parameters": {"weight": 1.0}} if rival.weights else {"model": str(source)}
        for source in sources
    ]
    found: dict[str, Any] = {"merge_method": rival.method, "models": models, "dtype": "float32"}
    if parameters:
        found["parameters"] = dict(parameters)
    if rival.method not in NO_BASE:
        found["base_model"] = str(base)
    if rival.method == "pcb":
        found.setdefault("parameters", {})["lambda"] = 1.0
    return found


def merged(config: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a merge by name."""
    with closing(Pipeline(load_recipe(config))) as pipeline:
        if len(pipeline.stages) != 1:
            raise ValueError("a benchmark's recipe has one stage")
        stage = pipeline.stages[0]
        held = Held()
        held.begin(stage.plan)
        memory = default_budget() + held_already()  # the family's models are in memory too
        run(stage.plan, stage.members.checkpoints, held, device=torch.device("cpu"), memory=memory)
    return held.tensors
