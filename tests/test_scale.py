"""What keeps plans of many tensors cheap must not change them."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from conftest import Llama

import yeam
from yeam.api import _planned
from yeam.errors import CheckpointError
from yeam.planning.collector import uncollected

Recipe = Callable[..., Path]


def test_models_of_one_kind_are_described_once(llama: Llama, recipe: Recipe) -> None:
    """Another name or dtype in the config is no other anatomy; other heads, other tensors or another order are."""
    kin = [llama("a"), llama("b", config={"_name_or_path": "b", "torch_dtype": "float16"})]
    others = [llama("c", config={"num_attention_heads": 4}), llama("d", shards=2)]
    with _planned(yeam.load_recipe(recipe(*kin, *others)), None, False) as pipeline:
        a, b, c, d = (member.anatomy for member in pipeline.result.members)
    assert a is b and a is not c and a is not d
    assert a.traits == b.traits and {*a.tensors} == {*d.tensors}


def test_the_collector_is_as_it_was(llama: Llama, recipe: Recipe) -> None:
    assert gc.isenabled()
    with uncollected():
        assert not gc.isenabled()
        with uncollected():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(CheckpointError):
        yeam.plan(recipe(llama("a"), llama("b", layers=3)))
    assert gc.isenabled()


def test_a_plan_as_plain_types(llama: Llama, recipe: Recipe) -> None:
    """`to_dict` is what `asdict` and JSON make of a plan, and the hash tells plans apart."""
    plan = yeam.plan(
        recipe(llama("a"), llama("b"), merge_method="slerp", base_model=llama("a"), parameters={"t": [0, 1]})
    )
    assert plan.to_dict() == json.loads(json.dumps(asdict(plan)))
    job = plan.jobs[3]
    changed = replace(
        plan, jobs=(*plan.jobs[:3], replace(job, parameters={**job.parameters, "t": 0.123}), *plan.jobs[4:])
    )
    assert changed.hash() != plan.hash() == replace(plan, notes=("other",), allow_nan=True).hash()
