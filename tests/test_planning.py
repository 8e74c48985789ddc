"""Plans: which parameters, bases and dtypes a recipe comes to, from headers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import Llama
from plans import jobs, refuses, yaml

import yeam
from yeam.planning.jobs import Plan


def values(plan: Plan, parameter: str) -> dict[str, Any]:
    return {job.name: job.parameters[parameter] for job in plan.jobs}


def test_precedence_filters_and_gradients(tmp_path: Path, llama: Llama) -> None:
    """The model's own value before the top level's; filters by name and role; gradients over layers."""
    a, b = llama("a", layers=3), llama("b", layers=3)
    plan = yeam.plan(
        yaml(
            tmp_path,
            """
merge_method: linear
models:
  - model: $a
    parameters:
      weight:
        - filter: self_attn.q_proj
          value: [0, 1]
        - filter: role:embedding
          value: 9
  - model: $b
    parameters: {weight: [2, 4]}
parameters:
  normalize: [{filter: norm, value: false}]
  weight: [{filter: role:mlp, value: [10, 20, 40]}, {filter: "*", value: 7}]
""",
            a=a,
            b=b,
        )
    )
    weight, normalize = values(plan, "weight"), values(plan, "normalize")
    layer = "model.layers.{}.{}.weight".format
    assert weight["model.embed_tokens.weight"] == (9, 2)
    assert weight["lm_head.weight"] == weight["model.norm.weight"] == (7, 2)
    assert [weight[layer(i, "self_attn.q_proj")] for i in range(3)] == [(0, 2), (0.5, 3), (1, 4)]
    assert [weight[layer(i, "mlp.up_proj")] for i in range(3)] == [(10, 2), (20, 3), (40, 4)]
    assert weight[layer(1, "self_attn.k_proj")] == (7, 3)
    assert not normalize["model.norm.weight"] and not normalize[layer(0, "input_layernorm")]
    assert normalize["lm_head.weight"]


def test_precedence_of_slices_and_modules(tmp_path: Path, llama: Llama) -> None:
    """source > slice > module > top; filters of a source see its layer numbers; every slice has its own gradients."""
    a, b = llama("a", layers=3), llama("b", layers=3)
    plan = yeam.plan(
        yaml(
            tmp_path,
            """
merge_method: linear
modules:
  default:
    parameters: {weight: 3}
    slices:
      - sources:
          - {model: $a, layer_range: [0, 2], parameters: {weight: [{filter: layers.1., value: 5}]}}
          - {model: $b, layer_range: [1, 3], parameters: {weight: [{filter: layers.1., value: 6}]}}
        parameters: {weight: [{filter: mlp.down, value: [0, 1]}]}
      - sources:
          - {model: $a, layer_range: [2, 3]}
          - {model: $b, layer_range: [2, 3]}
        parameters: {weight: [1, 2]}
parameters: {weight: 99}
""",
            a=a,
            b=b,
        )
    )
    weight = values(plan, "weight")
    layer = "model.layers.{}.{}.weight".format
    assert [weight[layer(i, "self_attn.q_proj")] for i in range(3)] == [(3, 6), (5, 3), (2, 2)]
    assert [weight[layer(i, "mlp.down_proj")] for i in range(3)] == [(0, 6), (5, 1), (2, 2)]
    assert weight["model.embed_tokens.weight"] == (3, 3) and weight["lm_head.weight"] == (1, 1)


def test_base_models(tmp_path: Path, llama: Llama) -> None:
    """A listed base is no source, wherever it stands, and what it says has no effect; `linear` takes it for one."""
    base, a, b = llama("base"), llama("a"), llama("b")
    own = {"weight": [{"filter": "mlp", "value": 5}, {"value": 2}]}
    listed = [
        {"model": str(a)},
        {"model": str(base), "parameters": own},
        {"model": str(b), "parameters": {"weight": 3}},
    ]
    for models in (listed, [listed[0], listed[2]]):
        plan = yeam.plan({"merge_method": "yeam", "base_model": str(base), "models": models})
        names = [model.label.rpartition("/")[2] for model in plan.models]
        for job in plan.jobs:
            assert job.base is not None and names[job.base.model] == "base"
            assert [names[source.model] for source in job.sources] == ["a", "b"]
            assert job.parameters["weight"] == (1, 3)
    common = {"merge_method": "linear", "base_model": str(base), "parameters": {"weight": 1}}
    for models, count in ((listed, 3), ([listed[0], listed[2]], 2)):
        plan = yeam.plan({**common, "models": models})
        assert all(job.base is None and len(job.sources) == count for job in plan.jobs)
        assert plan.models[plan.donor].label.endswith("base")


def test_bases_of_slices(llama: Llama) -> None:
    """A slice's base before the recipe's; a base among the sources gives its layers there, others are a source."""
    base, other, a = llama("base", layers=3), llama("other", layers=3), llama("a", layers=3)

    def source(model: Path, first: int) -> dict[str, Any]:
        return {"model": str(model), "layer_range": [first, first + 1]}

    slices = [
        {"sources": [source(a, 0)]},
        {"sources": [source(a, 1)], "base_model": str(other)},
        {"sources": [source(a, 2), source(base, 0), source(base, 1)]},
    ]
    plan = yeam.plan({"merge_method": "yeam", "base_model": str(base), "slices": slices})

    def inputs(layer: int) -> list[str]:
        job = jobs(plan)[f"model.layers.{layer}.mlp.up_proj.weight"]
        return [f"{Path(plan.models[i.model].reference).name} {i.tensor.split('.')[2]}" for i in job.inputs]

    assert [inputs(i) for i in range(3)] == [["a 0", "base 0"], ["a 1", "other 1"], ["a 2", "base 1", "base 0"]]
    alone = yeam.plan({"merge_method": "yeam", "slices": slices[1:2]})  # the slice's own base is enough
    assert all(job.base is not None for job in alone.jobs)


def test_dtypes(llama: Llama) -> None:
    """dtype is both; out_dtype is the file's; without them the first model's; exact works in the storage dtype."""
    a, b = llama("a", dtype=torch.bfloat16), llama("b", dtype=torch.float32)
    common = {"merge_method": "linear", "models": [{"model": str(a)}, {"model": str(b)}], "parameters": {"weight": 1}}
    expected = [
        ({}, "BF16", "F32", "bfloat16"),
        ({"dtype": "float16"}, "F16", "F32", "float16"),
        ({"dtype": "float32", "out_dtype": "bfloat16"}, "BF16", "F32", "bfloat16"),
        ({"out_dtype": "torch.float16"}, "F16", "F32", "float16"),
        ({"math": "exact"}, "BF16", "BF16", "bfloat16"),
        ({"math": "exact", "dtype": "float16", "out_dtype": "float32"}, "F32", "F16", "float32"),
        ({"models": common["models"][::-1]}, "F32", "F32", "float32"),
    ]
    for keys, dtype, work, stated in expected:
        plan = yeam.plan({**common, **keys})
        assert {(job.dtype, job.work) for job in plan.jobs} == {(dtype, work)}, keys
        assert plan.config is not None and plan.config["dtype"] == stated and "torch_dtype" not in plan.config
    refuses({**common, "math": "exact", "dtype": "float8_e4m3fn"}, "no arithmetic")
    noted = yeam.plan({"merge_method": "yeam", "models": common["models"], "math": "exact"})
    assert any("changes nothing" in note for note in noted.notes)
    # the sources decide, not a base that only donates its config
    donor = yeam.plan({**common, "models": common["models"][1:], "base_model": str(a)})
    assert donor.config is not None and donor.config["dtype"] == "float32"


def test_wrong_parameters(tmp_path: Path, llama: Llama) -> None:
    """Each error has its line and what to do."""
    a, b = llama("a"), llama("b")

    def config(tail: str, method: str = "linear") -> Path:
        text = f"merge_method: {method}\nmodels:\n- model: $a\n- model: $b\n{tail}"
        return yaml(tmp_path, text, a=a, b=b)

    refuses(config("parameters:\n  tt: 0.5"), "recipe.yaml:6", "no parameter 'tt'", "normalize, weight")
    refuses(config("parameters:\n  weigth: 0.5"), "did you mean 'weight'")
    refuses(config("parameters:\n  density: 0.5\n  int8_mask: true", "yeam"), "no parameter 'density'")
    refuses(config(""), "needs 'weight'", str(a))
    refuses(config("parameters:\n  weight: 1\n  normalize: maybe"), "recipe.yaml:7", "normalize")
    refuses(config("parameters:\n  softness: -1", "yeam"), "recipe.yaml:6", "greater than 0")
    refuses(config("parameters:\n  frames: [16, 20]", "yeam"), "not usable", "256")
    refuses(config("parameters:\n  weight: nan"), "recipe.yaml:6", "'nan' is not usable: input should be a finite")
    refuses(config("parameters:\n  weight: [{filter: mlpx, value: 1}, {value: 2}]"), "'mlpx' matches no", "'mlp'")
    refuses(
        config("parameters:\n  weight: [{filter: 'role:atention', value: 1}, {value: 2}]"), "unknown role", "attention"
    )
    refuses(config("parameters: {weight: 1}\nbase_model: $a\ndtype: float99"), "float99")
    refuses(config("", "passthrough"), "takes 1 model", "there are 2")
    refuses(config("", "slerpp"), "recipe.yaml:1", "unknown merge method")
    refuses(config("parameters: {weight: 1}\ntokenizer: {source: union}"), "recipe.yaml:6", "vocabulary")
    text = "merge_method: yeam\nmodels:\n- model: $a\n  parameters:\n    softness: 2"
    refuses(yaml(tmp_path, text, a=a), "recipe.yaml:5", "not a per-model parameter")
    only = {"merge_method": "yeam", "base_model": str(a), "models": [{"model": str(a)}]}
    refuses(only, "1 or more models beside the base", "there are 0")
